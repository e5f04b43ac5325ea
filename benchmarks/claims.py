"""The paper's claims as paired experiments: `python -m benchmarks claims [--ground world|real|llm] [--plan]`.

An arm (arms.py) is a few options of run_train.py or a change of the data. A claim compares two arms on the same seeds.
Its result is the difference by seed: mean, 95 % interval (bootstrap) and verdict:

    as expected     the difference is not zero and has the expected sign
    opposite        it is not zero and has the other sign
    inconclusive    it may be zero, or there are fewer than three seeds

For "not zero" Student's interval must exclude zero as well, because the bootstrap is too narrow for few seeds: without
an effect it excludes zero in a quarter of all cases with three seeds, in a tenth with ten.

    world    the sample world, held-out nDCG@10 x 100; a randomly initialised model (tiny)
    real     five files of soft labels and ten tasks (mean of mteb's main scores x 100) in the folder LG_ANNA_DATA; a
             randomly initialised model (configs/small.json)
    llm      the same data, texts cut to 48 tokens, the larger tasks reduced (experiment_scores.py); SmolLM2-135M with
             LoRA

Each row is cached in benchmarks/results/claims under a hash of arm, setting, seed, code and data, so that an
interrupted study continues; what has run is reported. --device cuda trains a larger model (configs/medium.json) for
more steps in the first two and writes its own tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.arms import ARMS, TEACHER, arms_on, trained_alike
from benchmarks.claims_report import write_overview, write_report
from benchmarks.experiment import Setting, row_path, run_arms
from benchmarks.experiment_data import RESULTS, ROOT, code_hash, prepare_mining
from ref.utils.environment import environment_info, utc_now
from ref.utils.files import read_json

MODEL = {"world": "tiny", "real": "configs/small.json", "llm": "checkpoints/smollm2"}
STEPS, GPU_STEPS = {"world": 400, "real": 400, "llm": 100}, {"world": 3000, "real": 10_000, "llm": 2000}
GPU_MODEL = {"world": "configs/medium.json", "real": "configs/medium.json", "llm": MODEL["llm"]}
SEEDS = {"world": 10, "real": 3, "llm": 3}
QUICK_STEPS = 10
# on one thread of a server's CPU, for --plan: of a training step, and of the evaluation of a run
SECONDS = {"world": (0.1, 0.0), "real": (0.3, 0.0), "llm": (11.0, 660.0)}


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ground", choices=tuple(MODEL), default="world", help="data and kind of model (default: world)")
    add("--seeds", type=int, help=f"(default: {SEEDS})")
    add("--steps", type=int, help=f"of each run (default: {STEPS}; on a GPU {GPU_STEPS})")
    add("--model", help=f"(default: {MODEL}; on a GPU {GPU_MODEL})")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--only", nargs="+", metavar="ARM", choices=list(ARMS), help="run these arms, and those that are trained alike")
    add("--workers", type=int, choices=range(1, 65), default=min(4, os.cpu_count() or 1), metavar="N",
        help="parallel runs, one thread each (default: %(default)s)")
    add("--plan", action="store_true", help="print what is missing and how long it takes; run nothing")
    add("--quick", action="store_true", help="one seed, ten steps, to test the code")
    add("--table", action="store_true", help="regenerate table and figure from the stored rows")
    add("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)  # a run in its own process
    return parser


@mock.patch("ref.utils.device.bfloat16_rate", new=mock.Mock(return_value=1.0))  # float32 on any CPU, as stored rows
def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print and write the tables. Returns 1 if a run failed."""
    parser = argument_parser()
    given = parser.parse_args(arguments)
    gpu, ground = given.device == "cuda", given.ground
    usual = Setting(ground, STEPS[ground], MODEL[ground])
    steps = QUICK_STEPS if given.quick else given.steps or (GPU_STEPS if gpu else STEPS)[ground]
    setting = Setting(ground, steps, given.model or (GPU_MODEL if gpu else MODEL)[ground], given.device)
    if given.one:
        run_and_store(setting, given.one[0], int(given.one[1]))
        return 0
    name = ground if setting == usual else "-".join(
        map(str, (ground, Path(setting.model).stem, setting.steps, setting.device)))
    stored = RESULTS / f"{name}.json"
    if given.table:
        if not stored.exists():
            parser.error(f"--table: {stored} does not exist; run the study first")
        write_report(name, read_json(stored))
        print(write_overview())
        return 0
    num_seeds = 1 if given.quick else given.seeds or SEEDS[ground]
    if unknown := set(given.only or []) - set(arms_on(ground)):
        parser.error(f"--only: {sorted(unknown)[0]!r} is no arm of --ground {ground}")
    arms = [arm for arm in arms_on(ground) if not given.only or arm in given.only]
    rows = stored_rows(stored)
    known_seeds = max([num_seeds, *(row["seed"] + 1 for row in rows)])  # rows of further seeds stay in the study
    paths = {(arm, seed): row_path(setting, ARMS[arm], seed) for seed in range(known_seeds) for arm in arms_on(ground)}
    if ground == "llm":
        arms, paths = [*arms, TEACHER], {**paths, (TEACHER, 0): row_path(setting, ARMS[TEACHER], 0)}
    restore_rows(rows, paths)
    missing = one_per_training([(arm, seed) for (arm, seed), path in paths.items()
                                if arm in arms and seed < num_seeds and not path.exists()])
    per_step_s, per_run_s = SECONDS[ground]
    steps = sum(ARMS[arm].steps for arm, _ in missing) * setting.steps
    hours = (steps * per_step_s + len(missing) * per_run_s) / given.workers / 3600
    duration = f"about {hours:.1f} hours" if setting.model == usual.model and not gpu else "duration unknown"
    print(f"{len(arms)} arms x {num_seeds} seeds, missing: {len(missing)} runs of {setting.steps} steps, {duration}, "
          f"{given.workers} in parallel", flush=True)
    return 0 if given.plan else run_study(name, setting, missing, paths, given.workers)


def stored_rows(stored: Path) -> list[dict[str, Any]]:
    """The rows of a stored study, none if there is no such file."""
    return list(read_json(stored)["rows"]) if stored.exists() else []


def restore_rows(rows: Sequence[dict[str, Any]], paths: dict[tuple[str, int], Path]) -> None:
    """Write the files of rows again that a stored study has: the study continues in another clone."""
    for row in rows:
        path = paths.get((row["arm"], row["seed"]))
        if path is not None and path.stem == row.get("key") and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row) + "\n")


def one_per_training(items: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The first of the arms and seeds that are trained alike; its run writes the rows of the others."""
    first: dict[tuple[str, int], tuple[str, int]] = {}
    for arm, seed in items:
        first.setdefault((trained_alike(arm)[0], seed), (arm, seed))
    return list(first.values())


def run_study(
    name: str, setting: Setting, missing: Sequence[tuple[str, int]], paths: dict[tuple[str, int], Path], workers: int,
) -> int:
    """Run the missing rows, then report all that exist; returns 1 if a run failed."""
    if any(ARMS[arm].change.startswith("mined") for arm, _ in missing):
        prepare_mining(setting.ground)
    failed = run_missing(setting, missing, paths, workers)
    rows = [{**json.loads(path.read_text()), "arm": arm, "code": code_hash(), "key": path.stem}
            for (arm, _), path in paths.items() if path.exists()]
    study = {"date": utc_now(), **environment_info(), "ground": setting.ground, "steps": setting.steps, "rows": rows}
    stored = RESULTS / f"{name}.json"
    num_stored = len(stored_rows(stored))
    write = bool(rows) and len(rows) >= num_stored and setting.steps > QUICK_STEPS
    write_report(name, study, write=write)
    if write:
        print(write_overview())
    else:
        print(f"not written: {len(rows)} rows of {setting.steps} steps; {num_stored} are stored")
    return int(failed)


def run_missing(
    setting: Setting, missing: Sequence[tuple[str, int]], paths: dict[tuple[str, int], Path], workers: int,
) -> bool:
    """Run each row in its own process; returns whether one failed, or wrote no row for the present code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start_s = time.perf_counter()

    def run(item: tuple[str, int]) -> bool:
        call = [sys.executable, "-m", "benchmarks.claims", "--ground", setting.ground, "--steps", str(setting.steps),
                "--model", setting.model, "--device", setting.device, "--one", item[0], str(item[1])]
        done = subprocess.run(call, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        succeeded = done.returncode == 0 and paths[item].exists()
        if not succeeded:
            print(done.stdout[-2000:], flush=True)
        return succeeded

    failed = False
    with ThreadPoolExecutor(workers) as pool:
        for number, (item, succeeded) in enumerate(zip(missing, pool.map(run, missing), strict=True), start=1):
            failed |= not succeeded
            minutes = (time.perf_counter() - start_s) / number * (len(missing) - number) / 60
            print(f"{number} of {len(missing)}: {item[0]}, seed {item[1]}{'' if succeeded else ' FAILED'}; "
                  f"{minutes:.0f} minutes left", flush=True)
    return failed


def run_and_store(setting: Setting, arm: str, seed: int) -> None:
    """Run one arm with one seed and write its row, and those of the arms that are trained alike."""
    names = [name for name in trained_alike(arm) if name in (arm, *arms_on(setting.ground))]
    paths = [row_path(setting, ARMS[name], seed) for name in names]  # before the run: the hash of the code that runs
    rows = run_arms(setting, [ARMS[name] for name in names], seed)
    versions = environment_info()["versions"]
    for name, path, row in zip(names, paths, rows, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arm": name, **row, "versions": versions}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
