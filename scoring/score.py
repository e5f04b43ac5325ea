"""Scores through mteb: its tasks, its metrics, its result files; ours is who gets the instruction.

    MtebEncoder      texts -> vectors, as mteb asks for them
    score_task       one task -> one row; resumes from mteb's result cache
    means, table     the figures of the leaderboard, or what they lack

Called by run_eval.py and plan.py. Importing this file imports mteb (three seconds), so run_eval.py does so late.
Facts about mteb: version 2.26.
"""

import copy
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
from mteb.abstasks.abstask import AbsTask, get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ref.held_out import TextEmbedder
from scoring.few_shot import FewShot
from scoring.tasks import BENCHMARK, CATEGORIES, benchmark_tasks, unknown


class MtebEncoder(AbsEncoder):
    """An embedder as mteb's evaluators call it; `similarity`, inherited, is the cosine.

    Instruction on every text of a symmetric task (STS, clustering, pair classification, summarisation,
    classification); in retrieval and reranking on the queries only, documents bare.

    name: "owner/model", and revision: together the folder of the results. overrides: task name ->
    instruction. few_shot: task name -> solved examples, shown wherever the instruction is. settings: whatever else
    decides the vectors (token limit, template). All of it is recorded next to each result.

    Source: the README's table of defaults (query prompt; passages); mteb/models/models_protocols.py, EncoderProtocol.
    """

    def __init__(
        self,
        embedder: TextEmbedder,
        *,
        name: str,
        revision: str,
        overrides: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        few_shot: Mapping[str, FewShot] | None = None,
        progress: bool = False,
    ) -> None:
        self.embedder = embedder
        self.few_shot = few_shot or {}
        self.overrides = overrides or {}
        self.settings = settings or {}
        self.progress = progress
        identity = {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty({**identity, "use_instructions": True})

    def encode(
        self,
        inputs: Iterable[Any],  # a DataLoader of {"text": list of texts}
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **recorded: Any,  # what mteb writes into run_settings.jsonl; see `score_task`
    ) -> np.ndarray:
        """Float32 array (texts, width) in data-set order. mteb has joined a document's title and text.

        Raises: ValueError if a vector is not finite, naming its text.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        # mteb gives a plain-string prompt and the class default for documents too: the side is decided here
        bare = prompt_type == PromptType.document
        instruction = None if bare else instruction_for(task_metadata, self.overrides)
        shown = () if bare or task_metadata.name not in self.few_shot else self.few_shot[task_metadata.name].examples
        vectors = self.embedder.encode(texts, instruction=instruction, examples=shown, progress=self.progress)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ValueError(
                f"{task_metadata.name} {hf_split} {hf_subset}: the vector of text {broken[0]} is not finite, "
                f"{texts[broken[0]][:60]!r}. Expected: finite numbers. Look at the weights and the precision."
            )
        return vectors

    def prompt_of(self, task_metadata: TaskMetadata) -> dict[str, Any]:
        """What stands before the texts of a task, for the record: instruction, examples and where they are from."""
        few_shot = self.few_shot.get(task_metadata.name, FewShot([], "zero-shot"))
        return {"instruction": instruction_for(task_metadata, self.overrides),
                "examples": [[e.query, e.response] for e in few_shot.examples], "examples_source": few_shot.source}

    def with_embedder(self, embedder: TextEmbedder) -> "MtebEncoder":
        """The same with another embedder."""
        other = copy.copy(self)
        other.embedder = embedder
        return other


# ---- instructions ------------------------------------------------------------------------------------------


def instruction_for(task_metadata: TaskMetadata, overrides: Mapping[str, str]) -> str:
    """The task's instruction: the override, else mteb's for the task (for its queries), else for its class.

    A local folder's own instruction is already in `task_metadata.prompt` (see `folder_task`).
    """
    if task_metadata.name in overrides:
        return overrides[task_metadata.name]
    prompt = task_metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    return prompt or get_abstask_prompt(task_metadata.name)


def read_instructions(path: str | Path, known_tasks: Iterable[str]) -> dict[str, str]:
    """Task name -> instruction, from a JSON file.

    Raises: ValueError for other content, or a name that is neither the benchmark's nor in `known_tasks`.
    """
    try:
        overrides = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Expected: a readable JSON file. Correct the path or the file.") from None
    if not isinstance(overrides, dict) or not all(isinstance(text, str) and text for text in overrides.values()):
        raise ValueError(f'{path}: not an object of texts. Expected: {{"STS12": "Retrieve ...", ...}}. Correct it.')
    known = [*benchmark_tasks(), *known_tasks]
    for name in overrides:
        if name not in known:
            raise ValueError(f"{path}: {unknown('task', name, known)}")
    return overrides


# ---- results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A task's main score in [0, 1]; `elapsed_s` is None if it was read from the result cache."""

    task: str
    category: str
    metric: str
    score: float
    elapsed_s: float | None = None


def score_task(encoder: MtebEncoder, task: AbsTask, output: str | Path) -> Row:
    """Run one task, or read its result if `output` has one of the same data, instruction, settings and mteb.

    output: the folder of mteb's ResultCache. The instruction and the encoder's settings go through mteb's
    encode_kwargs, which it writes next to the result (run_settings.jsonl): so a result says how it was made.
    Errors of the task or its data pass through.
    """
    cache = mteb.ResultCache(output)
    how: Any = {
        "batch_size": 1024,  # rows that mteb hands over at a time; the embedder makes batches of its own
        "show_progress_bar": False,
        **encoder.prompt_of(task.metadata),
        **encoder.settings,
    }
    current = _is_current(cache, encoder.mteb_model_meta, task, how)
    _seed_again(task)
    start_s = time.monotonic()
    outcome = mteb.evaluate(
        encoder, task, cache=cache, encode_kwargs=how, co2_tracker=False, show_progress_bar=False,
        overwrite_strategy="only-missing" if current else "always",
    )  # fmt: skip
    if outcome.exceptions:
        raise RuntimeError(outcome.exceptions[0].exception)
    # from the file, also after a run: mteb rounds what it writes, and a resumed run must print the same table
    result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta, raise_if_not_found=True)
    assert result is not None
    score = float(result.get_score(splits=list(task.eval_splits)))
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}. Expected is a finite number. Vectors that are all equal have none: "
                         "look at the model.")
    elapsed_s = None if current else time.monotonic() - start_s
    return Row(task.metadata.name, str(task.metadata.type), task.metadata.main_score, score, elapsed_s)


def _seed_again(task: AbsTask) -> None:
    """As mteb leaves a new task: what it drew before (a plan, an attempt that failed) must not change its sample."""
    random.seed(task.seed)
    np.random.seed(task.seed)
    task.rng_state, task.np_rng = random.Random(task.seed), np.random.default_rng(task.seed)


def _is_current(cache: mteb.ResultCache, meta: ModelMeta, task: AbsTask, how: Mapping[str, Any]) -> bool:
    """Whether there is a whole result of this data, instruction, settings and mteb; mteb ignores all four."""
    try:
        result = cache.load_task_result(task.metadata.name, meta)
    except (ValueError, KeyError):  # damaged, say by a full disk: made again
        return False
    if result is None or result.get_missing_evaluations(task):
        return False
    if (result.dataset_revision, result.mteb_version) != (task.metadata.revision, mteb.__version__):
        return False
    settings = cache.get_task_result_path(task.metadata.name, meta).with_name("run_settings.jsonl")
    lines = settings.read_text(encoding="utf-8").splitlines() if settings.is_file() else []
    try:
        recorded = [row["encode_kwargs"] for row in map(json.loads, lines) if row["task"] == task.metadata.name]
    except (ValueError, KeyError):  # cut short
        settings.unlink()
        return False
    return recorded == [json.loads(json.dumps(how))]


# ---- means -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """Means of scores in [0, 1]; None where the benchmark asks for tasks that have not been run."""

    over_run: float  # all rows, stand-ins included: comparable with nothing but the same selection
    by_category: dict[str, float | None]
    task: float | None
    category: float | None
    missing: list[str]


def means(rows: Sequence[Row], required: Mapping[str, str]) -> Means:
    """Mean over tasks, and mean over categories of their means, of exactly the tasks in `required`.

    required: task name -> category, for the leaderboard the 41 tasks. Nothing is averaged over a gap.

    Source: mteb/benchmarks/_create_table.py, Mean (Task) and Mean (TaskType).
    """
    score = {row.task: row.score for row in rows}
    missing = [name for name in required if name not in score]
    by_category: dict[str, float | None] = {}
    for category in dict.fromkeys(required.values()):
        members = [name for name, kind in required.items() if kind == category]
        by_category[category] = None if set(members) & set(missing) else _mean(score[name] for name in members)
    complete = bool(required) and not missing
    return Means(
        over_run=_mean(score.values()),
        by_category=by_category,
        task=_mean(score[name] for name in required) if complete else None,
        category=_mean(value for value in by_category.values() if value is not None) if complete else None,
        missing=missing,
    )


def table(rows: Sequence[Row], required: Mapping[str, str], missing: Sequence[str] = ()) -> str:
    """Text: rows by category, the means, and what is missing (selected, but without data); scores x 100."""
    result = means(rows, required)
    width = max([20, *(len(row.task) for row in rows)])
    lines: list[str] = []
    categories = [*CATEGORIES, *sorted({row.category for row in rows} - set(CATEGORIES))]
    for category in categories:
        members = [row for row in rows if row.category == category]
        if members:
            lines += ["", f"{category:<{width}}  {_category_mean(category, members, required, result)}"]
            lines += [f"  {row.task:<{width}}  {100 * row.score:6.2f}  {row.metric}" for row in members]
    counts = f"{len(result.missing)} of {len(required)} missing"
    lines += [
        "",
        f"mean over the {len(rows)} tasks run: {_percent(result.over_run if rows else None, 'none')}",
        f"Mean (Task) of {BENCHMARK}: {_percent(result.task, f'not available, {counts}')}",
        f"Mean (TaskType) of {BENCHMARK}: {_percent(result.category, f'not available, {counts}')}",
    ]
    if missing:
        lines += [f"selected but without data, not scored ({len(missing)}): {', '.join(missing)}"]
    return "\n".join(lines).strip("\n")


def _category_mean(category: str, members: Sequence[Row], required: Mapping[str, str], result: Means) -> str:
    mean = result.by_category.get(category)
    needed = list(required.values()).count(category)
    if mean is not None:
        return f"{100 * mean:8.2f}  mean, complete ({needed} of {needed})"
    ran = sum(row.task in required for row in members)
    partial = f"mean over the {len(members)} run: {_percent(_mean(row.score for row in members))}"
    return f"{partial}; not the category's mean ({ran} of its {needed} tasks)"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _percent(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None else f"{100 * value:.2f}"
