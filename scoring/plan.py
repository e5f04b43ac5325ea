"""What a benchmark will cost, before it starts: texts, different texts, tokens, hours.

mteb decides which texts a task asks vectors for, so the plan lets it run once with an encoder that counts and gives
vectors of eight hashed numbers: everything but the model. Tokens are counted on up to SAMPLE texts of each call and
scaled up; instruction and examples count once a call, since their keys and values are shared.

Written to plan.json beside the results, so that it is made once. Called by run_eval.py.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import mteb
import numpy as np
from mteb.abstasks.abstask import AbsTask

from ref.config import read_json
from ref.embedder import Embedder
from ref.overlap import different, first_of_equal
from ref.prompts import Example, Prompter
from ref.runs import write_json
from scoring.score import MtebEncoder

SAMPLE, KEPT = 2000, 200
SPEED_TOKENS = {"cpu": 20_000, "cuda": 500_000}  # a few seconds of work


@dataclass
class TaskPlan:
    """What one task asks for."""

    revision: str
    texts: int = 0
    different: int = 0
    tokens: int = 0  # of the different texts, and of each call's prompt (a passage's `<s>` left out)
    sample: list[str] = field(default_factory=list)  # to measure the speed on


class CountingEmbedder:
    """Gives some vector to every text, and counts."""

    def __init__(self, prompter: Prompter) -> None:
        self.prompter = prompter
        self.plan = TaskPlan("")
        self.sample: list[str] = []

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """(texts, 8) float32 unit vectors that depend on the text alone."""
        once = different(first_of_equal(texts))
        prefix = self.prompter.prefix(instruction, examples)
        drawn = once[:: -(-len(once) // SAMPLE) or 1]
        lengths = [len(ids) for ids in self.prompter.texts([texts[n] for n in drawn], prefix)]
        self.plan.texts += len(texts)
        self.plan.different += len(once)
        self.plan.tokens += len(prefix.ids) + round(len(once) * sum(lengths) / max(1, len(lengths)))
        self.sample += [texts[n] for n in drawn[: SAMPLE - len(self.sample)]]
        seeds = np.array([hash(text) for text in texts], np.int64)[:, None] >> np.arange(0, 64, 8) & 255
        vectors = (seeds - 127.5).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_plan(
    encoder: MtebEncoder, tasks: Sequence[AbsTask], prompter: Prompter, path: Path,
) -> tuple[dict[str, TaskPlan], list[str]]:
    """The plan of each task, read from `path` where it is there for the same data; and some texts to measure speed on.

    A task that cannot be counted is left out: it fails again, and is reported, when it is scored.
    """
    known = read_json(path) if path.exists() else {}
    plans: dict[str, TaskPlan] = {}
    for task in tasks:
        name = task.metadata.name
        revision = " ".join(map(str, (task.metadata.revision, encoder.mteb_model_meta.revision,
                                      encoder.prompt_of(task.metadata), encoder.settings)))
        if known.get(name, {}).get("revision") == revision:
            plans[name] = TaskPlan(**known[name])
            continue
        counting = CountingEmbedder(prompter)
        stand_in = encoder.with_embedder(counting)
        try:
            with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
                how: Any = {"batch_size": 1024, "show_progress_bar": False}
                mteb.evaluate(stand_in, task, cache=mteb.ResultCache(scratch), encode_kwargs=how, co2_tracker=False,
                              show_progress_bar=False, overwrite_strategy="always")
        except Exception:
            continue
        counting.plan.revision = revision
        plans[name] = counting.plan
        plans[name].sample = counting.sample[:: max(1, len(counting.sample) // KEPT)][:KEPT]
        known[name] = asdict(plans[name])
        write_json(path, known)
    return plans, [text for plan in plans.values() for text in plan.sample]


def measured_speed(embedder: Embedder, sample: Sequence[str]) -> float:
    """Tokens a second of the model on texts like those of the tasks; a few seconds of work."""
    wanted, device = 0, embedder.model.norm.weight.device.type
    drawn: list[str] = []
    prefix = embedder.prompter.prefix(None)
    for text in Random(0).sample(sample, len(sample)) or ["a text"]:
        drawn.append(text)
        wanted += len(embedder.prompter.texts([text], prefix)[0])
        if wanted >= SPEED_TOKENS[device]:
            break
    embedder.encode(drawn[:64])  # compiles, on a GPU
    start_s = time.perf_counter()
    embedder.encode(drawn)
    return wanted / (time.perf_counter() - start_s)


def table(plans: dict[str, TaskPlan], speed: float) -> str:
    """The plan as text: a line a task, and the sum with the hours it will take."""
    width = max([5, *map(len, plans)])
    lines = [f"{'task':<{width}}{'texts':>12}{'different':>12}{'tokens':>14}{'minutes':>9}"]
    total = TaskPlan("", *(sum(getattr(plan, key) for plan in plans.values()) for key in ("texts", "different",
                                                                                         "tokens")))
    for name, plan in [*plans.items(), ("sum", total)]:
        lines.append(f"{name:<{width}}{plan.texts:>12,}{plan.different:>12,}{plan.tokens:>14,}"
                     f"{plan.tokens / speed / 60:>9.1f}")
    lines.append(f"expected: {total.tokens / speed / 3600:.2f} hours at {speed:,.0f} tokens/s, and mteb's own work")
    return "\n".join(lines)
