"""Make public_scores.csv, a line a model, from a long table of public scores.

    python -m leaderboard.make_public_scores SCORES.csv

SCORES.csv: model,task,score with scores in percent, empty where there is none. Categories and registered models
are mteb's. A file whose rounding would change a model's points is not written.
"""

import argparse
import csv
import io
from collections.abc import Container, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mteb.models.model_implementations import MODEL_REGISTRY

from leaderboard.compare import BENCHMARK, DECIMALS, PUBLIC_SCORES, borda_points, checked_score
from ref.runs import write_whole
from scoring.tasks import benchmark_tasks

SOURCE = ("github.com/embeddings-benchmark/results at commit f4cc6c8b365a3c779dbc708d6affe0b0355b2ddf, 2026-08-20, "
          "CC0-1.0")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", metavar="SCORES.csv", type=Path)
    parser.add_argument("--output", metavar="FILE", type=Path, default=PUBLIC_SCORES, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    categories = {name: str(task.metadata.type) for name, task in benchmark_tasks().items()}
    text = wide(read_long(args.scores), categories, registered=MODEL_REGISTRY)
    write_whole(args.output, lambda draft: draft.write_text(text, encoding="utf-8"))


def read_long(path: Path) -> dict[str, dict[str, float]]:
    """Model -> task -> score, as given. Raises: ValueError with the line for what is no score, or comes twice."""
    table: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                model, task, score = row["model"], row["task"], row["score"]
                if task in table.setdefault(model, {}):
                    raise ValueError(f"{task} of {model} comes twice.")
                table[model][task] = checked_score(task, float(score)) if score else np.nan
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path.name} line {number}: {error} Expected: model,task,score. Mend it.") from None
    return table


def wide(table: dict[str, dict[str, float]], categories: dict[str, str], registered: Container[str]) -> str:
    """The file's text: tasks by category and name, models by name; scores rounded to DECIMALS.

    registered: a container of model names. Raises: ValueError if tasks are not the benchmark's, or if rounding
    changes points.
    """
    tasks = sorted(categories, key=lambda name: (categories[name], name))
    models = sorted(model for model, row in table.items() if not np.isnan(list(row.values())).all())
    for model in models:
        if set(table[model]) - set(tasks):
            raise ValueError(f"{model}: {sorted(set(table[model]) - set(tasks))}. Expected: tasks of {BENCHMARK}. "
                             "Take them out.")
    given_MN = np.array([[table[model].get(task, np.nan) for task in tasks] for model in models])
    score_MN = given_MN.round(DECIMALS)
    if not np.array_equal(borda_points(given_MN), borda_points(score_MN)):
        raise ValueError(f"{DECIMALS} decimals change the points of a model. Expected: the same. Raise DECIMALS.")
    text = io.StringIO()
    text.write(f"# {BENCHMARK}: main score of each task in percent, empty where there is none; registered: 1 if mteb "
               f"{version('mteb')} knows the model.\n# Source: {SOURCE}\n")
    write = csv.writer(text, lineterminator="\n").writerow
    write(["model", "registered", *tasks])
    write(["category", "", *(categories[task] for task in tasks)])
    for model, row in zip(models, score_MN.tolist(), strict=True):
        write([model, int(model in registered), *map(decimal, row)])
    return text.getvalue()


def decimal(score: float) -> str:
    """The score with as many decimals as it needs; empty if it is NaN."""
    return "" if np.isnan(score) else f"{score:.{DECIMALS}f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
