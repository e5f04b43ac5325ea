"""The value of instructions and of soft labels in the sample world.

    python -m benchmarks.world [--seeds 5] [--steps N]

Each arm is the README's training command with one component removed, on the same seeds:

    default           nothing removed
    no soft labels    --soft-label-weight 0: the contrastive term alone
    no instructions   all tasks have the same instruction, in training and in the held-out queries

Prints held-out nDCG@10 by arm and the cost of each removal, paired by seed, with its 95 % interval (bootstrap, 10,000
samples), and writes the rows to benchmarks/results/world.json. The sample world shows the mechanism; it is no evidence
for the method.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import run_train
from ref.utils.files import read_json, read_jsonl

ROOT = Path(__file__).parent.parent
ARMS = {"default": [], "no soft labels": ["--soft-label-weight", "0"], "no instructions": []}


def copy_with_one_instruction(data: Path, folder: Path) -> Path:
    """A copy of the sample data in which all tasks have the same instruction."""
    same = "Find islanders."
    lines = [{**line.value, "prompt": same} for line in read_jsonl(data / "soft_labels.jsonl")]
    (folder / "soft_labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(data / "held_out", folder / "held_out")
    for task in folder.glob("held_out/*/task.json"):
        task.write_text(json.dumps({**read_json(task), "instruction": same}))
    return folder


def train(data: Path, seed: int, options: list[str]) -> tuple[float, float]:
    """Held-out nDCG@10 before and after one training run."""
    with tempfile.TemporaryDirectory() as output:
        folder = Path(output) / "run"
        arguments = ["--data", str(data / "soft_labels.jsonl"), "--model", "tiny", "--seed", str(seed)]
        if run_train.main([*arguments, "--output", str(folder), *options]):
            raise SystemExit("run_train.py failed")
        run = read_json(folder / "run.json")
        return run["eval_before"], run["eval_after"]


def bootstrap_interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap."""
    samples = np.random.default_rng(0).choice(differences, (10_000, len(differences)))
    low, high = np.quantile(samples.mean(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Train every arm with every seed, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--steps", type=int, help="of each run (default: the preset's epochs)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/world.json", help="file of the rows")
    given = parser.parse_args()
    steps = [] if given.steps is None else ["--steps", str(given.steps)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        one_instruction = copy_with_one_instruction(ROOT / "data", Path(scratch))
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for arm, options in ARMS.items():
                data = one_instruction if arm == "no instructions" else ROOT / "data"
                before, after = train(data, seed, [*options, *steps])
                rows.append({"arm": arm, "seed": seed, "before": before, "after": after})
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the mean of each arm and its cost relative to the default."""
    after = {arm: [row["after"] for row in rows if row["arm"] == arm] for arm in ARMS}
    print(f"\n{'arm':<18}{'nDCG@10':>9}{'cost':>8}  95 % interval, n = {len(after['default'])} seeds")
    for arm, scores in after.items():
        cost = [default - score for default, score in zip(after["default"], scores, strict=True)]
        low, high = bootstrap_interval(cost)
        rest = "" if arm == "default" else f"{np.mean(cost):>8.3f}  {low:.3f} to {high:.3f}"
        print(f"{arm:<18}{np.mean(scores):>9.3f}{rest}")


if __name__ == "__main__":
    main()
