"""In-context examples of a task: drawn from its training split, or read from a file or a folder of files.

An example is a query of the task with a correct response, which depends on the task's type:

    retrieval, reranking          the passage with the highest relevance
    classification, clustering    another text of the same class or cluster
    STS, summarisation            the other text of a pair with a gold score of at least 4 on a scale of 0 to 5
    pair classification           the other text of a pair with label 1

Texts of a scored split are excluded, even if the training split repeats them: in retrieval and reranking the scored
queries and the passages relevant to them (the other passages belong to both splits), elsewhere all texts.

Importing this file imports mteb (three seconds). Written for mteb 2.26.
"""

import copy
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

import datasets
from mteb.abstasks.abstask import AbsTask

from ref.evaluation.local_data import link_files
from ref.evaluation.tasks import benchmark_tasks, earlier_names, unknown_name
from ref.text.prompts import InContextExample
from ref.utils.files import check_text, check_type, read_json, read_json_list
from ref.utils.text import normalize_whitespace

MIN_GOLD = 0.8  # of the gold scale: 4 on a scale of 0 to 5


@dataclass(frozen=True)
class FewShotExamples:
    """In-context examples of a task, and a description of their source for the records."""

    examples: list[InContextExample]
    source: str


def draw_examples(task: AbsTask, count: int, *, seed: int) -> FewShotExamples:
    """Draw at most `count` examples from the task's training split; a function of task and seed.

    Without a usable training split there are no examples (zero-shot) and `source` gives the reason. The task is not
    modified: a copy loads the data. Raises ValueError for a negative count, and ConnectionError if the hub cannot be
    reached: that says nothing about the task.

    Source: arXiv 2409.15700 (a query and a relevant text); other task types and the alternation of classes: ours.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0 (got {count})")
    kind, split = str(task.metadata.type), getattr(task, "train_split", "train")
    if count == 0 or kind not in EXAMPLE_GROUPS:
        return _zero_shot(f"tasks of type {kind} have no examples" if count else "no examples requested")
    if split in task.eval_splits:
        return _zero_shot(f"the {split} split is scored")
    try:
        if split not in _declared_splits(task):
            return _zero_shot("the task has no training split")
        examples = _draw(task, split, count, Random(f"{task.metadata.name} {seed}"))
    except Exception as error:
        if _is_of_the_hub(error, task):
            raise ConnectionError(f"--examples: the training split of {task.metadata.name} cannot be read "
                                  f"({type(error).__name__}: {error!s:.200})") from None
        # an error of the data: the task is scored without examples
        return _zero_shot(f"the training split cannot be read ({type(error).__name__}: {error!s:.80})")
    if not examples:
        return _zero_shot(f"the {split} split has no usable pair")
    fewer = "" if len(examples) == count else f", {len(examples)} of {count} requested"
    return FewShotExamples(examples, f"{split} split, seed {seed}{fewer}")


def _is_of_the_hub(error: Exception, task: AbsTask) -> bool:
    """Whether the hub has failed, rather than the data; a set that is gated or missing is without examples."""
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
        return True
    is_local = Path(task.metadata.dataset["path"]).is_dir()
    return isinstance(error, OSError) and not is_local and not isinstance(
        error, datasets.exceptions.DatasetNotFoundError)


def _zero_shot(reason: str) -> FewShotExamples:
    return FewShotExamples([], f"none: {reason}, zero-shot")


def load_examples(
    tasks: Sequence[AbsTask], known_tasks: Iterable[str], *, count: int, path: Path | None, seed: int,
) -> dict[str, FewShotExamples]:
    """Examples by task name: those in the file or folder `path`, else `count` from each task's training split."""
    if path is None:
        return {task.metadata.name: draw_examples(task, count, seed=seed) for task in tasks} if count else {}
    found = (read_example_folder if path.is_dir() else read_example_file)(path, known_tasks)
    if not any(task.metadata.name in found for task in tasks):
        raise ValueError(f"--examples-file {path}: must have examples for a selected task (got "
                         f"{', '.join(found) or 'none'})")
    return found


# ---- from files ----------------------------------------------------------------------------------------------


def read_example_file(path: Path, known_tasks: Iterable[str]) -> dict[str, FewShotExamples]:
    """Read task name -> examples from a JSON file {"STS12": [{"query": "...", "response": "..."}, ...], ...}.

    An example may have its own `instruct`. Raises ValueError that names file, task and field for anything else, and for
    a name that is neither a task of the benchmark nor in `known_tasks`.
    """
    tasks = read_json(path)
    known = [*benchmark_tasks(), *known_tasks]
    for name in tasks:
        if name not in known:
            raise ValueError(f"{path}: {unknown_name('task', name, known)}")
    return {name: FewShotExamples(_parse_examples(rows, f"{path}: {name!r}"), f"file {path.name}")
            for name, rows in tasks.items()}


def read_example_folder(folder: Path, known_tasks: Iterable[str]) -> dict[str, FewShotExamples]:
    """Read a folder with one JSON list per task, `TASK.json`, the form in which BGE-EN-ICL's examples are published.

    Files named after an earlier version of a task of the benchmark, or after a collection of tasks, serve those made
    from it. Files of other tasks are listed and not read. Raises ValueError if none can be used or one is malformed.
    """
    sources = {name: (name, *earlier_names(name)) for name in dict.fromkeys((*benchmark_tasks(), *known_tasks))}
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    chosen = {name: files[found[0]] for name, names in sources.items() if (found := [n for n in names if n in files])}
    if not chosen:
        raise ValueError(f"--examples-file {folder}: must hold a file TASK.json for a task, such as STS12.json (got "
                         f"{', '.join(path.name for path in files.values()) or 'no .json file'})")
    unused = sorted(set(files) - {path.stem for path in chosen.values()})
    if unused:
        print(f"examples: {len(unused)} of {len(files)} files are of other tasks ({', '.join(unused)})")
    parsed = {path: _parse_examples(read_json_list(path), str(path)) for path in sorted(set(chosen.values()))}
    return {name: FewShotExamples(parsed[path], f"file {path.name}") for name, path in chosen.items()}


def _parse_examples(rows: Any, where: str) -> list[InContextExample]:
    check_type(rows, list, where, 'a list of {"query": "...", "response": "..."}')
    return [_parse_example(row, f"{where}, example {n}") for n, row in enumerate(rows, start=1)]


def _parse_example(row: Any, where: str) -> InContextExample:
    check_type(row, dict, where, 'an object {"query": "...", "response": "..."}')
    for field in row:
        if field not in ("instruct", "query", "response"):
            raise ValueError(f"{where}: {field!r:.60} is unknown (only instruct, query, response)")
    query, response = (check_text(row.get(field), f"{where}: {field!r}") for field in ("query", "response"))
    instruct = row.get("instruct")
    return InContextExample(query, response, None if instruct is None else check_text(instruct, f"{where}: 'instruct'"))


# ---- drawing -------------------------------------------------------------------------------------------------


def _draw(task: AbsTask, split: str, count: int, random: Random) -> list[InContextExample]:
    loaded = _load(task, split)
    subsets = _by_subset(loaded)
    excluded = {_key(text) for data in subsets for name in task.eval_splits for text in _texts(data[name])} | {""}
    groups = [group for data in subsets for group in EXAMPLE_GROUPS[str(task.metadata.type)](task, data[split])]
    examples: list[InContextExample] = []
    for pair in _pairs(groups, excluded, random):
        keys = {_key(pair.query), _key(pair.response)}
        if not keys & excluded:
            examples.append(pair)
            excluded |= keys
        if len(examples) == count:
            break
    loaded.unload_data()
    return examples


def _pairs(groups: Sequence[Sequence[str]], excluded: Collection[str], random: Random) -> Iterator[InContextExample]:
    """Pairs of texts of the same group, groups in random order and one pair of each in turn: few examples show several
    classes.
    """
    usable: list[list[str]] = []
    for group in random.sample(groups, len(groups)):
        texts = [text for key, text in {_key(text): text for text in group}.items() if key not in excluded]
        usable.append(texts if len(group) == 2 else random.sample(texts, len(texts)))  # two: a query and its response
    for turn in zip_longest(*(zip(texts[::2], texts[1::2], strict=False) for texts in usable)):
        yield from (InContextExample(*pair) for pair in turn if pair)


def _key(text: str) -> str:
    """Equal for texts that differ only in case or white space."""
    return normalize_whitespace(text.casefold())


# ---- training data of a subset -> groups by task type: [query, response], or all texts of a class ------------


def _relevant_pairs(_: Any, data: Any) -> list[list[str]]:
    queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
    passages = _relevant_passages(data)  # mteb's order of queries differs between runs
    return [[queries[query], passages[query][0]] for query in sorted(queries) if passages.get(query)]


def _classes(task: Any, rows: Any) -> list[list[str]]:
    members: dict[str, list[str]] = {}
    for text, label in _cells(rows, task.input_column_name, task.label_column_name):
        members.setdefault(str(label), []).append(text)
    return list(members.values())


def _similar_pairs(task: Any, rows: Any) -> list[list[str]]:
    return [[a, b] for a, b, gold in _cells(rows, *task.column_names, "score") if _is_high(task, gold)]


def _positive_pairs(task: Any, rows: Any) -> list[list[str]]:
    columns = (task.input1_column_name, task.input2_column_name, task.label_column_name)
    return [[a, b] for a, b, label in _cells(rows, *columns) if label == 1]


def _summary_pairs(task: Any, rows: Any) -> list[list[str]]:
    """A human and a machine summary of the same document, which are what mteb compares."""
    columns = (task.human_summaries_column_name, task.machine_summaries_column_name, task.relevancy_column_name)
    return [[human[0], machine] for human, machines, golds in zip(*(rows[c] for c in columns), strict=True)
            for machine, gold in zip(machines, golds, strict=True) if human and _is_high(task, gold)]


EXAMPLE_GROUPS: Mapping[str, Callable[[Any, Any], list[list[str]]]] = {
    "Retrieval": _relevant_pairs, "Reranking": _relevant_pairs, "Classification": _classes, "Clustering": _classes,
    "STS": _similar_pairs, "PairClassification": _positive_pairs, "Summarization": _summary_pairs,
}


def _is_high(task: Any, gold: float) -> bool:
    scale = task.max_score - task.min_score
    return gold >= task.min_score + MIN_GOLD * scale - 1e-6  # in floating point 1 + 0.8 x 3 is above 3.4


# ---- mteb's data ---------------------------------------------------------------------------------------------


def _declared_splits(task: AbsTask) -> list[str]:
    """The splits of the data set (in retrieval of its judgements), without loading it.

    Checked first, because mteb's loader replaces a missing split by the only one there is.
    """
    dataset = task.metadata.dataset
    path, revision, config = dataset["path"], dataset.get("revision"), dataset.get("name")
    with tempfile.TemporaryDirectory() as scratch:
        options = {}
        if Path(path).is_dir():  # uncached and through links, as in LocalDataMixin
            options = {"cache_dir": f"{scratch}/cache"}
            link_files(Path(path), Path(scratch) / "data")
            path = f"{scratch}/data"
        if EXAMPLE_GROUPS[str(task.metadata.type)] is _relevant_pairs:
            configs = datasets.get_dataset_config_names(path, revision=revision)
            if configs == ["default"] and datasets.config.HF_HUB_OFFLINE and not options:
                raise ConnectionError("offline, and the cache does not say which splits there are")
            if "corpus" not in configs:  # a folder without README.md: test data only
                return []
            config = "default" if "default" in configs else "qrels"
        elif task.metadata.is_multilingual and not task.fast_loading:
            config = task.hf_subsets[0]
        return datasets.get_dataset_split_names(path, config, revision=revision, **options)


def _load(task: AbsTask, split: str) -> AbsTask:
    """A copy of the task with the scored splits and `split` loaded."""
    loaded = copy.copy(task).filter_eval_splits([split, *task.eval_splits])
    loaded.data_loaded = False
    loaded.load_data()
    for data in _by_subset(loaded):
        if split not in data:  # most clustering classes drop it
            with tempfile.TemporaryDirectory() as cache:
                rows = datasets.load_dataset(**loaded.metadata.dataset, split=split, cache_dir=cache)
                data[split] = datasets.Dataset.from_dict(rows.to_dict())
    return loaded


def _by_subset(task: AbsTask) -> list[Any]:
    """Split -> data for each subset; mteb omits the level of subsets if there is only one."""
    data: Any = task.dataset
    return [data if subset == "default" and subset not in data else data[subset] for subset in task.hf_subsets]


def _texts(data: Any) -> Iterator[str]:
    """The texts of a scored split that are excluded."""
    if "relevant_docs" in data:
        yield from data["queries"]["text"]
        yield from (passage for passages in _relevant_passages(data).values() for passage in passages)
    else:
        yield from (text for column in data.column_names for value in data[column] for text in _strings(value))


def _relevant_passages(data: Any) -> dict[str, list[str]]:
    """Query id -> its relevant passages, highest relevance first; title and text are joined as mteb does."""
    row_of = {identifier: row for row, identifier in enumerate(data["corpus"]["id"])}
    found: dict[str, list[str]] = {}
    for query, judgements in data["relevant_docs"].items():
        relevant = sorted((-score, name) for name, score in judgements.items() if score > 0 and name in row_of)
        documents = [data["corpus"][row_of[name]] for _, name in relevant]
        found[query] = [f"{document.get('title') or ''} {document['text']}".strip() for document in documents]
    return found


def _cells(rows: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows as tuples; older data sets have lists of many texts in one row."""
    for values in zip(*(rows[column] for column in columns), strict=True):
        yield from zip(*values, strict=True) if isinstance(values[0], list) else [values]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))
