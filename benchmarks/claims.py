"""The report's claims, each as a paired experiment: `python -m benchmarks claims [--plan] [--quick] [--ground real]`.

One experiment is one line of ARMS: options of run_train.py over the same functions that users call, and for some a
change of the data (experiment.py). Each arm runs on the same seeds as the arm it is held against; what counts is the
difference seed by seed, its mean and its 95 % interval (bootstrap). Then one of three words:

    reproduced        the difference is not zero, and has the expected sign
    not reproduced    it is not zero, and has the other sign
    cannot tell       it may be zero, or there are fewer than three seeds

"Not zero" asks more than the bootstrap, which is too sure of few seeds (without any effect it leaves out zero in a
quarter of all cases for three seeds, in a tenth for ten): Student's interval for as many pairs must leave it out too.

Grounds: `world`, the sample world (held-out nDCG@10 x 100), and `real`, five real files of soft labels and ten real
sets (mean of mteb's main scores x 100; the folder is LG_ANNA_DATA). Rows are kept in benchmarks/results/claims by
line, setting, seed and a hash of the code, so that a stopped study goes on and a changed line runs alone. With
--device cuda a larger model (configs/medium.json) learns for longer, on either ground, with tables of its own.
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

from benchmarks.experiment import RESULTS, ROOT, Arm, Setting, code_hash, prepare_mining, row_path, run_one
from benchmarks.world import interval

MODEL = {"world": "tiny", "real": "configs/small.json"}
LARGER = "configs/medium.json"
STEPS = {"world": 400, "real": 400}
STEPS_LARGER = {"world": 3000, "real": 10_000}
SEEDS = {"world": 10, "real": 3}
SECONDS_A_STEP = {"world": 0.1, "real": 0.3}  # one thread of a server's CPU, for --plan

ARMS = {
    "full": Arm(),
    "hard labels": Arm(("--soft-weight", "0")),
    "soft labels alone": Arm(("--hard-weight", "0")),
    "teacher temperature 0.016": Arm(("--teacher-temperature", "0.016")),
    "teacher temperature 0.16": Arm(("--teacher-temperature", "0.16")),
    "no instructions": Arm(data="same instruction"),
    "shuffled instructions": Arm(data="shuffled instructions"),
    "examples 0 to 5": Arm(("--max-examples", "5")),
    "examples 0 to 5, 2 shown": Arm(("--max-examples", "5"), shown=2),
    "examples 0 to 5, 5 shown": Arm(("--max-examples", "5"), shown=5),
    "fixed examples": Arm(("--max-examples", "5"), data="fixed examples"),
    "no false-negative margin": Arm(("--false-negative-margin", "none")),
    "16 queries": Arm(("--queries", "16", "--queries-symmetric", "16")),
    "256 queries": Arm(("--queries", "256", "--queries-symmetric", "256", "--chunk-tokens", "8192")),
    "mined, percentage 0.95": Arm(data="mined percentage 0.95"),
    "mined, margin 0.05": Arm(data="mined margin 0.05"),
    "mined, absolute 0.7": Arm(data="mined absolute 0.7"),
    "mined, none": Arm(data="mined none 0"),
    "mined, random": Arm(data="mined random 0"),
}


@dataclass(frozen=True)
class Claim:
    """`arm` against `other`. `expected`: the sign, with the report's size in points where there is one, or whose it is.

    `on`: one set, in place of the mean over all.
    """

    text: str
    arm: str
    other: str
    expected: str
    on: str = ""

    @property
    def sign(self) -> int:
        """1 where `arm` should do better."""
        return -1 if self.expected.startswith("-") else 1


MINED = "MedQuADRetrieval"  # the one of the ten sets that looks like the pairs that are mined

CLAIMS = [
    Claim("soft labels beside hard ones", "full", "hard labels", "+0.63"),
    Claim("both terms against soft labels alone", "full", "soft labels alone", "+ (its method)"),
    Claim("teacher temperature 0.05 against 0.016", "full", "teacher temperature 0.016", "+ (our default)"),
    Claim("teacher temperature 0.05 against 0.16", "full", "teacher temperature 0.16", "+ (our default)"),
    Claim("instructions on against off", "full", "no instructions", "+ (its method)"),
    Claim("the right instructions against shuffled ones", "full", "shuffled instructions", "+ (its method)"),
    Claim("examples in training, scored without, against none", "examples 0 to 5", "full", "+ (its method)"),
    Claim("2 examples at scoring time against none", "examples 0 to 5, 2 shown", "examples 0 to 5", "-1.02"),
    Claim("5 examples at scoring time against none", "examples 0 to 5, 5 shown", "examples 0 to 5", "- (as for 2)"),
    Claim("fixed examples against drawn ones, scored without", "fixed examples", "examples 0 to 5",
          "-3.17 (BGE-EN-ICL)"),
    Claim("false negatives masked by a margin against not", "full", "no false-negative margin", "+ (our default)"),
    Claim("64 queries a batch against 16, equal steps", "full", "16 queries", "+ (it has 512)"),
    Claim("256 queries a batch against 64, equal steps", "256 queries", "full", "+ (it has 512)"),
    Claim("mining at 0.95 against no rule", "mined, percentage 0.95", "mined, none", "+0.39 (other sampling)"),
    Claim("mining at 0.95 against a margin", "mined, percentage 0.95", "mined, margin 0.05", "+ (its method)"),
    Claim("mining at 0.95 against an absolute bar", "mined, percentage 0.95", "mined, absolute 0.7", "+ (its method)"),
    Claim("mining at 0.95 against random negatives", "mined, percentage 0.95", "mined, random", "+ (its method)"),
]
CLAIMS += [replace(claim, text=f"{claim.text}, {MINED}", expected="+ (its method)", on=MINED)
           for claim in CLAIMS if claim.arm.startswith("mined")]


# ------------------------------------------------------------------------------------------------- the study

def student(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of normal numbers; without bounds for fewer than two."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return -np.inf, np.inf
    half = t.ppf(0.975, count - 1) * float(np.std(differences, ddof=1)) / count**0.5
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def verdict(low: float, high: float, sign: int) -> str:
    """One of the three words."""
    if low <= 0 <= high:
        return "cannot tell"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def table(rows: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each claim whose arms have run on all seeds."""
    def score(arm: str, seed: int, on: str) -> float | None:
        row = rows.get((arm, seed), {"sets": {}})
        return row["sets"].get(on) if on else row.get("score")

    found = []
    for claim in CLAIMS:
        pairs = [(score(claim.arm, seed, claim.on), score(claim.other, seed, claim.on)) for seed in seeds]
        if not pairs or any(a is None or b is None for a, b in pairs):
            continue
        gain = [a - b for a, b in pairs if a is not None and b is not None]
        low, high = interval(gain)
        sure_low, sure_high = student(gain)
        found.append({"claim": claim.text, "difference": float(np.mean(gain)), "low": low, "high": high,
                      "seeds": len(gain), "expected": claim.expected,
                      "student": [sure_low, sure_high] if len(gain) > 1 else None,
                      "verdict": verdict(min(low, sure_low), max(high, sure_high), claim.sign) if len(gain) > 2
                      else "cannot tell",
                      "mean": float(np.mean([a for a, _ in pairs if a is not None]))})
    return found


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table for README and docs/evidence.md."""
    lines = ["| claim | difference, 95 % interval | n | the report | |", "|---|---|---|---|---|"]
    lines += [f"| {r['claim']} | {r['difference']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f}) | {r['seeds']} | "
              f"{r['expected']} | {r['verdict']} |" for r in found]
    return "\n".join(lines)


def draw(name: str, found: list[dict[str, Any]], path: Path) -> str:
    """Differences with their intervals as a picture; returns what was written, or why nothing was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed (pip install -e .[plots])"
    figure = Figure(figsize=(9, 0.36 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {"reproduced": "#228833", "not reproduced": "#cc3311", "cannot tell": "#888888"}
    for place, row in enumerate(found):
        middle = row["difference"]
        axes.errorbar(middle, place, xerr=[[middle - row["low"]], [row["high"] - middle]], fmt="o",
                      color=colors[row["verdict"]], capsize=3)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(found)), [row["claim"] for row in found])
    axes.invert_yaxis()
    axes.set(xlabel=f"points, {name} (green: reproduced, red: not reproduced, gray: cannot tell)")
    figure.savefig(path, metadata={"Date": None})
    return f"picture: {path}"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table; where nothing is missing, write table, picture and rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ground", choices=("world", "real"), default="world")
    parser.add_argument("--seeds", type=int, help="(default: 10 in the world, 3 on real data)")
    parser.add_argument("--steps", type=int, help="of each run (default: 400; on a GPU 3,000 and 10,000)")
    parser.add_argument("--model", help=f"(default: tiny in the world, configs/small.json; on a GPU {LARGER})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=list(ARMS), help="these arms: the table is printed")
    parser.add_argument("--workers", type=int, choices=range(1, 65), default=min(4, os.cpu_count() or 1), metavar="N",
                        help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="say what is missing and how long it takes, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, ten steps: shows that it runs")
    parser.add_argument("--table", action="store_true", help="table and picture from the rows already written")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    larger = given.device == "cuda"
    usual = Setting(given.ground, STEPS[given.ground], MODEL[given.ground])
    steps = (STEPS_LARGER if larger else STEPS)[given.ground]
    setting = Setting(given.ground, 10 if given.quick else given.steps or steps,
                      given.model or (LARGER if larger else usual.model), given.device)
    if given.one:
        name, seed = given.one[0], int(given.one[1])
        path = row_path(setting, ARMS[name], seed)  # before the run: of the code that it runs
        row = {"arm": name, **run_one(setting, ARMS[name], seed)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
        return 0
    files = given.ground if setting == usual else "-".join(
        map(str, (given.ground, Path(setting.model).stem, setting.steps, setting.device)))
    if given.table:
        if not (RESULTS / f"{files}.json").exists():
            parser.error(f"there is no {RESULTS / files}.json yet: run the study first.")
        return report(files, json.loads((RESULTS / f"{files}.json").read_text()))
    seeds = range(1 if given.quick else given.seeds or SEEDS[given.ground])
    arms = [name for name in ARMS if not given.only or name in given.only]
    paths = {(name, seed): row_path(setting, arm, seed) for seed in seeds for name, arm in ARMS.items()}
    left = [item for item, path in paths.items() if item[0] in arms and not path.exists()]
    hours = len(left) * setting.steps * SECONDS_A_STEP[given.ground] / given.workers / 3600
    guess = "measured as it goes" if setting.model != usual.model or larger else f"about {hours:.1f} hours"
    print(f"{len(arms)} arms x {len(seeds)} seeds, {len(left)} runs of {setting.steps} steps missing: {guess}, "
          f"{given.workers} at a time", flush=True)
    if given.plan:
        return 0
    if any(ARMS[arm].data.startswith("mined") for arm, _ in left):
        prepare_mining(given.ground)
    failed = study(setting, left, paths, given.workers)
    from ref.runs import machine, now

    rows = [{**json.loads(path.read_text()), "arm": name, "code": code_hash()} for (name, _), path in paths.items()
            if path.exists()]
    about = {"date": now(), **machine(), "ground": given.ground, "steps": setting.steps, "rows": rows}
    whole = len(rows) == len(paths) and len(seeds) >= SEEDS[given.ground]
    report(files, about, write=whole)
    if not whole:
        print("not written: that takes all arms, and as many seeds as by default")
    return failed


def study(setting: Setting, left: Sequence[tuple[str, int]], paths: dict[tuple[str, int], Path], workers: int) -> int:
    """Run the missing rows, each in a process of its own; 1 if one failed, or left no row for the code as it is now."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started_s = time.perf_counter()

    def one(item: tuple[str, int]) -> bool:
        call = [sys.executable, "-m", "benchmarks.claims", "--ground", setting.ground, "--steps", str(setting.steps),
                "--model", setting.model, "--device", setting.device, "--one", item[0], str(item[1])]
        ended = subprocess.run(call, cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # mteb and `datasets` say much
        fine = ended.returncode == 0 and paths[item].exists()
        if not fine:
            print(ended.stdout[-2000:], flush=True)
        return fine

    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for number, fine in enumerate(pool.map(one, left), start=1):
            failed += not fine
            minutes = (time.perf_counter() - started_s) / number * (len(left) - number) / 60
            print(f"{number} of {len(left)}: {left[number - 1][0]}, seed {left[number - 1][1]}"
                  f"{'' if fine else ' FAILED'}; left {minutes:.0f} minutes", flush=True)
    return 1 if failed else 0


def report(files: str, about: dict[str, Any], *, write: bool = True) -> int:
    """Print the table; write it with the picture and the rows under that name."""
    rows = {(row["arm"], row["seed"]): row for row in about["rows"]}
    found = table(rows, sorted({seed for _, seed in rows}))
    print("\n" + as_markdown(found))
    if write:
        about = {**{key: value for key, value in about.items() if key != "rows"}, "claims": found,
                 "rows": about["rows"]}
        (RESULTS / f"{files}.json").write_text(json.dumps(about, indent=1) + "\n")
        (RESULTS / f"{files}.md").write_text(as_markdown(found) + "\n")
        print(draw(files, found, RESULTS / f"{files}.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
