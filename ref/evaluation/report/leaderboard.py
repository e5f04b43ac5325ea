"""Public scores on MTEB(eng, v2), and the rank of one more model among them by the leaderboard's rule.

    public = read_public_scores()
    comparison = compare(public, {"STS12": 76.1, "ArguAna": 83.2}, name="my-model")

Borda count: each model gets n - rank points in each task, n = number of models with at least one score. Models are
ranked by the sum of their points. A small table:

              A    B    C    D      points in A   B    C    D     sum   rank
    one      90   80    -   70                2  1.5   0    0    3.5     2
    two      80   80   60   75                1  1.5   2    1    5.5     1
    three    70    -   50   80                0   0    1    2    3.0     3

Shape suffixes: M models of the leaderboard, E evaluation tasks. Scores are in percent, NaN where there is none.
Source of the rule: mteb/benchmarks/_create_table.py, mteb 2.26.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BENCHMARK = "MTEB(eng, v2)"
PUBLIC_SCORES = Path(__file__).resolve().parent / "public_scores.csv"
# Digits kept in the public file: with fewer, different scores would tie. New scores are rounded alike, so that equal
# ones tie.
DECIMALS = 8


@dataclass(frozen=True)
class ScoreTable:
    """The scores of models on tasks."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    categories: tuple[str, ...]  # of each task
    registered_M: np.ndarray  # bool: in mteb's registry; other models count in the ranking, but are not listed
    score_ME: np.ndarray  # float64
    source: str = ""

    def row(self, model: str) -> int:
        """Return the row of a model. Raises ValueError if the table has no such model."""
        if model not in self.models:
            raise ValueError(f"model {model!r:.80} must be in the public table, with its name in mteb such as "
                             f"{self.models[0]!r}")
        return self.models.index(model)


# ---- the public file -----------------------------------------------------------------------------------------


def read_public_scores(path: Path = PUBLIC_SCORES) -> ScoreTable:
    """Read a table written by data/make_public_scores.py.

    The file has comment lines, a header (model, registered, tasks), a line of categories, and one line per model.
    Raises ValueError with the line for a malformed file, OSError if it cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    source = next((line[10:] for line in lines if line.startswith("# Source: ")), "")
    rows = ((f"{path.name}:{number}", next(csv.reader([line])))
            for number, line in enumerate(lines, 1) if line and line[0] != "#")
    try:
        return _parse_table(rows, path.name, source)
    except ValueError as error:
        raise ValueError(f"{error}; make the file again with data/make_public_scores.py") from None


def _parse_table(rows: Iterator[tuple[str, list[str]]], file: str, source: str) -> ScoreTable:
    _, header = next(rows, ("", []))
    where, categories = next(rows, ("", []))
    if header[:2] != ["model", "registered"] or len(header) < 3 or categories[:1] != ["category"]:
        raise ValueError(f"{file}: must begin with the lines model,registered,TASK,… and category,,CATEGORY,…")
    if len(set(header)) != len(header):
        raise ValueError(f"{file}: each task must occur once in the header (got {','.join(header):.200})")
    _check_width(where, categories, header)
    if not all(categories[2:]):
        raise ValueError(f"{where}: each task must have a category (got {','.join(categories):.200})")
    models, registered, scores = [], [], []
    for where, cells in rows:
        _check_width(where, cells, header)
        if not cells[0] or cells[0] in models:
            raise ValueError(f"{where}: the model must have a name of its own (got {cells[0]!r:.80})")
        if cells[1] not in ("0", "1"):
            raise ValueError(f"{where}: 'registered' must be 0 or 1 (got {cells[1]!r:.20})")
        models.append(cells[0])
        registered.append(cells[1] == "1")
        scores.append([_parse_score(where, task, cell) for task, cell in zip(header[2:], cells[2:], strict=True)])
    if not models:
        raise ValueError(f"{file}: must have a line for at least one model")
    registered_M, score_ME = np.array(registered), np.array(scores)
    return ScoreTable(tuple(models), tuple(header[2:]), tuple(categories[2:]), registered_M, score_ME, source)


def _check_width(where: str, cells: Sequence[str], header: Sequence[str]) -> None:
    if len(cells) != len(header):
        raise ValueError(f"{where}: must have {len(header)} entries, as the header (got {len(cells)})")


def _parse_score(where: str, task: str, cell: str) -> float:
    if not cell:
        return math.nan
    try:
        return check_score(task, float(cell))
    except ValueError:
        raise ValueError(f"{where}: {task} must be empty or a number from -100 to 100 (got {cell!r:.40})") from None


def check_score(task: str, score: float) -> float:
    """Return a score in percent; correlations may be negative. Raises ValueError if it is NaN or out of range."""
    if not -100 <= score <= 100:  # true for NaN too
        raise ValueError(f"score of task {task!r:.80} must be a number from -100 to 100 (got {score})")
    return score


# ---- means and ranks -----------------------------------------------------------------------------------------


def task_mean(score_ME: np.ndarray) -> np.ndarray:
    """Mean (Task) of each model, (L,): the mean over its tasks, NaN if one is missing."""
    return score_ME.mean(axis=1)


def category_means(score_ME: np.ndarray, categories: Sequence[str]) -> dict[str, np.ndarray]:
    """Means over the tasks of a category: category -> (L,), in alphabetical order; NaN if a task is missing."""
    category_E = np.array(categories)
    return {category: score_ME[:, category_E == category].mean(axis=1) for category in sorted(set(categories))}


def category_mean(score_ME: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """Mean (TaskType) of each model, (L,): the mean of its category means, NaN if a task is missing."""
    return np.mean(list(category_means(score_ME, categories).values()), axis=0)


def task_ranks(score_ME: np.ndarray) -> np.ndarray:
    """Rank of each model in each task, (L, E): 1 is the best, ties share their average rank, NaN without a score."""
    num_better_ME = (score_ME[None, :, :] > score_ME[:, None, :]).sum(axis=1)
    num_equal_ME = (score_ME[None, :, :] == score_ME[:, None, :]).sum(axis=1)  # itself included
    return np.where(np.isnan(score_ME), np.nan, num_better_ME + (num_equal_ME + 1) / 2)


def borda_points(score_ME: np.ndarray) -> np.ndarray:
    """Sum over the tasks of n - rank, (L,), n = number of models with a score; a missing task gives 0 points."""
    num_models = np.count_nonzero(has_score(score_ME))
    return np.nansum(num_models - task_ranks(score_ME), axis=1)


def borda_ranks(score_ME: np.ndarray) -> np.ndarray:
    """Rank of each model by its points, (L,) int; ties get the smaller number, a model without any score 0."""
    points_M = borda_points(score_ME)
    has_score_M = has_score(score_ME)
    num_above_M = ((points_M[None, :] > points_M[:, None]) & has_score_M[None, :]).sum(axis=1)
    return np.where(has_score_M, 1 + num_above_M, 0)


def has_score(score_ME: np.ndarray) -> np.ndarray:
    """Whether each model has at least one score, (L,) bool."""
    return ~np.isnan(score_ME).all(axis=1)


# ---- one more model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """All models on the same tasks, the evaluated one in row 0.

    If tasks are `missing`, means and ranks differ from the leaderboard's.
    """

    table: ScoreTable
    mean_M: np.ndarray  # over the compared tasks; Mean (Task) if none is missing
    category_mean_M: np.ndarray  # over the compared categories; Mean (TaskType) if none is missing
    category_means: dict[str, np.ndarray]  # category -> (L,)
    rank_M: np.ndarray  # Borda rank; 0: no score on these tasks
    task_rank_ME: np.ndarray
    missing: tuple[str, ...]  # tasks of the benchmark without a score of the evaluated model

    @property
    def num_ranked(self) -> int:
        """Number of models with a rank, the evaluated one included."""
        return int(np.count_nonzero(self.rank_M))


def compare(public: ScoreTable, scores: Mapping[str, float], *, name: str = "evaluated model") -> Comparison:
    """Compute means and ranks of the public models and of one more, on the tasks that it has.

    scores: task -> score in percent. Raises ValueError if it is empty, has an unknown task or a score out of range.
    """
    table = insert_model(public, scores, name=name)
    return Comparison(
        table=table,
        mean_M=task_mean(table.score_ME),
        category_mean_M=category_mean(table.score_ME, table.categories),
        category_means=category_means(table.score_ME, table.categories),
        rank_M=borda_ranks(table.score_ME),
        task_rank_ME=task_ranks(table.score_ME),
        missing=tuple(task for task in public.tasks if task not in scores),
    )


def insert_model(public: ScoreTable, scores: Mapping[str, float], *, name: str) -> ScoreTable:
    """Return the public table on the tasks of `scores`, with these as a new first row. Raises as `compare`."""
    unknown = [task for task in scores if task not in public.tasks]
    if unknown or not scores:
        given = ", ".join(map(repr, unknown))[:200] or "none"
        raise ValueError(f"tasks to compare must be among the {len(public.tasks)} of the public table, at least one "
                         f"(got {given})")
    columns = [index for index, task in enumerate(public.tasks) if task in scores]
    tasks = tuple(public.tasks[index] for index in columns)
    row_E = [round(check_score(task, float(scores[task])), DECIMALS) for task in tasks]
    return ScoreTable(
        models=(name, *public.models),
        tasks=tasks,
        categories=tuple(public.categories[index] for index in columns),
        registered_M=np.concatenate([[True], public.registered_M]),
        score_ME=np.concatenate([[row_E], public.score_ME[:, columns]]),
        source=public.source,
    )
