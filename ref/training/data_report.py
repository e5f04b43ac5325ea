"""What is worth knowing about the training data before the first step: counts of what was dropped, and warnings.

    negatives dropped     texts that are also the query, a positive or another negative of the same line
    fields not read       'negs' for 'neg' would go unnoticed
    scores                beyond [-1, 1] they are a reranker's logits, which need --teacher-temperature 1
                          and no temperature suits logits and cosines at once
    entropy of labels     near 0 the soft labels say no more than the hard ones, near its maximum nothing
    small batches         a batch has one task and instruction: with many of them, batches have few queries
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ref.utils.entropy import softmax_entropy
from ref.utils.files import read_json

FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type", "task")  # of a line
MINING = "mining"  # a field of run_label.py's lines: the decisions of its rule, not needed here
LOW_ENTROPY = 0.05  # nats; a hard label has 0
UNIFORM_SHARE = 0.98  # of the entropy of equal labels
LARGEST_COSINE = 1.001  # rounded scores may exceed 1


@dataclass
class DataReport:
    """Collects one line after the other."""

    teacher_temperature: float
    num_dropped: int = 0  # negatives
    num_labels: dict[Path, int] = field(default_factory=lambda: defaultdict(int))  # lines with labels, by file
    entropy: dict[Path, float] = field(default_factory=lambda: defaultdict(float))  # nats, sum over these lines
    max_entropy: dict[Path, float] = field(default_factory=lambda: defaultdict(float))  # of equal labels
    largest_score: dict[Path, float] = field(default_factory=dict)  # absolute value, by file
    not_read: set[str] = field(default_factory=set)  # names of fields

    def add(self, path: Path, scores: Sequence[float], num_dropped: int, not_read: Iterable[str] = ()) -> None:
        """`scores` of the positives and negatives of one line of a file (none without labels), fields not read."""
        self.num_dropped += num_dropped
        self.not_read.update(not_read)
        if scores:
            self.num_labels[path] += 1
            self.entropy[path] += softmax_entropy(scores, self.teacher_temperature)
            self.max_entropy[path] += math.log(len(scores))
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
        lines += self._scale_lines()
        sizes = sorted(map(len, batches()))
        is_enough = instructions_per_task >= 2 or sum(sizes) >= batch_size  # else a small data set, no mistake
        if is_enough and sizes[len(sizes) // 2] < batch_size / 4:
            per_task = f"a task has {instructions_per_task:.0f} different instructions on average" \
                if instructions_per_task >= 2 else "the tasks have few lines"
            lines.append(f"warning: {per_task}, and a batch has one task and instruction: the median batch has "
                         f"{sizes[len(sizes) // 2]:,} queries instead of {batch_size:,}; give the lines of a task the "
                         "same 'task' (by default the file's name) and 'prompt'")
        return lines

    def _scale_lines(self) -> list[str]:
        """Warnings about scores that do not suit the teacher temperature."""
        temperature = f"--teacher-temperature {self.teacher_temperature}"
        logits = [path for path, score in self.largest_score.items() if score > LARGEST_COSINE or _says_logits(path)]
        cosines = [path for path in self.num_labels if path not in logits]
        hard = [path for path in self.num_labels if self.entropy[path] < LOW_ENTROPY * self.num_labels[path]]
        uniform = [path for path in cosines if self.entropy[path] > UNIFORM_SHARE * self.max_entropy[path] > 0]
        largest = max((self.largest_score[path] for path in logits), default=0.0)
        if logits and cosines:
            return [f"warning: the scores of {_names(logits)} are logits (up to {largest:.1f}), those of "
                    f"{_names(cosines)} cosines; no --teacher-temperature suits both: label all files by one teacher"]
        if logits and self.teacher_temperature < 0.5:
            return [f"warning: the scores of {_names(logits)} are logits (up to {largest:.1f}), not cosines; at "
                    f"{temperature} their labels are nearly hard; use --teacher-temperature 1"]
        if hard:
            return [f"warning: the soft labels of {_names(hard)} have an entropy below {LOW_ENTROPY} nats, nearly that "
                    "of hard labels (0); a higher --teacher-temperature makes them softer"]
        if uniform:
            return [f"warning: the soft labels of {_names(uniform)} are nearly equal for all texts at {temperature}, "
                    "and say nothing; a lower one makes them differ"]
        return []


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")


def _says_logits(path: Path) -> bool:
    """Whether run_label.py's description beside the file says so; it is small, another file of that name may be not."""
    description = path.with_suffix(".json")
    try:
        return description.stat().st_size < 10**6 and read_json(description).get("scale") == "logit"
    except (OSError, ValueError):
        return False
