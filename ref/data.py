"""soft_labels.jsonl to batches of one task: checked line by line, indexed, read when needed.

One JSON object a line (FlagEmbedding's schema):

    query        text                          pos, neg       lists of texts, negatives hardest first
    prompt       the task's instruction        pos_scores, neg_scores   teacher scores, one for each text, or null
    type         see KINDS (default normal)    task           name (default: the file's)

A first pass checks every line and keeps 14 bytes of it (place, file, task), so a file may be larger than memory.
Lines of one name, instruction and type are one Task; every batch comes from one. Each draw depends on
the seed, the epoch and the line or batch alone: a run can start at any step and sees the same batches.
Called by run_train.py, trainer.py. Source: arXiv 2506.07438 (one task a batch); arXiv 2409.15700 (types, 7 negatives,
examples).
"""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ref.config import Options
from ref.loss import Groups
from ref.mining import fold
from ref.prompts import Example

MAX_TEXT_CHARS = 1_000_000


class Kind(NamedTuple):
    """What a line's type means."""

    both_sides: bool  # passages carry the instruction too
    in_batch: bool  # the batch's other passages are negatives
    negatives: int | None  # a limit of its own


KINDS = {
    "normal": Kind(both_sides=False, in_batch=True, negatives=None),
    "only_1neg": Kind(both_sides=False, in_batch=True, negatives=1),
    "symmetric_sts": Kind(both_sides=True, in_batch=False, negatives=None),
    "symmetric_clustering": Kind(both_sides=True, in_batch=False, negatives=None),
    # a text and its class: FlagEmbedding's name, though the instruction stands on the query alone
    "symmetric_class": Kind(both_sides=False, in_batch=False, negatives=10**9),
}


class Task(NamedTuple):
    """What the lines of a batch have in common."""

    name: str
    instruction: str
    kind: str


@dataclass(frozen=True)
class Row:
    """One checked line."""

    task: Task
    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float] | None  # None: the line has no teacher scores
    negative_scores: list[float] | None


@dataclass(frozen=True)
class Batch:
    """Texts of one task and which belongs to which."""

    task: Task
    rows: list[int]  # numbers of the lines in the data
    queries: list[str]
    passages: list[str]
    groups: Groups
    teacher_QC: Tensor  # fp32 raw scores; NaN where there is none
    in_batch: bool
    examples: list[list[Example]]  # one list for the whole batch, or one for each query


class SoftLabels:
    """All lines of some files by number, and the batches of an epoch."""

    def __init__(self, paths: Sequence[Path], options: Options) -> None:
        """Check and index every line. Raises ValueError that names file, line and field."""
        self.paths, self.options = list(paths), options
        self.files: list[BinaryIO] = []
        self.sha256: list[str] = []
        self.with_labels = 0
        offsets: list[int] = []
        files: list[int] = []
        tasks: list[int] = []
        numbers: dict[Task, int] = {}
        for file_number, path in enumerate(self.paths):
            before = len(offsets)
            for offset, row in self._check(path):
                offsets.append(offset)
                files.append(file_number)
                tasks.append(numbers.setdefault(row.task, len(numbers)))
                self.with_labels += row.positive_scores is not None
            if len(offsets) == before:
                raise ValueError(f"{path} has no line. Expected is one JSON object a line. Write the file again.")
        self.tasks = list(numbers)
        self.offset, self.file = np.array(offsets, np.int64), np.array(files, np.uint16)
        self.task = np.array(tasks, np.int32)
        for number, task in enumerate(self.tasks):  # alone in its batch, a line has no negatives but its own
            lines = np.flatnonzero(self.task == number)
            if len(lines) == 1 and not self[int(lines[0])].negatives[: self._limit(task)]:
                raise ValueError(f"{self.places([int(lines[0])])}: no negative, and the task has no other line. "
                                 "Expected is at least one negative. Give some, or more lines of that task.")

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, number: int) -> Row:
        """Read line `number` again from its file."""
        file = self.files[self.file[number]]
        file.seek(self.offset[number])
        path = self.paths[self.file[number]]
        return parse(file.readline(), f"{path} at byte {self.offset[number]}", path.stem, self.options.instruction)

    def places(self, numbers: Iterable[int]) -> str:
        """Where lines stand, for messages: "FILE lines 3, 8; OTHER lines 1"."""
        found = []
        for file_number, path in enumerate(self.paths):
            offsets = {int(self.offset[n]) for n in numbers if self.file[n] == file_number}
            if offsets:
                with path.open("rb") as file:  # its own, since another thread may read the next batch
                    ends = accumulate(map(len, file), initial=0)
                    lines = [str(line) for line, offset in enumerate(ends, start=1) if offset in offsets]
                found.append(f"{path} line{'s' if len(lines) > 1 else ''} {', '.join(lines)}")
        return "; ".join(found)

    def first_line(self, task: Task) -> str:
        """Where a task's first line stands."""
        return self.places([int(np.flatnonzero(self.task == self.tasks.index(task))[0])])

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Line numbers of every batch of an epoch: each line once, one task a batch, in a new order."""
        by_task: list[list[np.ndarray]] = []
        for number, task in enumerate(self.tasks):
            draw = np.random.default_rng([self.options.seed, epoch, number])
            lines = draw.permutation(np.flatnonzero(self.task == number))
            size = self.options.queries if self.in_batch(task) else self.options.queries_symmetric
            cuts = list(range(size, len(lines), size))
            if size > 1 and len(lines) % size == 1 and cuts:
                cuts.pop()  # a query left alone would have no passage of others to see
            by_task.append(np.split(lines, cuts))
        flat = [batch for some in by_task for batch in some]
        order = np.random.default_rng([self.options.seed, epoch, len(by_task)]).permutation(len(flat))
        batches = [flat[i] for i in order]
        if self.options.order == "sts-first":
            batches.sort(key=lambda batch: self.tasks[self.task[batch[0]]].kind != "symmetric_sts")
        return batches

    def in_batch(self, task: Task) -> bool:
        """Whether a query of that task sees the other passages of its batch."""
        return {"all": True, "none": False, "by-type": KINDS[task.kind].in_batch}[self.options.in_batch]

    def batch(self, numbers: np.ndarray, *, epoch: int, step: int) -> Batch:
        """Read the lines of a batch, draw each query's positive and the examples, and lay out the groups."""
        rows = [self[int(n)] for n in numbers]
        passages: list[str] = []
        groups, teacher = [], []
        for number, row in zip(numbers, rows, strict=True):
            chosen = random.Random(f"{self.options.seed} {epoch} {number}").randrange(len(row.positives))
            texts, scores = self._group(row, chosen)
            groups.append(list(range(len(passages), len(passages) + len(texts))))
            teacher.append(scores)
            passages += texts
        task = rows[0].task
        return Batch(
            task=task, rows=[int(n) for n in numbers], queries=[row.query for row in rows], passages=passages,
            groups=_groups(groups, rows, passages), teacher_QC=_rectangle(teacher, math.nan, torch.float32),
            in_batch=self.in_batch(task), examples=self._examples(numbers, rows, passages, step))

    def _limit(self, task: Task) -> int:
        """How many hard negatives of a line are used."""
        own_limit = KINDS[task.kind].negatives
        return self.options.negatives if own_limit is None else own_limit

    def _group(self, row: Row, chosen: int) -> tuple[list[str], list[float]]:
        """The drawn positive and the hard negatives, with their scores (NaN: none)."""
        limit = self._limit(row.task)
        texts = [row.positives[chosen], *row.negatives[:limit]]
        if row.positive_scores is None or row.negative_scores is None:
            return texts, [math.nan] * len(texts)
        return texts, [row.positive_scores[chosen], *row.negative_scores[:limit]]

    def _examples(
        self, numbers: np.ndarray, rows: list[Row], passages: list[str], step: int,
    ) -> list[list[Example]]:
        """0 to max_examples solved queries of the task for the batch, or for each query.

        They show none of the batch's texts, and no known positive of its queries.
        """
        draw = random.Random(f"{self.options.seed} examples {step}")
        taken = {fold(text) for row in rows for text in (row.query, *row.positives)} | set(map(fold, passages))
        others = self.task == self.task[numbers[0]]
        others[numbers] = False
        pool = np.flatnonzero(others)
        lists = []
        for _ in range(1 if self.options.examples_per == "batch" else len(rows)):
            wanted = draw.randint(0, self.options.max_examples)
            examples: list[Example] = []
            for example in self._solved(pool, wanted, draw):
                if len(examples) == wanted:
                    break
                shown = {fold(example.query), fold(example.response)}
                if not shown & taken and example not in examples:
                    examples.append(example)
            lists.append(examples)
        return lists

    def _solved(self, pool: np.ndarray, wanted: int, draw: random.Random) -> Iterator[Example]:
        """Solved queries of drawn lines; more than are wanted, since one may show a text of the batch."""
        for _ in range(4 * wanted if len(pool) else 0):
            row = self[int(pool[draw.randrange(len(pool))])]
            yield Example(row.query, draw.choice(row.positives))

    def _check(self, path: Path) -> Iterator[tuple[int, Row]]:
        """Offset and content of each line of a file; its SHA-256 is noted on the way."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}). Expected is a file like "
                             "data/soft_labels.jsonl. Give its place with --data.") from None
        self.files.append(file)
        digest, offset = hashlib.sha256(), 0
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if line.strip():
                where = f"{path} line {number}"
                row = parse(line, where, path.stem, self.options.instruction)
                sees_batch = self.in_batch(row.task) and self.options.queries > 1
                if not sees_batch and not row.negatives[: self._limit(row.task)]:
                    why = "--negatives is 0" if row.negatives else "neg is empty"
                    raise ValueError(f"{where}: {why}, and type {row.task.kind} has no in-batch negatives. Expected is "
                                     "at least one negative. Give some, or use --in-batch all.")
                yield offset, row
            offset += len(line)
        self.sha256.append(digest.hexdigest())


def parse(line: bytes, where: str, file_name: str, instruction: str | None) -> Row:
    """Check one line; ValueError that names `where` and the field."""
    try:
        value = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at its byte {error.start}. Expected is UTF-8. "
                         "Save the file so.") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where}: not valid JSON ({reason}). Expected is one object a line. "
                         "Write the line again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a {type(value).__name__}. Expected is one JSON object with query and pos. "
                         "Correct it.")
    kind = value.get("type") or "normal"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}: type is {kind!r:.80}. Expected is one of {', '.join(KINDS)}. "
                         "Choose one, or leave it out.")
    prompt = value.get("prompt") or instruction
    if prompt is None:
        raise ValueError(f"{where}: prompt is missing. Expected is the task's instruction. "
                         "Give one, or use --instruction.")
    query = checked_text(value.get("query"), f"{where}: query")
    positives, negatives = (_texts(value, name, where) for name in ("pos", "neg"))
    if not positives:
        raise ValueError(f"{where}: pos is missing or empty. Expected is a list of at least one text. Give one.")
    name = checked_text(value.get("task") or file_name, f"{where}: task")
    task = Task(name, checked_text(prompt, f"{where}: prompt"), kind)
    positive_scores = _scores(value, "pos_scores", positives, where)
    negative_scores = _scores(value, "neg_scores", negatives, where)
    if not negatives and positive_scores is not None:
        negative_scores = []  # nothing to score, so neg_scores may be left out
    if (positive_scores is None) != (negative_scores is None):
        raise ValueError(f"{where}: one of pos_scores and neg_scores is missing. Expected are both, or neither. "
                         "Give the other.")
    return Row(task, query, positives, negatives, positive_scores, negative_scores)


def checked_text(value: Any, what: str) -> str:
    """The value, if it is a text that can be read; else ValueError that names `what`."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r:.60}. Expected is a text that is not empty. "
                         "Give one, or drop the line.")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{what} has {len(value):,} characters. Expected are at most {MAX_TEXT_CHARS:,}. "
                         "Cut the text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair at character {error.start}. "
                         "Expected is valid Unicode. Remove it.") from None
    return value


def _texts(value: dict[str, Any], name: str, where: str) -> list[str]:
    texts = value.get(name) or []
    if not isinstance(texts, list):
        raise ValueError(f"{where}: {name} is {texts!r:.60}. Expected is a list of texts. Put it in brackets.")
    return [checked_text(text, f"{where}: {name}[{n}]") for n, text in enumerate(texts)]


def _scores(value: dict[str, Any], name: str, texts: list[str], where: str) -> list[float] | None:
    scores = value.get(name)
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != len(texts):
        count = f"has {len(scores)} entries" if isinstance(scores, list) else f"is {scores!r:.60}"
        raise ValueError(f"{where}: {name} {count} for {len(texts)} {name[:3]} texts. "
                         f"Expected is one score for each text. Give them, or leave {name} out.")
    for n, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e30:
            raise ValueError(f"{where}: {name}[{n}] is {score!r:.60}. Expected is a finite number. "
                             "Score that text again, or drop it.")
    return [float(score) for score in scores]


def _groups(columns: list[list[int]], rows: list[Row], passages: list[str]) -> Groups:
    """Columns, and a number for each different text."""
    numbers: dict[str, int] = {}
    text_P = [numbers.setdefault(fold(text), len(numbers)) for text in passages]
    right: dict[str, dict[str, None]] = {}  # by query, which may stand on several lines: its own text, its positives
    for row in rows:
        texts = map(fold, (row.query, *row.positives))
        right.setdefault(fold(row.query), {}).update(dict.fromkeys(texts))
    known = [[numbers[text] for text in right[fold(row.query)] if text in numbers] for row in rows]
    return Groups(_rectangle(columns, -1, torch.int64), torch.tensor(text_P), _rectangle(known, -1, torch.int64))


def _rectangle(lists: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """Lists of different lengths as the rows of one tensor."""
    width = max(1, *map(len, lists)) if lists else 1
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in lists], dtype=dtype)
