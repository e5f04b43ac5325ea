"""What instructions and soft labels are worth in the sample world.

    python -m benchmarks.world [--seeds 5] [--steps N]

Each arm is the README's training command with one thing off, on the same seeds:

    full              the default
    no soft labels    --soft-weight 0: the contrastive term alone
    no instructions   every task has the same instruction, in training and in the held-out queries

Prints held-out nDCG@10 by arm and the paired cost with its 95 % interval (bootstrap over seeds, 10,000 draws), and
writes the rows to benchmarks/results/world.json. The world shows the mechanism; it is no evidence for the method.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import run_train

ROOT = Path(__file__).parent.parent
ARMS = {"full": [], "no soft labels": ["--soft-weight", "0"], "no instructions": []}


def without_instructions(data: Path, folder: Path) -> Path:
    """A copy of the sample data in which all tasks say the same."""
    same = "Find islanders."
    rows = [{**json.loads(line), "prompt": same} for line in (data / "soft_labels.jsonl").read_text().splitlines()]
    (folder / "soft_labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(data / "held_out", folder / "held_out")
    for task in folder.glob("held_out/*/task.json"):
        task.write_text(json.dumps({**json.loads(task.read_text()), "instruction": same}))
    return folder


def train(data: Path, seed: int, options: list[str]) -> tuple[float, float]:
    """Held-out nDCG@10 before and after one run."""
    with tempfile.TemporaryDirectory() as output:
        folder = Path(output) / "run"
        arguments = ["--data", str(data / "soft_labels.jsonl"), "--model", "tiny", "--seed", str(seed)]
        if run_train.main([*arguments, "--output", str(folder), *options]):
            raise SystemExit("a run failed")
        run = json.loads((folder / "run.json").read_text())
        return run["held_out_before"], run["held_out_after"]


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap."""
    draw = np.random.default_rng(0).choice(differences, (10_000, len(differences)))
    low, high = np.quantile(draw.mean(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Train every arm on every seed, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the preset's)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/world.json", help="where the rows go")
    arguments = parser.parse_args()
    steps = [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bare = without_instructions(ROOT / "data", Path(scratch))
        for seed in seeds:
            for arm, options in ARMS.items():
                before, after = train(bare if arm == "no instructions" else ROOT / "data", seed, [*options, *steps])
                rows.append({"arm": arm, "seed": seed, "before": before, "after": after})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Mean by arm, and what each costs against the full one."""
    after = {arm: [row["after"] for row in rows if row["arm"] == arm] for arm in ARMS}
    print(f"\n{'arm':<18}{'nDCG@10':>9}{'cost':>8}  95 % interval, n = {len(after['full'])} seeds")
    for arm, scores in after.items():
        cost = [full - score for full, score in zip(after["full"], scores, strict=True)]
        low, high = interval(cost)
        rest = "" if arm == "full" else f"{np.mean(cost):>8.3f}  {low:.3f} to {high:.3f}"
        print(f"{arm:<18}{np.mean(scores):>9.3f}{rest}")


if __name__ == "__main__":
    main()
