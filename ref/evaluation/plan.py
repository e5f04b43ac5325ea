"""Cost of an evaluation before it starts: texts, unique texts, tokens and hours.

Which texts a task embeds depends on mteb, so each task runs once with an embedder that counts texts and returns hash
vectors instead of embeddings. Tokens are counted on up to TEXTS_PER_CALL texts of each call and extrapolated;
instruction and examples count once per call, because all texts of a call share their keys and values.

The plan is stored in plan.json beside the results and reused. With --plan, tasks whose data are not on this machine are
estimated from the statistics that mteb ships (numbers of texts, unique texts and characters): nothing is downloaded.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import mteb
import numpy as np
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.classification import AbsTaskClassification

from ref.embedder import Embedder
from ref.evaluation.encoder import MtebEncoder
from ref.evaluation.tasks import benchmark_tasks
from ref.text.prompts import InContextExample, PromptEncoder
from ref.utils.dedup import first_occurrence, unique_index
from ref.utils.files import read_json, write_json

TEXTS_PER_CALL = 2000  # tokenised to count tokens
SAMPLE_SIZE = 200  # texts of a task that are kept for measuring speed
SPEED_TOKENS = {"cpu": 20_000, "cuda": 500_000}  # a few seconds of computation


@dataclass
class TaskPlan:
    """Counts of one task."""

    revision: str  # of data, model and prompt
    texts: int = 0
    unique: int = 0
    tokens: int = 0  # of the unique texts and of each call's prompt prefix (without the `<s>` of a passage)
    sample: list[str] = field(default_factory=list)  # texts for `measure_speed`


class CountingEmbedder:
    """An embedder that counts texts and tokens and returns hash vectors."""

    def __init__(self, prompt_encoder: PromptEncoder) -> None:
        self.prompt_encoder = prompt_encoder
        self.plan = TaskPlan("")
        self.sample: list[str] = []

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors that are a function of the text, (texts, 8) float32."""
        unique = unique_index(first_occurrence(texts))
        prefix = self.prompt_encoder.prefix(instruction, examples)
        sampled = unique[:: -(-len(unique) // TEXTS_PER_CALL) or 1]
        lengths = [len(ids) for ids in self.prompt_encoder.encode([texts[n] for n in sampled], prefix)]
        self.plan.texts += len(texts)
        self.plan.unique += len(unique)
        self.plan.tokens += len(prefix.ids) + round(len(unique) * sum(lengths) / max(1, len(lengths)))
        self.sample += [texts[n] for n in sampled[: TEXTS_PER_CALL - len(self.sample)]]
        hash_bytes = np.array([hash(text) for text in texts], np.int64)[:, None] >> np.arange(0, 64, 8) & 255
        vectors = (hash_bytes - 127.5).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_plan(
    encoder: MtebEncoder, tasks: Sequence[AbsTask], prompt_encoder: PromptEncoder, path: Path,
) -> tuple[dict[str, TaskPlan], list[str]]:
    """Plan each task, or read its plan from `path` if data, model and prompt are the same.

    Returns the plans by task name and a sample of texts. A task that fails has no plan; it fails again, with a message,
    when it is scored.
    """
    known = read_json(path) if path.exists() else {}
    plans: dict[str, TaskPlan] = {}
    for task in tasks:
        name = task.metadata.name
        revision = " ".join(map(str, (task.metadata.revision, encoder.mteb_model_meta.revision,
                                      encoder.prompt_settings(task.metadata), encoder.settings)))
        if known.get(name, {}).get("revision") == revision:
            plans[name] = TaskPlan(**known[name])
            continue
        counting = CountingEmbedder(prompt_encoder)
        try:
            with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
                encode_kwargs: Any = {"batch_size": 1024, "show_progress_bar": False}
                mteb.evaluate(encoder.with_embedder(counting), task, cache=mteb.ResultCache(scratch),
                              encode_kwargs=encode_kwargs, co2_tracker=False, show_progress_bar=False,
                              overwrite_strategy="always")
        except Exception:
            task.unload_data()  # as mteb does after a success
            continue
        counting.plan.revision = revision
        plans[name] = counting.plan
        plans[name].sample = counting.sample[:: max(1, len(counting.sample) // SAMPLE_SIZE)][:SAMPLE_SIZE]
        known[name] = asdict(plans[name])
        write_json(path, known)
    if not path.exists():  # every task failed: the folder is still this command's
        write_json(path, {})
    return plans, [text for plan in plans.values() for text in plan.sample]


def is_plan_file(path: Path) -> bool:
    """Whether `make_plan` wrote the file: a folder that holds another plan.json is not that of an evaluation."""
    try:
        plans = read_json(path).values()
    except ValueError:
        return False
    return all(isinstance(plan, dict) and {"revision", "tokens"} <= plan.keys() for plan in plans)


def estimate_plan(task: AbsTask, *, rate: float, max_text_tokens: int) -> TaskPlan | None:
    """A plan from the statistics that mteb ships; None if the task has none.

    Tokens: unique texts x average characters x `rate` (tokens per character), at most the token limit. For
    clustering an upper estimate: mteb embeds a part of the texts.
    """
    statistics = task.metadata.descriptive_stats or {}
    plan = TaskPlan("")

    def add(part: dict[str, Any], unique: float, texts: float) -> None:
        plan.texts += round(texts)
        plan.unique += round(unique)
        plan.tokens += round(unique * (min(rate * part["average_text_length"], max_text_tokens) + 1))
    for split in task.eval_splits:
        for part in _text_statistics(statistics.get(split)):
            add(part, part["unique_texts"], part["total_text_length"] / max(part["average_text_length"], 1e-9))
    if isinstance(task, AbsTaskClassification):  # several small draws from the training split
        train = _english(statistics.get(task.train_split))
        labels = (train.get("label_statistics") or {}).get("unique_labels", 0)
        for part in _text_statistics(train):
            draw = min(task.samples_per_label * labels, part["unique_texts"])
            unique = part["unique_texts"] * (1 - (1 - draw / part["unique_texts"]) ** task.n_experiments)
            add(part, unique, task.n_experiments * draw)
    return plan if plan.texts else None


def _english(statistics: Any) -> dict[str, Any]:
    """The statistics of a split, those of its English part if it has several languages."""
    statistics = statistics or {}
    subsets = statistics.get("hf_subset_descriptive_stats") or {}
    return next((subsets[name] for name in ("default", "en", "en-en", "eng") if name in subsets), statistics)


def _text_statistics(statistics: Any) -> list[dict[str, Any]]:
    """The statistics of each column of texts of a split."""
    return [part for part in _english(statistics).values()
            if isinstance(part, dict) and {"total_text_length", "average_text_length", "unique_texts"} <= part.keys()]


@lru_cache(maxsize=1)
def _english_texts() -> list[str]:
    """Descriptions of the benchmark's tasks: English prose that needs no download."""
    return [task.metadata.description for task in benchmark_tasks().values()]


def tokens_per_character(prompt_encoder: PromptEncoder) -> float:
    """Tokens per character of English prose: the descriptions of the benchmark's tasks."""
    texts = _english_texts()
    ids = prompt_encoder.tokenizer.encode(texts, max_tokens=2**16)
    return sum(map(len, ids)) / sum(map(len, texts))


def english_sample(length: float) -> list[str]:
    """Texts of about `length` characters, to measure the speed with."""
    text, size = " ".join(_english_texts()), max(10, round(length))
    return [text[start : start + size] for start in range(0, len(text) - size, size)]


def measure_speed(embedder: Embedder, sample: Sequence[str]) -> float:
    """Tokens per second of the model on a sample of the tasks' texts; takes a few seconds."""
    tokens = 0
    texts: list[str] = []
    prefix = embedder.prompt_encoder.prefix(None)
    for text in Random(0).sample(sample, len(sample)) or ["a text"]:
        texts.append(text)
        tokens += len(embedder.prompt_encoder.encode([text], prefix)[0])
        if tokens >= SPEED_TOKENS[embedder.device.type]:
            break
    embedder.encode(texts[:64])  # compilation on a GPU is not measured
    start_s = time.perf_counter()
    embedder.encode(texts)
    return tokens / (time.perf_counter() - start_s)


def table(plans: Mapping[str, TaskPlan], tokens_per_s: float, training_data: Mapping[str, str]) -> str:
    """The plan as text: one line per task, the total and the estimated hours.

    `training_data`: name of the model's training data by task, for tasks that it was trained on.
    """
    width = max([5, *(len(name) + 2 for name in plans)])
    lines = [f"{'task':<{width}}{'texts':>12}{'unique':>12}{'tokens':>14}{'minutes':>9}"]
    total = TaskPlan("", *(sum(getattr(plan, key) for plan in plans.values()) for key in ("texts", "unique", "tokens")))
    for name, plan in [*plans.items(), ("total", total)]:
        marked = f"{name} †" if name in training_data else name
        lines.append(f"{marked:<{width}}{plan.texts:>12,}{plan.unique:>12,}{plan.tokens:>14,}"
                     f"{plan.tokens / tokens_per_s / 60:>9.1f}")
    if trained := {name: data for name, data in training_data.items() if name in plans}:
        names = ", ".join(dict.fromkeys(trained.values()))
        lines.append(f"† trained on data of this task, its training split or more, judged by name ({names})")
    lines.append(f"estimated: {total.tokens / tokens_per_s / 3600:.2f} hours at {tokens_per_s:,.0f} tokens/s, plus "
                 "mteb's own computation")
    return "\n".join(lines)


@dataclass
class TokenProgress:
    """Tokens of the planned tasks that are left, and the speed so far."""

    remaining_tokens: int
    done_tokens: int = 0
    elapsed_s: float = 0.0

    def update(self, tokens: int, elapsed_s: float | None) -> str:
        """Count one scored task; returns its duration and an estimate of the rest as text."""
        self.remaining_tokens -= tokens
        if elapsed_s is None:
            return "from the result cache"
        self.done_tokens, self.elapsed_s = self.done_tokens + tokens, self.elapsed_s + elapsed_s
        text = f"{elapsed_s:.1f} s, {tokens:,} tokens; remaining: {self.remaining_tokens:,} tokens"
        if self.done_tokens and self.remaining_tokens:
            text += f", {self.remaining_tokens * self.elapsed_s / self.done_tokens / 60:.0f} minutes"
        return text
