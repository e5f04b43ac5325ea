"""What each mining rule rejects, and what it is worth, in the sample world, where the true labels are known.

    python -m benchmarks.mining_world [--seeds 5] [--steps N] [--retriever RUN]

The world's raw pairs mark three of the eight relevant passages of a query; the other five are false negatives among its
candidates. A retriever (by default trained on the sample's soft labels, as in the README) labels the pairs through
run_label.py, once per rule. Reported by rule:

    removed    share of the false negatives among the candidates that the rule rejects
    kept       share of the true negatives among the candidates that it keeps
    nDCG@10    held-out score of a randomly initialised model trained on the labels, by seed, and its paired difference
               to the rule "percentage" with the 95 % interval (bootstrap)

Writes benchmarks/results/mining_world.json and docs/mining.svg: the candidates of one query by score, with each rule's
threshold. The sample world shows the mechanism; it is no evidence for the method.
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
from benchmarks.world import bootstrap_interval, train
from ref.mining.rules import RULES, threshold
from ref.utils.files import read_jsonl

ROOT = Path(__file__).parent.parent
ARMS = {"percentage": ["--rule", "percentage"], "margin": ["--rule", "margin"], "absolute": ["--rule", "absolute"],
        "none": ["--rule", "none"], "percentage 0.8": ["--rule", "percentage", "--value", "0.8"]}
Lines = list[dict[str, Any]]


def pair_options(folder: Path, retriever: Path) -> list[str]:
    """Options of run_label.py for the raw pairs in `folder`, with the cache there too."""
    return ["--pairs", str(folder / "pairs.jsonl"), "--corpus", str(folder / "corpus.jsonl"),
            "--retriever", str(retriever), "--cache", str(folder / "cache")]


def label(options: list[str], output: Path) -> Lines:
    """Run run_label.py with these options and return the lines it writes."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_label.main([*options, "--output", str(output)])
    if code:
        raise SystemExit("run_label.py failed")
    return read_lines(output)


def read_lines(file: Path) -> Lines:
    """The objects of a JSONL file."""
    return [line.value for line in read_jsonl(file)]


def filter_shares(lines: Lines, all_candidates: Lines, relevant: list[set[str]], arm: str) -> dict[str, Any]:
    """False negatives removed and true negatives kept by an arm, of the candidates that the rule `none` keeps."""
    rule, value = arm.split()[0], RULES[arm.split()[0]] if " " not in arm else float(arm.split()[1])
    false = removed = true = kept = selected_false = 0
    for line, full, good in zip(lines, all_candidates, relevant, strict=True):
        limit = threshold(rule, value, line["pos_scores"])
        for text, score in zip(full["neg"], full["neg_scores"], strict=True):
            below = score < limit
            false, removed = false + (text in good), removed + (text in good and not below)
            true, kept = true + (text not in good), kept + (text not in good and below)
        selected_false += sum(text in good for text in line["neg"])
    return {"false_negatives_removed": removed / false, "true_negatives_kept": kept / true,
            "false_negatives_per_query": selected_false / len(lines),
            "negatives_per_query": float(np.mean([len(line["neg"]) for line in lines]))}


def plot_thresholds(full: dict[str, Any], good: set[str], path: Path) -> None:
    """One query: its candidates by score, one row per rule, with the rule's threshold."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    positive = min(full["pos_scores"])
    for height, rule in enumerate(reversed(RULES)):
        limit = threshold(rule, RULES[rule], full["pos_scores"])
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
             title=f"query: “{full['query']}”  instruction: “{full['prompt']}”\n"
                   "red: false negative, blue: true negative, hollow: rejected, black line: threshold of the rule")
    axes.title.set_fontsize(9)
    with rc_context({"svg.hashsalt": "mining"}):  # the same file for the same labels
        figure.savefig(path, metadata={"Date": None})


def train_retriever(folder: Path, steps: list[str]) -> Path:
    """Train the default retriever on the sample's soft labels."""
    if run_train.main(["--model", "tiny", "--data", str(ROOT / "data/soft_labels.jsonl"), "--output", str(folder),
                       *steps]):
        raise SystemExit("run_train.py failed on the retriever")
    return folder


def label_by_all_rules(folder: Path, retriever: Path) -> dict[str, Any]:
    """Write the labels of each arm to folder/ARM, draw docs/mining.svg, and return the shares by arm."""
    corpus = {passage["id"]: passage["text"] for passage in read_lines(folder / "corpus.jsonl")}
    relevant = [{corpus[name] for name, grade in query["grades"].items() if grade == 2}
                for query in read_lines(folder / "truth.jsonl")]
    options = pair_options(folder, retriever)
    all_candidates = label([*options, "--rule", "none", "--num-negatives", "1000"], folder / "all.jsonl")
    result: dict[str, Any] = {}
    for arm, rule in ARMS.items():
        data = folder / arm.replace(" ", "-")
        data.mkdir()
        (data / "held_out").symlink_to(ROOT / "data/held_out")
        lines = label([*options, *rule], data / "soft_labels.jsonl")
        result[arm] = filter_shares(lines, all_candidates, relevant, arm) | {"ndcg_at_10": []}
    n = max(range(200), key=lambda n: sum(text in relevant[n] for text in all_candidates[n]["neg"]))
    plot_thresholds(all_candidates[n], relevant[n], ROOT / "docs/mining.svg")
    return result


def main() -> None:
    """Label by every rule, train with every seed, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per rule (default: 5); 0: label and draw only")
    parser.add_argument("--steps", type=int, help="of each run (default: the preset's epochs)")
    parser.add_argument("--retriever", type=Path, help="a run (default: one is trained first)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mining_world.json")
    given = parser.parse_args()
    steps = [] if given.steps is None else ["--steps", str(given.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", scratch], check=True)
        result = label_by_all_rules(folder, given.retriever or train_retriever(folder / "retriever", steps))
        for seed in range(given.seeds):
            for arm in ARMS:
                after = train(folder / arm.replace(" ", "-"), seed, steps)[1]
                result[arm]["ndcg_at_10"].append(after)
                print(f"seed {seed}, {arm}: {after:.3f}", flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, given.seeds)


def print_table(result: dict[str, Any], seeds: int) -> None:
    """Print one line per rule."""
    print(f"\n{'rule':<16}{'removed':>9}{'kept':>7}{'false per query':>17}{'nDCG@10':>9}  minus percentage, "
          f"{seeds} seeds")
    for arm, found in result.items():
        gain = [a - b for a, b in zip(found["ndcg_at_10"], result["percentage"]["ndcg_at_10"], strict=True)]
        low, high = bootstrap_interval(gain) if gain else (0.0, 0.0)
        print(f"{arm:<16}{found['false_negatives_removed']:>9.1%}{found['true_negatives_kept']:>7.1%}"
              f"{found['false_negatives_per_query']:>17.2f}{np.mean(found['ndcg_at_10'] or [0]):>9.3f}"
              f"  {np.mean(gain or [0]):+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    main()
