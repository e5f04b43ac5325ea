"""soft_labels.jsonl -> batches of one task: validated line by line, indexed, read when needed.

One JSON object per line (FlagEmbedding's schema):

    query        text                          pos, neg       lists of texts, hardest negatives first
    prompt       the task's instruction        pos_scores, neg_scores   teacher scores, one per text, or null
    type         see ref/task_types.py         task           name of the task (default: the file's name)

A first pass validates every line and keeps 22 bytes of it in memory (offset, file, task, place in the order of tasks):
files may be larger than memory.
Lines of one task name, instruction and type form a Task, and every batch is drawn from one. A negative that repeats the
query, a positive or an earlier negative of its line is dropped. Each draw depends only on the seed, the epoch and the
line or step: a run can start at any step and sees the same batches.
Source: arXiv 2409.15700 and its trainer (one task per batch, types, 7 negatives, in-context examples).
"""

import math
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ref.config import TrainConfig
from ref.loss.contrastive import CandidateIndex
from ref.task_types import TASK_TYPES, check_task_type
from ref.text.prompts import InContextExample
from ref.training.data_report import FIELDS, MINING, DataReport
from ref.utils.files import check_text, hash_file, parse_json_object, read_jsonl
from ref.utils.text import normalize_whitespace

OPEN_FILES = 200


class Task(NamedTuple):
    """What the lines of a batch have in common. Without an instruction queries are embedded as passages are."""

    name: str
    instruction: str | None
    type: str


@dataclass(frozen=True)
class TrainingExample:
    """One validated line."""

    task: Task
    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float] | None  # None: the line has no teacher scores
    negative_scores: list[float] | None
    num_dropped: int = 0  # negatives of the file that repeat the query, a positive or a negative


@dataclass(frozen=True)
class Batch:
    """Texts of one task, and which passages are candidates of which query."""

    task: Task
    lines: list[int]  # numbers of the lines in the data set
    queries: list[str]
    passages: list[str]
    candidates: CandidateIndex
    teacher_QC: Tensor  # fp32 raw scores; NaN where there is none
    in_batch_negatives: bool
    in_context_examples: list[list[InContextExample]]  # one list for the whole batch, or one per query


class SoftLabelDataset:
    """The lines of several files by number, and the batches of an epoch."""

    def __init__(self, paths: Sequence[Path], config: TrainConfig) -> None:
        """Validate and index every line. Raises ValueError that names file, line and field."""
        self.paths, self.config = list(paths), config
        self.names = _task_names(self.paths)
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()
        self.report = DataReport(config.teacher_temperature)
        self.sha256: list[str] = []
        self.num_with_labels = self.num_without_prompt = 0
        offsets: list[int] = []
        files: list[int] = []
        tasks: list[int] = []
        numbers: dict[Task, int] = {}
        for file_number, path in enumerate(self.paths):
            before = len(offsets)
            for offset, example in self._read(path, self.names[file_number]):
                offsets.append(offset)
                files.append(file_number)
                tasks.append(numbers.setdefault(example.task, len(numbers)))
                self.num_with_labels += example.positive_scores is not None
            if len(offsets) == before:
                raise ValueError(f"{path}: must have at least one line")
        self.tasks = list(numbers)
        self.offset, self.file = np.array(offsets, np.int64), np.array(files, np.uint16)
        self.task = np.array(tasks, np.int32)
        self.by_task = np.argsort(self.task, kind="stable")
        self.task_bounds = np.searchsorted(self.task[self.by_task], np.arange(len(self.tasks) + 1))
        self._check_single_lines()
        if config.instruction is not None and not self.num_without_prompt and not config.resume:
            raise ValueError("--instruction is for lines without 'prompt' (every line has one)")
        if config.contrastive_weight == 0 and self.num_with_labels == 0:
            raise ValueError("--contrastive-weight 0 trains on soft labels alone, but no line has 'pos_scores' and "
                             "'neg_scores'")

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, number: int) -> TrainingExample:
        """Read line `number` again from its file."""
        file_number = int(self.file[number])
        file = self._open(file_number)
        file.seek(self.offset[number])
        where = f"{self.paths[file_number]} (byte {self.offset[number]})"
        return parse_example(parse_json_object(file.readline(), where), where, self.names[file_number],
                             self.config.instruction)

    def _open(self, file_number: int) -> BinaryIO:
        """A handle of a file, one of the OPEN_FILES used last: systems allow about a thousand."""
        if file_number not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[file_number] = self.paths[file_number].open("rb")
        self.files.move_to_end(file_number)
        return self.files[file_number]

    def locations(self, numbers: Iterable[int]) -> str:
        """File and line numbers for messages: "FILE:3, FILE:8, OTHER:1"."""
        found = []
        for file_number, path in enumerate(self.paths):
            offsets = {int(self.offset[n]) for n in numbers if self.file[n] == file_number}
            if offsets:
                with path.open("rb") as file:  # a handle of its own: another thread may read the next batch
                    starts = accumulate(map(len, file), initial=0)
                    found += [f"{path}:{line}" for line, offset in enumerate(starts, start=1) if offset in offsets]
        return ", ".join(found)

    def first_location(self, task: Task) -> str:
        """File and line number of a task's first line."""
        return self.locations([int(self.lines_of(self.tasks.index(task))[0])])

    def lines_of(self, task: int) -> np.ndarray:
        """Numbers of a task's lines, in the order of the files."""
        return self.by_task[self.task_bounds[task] : self.task_bounds[task + 1]]

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Line numbers of every batch of an epoch: each line once, one task per batch, shuffled.

        A last batch of one query joins the batch before it: it would have no in-batch negatives.
        """
        by_task: list[list[np.ndarray]] = []
        for number, task in enumerate(self.tasks):
            draw = np.random.default_rng([self.config.seed, epoch, number])
            lines = draw.permutation(self.lines_of(number))
            in_batch = self.has_in_batch_negatives(task)
            size = self.config.batch_size if in_batch else self.config.batch_size_symmetric
            bounds = list(range(size, len(lines), size))
            if size > 1 and len(lines) % size == 1 and bounds:
                bounds.pop()
            by_task.append(np.split(lines, bounds))
        batches = [batch for task_batches in by_task for batch in task_batches]
        order = np.random.default_rng([self.config.seed, epoch, len(by_task)]).permutation(len(batches))
        return [batches[i] for i in order]

    def has_in_batch_negatives(self, task: Task) -> bool:
        """Whether queries of that task use the other passages of the batch as negatives."""
        by_type = TASK_TYPES[task.type].in_batch_negatives
        return {"all": True, "none": False, "by-type": by_type}[self.config.in_batch_negatives]

    def batch(self, numbers: np.ndarray, *, epoch: int, step: int) -> Batch:
        """Read the lines of a batch, draw each query's positive and the in-context examples."""
        examples = [self[int(n)] for n in numbers]
        passages: list[str] = []
        columns, teacher = [], []
        for number, example in zip(numbers, examples, strict=True):
            drawn = random.Random(f"{self.config.seed} {epoch} {number}").randrange(len(example.positives))
            texts, scores = self._candidates(example, drawn)
            columns.append(list(range(len(passages), len(passages) + len(texts))))
            teacher.append(scores)
            passages += texts
        task = examples[0].task
        return Batch(
            task=task, lines=[int(n) for n in numbers], queries=[example.query for example in examples],
            passages=passages, candidates=_candidate_index(columns, examples, passages),
            teacher_QC=_pad(teacher, math.nan, torch.float32), in_batch_negatives=self.has_in_batch_negatives(task),
            in_context_examples=self._in_context_examples(numbers, examples, passages, step))

    def _num_negatives(self, task: Task) -> int:
        """How many hard negatives of a line are used, at most."""
        of_type = TASK_TYPES[task.type].max_negatives
        return self.config.num_negatives if of_type is None else of_type

    def _candidates(self, example: TrainingExample, drawn: int) -> tuple[list[str], list[float]]:
        """The drawn positive and the hard negatives, with their scores (NaN: none)."""
        limit = self._num_negatives(example.task)
        texts = [example.positives[drawn], *example.negatives[:limit]]
        if example.positive_scores is None or example.negative_scores is None:
            return texts, [math.nan] * len(texts)
        return texts, [example.positive_scores[drawn], *example.negative_scores[:limit]]

    def _in_context_examples(
        self, numbers: np.ndarray, batch: list[TrainingExample], passages: list[str], step: int,
    ) -> list[list[InContextExample]]:
        """Draw 0 to max_examples other lines of the task, for the batch or for each query.

        They contain no text of the batch and no known positive of its queries.
        """
        draw = random.Random(f"{self.config.seed} examples {step}")
        if self.tasks[self.task[numbers[0]]].instruction is None:
            return [[]]
        used = {normalize_whitespace(text) for line in batch for text in (line.query, *line.positives)}
        used |= set(map(normalize_whitespace, passages))
        others = self.task == self.task[numbers[0]]
        others[numbers] = False
        pool = np.flatnonzero(others)
        lists = []
        for _ in range(1 if self.config.examples_per == "batch" else len(batch)):
            wanted = draw.randint(0, self.config.max_examples)
            chosen: list[InContextExample] = []
            for example in self._draw_examples(pool, wanted, draw):
                if len(chosen) == wanted:
                    break
                shown = {normalize_whitespace(example.query), normalize_whitespace(example.response)}
                if not shown & used and example not in chosen:
                    chosen.append(example)
            lists.append(chosen)
        return lists

    def _draw_examples(self, pool: np.ndarray, wanted: int, draw: random.Random) -> Iterator[InContextExample]:
        """Random lines of the pool as examples; more than wanted, because some may contain a text of the batch."""
        for _ in range(4 * wanted if len(pool) else 0):
            example = self[int(pool[draw.randrange(len(pool))])]
            yield InContextExample(example.query, draw.choice(example.positives))

    def _read(self, path: Path, name: str) -> Iterator[tuple[int, TrainingExample]]:
        """Offset and content of each line of a file; hashes it."""
        for line in read_jsonl(path):
            example = parse_example(line.value, line.where, name, self.config.instruction)
            scores = [*(example.positive_scores or []), *(example.negative_scores or [])]
            self.report.add(path, scores, example.num_dropped, line.value.keys() - {*FIELDS, MINING})
            self.num_without_prompt += not line.value.get("prompt")
            in_batch = self.has_in_batch_negatives(example.task) and self.config.batch_size > 1
            if not in_batch and not example.negatives[: self._num_negatives(example.task)]:
                repeated = "only texts that repeat the query or a positive" if example.num_dropped else "none"
                got = "--num-negatives 0" if example.negatives else repeated
                raise ValueError(f"{line.where}: 'neg' must have a text for type {example.task.type}, which has no "
                                 f"in-batch negatives (got {got})")
            yield line.offset, example
        self.sha256.append(hash_file(path))

    def _check_single_lines(self) -> None:
        """A task with a single line has no in-batch negatives, so the line needs a hard negative."""
        for number, task in enumerate(self.tasks):
            lines = self.lines_of(number)
            if len(lines) == 1 and not self[int(lines[0])].negatives[: self._num_negatives(task)]:
                raise ValueError(f"{self.locations([int(lines[0])])}: 'neg' must have a text, because the task has no "
                                 "other line")


def _task_names(paths: Sequence[Path]) -> list[str]:
    """The name of each file's task: its stem, behind as many of its folders as make it unique.

    Raises ValueError for a file that is given twice.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]  # links are not followed: their names say more
    if twice := [path for path, times in Counter(absolute).items() if times > 1]:
        raise ValueError(f"--data: {twice[0]} is given twice")
    names = [""] * len(paths)
    for folders in range(max(len(path.parts) for path in absolute) - 1):
        endings = ["/".join([*path.parts[max(1, len(path.parts) - 1 - folders) : -1], path.stem]) for path in absolute]
        count = Counter(endings)
        names = [name or (ending if count[ending] == 1 else "") for name, ending in zip(names, endings, strict=True)]
    return [name or str(path) for name, path in zip(names, absolute, strict=True)]


def parse_example(value: dict[str, Any], where: str, file_name: str, instruction: str | None) -> TrainingExample:
    """Validate one line; ValueError that names `where` and the field."""
    task_type = check_task_type(value.get("type") or "normal", f"{where}: 'type'")
    query = check_text(value.get("query"), f"{where}: 'query'")
    positives, negatives = (_texts(value, name, where) for name in ("pos", "neg"))
    if not positives:
        raise ValueError(f"{where}: 'pos' must have at least one text")
    prompt = value.get("prompt") or instruction
    if prompt is None:
        raise ValueError(f"{where}: 'prompt' is missing; give the task's instruction there or with --instruction, "
                         "or train without one: --instruction none")
    name = check_text(value.get("task") or file_name, f"{where}: 'task'")
    no_prompt = not value.get("prompt") and prompt in ("none", "")
    task = Task(name, None if no_prompt else check_text(prompt, f"{where}: 'prompt'").strip(), task_type)
    positive_scores = _scores(value, "pos_scores", positives, where)
    negative_scores = _scores(value, "neg_scores", negatives, where)
    if not negatives and positive_scores is not None:
        negative_scores = []  # neg_scores may be absent if there is nothing to score
    if (positive_scores is None) != (negative_scores is None):
        missing = "pos_scores" if positive_scores is None else "neg_scores"
        raise ValueError(f"{where}: {missing!r} is missing; give both 'pos_scores' and 'neg_scores', or neither")
    known = set(map(normalize_whitespace, (query, *positives)))
    first = {text: n for n, text in reversed(list(enumerate(map(normalize_whitespace, negatives))))}
    kept = sorted(n for text, n in first.items() if text not in known)
    return TrainingExample(
        task, query, positives, [negatives[n] for n in kept], positive_scores,
        None if negative_scores is None else [negative_scores[n] for n in kept], len(negatives) - len(kept))


def _texts(value: dict[str, Any], name: str, where: str) -> list[str]:
    texts = value.get(name) or []
    if not isinstance(texts, list):
        raise ValueError(f"{where}: {name!r} must be a list of texts (got {texts!r:.60})")
    return [check_text(text, f"{where}: '{name}[{n}]'") for n, text in enumerate(texts)]


def _scores(value: dict[str, Any], name: str, texts: list[str], where: str) -> list[float] | None:
    scores = value.get(name)
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != len(texts):
        got = f"{len(scores)} for {len(texts)}" if isinstance(scores, list) else f"{scores!r:.60}"
        raise ValueError(f"{where}: {name!r} must have one score per text in {name[:3]!r} (got {got})")
    for n, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e30:
            raise ValueError(f"{where}: '{name}[{n}]' must be a finite number (got {score!r:.60})")
    return [float(score) for score in scores]


def _candidate_index(columns: list[list[int]], batch: list[TrainingExample], passages: list[str]) -> CandidateIndex:
    """Candidate columns and a text id for each distinct text."""
    ids: dict[str, int] = {}
    text_id_P = [ids.setdefault(normalize_whitespace(text), len(ids)) for text in passages]
    known: dict[str, dict[str, None]] = {}  # query -> its own text and its positives, of all its lines
    for example in batch:
        texts = map(normalize_whitespace, (example.query, *example.positives))
        known.setdefault(normalize_whitespace(example.query), {}).update(dict.fromkeys(texts))
    known_ids = [[ids[text] for text in known[normalize_whitespace(example.query)] if text in ids] for example in batch]
    return CandidateIndex(_pad(columns, -1, torch.int64), torch.tensor(text_id_P), _pad(known_ids, -1, torch.int64))


def _pad(lists: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """Lists of different lengths as the rows of one tensor."""
    width = max(1, *map(len, lists)) if lists else 1
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in lists], dtype=dtype)
