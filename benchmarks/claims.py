"""The report's claims as paired experiments: `python -m benchmarks claims [--ground world|real|llm] [--plan]`.

An arm is an entry of ARMS: options of run_train.py and, for some, a change of the data (experiment.py). A claim
compares two arms on the same seeds. Its result is the difference by seed: mean, 95 % interval (bootstrap) and verdict:

    reproduced        the difference is not zero and has the expected sign
    not reproduced    it is not zero and has the other sign
    inconclusive      it may be zero, or there are fewer than three seeds

For "not zero" Student's interval must exclude zero as well, because the bootstrap is too narrow for few seeds: without
an effect it excludes zero in a quarter of all cases with three seeds, in a tenth with ten.

    world    the sample world, held-out nDCG@10 x 100; a randomly initialised model (tiny)
    real     five files of soft labels and ten tasks (mean of mteb's main scores x 100) in the folder LG_ANNA_DATA; a
             randomly initialised model (configs/small.json)
    llm      the same data; SmolLM2-135M with LoRA

Each row is cached in benchmarks/results/claims under a hash of arm, setting, seed, code and data, so that an
interrupted study continues. --device cuda trains a larger model (configs/medium.json) for more steps in the first two
and writes its own tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import RESULTS, ROOT, Arm, Setting, code_hash, prepare_mining, row_path, run_arm
from benchmarks.world import bootstrap_interval
from ref.utils.environment import environment_info, utc_now
from ref.utils.files import read_json

MODEL = {"world": "tiny", "real": "configs/small.json", "llm": "checkpoints/smollm2"}
STEPS, GPU_STEPS = {"world": 400, "real": 400, "llm": 200}, {"world": 3000, "real": 10_000, "llm": 2000}
GPU_MODEL = {"world": "configs/medium.json", "real": "configs/medium.json", "llm": MODEL["llm"]}
SEEDS = {"world": 10, "real": 3, "llm": 3}
BATCH = {"world": 64, "real": 64, "llm": 32}  # queries of the preset
SECONDS_PER_STEP = {"world": 0.1, "real": 0.3, "llm": 25.0}  # on one thread of a server's CPU, for --plan
Rows = dict[tuple[str, int], dict[str, Any]]  # by arm and seed

ARMS = {
    "default": Arm(),
    "contrastive term only": Arm(("--soft-label-weight", "0")),
    "soft-label term only": Arm(("--contrastive-weight", "0")),
    "teacher temperature 0.016": Arm(("--teacher-temperature", "0.016")),
    "teacher temperature 0.16": Arm(("--teacher-temperature", "0.16")),
    "no instructions": Arm(change="same instruction"),
    "shuffled instructions": Arm(change="shuffled instructions"),
    "random examples": Arm(("--max-examples", "5")),
    "random examples, 2 at evaluation": Arm(("--max-examples", "5"), num_examples=2),
    "random examples, 5 at evaluation": Arm(("--max-examples", "5"), num_examples=5),
    "fixed examples": Arm(("--max-examples", "5"), change="fixed examples"),
    "no false-negative margin": Arm(("--false-negative-margin", "none")),
    "batch of 16": Arm(("--batch-size", "16", "--batch-size-symmetric", "16")),
    "batch of 256": Arm(("--batch-size", "256", "--batch-size-symmetric", "256", "--mini-batch-tokens", "8192")),
    "batch of 16, equal texts": Arm(("--batch-size", "16", "--batch-size-symmetric", "16"), steps=2.0),
    "batch of 256, equal texts": Arm(("--batch-size", "256", "--batch-size-symmetric", "256"), steps=1 / 8),
    "mined, percentage 0.95": Arm(change="mined percentage 0.95"),
    "mined, margin 0.05": Arm(change="mined margin 0.05"),
    "mined, absolute 0.7": Arm(change="mined absolute 0.7"),
    "mined, none": Arm(change="mined none 0"),
    "mined, random": Arm(change="mined random 0"),
}


@dataclass(frozen=True)
class Claim:
    """`arm` compared with `baseline`."""

    text: str
    arm: str
    baseline: str
    expected: str  # the sign, with the report's size in points if it gives one, or with the source of the expectation
    task: str = ""  # one task instead of the mean over all
    ground: str = ""  # only on this one

    @property
    def sign(self) -> int:
        """1 if `arm` is expected to be better, else -1."""
        return -1 if self.expected.startswith("-") else 1


MEDQUAD = "MedQuADRetrieval"  # the task whose texts resemble the pairs that are mined
METHOD, OURS = "+ (part of its method)", "+ (our default)"

CLAIMS = [
    Claim("soft labels added to hard labels", "default", "contrastive term only", "+0.63"),
    Claim("hard labels added to soft labels", "default", "soft-label term only", METHOD),
    Claim("teacher temperature 0.05 instead of 0.016", "default", "teacher temperature 0.016", OURS),
    Claim("teacher temperature 0.05 instead of 0.16", "default", "teacher temperature 0.16", OURS),
    Claim("with instructions instead of without", "default", "no instructions", METHOD),
    Claim("correct instead of shuffled instructions", "default", "shuffled instructions", METHOD),
    Claim("trained with 0 to 5 examples instead of none, evaluated with none", "random examples", "default", METHOD),
    Claim("trained with examples: evaluated with 2 instead of none", "random examples, 2 at evaluation",
          "random examples", "-1.02"),
    Claim("trained with examples: evaluated with 5 instead of none", "random examples, 5 at evaluation",
          "random examples", "- (as for 2)"),
    Claim("trained with fixed instead of random examples, evaluated with none", "fixed examples", "random examples",
          "-3.17 (BGE-EN-ICL)"),
    Claim("false negatives masked by a margin instead of not", "default", "no false-negative margin", OURS),
    Claim("{batch} queries per batch instead of 16, equal steps", "default", "batch of 16", "+ (it uses 512)"),
    Claim("256 queries per batch instead of {batch}, equal steps", "batch of 256", "default", "+ (it uses 512)"),
    Claim("{batch} queries per batch instead of 16, equal numbers of texts", "default", "batch of 16, equal texts",
          "+ (it uses 512)", ground="llm"),
    Claim("256 queries per batch instead of {batch}, equal numbers of texts", "batch of 256, equal texts", "default",
          "+ (it uses 512)", ground="llm"),
    Claim("mining by percentage 0.95 instead of no rule", "mined, percentage 0.95", "mined, none",
          "+0.39 (other sampling)"),
    Claim("mining by percentage 0.95 instead of margin 0.05", "mined, percentage 0.95", "mined, margin 0.05", METHOD),
    Claim("mining by percentage 0.95 instead of absolute 0.7", "mined, percentage 0.95", "mined, absolute 0.7", METHOD),
    Claim("mining by percentage 0.95 instead of random negatives", "mined, percentage 0.95", "mined, random", METHOD),
]
CLAIMS += [replace(claim, text=f"{claim.text}, {MEDQUAD}", expected=METHOD, task=MEDQUAD)
           for claim in CLAIMS if claim.arm.startswith("mined")]


def arms_on(ground: str) -> list[str]:
    """The arms of the claims that are tested on this ground."""
    used = {arm for claim in CLAIMS if claim.ground in ("", ground) for arm in (claim.arm, claim.baseline)}
    return [arm for arm in ARMS if arm in used]


# ---- statistics --------------------------------------------------------------------------------------------


def student_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; infinite for fewer than two differences."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return -np.inf, np.inf
    half = t.ppf(0.975, count - 1) * float(np.std(differences, ddof=1)) / count**0.5
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def verdict(low: float, high: float, sign: int) -> str:
    """The verdict for an interval and the expected sign."""
    if low <= 0 <= high:
        return "inconclusive"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def detectable_difference(scores: Sequence[float], seeds: int) -> float:
    """The difference that `seeds` paired runs detect in four of five studies, from a few runs of one arm.

    (t(0.975) + t(0.8)) x standard deviation of a difference / sqrt(seeds), with seeds - 1 degrees of freedom; the two
    arms of a pair are taken as independent.
    """
    from scipy.stats import t

    deviation = float(np.std(scores, ddof=1)) * 2**0.5
    return float(t.ppf(0.975, seeds - 1) + t.ppf(0.8, seeds - 1)) * deviation / seeds**0.5


def compare(rows: Rows, ground: str = "world") -> list[dict[str, Any]]:
    """The result of each claim, on the seeds with which both its arms have run."""
    def score(arm: str, seed: int, task: str) -> float | None:
        row = rows.get((arm, seed), {"task_scores": {}})
        return row["task_scores"].get(task) if task else row.get("score")

    results = []
    for claim in CLAIMS:
        scores = [(score(claim.arm, seed, claim.task), score(claim.baseline, seed, claim.task))
                  for seed in sorted({seed for _, seed in rows})]
        pairs = [(a, b) for a, b in scores if a is not None and b is not None]
        if not pairs or claim.ground not in ("", ground):
            continue
        gain = [a - b for a, b in pairs]
        (low, high), (wide_low, wide_high) = bootstrap_interval(gain), student_interval(gain)
        results.append({
            "claim": claim.text.format(batch=BATCH[ground]), "difference": float(np.mean(gain)), "low": low,
            "high": high, "seeds": len(gain),
            "expected": claim.expected, "student_interval": [wide_low, wide_high] if len(gain) > 1 else None,
            "verdict": verdict(min(low, wide_low), max(high, wide_high), claim.sign) if len(gain) > 2
            else "inconclusive",
            "mean": float(np.mean([a for a, _ in pairs]))})
    return results


# ---- report ------------------------------------------------------------------------------------------------


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of the README and of docs/evidence.md."""
    lines = ["| comparison | difference in points (95 % interval) | seeds | reported | verdict |",
             "|---|---|---|---|---|"]
    lines += [f"| {r['claim']} | {r['difference']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f}) | {r['seeds']} | "
              f"{r['expected']} | {r['verdict']} |" for r in results]
    return "\n".join(lines)


def plot_claims(name: str, results: list[dict[str, Any]], path: Path) -> str:
    """Draw the differences with their intervals; returns the path, or the reason if it cannot be drawn."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "figure not drawn: matplotlib is not installed (pip install -e .[plots])"
    figure = Figure(figsize=(10, 0.3 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {"reproduced": "#228833", "not reproduced": "#cc3311", "inconclusive": "#888888"}
    for place, row in enumerate(results):
        middle = row["difference"]
        axes.errorbar(middle, place, xerr=[[middle - row["low"]], [row["high"] - middle]], fmt="o",
                      color=colors[row["verdict"]], capsize=3)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(results)), [row["claim"] for row in results])
    axes.invert_yaxis()
    axes.set(xlabel=f"difference in points, {name}\ngreen: reproduced, red: not reproduced, gray: inconclusive")
    with rc_context({"svg.hashsalt": "claims"}):  # the same file for the same rows
        figure.savefig(path, metadata={"Date": None})
    return f"figure: {path}"


def write_report(name: str, study: dict[str, Any], *, write: bool = True) -> None:
    """Print the table; with `write` also write rows (.json), table (.md) and figure (.svg) under `name`."""
    rows = {(row["arm"], row["seed"]): row for row in study["rows"]}
    results = compare(rows, name.split("-")[0])
    print("\n" + as_markdown(results))
    default = [row["score"] for (arm, _), row in rows.items() if arm == "default"]
    if len(default) > 2:
        print("detectable differences, from the runs of the arm `default`: " + ", ".join(
            f"{detectable_difference(default, seeds):.2f} points with {seeds} seeds" for seeds in (3, 5, 10)))
    if write:
        study = {**{key: value for key, value in study.items() if key != "rows"}, "claims": results,
                 "rows": study["rows"]}
        (RESULTS / f"{name}.json").write_text(json.dumps(study, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(as_markdown(results) + "\n")
        print(plot_claims(name, results, RESULTS / f"{name}.svg"))


# ---- the study ---------------------------------------------------------------------------------------------


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
    add("--only", nargs="+", metavar="ARM", choices=list(ARMS), help="run these arms; the table is only printed")
    add("--workers", type=int, choices=range(1, 65), default=min(4, os.cpu_count() or 1), metavar="N",
        help="parallel runs, one thread each (default: %(default)s)")
    add("--plan", action="store_true", help="print what is missing and how long it takes; run nothing")
    add("--quick", action="store_true", help="one seed, ten steps, to test the code")
    add("--table", action="store_true", help="regenerate table and figure from the stored rows")
    add("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)  # a run in its own process
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the table; a complete study is also written. Returns 1 if a run failed."""
    parser = argument_parser()
    given = parser.parse_args(arguments)
    gpu, ground = given.device == "cuda", given.ground
    usual = Setting(ground, STEPS[ground], MODEL[ground])
    steps = given.steps or (GPU_STEPS if gpu else STEPS)[ground]
    setting = Setting(ground, 10 if given.quick else steps, given.model or (GPU_MODEL if gpu else MODEL)[ground],
                      given.device)
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
        return 0
    num_seeds = 1 if given.quick else given.seeds or SEEDS[ground]
    if unknown := set(given.only or []) - set(arms_on(ground)):
        parser.error(f"--only: {sorted(unknown)[0]!r} is no arm of --ground {ground}")
    arms = [arm for arm in arms_on(ground) if not given.only or arm in given.only]
    paths = {(arm, seed): row_path(setting, ARMS[arm], seed) for seed in range(num_seeds) for arm in arms_on(ground)}
    missing = [item for item, path in paths.items() if item[0] in arms and not path.exists()]
    steps = sum(ARMS[arm].steps for arm, _ in missing) * setting.steps
    hours = steps * SECONDS_PER_STEP[ground] / given.workers / 3600
    duration = f"about {hours:.1f} hours" if setting.model == usual.model and not gpu else "duration unknown"
    print(f"{len(arms)} arms x {num_seeds} seeds, missing: {len(missing)} runs of {setting.steps} steps, {duration}, "
          f"{given.workers} in parallel", flush=True)
    return 0 if given.plan else run_study(name, setting, missing, paths, given.workers)


def run_study(
    name: str, setting: Setting, missing: Sequence[tuple[str, int]], paths: dict[tuple[str, int], Path], workers: int,
) -> int:
    """Run the missing rows, then report all that exist; returns 1 if a run failed."""
    if any(ARMS[arm].change.startswith("mined") for arm, _ in missing):
        prepare_mining(setting.ground)
    failed = run_missing(setting, missing, paths, workers)
    rows = [{**json.loads(path.read_text()), "arm": arm, "code": code_hash()} for (arm, _), path in paths.items()
            if path.exists()]
    study = {"date": utc_now(), **environment_info(), "ground": setting.ground, "steps": setting.steps, "rows": rows}
    complete = len(rows) == len(paths) and len(paths) >= len(arms_on(setting.ground)) * SEEDS[setting.ground]
    write_report(name, study, write=complete)
    if not complete:
        print("not written: a complete study has all arms and at least the default number of seeds")
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
    """Run one arm with one seed and write its row."""
    path = row_path(setting, ARMS[arm], seed)  # before the run: the hash of the code that runs
    row = {"arm": arm, **run_arm(setting, ARMS[arm], seed)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
