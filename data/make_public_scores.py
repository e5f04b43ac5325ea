"""Write ref/evaluation/report/public_scores.csv, one line per model, from a long table of public scores.

    python data/make_public_scores.py SCORES.csv

SCORES.csv has the columns model,task,score with scores in percent, empty where there is none. Categories of the tasks
and the registered models come from mteb. Nothing is written if rounding would change the Borda points of a model.
"""

import argparse
import csv
import io
import sys
from collections.abc import Container, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mteb.models.model_implementations import MODEL_REGISTRY

from ref.evaluation.report.leaderboard import BENCHMARK, DECIMALS, PUBLIC_SCORES, borda_points, check_score
from ref.evaluation.tasks import benchmark_tasks
from ref.utils.files import atomic_write

SOURCE = ("github.com/embeddings-benchmark/results at commit f4cc6c8b365a3c779dbc708d6affe0b0355b2ddf, 2026-08-20, "
          "CC0-1.0")
COLUMNS = ["model", "task", "score"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", metavar="SCORES.csv", type=Path)
    parser.add_argument("--output", metavar="FILE", type=Path, default=PUBLIC_SCORES, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    categories = {name: str(task.metadata.type) for name, task in benchmark_tasks().items()}
    try:
        text = format_table(read_scores(args.scores), categories, registered=MODEL_REGISTRY)
        atomic_write(args.output, lambda draft: draft.write_text(text, encoding="utf-8"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Read model -> task -> score. Raises ValueError with the line for an invalid score or a repeated task."""
    scores: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not set(COLUMNS) <= set(reader.fieldnames):
            raise ValueError(f"{path.name}:1: must have the columns {','.join(COLUMNS)} (got {reader.fieldnames})")
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            model, task, score = (row[column] for column in COLUMNS)
            if model is None or task is None or score is None:
                raise ValueError(f"{where}: must have {len(COLUMNS)} entries")
            if task in scores.setdefault(model, {}):
                raise ValueError(f"{where}: task {task!r:.80} of {model!r:.80} must occur once")
            try:
                scores[model][task] = check_score(task, float(score)) if score else np.nan
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    return scores


def format_table(scores: dict[str, dict[str, float]], categories: dict[str, str], registered: Container[str]) -> str:
    """Return the file's text: tasks by category and name, models by name, scores rounded to DECIMALS.

    registered: names of the models in mteb's registry. Raises ValueError for a task outside the benchmark, or if
    rounding changes the points.
    """
    tasks = sorted(categories, key=lambda name: (categories[name], name))
    models = sorted(model for model, row in scores.items() if not np.isnan(list(row.values())).all())
    for model in models:
        unknown = sorted(set(scores[model]) - set(tasks))
        if unknown:
            raise ValueError(f"tasks of {model!r:.80} must be tasks of {BENCHMARK} (got {', '.join(unknown):.200})")
    exact_ME = np.array([[scores[model].get(task, np.nan) for task in tasks] for model in models])
    score_ME = exact_ME.round(DECIMALS)
    if not np.array_equal(borda_points(exact_ME), borda_points(score_ME)):
        raise ValueError(f"rounding to {DECIMALS} decimals must not change the Borda points of a model; increase "
                         "DECIMALS in ref/evaluation/report/leaderboard.py")
    text = io.StringIO()
    text.write(f"# {BENCHMARK}: main score of each task in percent, empty where there is none; registered: 1 if mteb "
               f"{version('mteb')} knows the model.\n# Source: {SOURCE}\n")
    write = csv.writer(text, lineterminator="\n").writerow
    write(["model", "registered", *tasks])
    write(["category", "", *(categories[task] for task in tasks)])
    for model, row in zip(models, score_ME.tolist(), strict=True):
        write([model, int(model in registered), *map(format_score, row)])
    return text.getvalue()


def format_score(score: float) -> str:
    """Format a score with as many decimals as it needs; NaN is empty."""
    return "" if np.isnan(score) else f"{score:.{DECIMALS}f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    raise SystemExit(main())
