"""Public scores on MTEB(eng, v2), and a model's place among them, ranked as the leaderboard ranks.

    public = read_public_scores()
    comparison = compare(public, {"STS12": 76.1, "ArguAna": 83.2}, name="ours")

Each model gets n - rank points in each task, n = models with at least one score; the sum decides. A small table:

              A    B    C    D      points in A   B    C    D     sum   rank
    one      90   80    -   70                2  1.5   0    0    3.5     2
    two      80   80   60   75                1  1.5   2    1    5.5     1
    three    70    -   50   80                0   0    1    2    3.0     3

Letters: M models, N tasks. Scores are in percent; NaN where there is none.
Called by results.py, content.py and make_public_scores.py.
Source of the rule: mteb/benchmarks/_create_table.py, mteb 2.26.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BENCHMARK = "MTEB(eng, v2)"
PUBLIC_SCORES = Path(__file__).resolve().parent / "public_scores.csv"
# What the public file keeps; with fewer, scores that differ would tie. Ours are rounded alike, so that equal ones tie.
DECIMALS = 8


@dataclass(frozen=True)
class Scores:
    """A table of scores. registered_M: whether mteb's registry knows the model; others count, but are not shown."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    categories: tuple[str, ...]  # of each task
    registered_M: np.ndarray  # bool
    score_MN: np.ndarray  # float64
    source: str = ""

    def row(self, model: str) -> int:
        """Which row a model is. Raises: ValueError if the table does not have it."""
        if model not in self.models:
            raise ValueError(f"{model!r:.80}: not in the public table. Expected: a name as mteb writes it, such as "
                             f"{self.models[0]!r}. Correct the name, or leave it out.")
        return self.models.index(model)


# ---- the public file -----------------------------------------------------------------------------------------


def read_public_scores(path: Path = PUBLIC_SCORES) -> Scores:
    """The table in a file that make_public_scores.py has made.

    Comment lines, a line of names (model, registered, tasks), a line of categories, one line a model.
    Raises: ValueError with the line, for a malformed file; OSError if it cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    source = next((line[10:] for line in lines if line.startswith("# Source: ")), "")
    rows = ((number, next(csv.reader([line]))) for number, line in enumerate(lines, 1) if line and line[0] != "#")
    try:
        return _parsed(rows, source)
    except ValueError as error:
        raise ValueError(f"{path.name} {error} Make the file anew with leaderboard/make_public_scores.py.") from None


def _parsed(rows: Iterator[tuple[int, list[str]]], source: str) -> Scores:
    _, names = next(rows, (0, []))
    number, categories = next(rows, (0, []))
    if names[:2] != ["model", "registered"] or len(names) < 3 or categories[:1] != ["category"]:
        raise ValueError("has other first lines. Expected: model,registered,TASK,... and category,,CATEGORY,...")
    _check_line(number, categories, names)
    if not all(categories[2:]):
        raise ValueError(f"line {number}: a task has no category. Expected: one for each task.")
    models, registered, scores = [], [], []
    for number, cells in rows:
        _check_line(number, cells, names)
        if cells[0] in models or cells[1] not in ("0", "1"):
            raise ValueError(f"line {number}: {cells[0]!r:.80}, {cells[1]!r:.20}. Expected: a new name, then 0 or 1.")
        models.append(cells[0])
        registered.append(cells[1] == "1")
        scores.append([_score(number, task, cell) for task, cell in zip(names[2:], cells[2:], strict=True)])
    if not models:
        raise ValueError("has no model. Expected: one line a model.")
    registered_M, score_MN = np.array(registered), np.array(scores)
    return Scores(tuple(models), tuple(names[2:]), tuple(categories[2:]), registered_M, score_MN, source)


def _check_line(number: int, cells: Sequence[str], names: Sequence[str]) -> None:
    if len(cells) != len(names) or not cells[0] or len(set(names)) != len(names):
        raise ValueError(f"line {number}: {len(cells)} entries, first {cells[:1]}. Expected: {len(names)}, a name "
                         "first, and no task twice.")


def _score(number: int, task: str, cell: str) -> float:
    if not cell:
        return math.nan
    try:
        return checked_score(task, float(cell))
    except ValueError:
        raise ValueError(f"line {number}: {task} has {cell!r:.40}. Expected: -100 to 100, or empty.") from None


def checked_score(task: str, score: float) -> float:
    """The score, if it is one in percent; correlations may be negative. Raises: ValueError."""
    if not -100 <= score <= 100:  # also if it is NaN
        raise ValueError(f"{task!r:.80}: score {score}. Expected: a number from -100 to 100. Give it in percent.")
    return score


# ---- means and ranks -----------------------------------------------------------------------------------------


def task_mean(score_MN: np.ndarray) -> np.ndarray:
    """Mean (Task) of each model: over its tasks; NaN if one is missing."""
    return score_MN.mean(axis=1)


def category_means(score_MN: np.ndarray, categories: Sequence[str]) -> dict[str, np.ndarray]:
    """Category, in the order of the alphabet -> mean of each model over its tasks; NaN if one is missing."""
    labels_N = np.array(categories)
    return {category: score_MN[:, labels_N == category].mean(axis=1) for category in sorted(set(categories))}


def category_mean(score_MN: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """Mean (TaskType) of each model: the mean of its category means; NaN if a task is missing."""
    return np.mean(list(category_means(score_MN, categories).values()), axis=0)


def task_ranks(score_MN: np.ndarray) -> np.ndarray:
    """Rank of each model in each task: the best has 1, ties share the average of their ranks; NaN without score."""
    better_MN = (score_MN[None, :, :] > score_MN[:, None, :]).sum(axis=1)
    equal_MN = (score_MN[None, :, :] == score_MN[:, None, :]).sum(axis=1)  # itself included
    return np.where(np.isnan(score_MN), np.nan, better_MN + (equal_MN + 1) / 2)


def borda_points(score_MN: np.ndarray) -> np.ndarray:
    """Sum over tasks of n - rank, n = models with at least one score; a missing task gives 0."""
    models = np.count_nonzero(has_score(score_MN))
    return np.nansum(models - task_ranks(score_MN), axis=1)


def borda_ranks(score_MN: np.ndarray) -> np.ndarray:
    """Rank of each model by its points, int, ties at the smaller number; 0 for a model without any score."""
    points_M = borda_points(score_MN)
    ranked_M = has_score(score_MN)
    above_M = ((points_M[None, :] > points_M[:, None]) & ranked_M[None, :]).sum(axis=1)
    return np.where(ranked_M, 1 + above_M, 0)


def has_score(score_MN: np.ndarray) -> np.ndarray:
    """Which models have at least one score."""
    return ~np.isnan(score_MN).all(axis=1)


# ---- ours among them -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Models on the same tasks, ours in row 0. Where `missing` is not empty, no figure is one of the leaderboard's."""

    scores: Scores
    mean_M: np.ndarray  # over the tasks compared; Mean (Task) if none is missing
    category_mean_M: np.ndarray  # over the categories compared; Mean (TaskType) if none is missing
    by_category: dict[str, np.ndarray]
    rank_M: np.ndarray  # 0: no score on these tasks
    task_rank_MN: np.ndarray
    missing: tuple[str, ...]  # tasks of the benchmark that ours lacks

    @property
    def ranked(self) -> int:
        """How many models the ranks are among, ours included."""
        return int(np.count_nonzero(self.rank_M))


def compare(public: Scores, ours: Mapping[str, float], *, name: str = "ours") -> Comparison:
    """Means and ranks of all models and ours on the tasks that ours has.

    ours: task -> score in percent. Raises: ValueError if it is empty, names other tasks or is out of range.
    """
    both = with_ours(public, ours, name=name)
    return Comparison(
        scores=both,
        mean_M=task_mean(both.score_MN),
        category_mean_M=category_mean(both.score_MN, both.categories),
        by_category=category_means(both.score_MN, both.categories),
        rank_M=borda_ranks(both.score_MN),
        task_rank_MN=task_ranks(both.score_MN),
        missing=tuple(task for task in public.tasks if task not in ours),
    )


def with_ours(public: Scores, ours: Mapping[str, float], *, name: str) -> Scores:
    """The public table on our tasks, with ours as a new first row, whatever its name. Raises as `compare`."""
    _check_tasks(ours, public.tasks)
    columns = [index for index, task in enumerate(public.tasks) if task in ours]
    tasks = tuple(public.tasks[index] for index in columns)
    row_N = [round(checked_score(task, float(ours[task])), DECIMALS) for task in tasks]
    return Scores(
        models=(name, *public.models),
        tasks=tasks,
        categories=tuple(public.categories[index] for index in columns),
        registered_M=np.concatenate([[True], public.registered_M]),
        score_MN=np.concatenate([[row_N], public.score_MN[:, columns]]),
        source=public.source,
    )


def _check_tasks(ours: Iterable[str], known: Sequence[str]) -> None:
    strangers = [task for task in ours if task not in known]
    if strangers or not list(ours):
        given = ", ".join(map(repr, strangers))[:200] or "none"
        raise ValueError(f"scores to compare: {given}. Expected: at least one of the {len(known)} tasks of the public "
                         "table, and no other. Leave other tasks out.")
