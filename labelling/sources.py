"""Pairs and corpus: indexed in one pass, read when needed.

    corpus    our own         {"id": "d1", "text": "…"}                             one JSON object a line
              BEIR            {"_id": "d1", "title": "…", "text": "…"}              text = title + " " + text
              FlagEmbedding   {"text": "…"}                                         no id: its number is one
    pairs     our own         {"query": "…", "pos": ["d1"], "prompt": "…", "type": "…", "task": "…"}
              BEIR            a folder with queries.jsonl and qrels/SPLIT.tsv
              FlagEmbedding   {"query": "…", "pos": ["the text itself"]}            where the corpus has no ids

Once indexed, a passage takes 24 bytes of memory (place, hash of id or text, order of its id) and a pair 28; while the
ids are put in order, some 220. Texts stay in the files.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ref.data import KINDS, checked_text
from ref.mining import fold
from ref.runs import write_whole


class Pair(NamedTuple):
    """A query with what is known of it."""

    where: str  # file and line, for messages
    query: str
    positives: list[str]  # ids, or texts where the corpus has no ids
    prompt: str | None
    kind: str
    task: str


class Corpus:
    """Passages by row, and rows by id."""

    def __init__(self, path: Path) -> None:
        """Check and index every line. Raises ValueError that names file, line and field."""
        self.path = path / "corpus.jsonl" if path.is_dir() else path
        offsets: list[int] = []
        keys: list[int] = []
        ids: list[str] = []
        digest = hashlib.sha256()
        self.has_ids = True
        for number, offset, value, line in _lines(self.path):
            where = f"{self.path} line {number}"
            text = _passage(value, where)
            name = value.get("_id", value.get("id"))
            if not offsets:
                self.has_ids = name is not None
            if (name is not None) != self.has_ids:
                raise ValueError(f"{where}: id is {'missing' if name is None else 'given'}, and the first line has "
                                 f"{'one' if self.has_ids else 'none'}. Expected is one for all lines, or for none.")
            label = _id(name, where) if self.has_ids else str(len(offsets) + 1)
            offsets.append(offset)
            ids.append(label)
            keys.append(_hash(label if self.has_ids else text))
            digest.update(line)
        if not offsets:
            raise ValueError(f"{self.path} holds no passage. Expected is one JSON object with id and text a line. "
                             "Write the file again.")
        self.sha256 = digest.hexdigest()
        self.file = self.path.open("rb")
        self.offset = np.array(offsets, np.int64)
        self.rank = np.empty(len(ids), np.int32)  # the order of ids: what breaks ties
        self.rank[np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int32)] = np.arange(len(ids))
        self.keys = np.array(keys, np.uint64)
        self.by_key = self.keys.argsort(kind="stable").astype(np.int32)
        self.keys = self.keys[self.by_key]
        if self.has_ids:
            self._refuse_duplicates()

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, row: int) -> tuple[str, str]:
        """Id and text of a passage."""
        self.file.seek(self.offset[row])
        value = json.loads(self.file.readline())
        where = f"{self.path} row {row}"
        return (_id(value.get("_id", value.get("id")), where) if self.has_ids else str(row + 1)), _passage(value, where)

    def row(self, name: str) -> int | None:
        """The row of an id (of a text, where the corpus has no ids); None if it is not there."""
        key = np.uint64(_hash(name))
        place = int(np.searchsorted(self.keys, key))
        while place < len(self.keys) and self.keys[place] == key:
            row = int(self.by_key[place])
            if self.read(row)[0 if self.has_ids else 1] == name:
                return row
            place += 1
        return None

    def blocks(self, size: int) -> Iterator[range]:
        """Rows, `size` at a time."""
        for start in range(0, len(self), size):
            yield range(start, min(start + size, len(self)))

    def _refuse_duplicates(self) -> None:
        for place in np.flatnonzero(self.keys[1:] == self.keys[:-1]):
            one, other = sorted(int(self.by_key[place + n]) for n in (0, 1))
            name = self.read(one)[0]
            if name == self.read(other)[0]:
                raise ValueError(f"{self.path}: id {name!r:.80} stands on more than one line (passages {one + 1} and "
                                 f"{other + 1}). Expected is each id once. Rename one or drop it.")


class Pairs:
    """Queries by row."""

    def __init__(self, path: Path, corpus: Corpus, *, split: str = "train") -> None:
        """Check every line, each positive's id too. Raises ValueError that names file, line and field."""
        self.path, self.corpus = path, corpus
        self.judged: dict[str, list[str]] = {}
        self.name, self.all_have_prompts = path.name.removesuffix(".jsonl"), True
        if path.is_dir():
            self.path = path / "queries.jsonl"
            self.judged = _qrels(path / "qrels" / f"{split}.tsv")
        offsets, numbers, keys = [], [], []
        digest = hashlib.sha256(json.dumps(self.judged, sort_keys=True).encode())
        unseen = set(self.judged)
        for number, offset, value, line in _lines(self.path):
            if self.judged:
                name = _id(value.get("_id"), f"{self.path} line {number}")
                if name not in self.judged:
                    continue  # a query of another split
                if name not in unseen:
                    raise ValueError(f"{self.path} line {number}: _id {name!r:.80} stands on an earlier line too. "
                                     "Expected is each query once. Rename one or drop it.")
                unseen.remove(name)
            pair = self._pair(value, number)
            self._check(pair)
            keys.append(_query_key(pair))
            self.all_have_prompts &= value.get("prompt") is not None
            offsets.append(offset)
            numbers.append(number)
            digest.update(line)
        if not offsets:
            raise ValueError(f"{self.path} holds no pair. Expected is one JSON object with query and pos a line. "
                             "Write the file again.")
        if unseen:
            raise ValueError(f"{path / 'qrels'}: {split}.tsv judges {len(unseen)} queries that {self.path} does not "
                             f"have, such as {min(unseen)!r:.80}. Expected is the file they belong to. Fetch both "
                             "again.")
        self.sha256 = digest.hexdigest()
        self.file = self.path.open("rb")
        self.offset, self.number = np.array(offsets, np.int64), np.array(numbers, np.int64)
        keys_N = np.array(keys, np.uint64)
        self.by_key = keys_N.argsort(kind="stable").astype(np.int32)
        self.keys = keys_N[self.by_key]

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, row: int) -> Pair:
        self.file.seek(self.offset[row])
        return self._pair(json.loads(self.file.readline()), int(self.number[row]))

    def elsewhere(self, pair: Pair) -> list[tuple[int | None, str, str]]:
        """`positives` of the other lines that ask the same query under the same task, prompt and type."""
        key = np.uint64(_query_key(pair))
        start, stop = np.searchsorted(self.keys, key), np.searchsorted(self.keys, key, side="right")
        others = (self[row] for row in self.by_key[start:stop]) if stop - start > 1 else ()
        return [one for other in others if other.where != pair.where and _asks(other) == _asks(pair)
                for one in self.positives(other)]

    def positives(self, pair: Pair) -> list[tuple[int | None, str, str]]:
        """(row, id, text) of each positive; row None for a text that the corpus does not have."""
        found: list[tuple[int | None, str, str]] = []
        for name in pair.positives:
            row = self.corpus.row(name)
            found.append((None, "", name) if row is None else (row, *self.corpus.read(row)))
        return found

    def _pair(self, value: dict[str, Any], number: int) -> Pair:
        where = f"{self.path} line {number}"
        positives: Any = value.get("pos")
        query = value.get("query")
        if self.judged:
            positives, query = self.judged[_id(value.get("_id"), where)], value.get("text")
        if not isinstance(positives, list) or not positives:
            raise ValueError(f"{where}: pos is {positives!r:.60}. Expected is a list of at least one "
                             f"{'id' if self.corpus.has_ids else 'text'}. Give one, or drop the query.")
        checked = _id if self.corpus.has_ids else checked_text
        names = [checked(name, f"{where}: pos") for name in positives]
        kind, prompt, task = value.get("type") or "normal", value.get("prompt"), value.get("task") or self.name
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{where}: type is {kind!r:.80}. Expected is one of {', '.join(KINDS)}. Choose one, or "
                             "leave it out.")
        for name, given in (("prompt", prompt), ("task", task)):
            if given is not None:
                checked_text(given, f"{where}: {name}")
        return Pair(where, checked_text(query, f"{where}: query"), list(dict.fromkeys(names)), prompt, kind, task)

    def _check(self, pair: Pair) -> None:
        for name in pair.positives:
            if self.corpus.has_ids and self.corpus.row(name) is None:
                raise ValueError(f"{pair.where}: pos has {name!r:.80}, which is no id of {self.corpus.path}. Expected "
                                 "are ids of the corpus. Correct it, or give the corpus it belongs to.")


def corpus_from_pairs(path: Path, folder: Path) -> Path:
    """FlagEmbedding's way without a corpus: all texts of pos and neg, each once, as a file in `folder`."""
    seen: set[int] = set()
    lines, spaces = [], False
    for number, _, value, _ in _lines(path):
        for name in ("pos", "neg"):
            if not isinstance(value.get(name) or [], list):
                raise ValueError(f"{path} line {number}: {name} is {value[name]!r:.60}. Expected is a list of texts. "
                                 "Put it in brackets.")
        for text in (*(value.get("pos") or []), *(value.get("neg") or [])):
            key = _hash(checked_text(text, f"{path} line {number}: pos or neg"))
            if key not in seen:
                seen.add(key)
                spaces |= len(text.split()) > 1
                lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if lines and not spaces:
        raise ValueError(f"{path}: no text of pos or neg has more than one word: they look like ids, such as "
                         f"{json.loads(lines[0])['text']!r:.60}. Expected are texts, where there is no corpus. "
                         "Give the corpus with --corpus.")
    content = "".join(lines).encode()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"corpus-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not target.exists():
        write_whole(target, lambda draft: draft.write_bytes(content))
    return target


def _lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any], bytes]]:
    """(number, offset, object, bytes) of each line that is not blank."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). Expected is a JSONL file, or a folder in BEIR's "
                         "layout. Give its place.") from None
    offset = 0
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path} line {number}: not valid JSON in UTF-8 ({error}). Expected is one object "
                                     "a line. Write the line again.") from None
                if not isinstance(value, dict):
                    raise ValueError(f"{path} line {number}: a {type(value).__name__}. Expected is one JSON object. "
                                     "Write the line again.")
                yield number, offset, value, line
            offset += len(line)


def _passage(value: dict[str, Any], where: str) -> str:
    title = value.get("title") or ""
    text = value.get("text")
    if title and isinstance(text, str):
        text = f"{checked_text(title, f'{where}: title')} {text}".strip()
    return checked_text(text, f"{where}: text")


def _id(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{where}: id is {value!r:.60}. Expected is a text or a whole number. Give each its own.")
    return str(value)


def _asks(pair: Pair) -> tuple[str, str, str | None, str]:
    """What makes two lines one question: as in training, where a batch has one task, prompt and type."""
    return fold(pair.query), pair.task, pair.prompt, pair.kind


def _query_key(pair: Pair) -> int:
    return _hash(json.dumps(_asks(pair)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _qrels(path: Path) -> dict[str, list[str]]:
    """Query id to the ids of its relevant passages (score above 0), from BEIR's table with its header."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Expected is a table of query-id, corpus-id, score. "
                         "Give another --split.") from None
    judged: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        cells = row.split("\t")
        if (number == 1 and cells[-1].strip().lower() == "score") or not row.strip():
            continue
        try:
            query, passage, score = cells[0], cells[-2], float(cells[-1])
        except (ValueError, IndexError):
            raise ValueError(f"{path} line {number}: {row!r:.80}. Expected are query-id, corpus-id and score between "
                             "tabs. Correct it.") from None
        if not math.isfinite(score):
            raise ValueError(f"{path} line {number}: the score is {cells[-1]!r:.40}. Expected is a finite number. "
                             "Correct it.")
        if score > 0:
            judged.setdefault(query, []).append(passage)
    if not judged:
        raise ValueError(f"{path} names no relevant passage. Expected is at least one score above 0. "
                         "Give another --split.")
    return judged
