"""What is worth knowing about the training data before the first step: counts of what was dropped, and warnings.

    negatives dropped     texts that are also the query, a positive or another negative of the same line
    fields not read       'negs' for 'neg' would go unnoticed
    scores                beyond [-1, 1] they are a reranker's logits, which need --teacher-temperature 1
    entropy of labels     near 0 the soft labels say no more than the hard ones
    small batches         a batch has one instruction: with many of them in a task, batches have few queries
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ref.utils.entropy import softmax_entropy
from ref.utils.files import read_json

FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type", "task")  # of a line
MINING = "mining"  # a field of run_label.py's lines: the decisions of its rule, not needed here
LOW_ENTROPY = 0.05  # nats; a hard label has 0
LARGEST_COSINE = 1.001  # rounded scores may exceed 1


@dataclass
class DataReport:
    """Collects one line after the other."""

    teacher_temperature: float
    num_dropped: int = 0  # negatives
    num_labels: int = 0
    entropy: float = 0.0  # sum over lines, nats
    largest_score: dict[Path, float] = field(default_factory=dict)  # absolute value, by file
    not_read: set[str] = field(default_factory=set)  # names of fields

    def add(self, path: Path, scores: Sequence[float], num_dropped: int, not_read: Iterable[str] = ()) -> None:
        """`scores` of the positives and negatives of one line of a file (none without labels), fields not read."""
        self.num_dropped += num_dropped
        self.not_read.update(not_read)
        if scores:
            self.num_labels += 1
            self.entropy += softmax_entropy(scores, self.teacher_temperature)
            self.largest_score[path] = max(self.largest_score.get(path, 0.0), *map(abs, scores))

    def lines(
        self, batches: Callable[[], Sequence[np.ndarray]], *, instructions_per_task: float, batch_size: int,
    ) -> list[str]:
        """What to print; `batches` draws those of an epoch."""
        lines = []
        if self.num_dropped:
            lines.append(f"dropped: {self.num_dropped:,} negatives that repeat the query, a positive or another "
                         "negative of their line")
        if self.not_read:
            lines.append(f"fields not read: {', '.join(sorted(self.not_read)[:8])!s:.200} (read: {', '.join(FIELDS)})")
        logits = [path for path, score in self.largest_score.items() if score > LARGEST_COSINE or _says_logits(path)]
        if logits and self.teacher_temperature < 0.5:
            lines.append(f"warning: the scores of {', '.join(path.name for path in logits[:3])} are logits (up to "
                         f"{max(self.largest_score[path] for path in logits):.1f}), not cosines; at "
                         f"--teacher-temperature {self.teacher_temperature} their labels are nearly hard; use "
                         "--teacher-temperature 1")
        elif self.num_labels and self.entropy / self.num_labels < LOW_ENTROPY:
            lines.append(f"warning: the soft labels have an entropy of {self.entropy / self.num_labels:.3f} nats, "
                         "nearly that of hard labels (0); a higher --teacher-temperature makes them softer")
        if instructions_per_task >= 2 and (median := _median_size(batches())) < batch_size / 4:
            lines.append(f"warning: a task has {instructions_per_task:.0f} different instructions on average and a "
                         f"batch has one: the median batch has {median:,} queries instead of {batch_size:,}; give the "
                         "lines of a task the same 'prompt'")
        return lines


def _median_size(batches: Sequence[np.ndarray]) -> int:
    return sorted(map(len, batches))[len(batches) // 2]


def _says_logits(path: Path) -> bool:
    """Whether run_label.py's description beside the file says so; it is small, another file of that name may be not."""
    description = path.with_suffix(".json")
    try:
        return description.stat().st_size < 10**6 and read_json(description).get("scale") == "logit"
    except (OSError, ValueError):
        return False
