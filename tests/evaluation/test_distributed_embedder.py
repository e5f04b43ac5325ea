"""One embedder on several processes: the same vectors, the same table, an error on one rank."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import exit_codes, start_ranks
from sample_sets import world
from tiny_mteb import sentence

import run_eval
from ref.embedder import Embedder
from ref.utils.dedup import first_occurrence

__all__ = ["world"]  # a fixture
ROOT = Path(__file__).parents[2]

WORKER = """
import json, sys
from pathlib import Path
import mteb
import numpy as np
import torch
from ref.embedder import Embedder
from ref.evaluation.distributed_embedder import DistributedEmbedder
from ref.utils.distributed import Distributed
texts = json.loads(open(sys.argv[2]).read())
distributed = Distributed()
sharded = DistributedEmbedder(Embedder.from_pretrained(sys.argv[1], device="cpu"), distributed)
if distributed.rank:
    sharded.worker_loop()
else:
    np.save(sys.argv[3], sharded.encode(texts, instruction="Find it."))
    np.save(sys.argv[4], sharded.encode(texts[:1]))
    sharded.shutdown()
distributed.close()
assert not any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))  # no thread is left
"""


def run_ranks(count: int, arguments: list[Any]) -> None:
    """Processes as torchrun starts them."""
    assert exit_codes(start_ranks(count, arguments)) == [0] * count


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_the_same_vectors_in_the_same_order(count: int, tiny_run: Path, tmp_path: Path) -> None:
    texts = [sentence(n % 31) + " more" * (n % 5) for n in range(100)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run_ranks(count, ["-c", WORKER, tiny_run, tmp_path / "texts.json", tmp_path / "all.npy", tmp_path / "one.npy"])
    embedder = Embedder.from_pretrained(tiny_run, device="cpu")
    found = np.load(tmp_path / "all.npy")
    assert np.abs(found - embedder.encode(texts, instruction="Find it.")).max() <= 1e-6
    assert (found == found[first_occurrence(texts)]).all()
    assert np.abs(np.load(tmp_path / "one.npy") - embedder.encode(texts[:1])).max() <= 1e-6


def main_scores(output: Path) -> dict[str, float]:
    """Task name to main score, from mteb's result files."""
    return {path.stem: json.loads(path.read_text())["scores"]["test"][0]["main_score"]
            for path in output.rglob("*-local-data/*.json") if path.name != "model_meta.json"}


def test_the_command_on_two_processes_has_the_same_scores(world: Path, tiny_run: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_run), "--data-dir", str(world), "--tasks", "BIOSSES,MyRetrieval", "--output"]
    assert run_eval.main([*options, str(tmp_path / "alone")]) == 0
    run_ranks(2, [ROOT / "run_eval.py", *options, tmp_path / "both"])
    alone, both = main_scores(tmp_path / "alone"), main_scores(tmp_path / "both")
    assert alone.keys() == both.keys() == {"BIOSSES", "MyRetrieval"}
    for name in alone:
        assert alone[name] == pytest.approx(both[name], abs=2e-2)  # rounding orders texts with nearly equal vectors


BROKEN = WORKER.replace("distributed = Distributed()", """
distributed = Distributed()
original = Embedder.encode
def encode(self, texts, **options):
    if distributed.rank == int(sys.argv[5]) and len(texts) > 1:
        raise {"MemoryError": MemoryError, "OutOfMemoryError": torch.cuda.OutOfMemoryError}[sys.argv[6]]("too much")
    return original(self, texts, **options)
Embedder.encode = encode
""").replace("    np.save(sys.argv[3], sharded.encode(texts, instruction=\"Find it.\"))", """
    try:
        sharded.encode(texts, instruction="Find it.")
        raise SystemExit(9)
    except RuntimeError as error:
        assert f"rank {sys.argv[5]}: {sys.argv[6]}: too much" in str(error), error
        assert isinstance(error, torch.cuda.OutOfMemoryError) == (sys.argv[6] == "OutOfMemoryError")
""")


@pytest.mark.parametrize(("rank", "kind"), [(0, "MemoryError"), (1, "MemoryError"), (1, "OutOfMemoryError")])
def test_an_error_on_one_rank_fails_one_call(rank: int, kind: str, tiny_run: Path, tmp_path: Path) -> None:
    """The next call works again, on all ranks. Memory of a GPU is an error of its own, which ends the command."""
    (tmp_path / "texts.json").write_text(json.dumps([sentence(n) for n in range(10)]))
    run_ranks(2, ["-c", BROKEN, tiny_run, tmp_path / "texts.json", tmp_path / "x", tmp_path / "one.npy", rank, kind])
    assert np.load(tmp_path / "one.npy").shape == (1, 32)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_others(dead: int, world: Path, tiny_run: Path, tmp_path: Path) -> None:
    """With the exit code of run_train.py, not as a task that failed."""
    code = ("import os, sys, run_eval; from ref.embedder import Embedder as E; encode = E.encode\n"
            "def die(self, *given, **options):\n"
            f"    if os.environ['RANK'] == '{dead}': os._exit(9)\n"
            "    return encode(self, *given, **options)\n"
            "E.encode = die; sys.exit(run_eval.main(sys.argv[1:]))")
    ranks = start_ranks(2, ["-c", code, "--model", tiny_run, "--data-dir", world, "--tasks", "BIOSSES,MyRetrieval",
                            "--output", tmp_path / "out"])
    assert exit_codes(ranks) == ([9, 4] if dead == 0 else [4, 9])
    other = ranks[1 - dead]
    assert f"noticed by rank {1 - dead}" in other.stderr and "Traceback" not in other.stderr
