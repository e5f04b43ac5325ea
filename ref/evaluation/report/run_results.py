"""The results of an evaluation, and which of them can be compared with the public scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ref.evaluation.report.leaderboard import BENCHMARK, Comparison, ScoreTable, compare

REFERENCE_MODEL = "annamodels/LGAI-Embedding-Preview"
COMPARED_MODELS = (
    REFERENCE_MODEL,
    "Qwen/Qwen3-Embedding-8B",
    "google/gemini-embedding-001",
    "intfloat/e5-mistral-7b-instruct",
    "BAAI/bge-en-icl",
    "Linq-AI-Research/Linq-Embed-Mistral",
    "Salesforce/SFR-Embedding-Mistral",
)


@dataclass(frozen=True)
class TaskResult:
    """The result of one task."""

    task: str
    category: str
    metric: str
    score: float  # main metric, in percent
    instruction: str
    examples: int = 0
    examples_source: str = ""
    seconds: float | None = None  # None: not measured, e.g. for a cached result
    tokens: int | None = None
    official: bool = True  # the data are known to be the benchmark's own
    training_data: str = ""  # the model was trained on this task's data, which have this name


@dataclass(frozen=True)
class Report:
    """The results of one model, and the public models to compare it with."""

    model: str
    date: str
    tasks: Sequence[TaskResult]
    versions: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)  # task -> error
    missing: Sequence[str] = ()  # selected tasks without data
    note: str = ""  # shown first, such as "an example"
    compared_models: Sequence[str] = COMPARED_MODELS
    reference_model: str = REFERENCE_MODEL  # its scores are subtracted in the comparison by task


@dataclass(frozen=True)
class Analysis:
    """A report with its comparison. Raises ValueError for a repeated task or a score that is not finite."""

    report: Report
    public: ScoreTable

    def __post_init__(self) -> None:
        names = [result.task for result in self.report.tasks]
        for result in self.report.tasks:
            where = f"report of {self.report.model!r:.80}: task {result.task!r:.80}"
            if names.count(result.task) > 1:
                raise ValueError(f"{where} must have one result (got {names.count(result.task)})")
            if not math.isfinite(result.score):
                raise ValueError(f"{where} must have a finite score (got {result.score})")

    @cached_property
    def compared(self) -> list[TaskResult]:
        """Results on official data of tasks of the benchmark."""
        return [result for result in self.report.tasks if result.official and result.task in self.public.tasks]

    @cached_property
    def not_compared(self) -> list[TaskResult]:
        """Results on other data or tasks: there are no public scores for them."""
        return [result for result in self.report.tasks if result not in self.compared]

    @cached_property
    def comparison(self) -> Comparison | None:
        """The model among the public ones on the tasks in `compared`; None if there are none."""
        scores = {result.task: result.score for result in self.compared}
        return compare(self.public, scores, name=self.report.model) if scores else None

    @cached_property
    def shown(self) -> list[int]:
        """Rows of the comparison to show: the evaluated model, then the compared models that the public table has."""
        models = dict.fromkeys(self.report.compared_models)
        return [0, *(1 + self.public.row(model) for model in models if self.is_public(model))]

    @cached_property
    def reference_row(self) -> int | None:
        """Row of the reference model in the comparison; None if the public table does not have it."""
        model = self.report.reference_model
        return 1 + self.public.row(model) if self.is_public(model) else None

    def is_public(self, model: str) -> bool:
        """Whether the public table has a model."""
        return model in self.public.models

    def data_status(self, result: TaskResult) -> str:
        """Whether a result can be compared, and why not, as the tables say it."""
        if result in self.compared:
            return "official"
        return f"not in {BENCHMARK}" if result.official else "unofficial, not compared"
