"""A run as it is handed in, and what of it can be compared with the public scores. Called by content.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from leaderboard.compare import BENCHMARK, Comparison, Scores, compare

AGAINST = "annamodels/LGAI-Embedding-Preview"
CHOSEN = (
    AGAINST,
    "Qwen/Qwen3-Embedding-8B",
    "google/gemini-embedding-001",
    "intfloat/e5-mistral-7b-instruct",
    "BAAI/bge-en-icl",
    "Linq-AI-Research/Linq-Embed-Mistral",
    "Salesforce/SFR-Embedding-Mistral",
)


@dataclass(frozen=True)
class TaskResult:
    """One task of a run. score: main metric in percent. official: known to be the benchmark's own data."""

    task: str
    category: str
    metric: str
    score: float
    instruction: str
    examples: int = 0
    examples_source: str = ""
    seconds: float | None = None  # None: not measured, such as for a result read from the cache
    tokens: int | None = None
    official: bool = True


@dataclass(frozen=True)
class Report:
    """A run, and which public models to show beside it. failed: task -> error. missing: selected, but without data."""

    model: str
    date: str
    tasks: Sequence[TaskResult]
    versions: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    note: str = ""  # shown first, such as "an example"
    chosen: Sequence[str] = CHOSEN
    against: str = AGAINST  # whose scores are subtracted, task by task


@dataclass(frozen=True)
class Findings:
    """A report with what follows from it. Raises: ValueError for a task twice, or a score that is none."""

    report: Report
    public: Scores

    def __post_init__(self) -> None:
        names = [row.task for row in self.report.tasks]
        wrong = [row.task for row in self.report.tasks if names.count(row.task) > 1 or not math.isfinite(row.score)]
        if wrong:
            raise ValueError(f"report of {self.report.model!r:.80}: {wrong[0]!r:.80} comes twice, or its score is not "
                             "finite. Expected: one number in percent for each task. Correct the results.")

    @cached_property
    def comparable(self) -> list[TaskResult]:
        """Results on official data of tasks of the benchmark."""
        return [row for row in self.report.tasks if row.official and row.task in self.public.tasks]

    @cached_property
    def others(self) -> list[TaskResult]:
        """Results that have no public counterpart."""
        return [row for row in self.report.tasks if row not in self.comparable]

    @cached_property
    def comparison(self) -> Comparison | None:
        """Among the public models, on the tasks that can be compared; None if there is none."""
        ours = {row.task: row.score for row in self.comparable}
        return compare(self.public, ours, name=self.report.model) if ours else None

    @cached_property
    def shown(self) -> list[int]:
        """Rows of the comparison: ours, then the chosen models that the public table has."""
        return [0, *(1 + self.public.row(name) for name in dict.fromkeys(self.report.chosen) if self.has(name))]

    @cached_property
    def against(self) -> int | None:
        """The comparison's row of the model whose scores are subtracted; None if the table lacks it."""
        return 1 + self.public.row(self.report.against) if self.has(self.report.against) else None

    def has(self, model: str) -> bool:
        """Whether the public table has a model."""
        return model in self.public.models

    def why_not(self, row: TaskResult) -> str:
        """What a result's data are, in the words of the tables."""
        if row in self.comparable:
            return "official"
        return f"not in {BENCHMARK}" if row.official else "other data, not comparable"
