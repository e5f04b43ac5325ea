"""Several ranks give the results of one: metrics, gradients, weights; and a run survives signals and killed ranks.

Moments are counted in steps and saves, never timed: DRIVER sends a signal to its own process at the chosen one.
"""

import json
import random
import re
import shutil
import signal
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, WORDS, draw_training_lines
from ranks import Rank, exit_codes, start_ranks

import run_train
from ref.utils import distributed as module
from ref.utils.device import LOCAL_RANK
from ref.utils.distributed import Distributed, RankFailure

ROOT = Path(__file__).parents[2]
BOUND = 1e-12  # the workers compute in fp64: fp32 rounds differently on each processor
INSTRUCTIONS = {"Boats": "Find a boat.", "Towers": "Find a tower with the same lamp."}


def training_lines(count: int = 32) -> list[dict]:
    return draw_training_lines(WORDS, INSTRUCTIONS, count)


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- one step -----------------------------------------------------------------------------------------------


def results(world_size: int, data: Path, *more: str) -> list:
    """What the first and the last rank find for all cases."""
    output = data.parent / f"ranks{world_size}{''.join(more)}"
    processes = start_ranks(world_size, ["tests/utils/distributed_worker.py", data, output, *more])
    assert exit_codes(processes) == [0] * world_size
    return [np.load(output.with_suffix(f".{rank}.npz")) for rank in dict.fromkeys((0, world_size - 1))]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Lines of two tasks, one with the instruction on both sides; duplicate texts, some lines without labels."""
    folder = tmp_path_factory.mktemp("distributed")
    lines = training_lines(40)
    for n, line in enumerate(lines):
        if line["task"] == "Towers":
            line["type"] = "symmetric_sts"
        if n % 5 == 0:
            line["neg"][0] = lines[(n + 2) % 40]["pos"][0]  # another query's positive
        if n % 7 == 0:
            line["neg"] = line["neg"][:1]
            line.update({"neg_scores": line["neg_scores"][:1]} if "neg_scores" in line else {})
        line["query"] += " more" * (n % 6 * 2)  # shards of very different length
    return write_lines(folder / "data.jsonl", lines)


@pytest.fixture(scope="module")
def alone(data):
    return results(1, data)[0]


def distance(ours: np.ndarray, truth: np.ndarray) -> float:
    """|ours - truth| / |truth|."""
    return np.linalg.norm(ours.astype(np.float64) - truth) / max(np.linalg.norm(truth.astype(np.float64)), 1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_several_ranks_give_the_results_of_one(world_size, data, alone):
    """Loss, both terms, counts and every gradient of two steps; first and last rank have equal weights."""
    first, last = results(world_size, data)
    assert set(first.files) == set(alone.files)
    for name in alone.files:
        assert (first[name] == last[name]).all(), name
        bound = 1e-6 if name.endswith("label_entropy") else BOUND  # labels are rounded to fp32 in any case
        if name.endswith("tokens"):
            assert first[name] >= alone[name], name  # each rank computes the shared prefix
        elif name.endswith("num_masked"):
            assert first[name] == alone[name], name
        elif "/gradient/" in name and np.linalg.norm(alone[name]) < BOUND:
            assert np.linalg.norm(first[name]) < 10 * BOUND, name
        else:
            assert distance(first[name], alone[name]) <= bound, (name, distance(first[name], alone[name]))


def test_control_averaged_gradients_are_noticed(data, alone):
    """Averaged over two ranks, as by the usual wrappers, gradients are half of what they should be."""
    first, _ = results(2, data, "averaged")
    name = next(name for name in alone.files if name.startswith("whole/0/gradient/layers.0.mlp"))
    assert distance(first[name], alone[name]) > 0.4


def test_shards():
    for world_size, count, bounds in ((1, 5, [0, 5]), (3, 7, [0, 3, 5, 7]), (4, 3, [0, 1, 2, 3, 3])):
        distributed = Distributed()
        distributed.world_size = world_size
        assert distributed.split_bounds(count) == bounds
    distributed.rank, distributed.world_size = 1, 3
    assert list(distributed.shard("abcdefg")) == ["b", "e"]


def test_one_process_needs_no_group():
    distributed, x_PD = Distributed(), torch.randn(3, 2)
    distributed.barrier()
    assert distributed.all_gather(x_PD, [3]) is x_PD
    distributed.all_reduce_([x_PD])
    distributed.close()
    assert (distributed.world_size, distributed.rank) == (1, 0)


# ---- the barrier, with a clock and a store of the test --------------------------------------------------------


class Rank1(Distributed):
    """Rank 1 of 2 without processes: its clock advances while it sleeps, and `each_sleep` plays rank 0."""

    def __init__(self, each_sleep, monkeypatch) -> None:
        super().__init__(timeout=timedelta(seconds=10))
        self.world_size, self.rank, self.barriers = 2, 1, 0
        self.now_s, self.values, self.store = 0.0, {"barrier/0": 0, "heartbeat/0": 0, "heartbeat/1": 0}, self
        self.each_sleep = each_sleep
        monkeypatch.setattr(module, "time", self)

    def set(self, key: str, value: str) -> None:
        self.values[key] = int(value)

    def multi_get(self, keys: list[str]) -> list[int]:
        return [self.values[key] for key in keys]

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.values["heartbeat/1"] += 1
        self.each_sleep(self)


def arrive_after(seconds: float, *, heartbeats: bool):
    """Rank 0 reaches the barrier at that time; before, it sends heartbeats or none."""
    def each_sleep(rank: Rank1) -> None:
        rank.values["heartbeat/0"] += heartbeats
        if rank.now_s >= seconds:
            rank.values["barrier/0"] = 1
    return each_sleep


def test_an_address_where_nobody_listens_is_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankFailure, match=r"^rank 1 of 2 cannot join the others at 127\.0\.0\.1:1 \([^\n]*\)$"):
        Distributed(timeout=timedelta(seconds=1))
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(RankFailure, match=r"at 127\.0\.0\.1:\(MASTER_PORT is not set\)"):
        Distributed(timeout=timedelta(seconds=1))


def test_a_barrier_waits_until_the_timeout(monkeypatch):
    Rank1(arrive_after(9.9, heartbeats=False), monkeypatch).barrier()
    rank = Rank1(arrive_after(1e9, heartbeats=True), monkeypatch)
    with pytest.raises(RankFailure, match=r"^rank 0 of 2 failed, noticed by rank 1 \(no response for 0:00:10\)$"):
        rank.barrier()
    assert 10 <= rank.now_s < 11


def test_a_barrier_waits_for_long_work_as_long_as_heartbeats_come(monkeypatch):
    """Before the first step and after a saved state: evaluation and large files take longer than a step."""
    rank = Rank1(arrive_after(100, heartbeats=True), monkeypatch)
    rank.barrier(while_alive=True)
    assert 100 <= rank.now_s < 101 + 3 * module.HEARTBEAT_S
    rank = Rank1(arrive_after(100, heartbeats=False), monkeypatch)
    with pytest.raises(RankFailure, match="^rank 0 of 2 failed"):
        rank.barrier(while_alive=True)
    assert rank.now_s < 20


def test_a_rank_that_arrives_while_heartbeats_are_compared_has_not_failed(monkeypatch):
    Rank1(arrive_after(11, heartbeats=False), monkeypatch).barrier(while_alive=True)


HEARTBEATS = """
import sys
from datetime import timedelta
from ref.utils.distributed import Distributed
distributed = Distributed(timeout=timedelta(seconds=250))
distributed.barrier()
other = 1 - distributed.rank
for _ in range(3):  # the thread of the other rank counts on while this one does nothing else
    before = int(distributed.store.get(f"heartbeat/{other}"))
    while int(distributed.store.get(f"heartbeat/{other}")) == before:
        pass
distributed.barrier(while_alive=True)
print("together")
distributed.close()
"""


def test_rank_0_does_not_end_while_another_rank_is_in_the_last_barrier(tmp_path):
    script = tmp_path / "late.py"
    script.write_text("""
import time
from ref.utils.distributed import Distributed
ours = Distributed()
read = ours._read
if ours.rank == 1:
    ours._read = lambda key: time.sleep(0.7) or read(key)
ours.barrier()
ours.close()
""")
    assert exit_codes(start_ranks(2, [script])) == [0, 0]


def test_heartbeats_are_sent():
    processes = start_ranks(2, ["-c", HEARTBEATS])
    assert exit_codes(processes) == [0, 0]
    assert [process.stdout for process in processes] == ["together\n"] * 2


# ---- whole runs ---------------------------------------------------------------------------------------------

STEPS = 22
DRIVER = """
import os, signal, sys, time
import run_train
from ref.training import run_dir, trainer
name, where, count, rank = sys.argv.pop(1).split(":")  # signal, moment, how often it comes, rank or "all"
places = {"prepare": (trainer.Trainer, "prepare"), "step": (trainer.Trainer, "step"),
          "update": (trainer.Trainer, "update"), "save": (run_dir, "save_file")}
place, function = places[where]
original, calls = getattr(place, function), 0
def call(*args, **options):
    global calls
    calls += 1
    result = original(*args, **options)
    if calls == int(count) and rank in ("all", os.environ["RANK"]):
        os.kill(os.getpid(), getattr(signal, name))
    return result
setattr(place, function, call)
save_result = run_train.save_result
def save_late(*args, **options):  # the other ranks have time to end before it
    time.sleep(0.5 if name == "SIGTERM" else 0)
    save_result(*args, **options)
run_train.save_result = save_late
sys.exit(run_train.main(sys.argv[1:]))
"""


def write_inputs(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({**SMALL.to_json(), "vocab_size": 300, "sliding_window": 16}))
    write_lines(folder / "some.jsonl", training_lines())
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_inputs(tmp_path)


def options(folder: Path, name: str, *more: object) -> list[str]:
    """The command line of a run of STEPS steps.

    Without the margin: rounding decides whether a cosine at the threshold is masked, and the loss jumps there.
    """
    return [str(x) for x in (
        "--data", folder / "some.jsonl", "--model", folder / "config.json", "--batch-size", 5, "--device", "cpu",
        "--learning-rate", "5e-3", "--max-text-tokens", 40, "--max-examples", 2, "--steps", STEPS,
        "--false-negative-margin", "none",
        "--save-steps", 3, "--output", folder / name, *more)]


def resume(folder: Path, name: str) -> list[str]:
    return ["--resume", "--output", str(folder / name)]


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """`uninterrupted(world_size)`: the folder of a complete run."""
    @cache
    def run(world_size: int) -> Path:
        folder = write_inputs(tmp_path_factory.mktemp("uninterrupted"))
        processes = start_ranks(world_size, ["run_train.py", *options(folder, "run")])
        assert exit_codes(processes) == [0] * world_size
        return folder / "run"
    return run


def start_and_signal(world_size: int, moment: str, arguments: list[str]) -> list[Rank]:
    """Start a run in which a signal arrives at a moment "SIGNAL:FUNCTION:COUNT:RANK" (see DRIVER)."""
    return start_ranks(world_size, ["-c", DRIVER, moment, *arguments])


def test_order_of_the_data_and_loss_do_not_depend_on_the_number_of_ranks(uninterrupted):
    one, two = (metrics(uninterrupted(world_size)) for world_size in (1, 2))
    assert [row["task"] for row in one] == [row["task"] for row in two] and len(one) == STEPS
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-3)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(("world_size", "rank"), [(1, "all"), (2, "all"), (2, "1")])
def test_sigterm_saves_and_ends_and_the_run_resumes_bit_for_bit(world_size, rank, folder, uninterrupted):
    """Also if only one rank receives the signal: all stop after the same step."""
    processes = start_and_signal(world_size, f"SIGTERM:update:5:{rank}", options(folder, "stopped"))
    assert processes[-1].wait() == 130
    assert (folder / "stopped/model").is_dir()  # torchrun ends all ranks when one of them has ended with 130
    assert exit_codes(processes) == [130] * world_size
    assert 5 <= len(metrics(folder / "stopped")) < 9
    resumed = start_ranks(world_size, ["run_train.py", *resume(folder, "stopped")])
    assert exit_codes(resumed) == [0] * world_size
    assert weights(folder / "stopped") == weights(uninterrupted(world_size))


def test_another_number_of_ranks_continues_up_to_rounding(folder, uninterrupted):
    processes = start_and_signal(2, "SIGTERM:update:4:all", options(folder, "changed"))
    assert exit_codes(processes) == [130, 130]
    assert run_train.main(resume(folder, "changed")) == 0
    one, other = metrics(uninterrupted(1)), metrics(folder / "changed")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=2e-3)


def test_a_killed_rank_ends_the_others_and_is_named(folder):
    processes = start_and_signal(3, "SIGKILL:step:4:1", options(folder, "dead", "--distributed-timeout", 10))
    assert exit_codes(processes) == [4, -signal.SIGKILL, 4]
    errors = [process.stderr for process in processes]
    assert "--resume continues from the last saved state" in errors[0]
    named = [re.search(r"error: rank ([\d, ]+) of 3 failed, noticed by rank", errors[n]) for n in (0, 2)]
    assert all(named), errors  # a rank that notices late may also name one that failed as a consequence
    assert any(found[1] == "1" for found in named if found), errors


def test_a_hanging_rank_ends_the_others_and_is_named(folder):
    processes = start_and_signal(2, "SIGSTOP:step:4:1", options(folder, "stuck", "--distributed-timeout", 10))
    try:
        assert processes[0].wait() == 4
        assert "error: rank 1 of 2 failed, noticed by rank 0" in processes[0].stderr
        assert processes[1].is_running
    finally:
        processes[1].kill()


def random_moment(world_size: int) -> str:
    """SIGKILL of a random rank before the first batch, in a step, after an update, or in the middle of a save."""
    where = random.choice(("prepare", "step", "update", "save"))
    count = random.randrange(1, 5 if where == "save" else 15)
    rank = 0 if where == "save" else random.randrange(world_size)  # the first rank saves
    return f"SIGKILL:{where}:{count}:{rank}"


@pytest.mark.parametrize(("world_size", "kills"), [(1, 3), (2, 2), pytest.param(1, 25, marks=pytest.mark.record),
                                                   pytest.param(2, 25, marks=pytest.mark.record)])
def test_killed_at_random_moments_the_weights_are_the_same(world_size, kills, folder, uninterrupted):
    survived = 0
    while survived < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        arguments = options(folder, "killed", "--distributed-timeout", 10)
        for _ in range(3):
            processes = start_and_signal(world_size, random_moment(world_size), arguments)
            survived += -signal.SIGKILL in exit_codes(processes)
            if (folder / "killed/run.json").exists():
                arguments = resume(folder, "killed")
                if survived >= kills or json.loads((folder / "killed/run.json").read_text())["complete"]:
                    break
        processes = start_ranks(world_size, ["run_train.py", *arguments])
        assert exit_codes(processes) == [0] * world_size
        assert weights(folder / "killed") == weights(uninterrupted(world_size))
        assert not list((folder / "killed").rglob("*.draft"))


def test_the_last_states_are_kept(folder):
    assert run_train.main(options(folder, "kept", "--save-total-limit", 3)) == 0
    kept = sorted(path.name for path in (folder / "kept/state").iterdir())
    assert kept == ["00000018", "00000021", "00000022"]


def test_minutes_need_a_single_process(folder):
    arguments = options(folder, "minutes")
    at = arguments.index("--steps")
    arguments[at : at + 2] = ["--minutes", "1"]
    processes = start_ranks(2, ["run_train.py", *arguments])
    assert exit_codes(processes) == [2, 2] and "--minutes is not supported" in processes[0].stderr


def test_two_ranks_score_during_training_and_extend_the_run(folder, uninterrupted):
    """Rank 0 scores, and the others wait; the weights are those of a run without. Then both go on with more steps."""
    held_out = folder / "sets/Set"
    held_out.mkdir(parents=True)
    (held_out / "task.json").write_text('{"class": "ArguAna", "instruction": "Find it."}')
    write_lines(held_out / "corpus.jsonl", [{"_id": word, "text": word} for word in WORDS])
    write_lines(held_out / "queries.jsonl", [{"_id": "q", "text": WORDS[0]}])
    write_lines(held_out / "qrels.jsonl", [{"query-id": "q", "corpus-id": WORDS[0], "score": 1}])
    scoring = ["--eval-data", folder / "sets", "--eval-steps", 8, "--keep-best"]
    processes = start_ranks(2, ["run_train.py", *options(folder, "run", *scoring)])
    assert exit_codes(processes) == [0, 0]
    scores, run = (json.loads((folder / "run" / name).read_text()) for name in ("held_out.json", "run.json"))
    assert list(scores) == ["8", "16", str(STEPS)] and run["result_step"] == int(max(scores, key=scores.__getitem__))
    losses = [[row["loss"] for row in metrics(path)] for path in (folder / "run", uninterrupted(2))]
    assert losses[0] == losses[1]
    more = [*resume(folder, "run"), "--steps", STEPS + 3]
    assert exit_codes(start_ranks(2, ["run_train.py", *more])) == [0, 0]
    assert [row["step"] for row in metrics(folder / "run")] == list(range(STEPS + 3))
    assert json.loads((folder / "run/run.json").read_text())["schedule_start"]["step"] == STEPS


def test_a_store_that_is_gone_is_a_rank_failure():
    """Rank 0, which holds it, has ended before this rank comes to a barrier."""
    def gone(*_):
        raise RuntimeError("Broken pipe")
    distributed = Distributed()
    distributed.world_size, distributed.rank, distributed.barriers = 2, 1, 0
    distributed.store = SimpleNamespace(set=gone)
    with pytest.raises(RankFailure, match=r"rank 0 of 2 failed, noticed by rank 1 \(Broken pipe\)"):
        distributed.barrier()


@pytest.mark.parametrize(("available", "local_rank", "chosen"), [(False, "0", []), (True, "3", [3]), (True, "4", [])])
def test_a_rank_takes_its_own_gpu_where_there_is_one(monkeypatch, available, local_rank, chosen):
    """A driver that is too old counts GPUs that cannot be used; a rank beyond their number may run on the CPU."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    Distributed()
    assert taken == chosen


@pytest.mark.parametrize("name", LOCAL_RANK)
def test_the_number_on_the_machine_is_the_launchers(monkeypatch, name):
    for other in LOCAL_RANK:
        monkeypatch.delenv(other, raising=False)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    Distributed()
    monkeypatch.setenv(name, "3")
    Distributed()
    assert taken == [3]


def test_processes_of_a_launcher_that_sets_no_world_size_are_refused(monkeypatch):
    """Slurm's srun would start separate runs."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match=r"^the launcher has started 8 processes: set RANK, .*WORLD_SIZE=1"):
        Distributed()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Distributed().world_size == 1


def test_a_mesh_that_cannot_connect_names_the_variable_of_the_interface(monkeypatch):
    def rendezvous(*_: object, **__: object):
        raise RuntimeError("Gloo connectFullMesh failed with …")
    monkeypatch.setattr("torch.distributed.rendezvous", rendezvous)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankFailure, match=r"connectFullMesh failed with …\); GLOO_SOCKET_IFNAME names the network"):
        Distributed()
