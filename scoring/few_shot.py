"""In-context examples of a task at scoring time: from its training split, or from a user's file.

An example is a query of the task and a good response to it; what a response is depends on the task's type:

    retrieval, reranking          the passage judged most relevant
    classification, clustering    another text of the same class or cluster
    STS, summarisation            the other text of a pair, gold score at least 4 of 5 (of the task's own scale)
    pair classification           the other text of a pair with label 1

Nothing of a scored split gets in, even where the training split repeats it: in retrieval and reranking neither a
scored query nor a passage relevant to one (other passages are common to both splits), elsewhere no text at all.
Called by run_eval.py and score.py. Importing this file imports mteb (three seconds). Facts about mteb: version 2.26.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

import datasets
from mteb.abstasks.abstask import AbsTask

from ref.mining import fold
from ref.prompts import Example
from scoring.tasks import benchmark_tasks, unknown

STRONG = 0.8  # of the gold scale: 4 of 5


@dataclass(frozen=True)
class FewShot:
    """The examples of a task, and a few words for the result table on where they are from."""

    examples: list[Example]
    source: str


def examples_for(task: AbsTask, count: int, *, seed: int) -> FewShot:
    """At most `count` examples, the same at each call with this seed; none (zero-shot) without a training split.

    The task is not touched: a copy of it reads the data. Raises ValueError for a negative count; if the data cannot
    be read, that is no error but zero-shot, and `source` says why.

    Source: arXiv 2409.15700 (a query and a relevant text). What stands for these in
    other types, and classes in turn: ours.
    """
    if count < 0:
        raise ValueError(f"count is {count}. Expected is a number of examples, 0 or more. Correct it.")
    kind, split = str(task.metadata.type), getattr(task, "train_split", "train")
    if count == 0 or kind not in RULES:
        return _zero_shot(f"no rule for tasks of type {kind}" if count else "no examples asked for")
    if split in task.eval_splits:
        return _zero_shot(f"the {split} split is scored")
    try:
        if split not in _declared_splits(task):
            return _zero_shot("the task has no training split")
        examples = _drawn(task, split, count, Random(f"{task.metadata.name} {seed}"))
    except Exception as error:  # hub and data sets have many; scoring goes on, and the table says so
        return _zero_shot(f"the training split cannot be read ({type(error).__name__}: {error!s:.80})")
    if not examples:
        return _zero_shot(f"the {split} split has no pair that may be shown")
    short = "" if len(examples) == count else f", {len(examples)} of the {count} asked for"
    return FewShot(examples, f"{split} split, seed {seed}{short}")


def _zero_shot(reason: str) -> FewShot:
    return FewShot([], f"none: {reason}, zero-shot")


def examples_from_file(path: str | Path, known_tasks: Iterable[str]) -> dict[str, list[Example]]:
    """Task name -> examples, from a JSON file {"STS12": [{"query": "...", "response": "..."}, ...], ...}.

    Raises: ValueError with file, task and field for other content, or a name that is neither the benchmark's nor
    in `known_tasks`.
    """
    try:
        tasks = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Expected: a readable JSON file. Correct the path or the file.") from None
    expected = 'Expected: {"STS12": [{"query": "...", "response": "..."}]}. Correct it.'
    if not isinstance(tasks, dict):
        raise ValueError(f"{path}: JSON of type {type(tasks).__name__}. {expected}")
    known = [*benchmark_tasks(), *known_tasks]
    for name, rows in tasks.items():
        if name not in known:
            raise ValueError(f"{path}: {unknown('task', name, known)}")
        if not isinstance(rows, list):
            raise ValueError(f"{path}, {name}: {rows!r:.60} is not a list. {expected}")
    return {name: [_example(row, f"{path}, {name}, example {n}") for n, row in enumerate(rows, start=1)]
            for name, rows in tasks.items()}


def _example(row: Any, place: str) -> Example:
    given = row if isinstance(row, dict) else {}
    for field in ("query", "response", *given):
        text = given.get(field)
        if field not in ("query", "response") or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: {field!r} is {text!r:.60}. Expected: query and response, both a text that "
                             "is not empty, and nothing else. Correct it.")
    return Example(given["query"], given["response"])


# ---- drawing -------------------------------------------------------------------------------------------------


def _drawn(task: AbsTask, split: str, count: int, draw: Random) -> list[Example]:
    loaded = _load(task, split)
    subsets = _by_subset(loaded)
    barred = {_key(text) for data in subsets for name in task.eval_splits for text in _texts(data[name])} | {""}
    groups = [group for data in subsets for group in RULES[str(task.metadata.type)](task, data[split])]
    examples: list[Example] = []
    for pair in _pairs(groups, barred, draw):
        keys = {_key(pair.query), _key(pair.response)}
        if not keys & barred:
            examples.append(pair)
            barred |= keys
        if len(examples) == count:
            break
    loaded.unload_data()
    return examples


def _pairs(groups: Sequence[Sequence[str]], barred: Collection[str], draw: Random) -> Iterator[Example]:
    """Groups in random order, a pair of each in turn: so few examples show several classes."""
    chosen: list[list[str]] = []
    for group in draw.sample(groups, len(groups)):
        texts = [text for key, text in {_key(text): text for text in group}.items() if key not in barred]
        chosen.append(texts if len(group) == 2 else draw.sample(texts, len(texts)))  # two: a query and its response
    for turn in zip_longest(*(zip(texts[::2], texts[1::2], strict=False) for texts in chosen)):
        yield from (Example(*pair) for pair in turn if pair)


def _key(text: str) -> str:
    """Texts that differ only in case or blanks are one."""
    return fold(text.casefold())


# ---- one rule a type: the training data of a subset -> groups, [query, response] or all texts of a class -------


def _relevant(_: Any, data: Any) -> list[list[str]]:
    queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
    passages = _relevant_passages(data)  # in an order that differs from run to run
    return [[queries[query], passages[query][0]] for query in sorted(queries) if passages.get(query)]


def _same_class(task: Any, rows: Any) -> list[list[str]]:
    members: dict[str, list[str]] = {}
    for text, label in _cells(rows, task.input_column_name, task.label_column_name):
        members.setdefault(str(label), []).append(text)
    return list(members.values())


def _same_meaning(task: Any, rows: Any) -> list[list[str]]:
    return [[a, b] for a, b, gold in _cells(rows, *task.column_names, "score") if _strong(task, gold)]


def _same_label(task: Any, rows: Any) -> list[list[str]]:
    columns = (task.input1_column_name, task.input2_column_name, task.label_column_name)
    return [[a, b] for a, b, label in _cells(rows, *columns) if label == 1]


def _summaries(task: Any, rows: Any) -> list[list[str]]:
    """A person's summary and a machine's of the same document: these are what mteb compares."""
    columns = (task.human_summaries_column_name, task.machine_summaries_column_name, task.relevancy_column_name)
    return [[people[0], machine] for people, machines, golds in zip(*(rows[c] for c in columns), strict=True)
            for machine, gold in zip(machines, golds, strict=True) if people and _strong(task, gold)]


RULES: Mapping[str, Callable[[Any, Any], list[list[str]]]] = {
    "Retrieval": _relevant, "Reranking": _relevant, "Classification": _same_class, "Clustering": _same_class,
    "STS": _same_meaning, "PairClassification": _same_label, "Summarization": _summaries,
}  # fmt: skip


def _strong(task: Any, gold: float) -> bool:
    return gold >= task.min_score + STRONG * (task.max_score - task.min_score) - 1e-6  # 1 + 0.8 x 3 is not quite 3.4


# ---- mteb's data ---------------------------------------------------------------------------------------------


def _declared_splits(task: AbsTask) -> list[str]:
    """The splits of the data set, of its judgements in retrieval, without reading it.

    Asked first because mteb's loader, told to read a split that is not there, takes the only one that is.
    """
    place = task.metadata.dataset
    path, revision, config = place["path"], place.get("revision"), place.get("name")
    if RULES[str(task.metadata.type)] is _relevant:
        configs = datasets.get_dataset_config_names(path, revision=revision)
        if "corpus" not in configs:  # a folder without README.md: all of it is scored
            return []
        config = "default" if "default" in configs else "qrels"
    elif task.metadata.is_multilingual and not task.fast_loading:
        config = task.hf_subsets[0]
    with tempfile.TemporaryDirectory() as cache:  # a folder's files change: nothing old, as in FolderData (tasks.py)
        own = {"cache_dir": cache} if Path(path).is_dir() else {}
        return datasets.get_dataset_split_names(path, config, revision=revision, **own)


def _load(task: AbsTask, split: str) -> AbsTask:
    """A copy of the task that has read the scored splits and this one."""
    loaded = copy.copy(task).filter_eval_splits([split, *task.eval_splits])
    loaded.data_loaded = False
    loaded.load_data()
    for data in _by_subset(loaded):
        if split not in data:  # most clustering classes drop it
            with tempfile.TemporaryDirectory() as cache:
                rows = datasets.load_dataset(**task.metadata.dataset, split=split, cache_dir=cache)
                data[split] = datasets.Dataset.from_dict(rows.to_dict())
    return loaded


def _by_subset(task: AbsTask) -> list[Any]:
    """Split -> data, for each subset; mteb leaves out the level of subsets where there is one alone."""
    data: Any = task.dataset
    return [data if subset == "default" and subset not in data else data[subset] for subset in task.hf_subsets]


def _texts(data: Any) -> Iterator[str]:
    """What of a scored split must not be shown."""
    if "relevant_docs" in data:
        yield from data["queries"]["text"]
        yield from (passage for passages in _relevant_passages(data).values() for passage in passages)
    else:
        yield from (text for column in data.column_names for value in data[column] for text in _strings(value))


def _relevant_passages(data: Any) -> dict[str, list[str]]:
    """Query id -> its relevant passages in the corpus, best first; title and text as mteb joins them."""
    place = {identifier: row for row, identifier in enumerate(data["corpus"]["id"])}
    found: dict[str, list[str]] = {}
    for query, judged in data["relevant_docs"].items():
        relevant = sorted((-score, name) for name, score in judged.items() if score > 0 and name in place)
        documents = [data["corpus"][place[name]] for _, name in relevant]
        found[query] = [f"{document.get('title') or ''} {document['text']}".strip() for document in documents]
    return found


def _cells(rows: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows as tuples; older sets keep many rows in one, as lists of texts."""
    for values in zip(*(rows[column] for column in columns), strict=True):
        yield from zip(*values, strict=True) if isinstance(values[0], list) else [values]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))
