"""What each mining rule drops and what that is worth, in the sample world, where the truth is known.

    python -m benchmarks.mining_world [--seeds 5] [--steps N] [--retriever RUN]

The world's raw pairs name three of eight passages that are right: the other five are false negatives, planted among the
candidates. A retriever (by default one trained on the sample's own soft labels, as the README does) labels the pairs
through run_label.py once for each rule. Then

    removed    the share of the false negatives among a query's candidates that the rule leaves out
    kept       the share of the true negatives among them that it leaves in
    nDCG@10    held-out score of a fresh model trained on what the rule gave, by seed, with the paired difference to
               the 95 % rule and its 95 % interval (bootstrap)

Writes benchmarks/results/mining_world.json and docs/mining.svg: one query, its candidates by score, and where each rule
puts its bar. The world shows the mechanism; it is no evidence for the method.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import run_label
import run_train
from benchmarks.world import interval, train
from ref.mining import RULES, bar

ROOT = Path(__file__).parent.parent
ARMS = {"percentage": ["--rule", "percentage"], "margin": ["--rule", "margin"], "absolute": ["--rule", "absolute"],
        "none": ["--rule", "none"], "percentage 0.8": ["--rule", "percentage", "--value", "0.8"]}


def raw_pairs(folder: Path, retriever: Path) -> list[str]:
    """run_label.py's options for the raw pairs of a folder, with its cache there too."""
    return ["--pairs", str(folder / "pairs.jsonl"), "--corpus", str(folder / "corpus.jsonl"),
            "--retriever", str(retriever), "--cache", str(folder / "cache")]


def label(given: list[str], output: Path) -> list[dict[str, Any]]:
    """Lines that run_label.py writes, with these options."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_label.main([*given, "--output", str(output)])
    if code:
        raise SystemExit("labelling failed")
    return read_lines(output)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def shares(
    rows: list[dict[str, Any]], everything: list[dict[str, Any]], right: list[set[str]], arm: str,
) -> dict[str, Any]:
    """Of the candidates (`everything`: what the rule `none` keeps): false negatives removed, true ones kept."""
    rule, value = arm.split()[0], RULES[arm.split()[0]] if " " not in arm else float(arm.split()[1])
    false = removed = true = kept = wrong = 0
    for row, full, good in zip(rows, everything, right, strict=True):
        limit = bar(rule, value, row["pos_scores"])
        for text, score in zip(full["neg"], full["neg_scores"], strict=True):
            below = score < limit
            false, removed = false + (text in good), removed + (text in good and not below)
            true, kept = true + (text not in good), kept + (text not in good and below)
        wrong += sum(text in good for text in row["neg"])
    return {"false negatives removed": removed / false, "true negatives kept": kept / true,
            "false negatives a query among the chosen": wrong / len(rows),
            "negatives a query": float(np.mean([len(row["neg"]) for row in rows]))}


def draw(full: dict[str, Any], good: set[str], path: Path) -> None:
    """One query: candidates by score, and the bar of each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    positive = min(full["pos_scores"])
    for height, rule in enumerate(reversed(RULES)):
        limit = bar(rule, RULES[rule], full["pos_scores"])
        for text, score in zip(full["neg"], full["neg_scores"], strict=True):
            color = "#cc3311" if text in good else "#4477aa"
            axes.plot(score, height, "o", color=color, markersize=6, fillstyle="full" if score < limit else "none")
        if limit < 1.5:
            axes.plot([limit, limit], [height - 0.35, height + 0.35], color="black", linewidth=1.5)
    axes.axvline(positive, color="gray", linestyle=":", linewidth=1)
    axes.annotate("lowest positive", (positive, len(RULES) - 0.45), ha="center", fontsize=8, color="gray")
    names = [rule if rule == "none" else f"{rule} {RULES[rule]:g}" for rule in reversed(RULES)]
    axes.set_yticks(range(len(RULES)), names)
    axes.set(xlabel="teacher's score", ylim=(-0.6, len(RULES) - 0.2),
             title=f"“{full['query']}” {full['prompt']}\nred: right but not marked; blue: wrong; hollow: left out")
    axes.title.set_fontsize(9)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Label by every rule, train on every seed, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each rule (default: 5)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the preset's)")
    parser.add_argument("--retriever", type=Path, help="a run (default: one is trained first)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mining_world.json")
    given = parser.parse_args()
    steps = [] if given.steps is None else ["--steps", str(given.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", scratch], check=True)
        retriever = given.retriever or folder / "retriever"
        sample = str(ROOT / "data/soft_labels.jsonl")
        if given.retriever is None and run_train.main(
                ["--model", "tiny", "--data", sample, "--output", str(retriever), *steps]):
            raise SystemExit("training the retriever failed")
        corpus = {row["id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open())}
        right = [{corpus[name] for name, grade in row["grades"].items() if grade == 2}
                 for row in map(json.loads, (folder / "truth.jsonl").open())]
        given_pairs = raw_pairs(folder, retriever)
        everything = label([*given_pairs, "--rule", "none", "--negatives", "1000"], folder / "all.jsonl")
        result: dict[str, Any] = {}
        for arm, options in ARMS.items():
            data = folder / arm.replace(" ", "-")
            data.mkdir()
            (data / "held_out").symlink_to(ROOT / "data/held_out")
            rows = label([*given_pairs, *options], data / "soft_labels.jsonl")
            result[arm] = shares(rows, everything, right, arm) | {"nDCG@10": []}
        n = max(range(200), key=lambda n: sum(text in right[n] for text in everything[n]["neg"]))
        draw(everything[n], right[n], ROOT / "docs/mining.svg")
        for seed in range(given.seeds):
            for arm in ARMS:
                after = train(folder / arm.replace(" ", "-"), seed, steps)[1]
                result[arm]["nDCG@10"].append(after)
                print(f"seed {seed}, {arm}: {after:.3f}", flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'rule':<16}{'removed':>9}{'kept':>7}{'false a query':>15}{'nDCG@10':>9}  minus percentage, "
          f"n = {given.seeds}")
    for arm, found in result.items():
        gain = [a - b for a, b in zip(found["nDCG@10"], result["percentage"]["nDCG@10"], strict=True)]
        low, high = interval(gain) if gain else (0.0, 0.0)
        print(f"{arm:<16}{found['false negatives removed']:>9.1%}{found['true negatives kept']:>7.1%}"
              f"{found['false negatives a query among the chosen']:>15.2f}{np.mean(found['nDCG@10'] or [0]):>9.3f}"
              f"  {np.mean(gain or [0]):+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    main()
