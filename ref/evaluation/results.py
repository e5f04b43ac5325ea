"""Task -> score, with mteb's metric and result files; means over tasks and the printed table.

Importing this file imports mteb (three seconds). Written for mteb 2.26.
"""

import json
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks.abstask import AbsTask
from mteb.models.model_meta import ModelMeta

from ref.evaluation.encoder import MtebEncoder
from ref.evaluation.tasks import BENCHMARK, CATEGORIES


@dataclass(frozen=True)
class TaskScore:
    """A task's main score in [0, 1]; `elapsed_s` is None if it was read from the result cache."""

    task: str
    category: str
    metric: str
    score: float
    elapsed_s: float | None = None


def score_task(encoder: MtebEncoder, task: AbsTask, output: str | Path) -> TaskScore:
    """Score one task, or read its result if `output` has one for the same data, prompt, settings and mteb version.

    `output`: folder of mteb's ResultCache. Prompt and settings are passed as encode_kwargs, which mteb records beside
    the result in run_settings.jsonl. Raises ValueError if the score is not finite, and any error of mteb and the data.
    """
    cache, encoder = mteb.ResultCache(output), encoder.for_task(task.metadata)
    encode_kwargs: Any = {
        "batch_size": 1024,  # rows per batch of mteb's DataLoader; the embedder makes its own batches
        "show_progress_bar": False,
        **encoder.prompt_settings(task.metadata),
        **encoder.settings,
    }
    current = _is_current(cache, encoder.mteb_model_meta, task, encode_kwargs)
    if not current and cache.get_task_result_path(task.metadata.name, encoder.mteb_model_meta).is_file():
        print("  replaces a result of another instruction, examples, data, dtype or version, or a part of it")
    _reset_seeds(task)
    start_s = time.monotonic()
    outcome = mteb.evaluate(
        encoder, task, cache=cache, encode_kwargs=encode_kwargs, co2_tracker=False, show_progress_bar=False,
        overwrite_strategy="only-missing" if current else "always")
    if outcome.exceptions:
        raise RuntimeError(outcome.exceptions[0].exception)
    # from the file even after a run: mteb rounds what it writes, and a second run must print the same table
    result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta, raise_if_not_found=True)
    assert result is not None
    score = float(result.get_score(splits=list(task.eval_splits)))
    if not math.isfinite(score):
        raise ValueError(f"{task.metadata.name}: the score must be finite (got {score}); it is undefined if all "
                         "embeddings are equal")
    elapsed_s = None if current else time.monotonic() - start_s
    return TaskScore(task.metadata.name, str(task.metadata.type), task.metadata.main_score, score, elapsed_s)


def _reset_seeds(task: AbsTask) -> None:
    """Reset the random state to that of a new task: a plan or a failed attempt must not change what it samples."""
    random.seed(task.seed)
    np.random.seed(task.seed)
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


def _is_current(cache: mteb.ResultCache, meta: ModelMeta, task: AbsTask, encode_kwargs: Mapping[str, Any]) -> bool:
    """Whether a complete result for this data, prompt, settings and mteb version exists; mteb checks none of these."""
    try:
        result = cache.load_task_result(task.metadata.name, meta)
    except (ValueError, KeyError):  # a damaged file, for example after a full disk
        return False
    if result is None or result.get_missing_evaluations(task):
        return False
    if (result.dataset_revision, result.mteb_version) != (task.metadata.revision, mteb.__version__):
        return False
    settings = cache.get_task_result_path(task.metadata.name, meta).with_name("run_settings.jsonl")
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.is_file() else []
    try:
        recorded = [_without_source(row["encode_kwargs"]) for row in map(json.loads, lines)
                    if row["task"] == task.metadata.name]
    except (ValueError, KeyError):  # a truncated file
        settings.unlink()
        return False
    return recorded == [_without_source(json.loads(json.dumps(encode_kwargs)))]


def _without_source(encode_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without the words on where the examples come from, or why there are none: the examples themselves count."""
    return {key: value for key, value in encode_kwargs.items() if key != "examples_source"}


# ---- means -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means of scores in [0, 1]; None if a task of the benchmark has no score."""

    scored_tasks: float  # over all scores, also of tasks outside the benchmark
    by_category: dict[str, float | None]
    mean_task: float | None
    mean_task_type: float | None
    missing: list[str]  # tasks of the benchmark without a score on its own data


def means(scores: Sequence[TaskScore], required: Mapping[str, str], unofficial: Sequence[str] = ()) -> Means:
    """Mean over the tasks in `required` (name -> category), and mean over their categories of the categories' means.

    `unofficial`: tasks scored on other data than the benchmark's, which are no part of these means.
    Source: mteb/benchmarks/_create_table.py, Mean (Task) and Mean (TaskType).
    """
    by_task = {score.task: score.score for score in scores}
    missing = [name for name in required if name not in by_task or name in unofficial]
    by_category: dict[str, float | None] = {}
    for category in dict.fromkeys(required.values()):
        members = [name for name, of_category in required.items() if of_category == category]
        complete = not set(members) & set(missing)
        by_category[category] = _mean(by_task[name] for name in members) if complete else None
    complete = bool(required) and not missing
    return Means(
        scored_tasks=_mean(by_task.values()),
        by_category=by_category,
        mean_task=_mean(by_task[name] for name in required) if complete else None,
        mean_task_type=_mean(value for value in by_category.values() if value is not None) if complete else None,
        missing=missing,
    )


def table(
    scores: Sequence[TaskScore], required: Mapping[str, str], missing: Sequence[str] = (),
    unofficial: Sequence[str] = (),
) -> str:
    """Scores x 100 by category with the means (`means`), as text. `missing`: tasks that were selected but have no data.
    """
    result = means(scores, required, unofficial)
    width = max([20, *(len(score.task) for score in scores)])
    lines: list[str] = []
    for category in [*CATEGORIES, *sorted({score.category for score in scores} - set(CATEGORIES))]:
        members = [score for score in scores if score.category == category]
        if members:
            lines += ["", f"{category:<{width}}  {_category_mean(category, members, required, result)}"]
            lines += [f"  {score.task:<{width}}  {100 * score.score:6.2f}  {score.metric}" for score in members]
    incomplete = f"not available, {len(result.missing)} of {len(required)} tasks missing"
    lines += [
        "",
        f"mean of scored tasks ({len(scores)}): {_percent(result.scored_tasks if scores else None, 'none')}",
        f"Mean (Task) of {BENCHMARK}: {_percent(result.mean_task, incomplete)}",
        f"Mean (TaskType) of {BENCHMARK}: {_percent(result.mean_task_type, incomplete)}",
    ]
    if missing:
        lines += [f"selected but without data ({len(missing)}): {', '.join(missing)}"]
    return "\n".join(lines).strip("\n")


def _category_mean(category: str, members: Sequence[TaskScore], required: Mapping[str, str], result: Means) -> str:
    mean = result.by_category.get(category)
    total = list(required.values()).count(category)
    if mean is not None:
        return f"{100 * mean:8.2f}  mean, complete ({total} of {total} tasks)"
    scored = sum(score.task in required and score.task not in result.missing for score in members)
    partial = _percent(_mean(score.score for score in members))
    return f"mean of scored tasks ({len(members)}): {partial}; category mean not available ({scored} of {total} tasks)"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _percent(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else f"{100 * value:.2f}"
