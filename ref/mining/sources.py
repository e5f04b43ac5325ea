"""Pairs and corpus: indexed in one pass over the files, read when needed.

    corpus    this project    {"id": "d1", "text": "…"}                             one JSON object per line
              BEIR            {"_id": "d1", "title": "…", "text": "…"}              text = title + " " + text
              FlagEmbedding   {"text": "…"}                                         no id: the line's number is the id
    pairs     this project    {"query": "…", "pos": ["d1"], "prompt": "…", "type": "…", "task": "…"}
              BEIR            a folder with queries.jsonl and qrels/SPLIT.tsv
              FlagEmbedding   {"query": "…", "pos": ["the text itself"]}            where the corpus has no ids

The index takes 24 bytes of memory per passage (offset, hash of id or text, order of the id), some 220 while the ids are
sorted, and 20 per pair. Texts stay in the files.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ref.task_types import check_task_type
from ref.utils.corpus import check_id, passage_id, passage_text, read_qrels
from ref.utils.files import (
    JsonLine,
    atomic_write,
    check_text,
    check_type,
    hash_file,
    hash_files,
    parse_json_object,
    read_jsonl,
)
from ref.utils.text import normalize_whitespace


class Pair(NamedTuple):
    """A query with its positives."""

    row: int
    query: str
    positives: list[str]  # ids, or texts where the corpus has no ids
    prompt: str | None
    task_type: str
    task: str


class Corpus:
    """Passages by row, and rows by id."""

    def __init__(self, path: Path) -> None:
        """Check and index every line. Raises ValueError that names file, line and field."""
        self.path = path / "corpus.jsonl" if path.is_dir() else path
        self.has_ids = True
        offsets: list[int] = []
        keys: list[int] = []
        ids: list[str] = []
        self.empty: set[str] = set()  # ids of passages without text, which published corpora have; they are skipped
        for line in read_jsonl(self.path):
            name = passage_id(line.value, line.where)
            if name is not None and not passage_text(line.value, line.where):
                self.empty.add(name)
                continue
            text = _passage_text(line.value, line.where)
            if not offsets:
                self.has_ids = name is not None
            if (name is not None) != self.has_ids:
                raise ValueError(f"{line.where}: must have {'an' if self.has_ids else 'no'} id, like the first line "
                                 f"(got {name!r:.60})")
            offsets.append(line.offset)
            ids.append(str(len(offsets)) if name is None else name)
            keys.append(_hash(text if name is None else name))
        if not offsets:
            raise ValueError(f"{self.path}: must have at least one passage (the file has none)")
        self.sha256 = hash_file(self.path)
        self.file = self.path.open("rb")
        self.offset = np.array(offsets, np.int64)
        self.id_order = np.empty(len(ids), np.int32)  # position in the order of ids, which breaks ties
        self.id_order[np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int32)] = np.arange(len(ids))
        self.row_by_key, self.keys = _sorted_keys(keys)
        if self.has_ids:
            self._check_unique()

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, row: int) -> tuple[str, str]:
        """Id and text of a passage."""
        self.file.seek(self.offset[row])
        where = f"{self.path}: passage {row + 1}"
        value = parse_json_object(self.file.readline(), where)
        return passage_id(value, where) or str(row + 1), _passage_text(value, where)

    def row(self, name: str) -> int | None:
        """The row of an id (of a text, if the corpus has no ids); None if it is missing."""
        for row in _rows_with(_hash(name), self.keys, self.row_by_key):
            if self.read(row)[0 if self.has_ids else 1] == name:
                return row
        return None

    def blocks(self, size: int) -> list[range]:
        """All rows, `size` at a time."""
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def _check_unique(self) -> None:
        for n in np.flatnonzero(self.keys[1:] == self.keys[:-1]):
            first, second = sorted(int(row) for row in self.row_by_key[n : n + 2])
            name = self.read(first)[0]
            if name == self.read(second)[0]:
                raise ValueError(f"{self.path}: ids must be unique ({name!r:.80} is the id of passages {first + 1} and "
                                 f"{second + 1})")


class Pairs:
    """Queries by row."""

    def __init__(self, path: Path, corpus: Corpus, *, split: str = "train") -> None:
        """Check every line and the id of each positive. Raises ValueError that names file, line and field."""
        self.path, self.corpus = path, corpus
        self.name = Path(os.path.abspath(path)).name.removesuffix(".jsonl")  # also of `.`
        self.qrels: dict[str, list[str]] = {}  # for BEIR: ids of the positives by query id
        files = [path]
        if path.is_dir():
            self.path, qrels_path = path / "queries.jsonl", path / "qrels" / f"{split}.tsv"
            files = [self.path, qrels_path]
            self.qrels = _read_qrels(qrels_path)
            if not corpus.has_ids:
                raise ValueError(f"{corpus.path}: must have ids ('_id' or 'id'), which the qrels name")
        self.all_have_prompts, self.any_has_prompt, positives_are_ids = True, False, not corpus.has_ids
        offsets: list[int] = []
        keys: list[int] = []
        for line in self._lines():
            pair = self._pair(line.value, len(offsets), line.where)
            self._check_positives(pair, line.where)
            positives_are_ids = positives_are_ids and all(
                _like_an_id(name) and corpus.row(name) is None for name in pair.positives)
            self.all_have_prompts &= pair.prompt is not None
            self.any_has_prompt |= pair.prompt is not None
            offsets.append(line.offset)
            keys.append(_query_key(pair))
        if not offsets:
            raise ValueError(f"{self.path}: must have at least one pair (the file is empty)")
        if positives_are_ids:
            raise ValueError(f"{self.path}: 'pos' must hold texts, not ids, because {corpus.path} has no ids (got "
                             f"{pair.positives[0]!r:.60})")
        self.sha256 = hash_files(path, files) if path.is_dir() else hash_file(path)
        self.file = self.path.open("rb")
        self.offset = np.array(offsets, np.int64)
        self.row_by_key, self.keys = _sorted_keys(keys)

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, row: int) -> Pair:
        self.file.seek(self.offset[row])
        where = f"{self.path}: pair {row + 1}"
        return self._pair(parse_json_object(self.file.readline(), where), row, where)

    def positives(self, pair: Pair) -> list[tuple[int | None, str, str]]:
        """(row, id, text) of each positive; row None for a text that is not in the corpus."""
        found: list[tuple[int | None, str, str]] = []
        for name in pair.positives:
            row = self.corpus.row(name)
            found.append((None, "", name) if row is None else (row, *self.corpus.read(row)))
        return found

    def other_positives(self, pair: Pair) -> list[tuple[int | None, str, str]]:
        """`positives` of the other lines with the same query, task, prompt and type."""
        rows = _rows_with(_query_key(pair), self.keys, self.row_by_key)
        others = [self[row] for row in rows if row != pair.row]
        return [positive for other in others if _same_query(other) == _same_query(pair)
                for positive in self.positives(other)]

    def _lines(self) -> Iterator[JsonLine]:
        """The lines of this split. Raises ValueError for a query that is given twice or missing."""
        missing = set(self.qrels)
        for line in read_jsonl(self.path):
            if self.qrels:
                name = passage_id(line.value, line.where)
                if name is None:
                    raise ValueError(f"{line.where}: '_id' is missing")
                if name not in self.qrels:
                    continue  # a query of another split
                if name not in missing:
                    raise ValueError(f"{line.where}: '_id' must be unique (an earlier line has {name!r:.80} too)")
                missing.remove(name)
            yield line
        if missing:
            raise ValueError(f"{self.path}: must have all queries of the qrels ({len(missing)} are missing, such as "
                             f"{min(missing)!r:.80})")

    def _pair(self, value: dict[str, Any], row: int, where: str) -> Pair:
        query, positives = value.get("query"), value.get("pos")
        if self.qrels:
            query, positives = value.get("text"), self.qrels[passage_id(value, where) or ""]
        if not isinstance(positives, list) or not positives:
            raise ValueError(f"{where}: 'pos' must be a list of at least one {'id' if self.corpus.has_ids else 'text'} "
                             f"(got {positives!r:.60})")
        names = [check_id(name, f"{where}: 'pos'") if self.corpus.has_ids
                 else check_text(name, f"{where}: 'pos'").strip() for name in positives]
        prompt, task = (check_text(value[key], f"{where}: {key!r}") if value.get(key) else None
                        for key in ("prompt", "task"))
        return Pair(row, check_text(query, f"{where}: 'query'"), list(dict.fromkeys(names)), prompt,
                    check_task_type(value.get("type") or "normal", f"{where}: 'type'"), task or self.name)

    def _check_positives(self, pair: Pair, where: str) -> None:
        for name in pair.positives:
            if self.corpus.has_ids and self.corpus.row(name) is None:
                what = "passages with text" if name in self.corpus.empty else "ids"
                raise ValueError(f"{where}: 'pos' must hold {what} of {self.corpus.path} (got {name!r:.80})")


def corpus_from_pairs(path: Path, folder: Path) -> Path:
    """A corpus of all texts of 'pos' and 'neg' (FlagEmbedding's layout), each once, as a file in `folder`.

    The pairs are read twice, for the file's name (a hash) and for the file, so that no text stays in memory.
    """
    digest, first, are_ids = hashlib.sha256(), "", True
    for text in _distinct_texts(path):
        digest.update(_corpus_line(text))
        first, are_ids = first or text, are_ids and _like_an_id(text)
    if first and are_ids:
        raise ValueError(f"{path}: 'pos' and 'neg' must hold texts, not ids, if there is no corpus (got "
                         f"{first!r:.60}); give the corpus with --corpus")

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            file.writelines(map(_corpus_line, _distinct_texts(path)))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"corpus-{digest.hexdigest()[:16]}.jsonl"
    if not target.exists():
        atomic_write(target, write)
    return target


def _distinct_texts(path: Path) -> Iterator[str]:
    """The texts of 'pos' and 'neg', each once."""
    seen: set[int] = set()
    for line in read_jsonl(path):
        for key in ("pos", "neg"):
            for text in check_type(line.value.get(key) or [], list, f"{line.where}: {key!r}", "a list of texts"):
                text = check_text(text, f"{line.where}: {key!r}").strip()
                if _hash(text) not in seen:
                    seen.add(_hash(text))
                    yield text


def _corpus_line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def _like_an_id(text: str) -> bool:
    """One word of ASCII with a digit, hyphen or underscore. Languages without spaces between words are not."""
    return re.fullmatch(r"[!-~]*[0-9_-][!-~]*", text) is not None


def _passage_text(value: dict[str, Any], where: str) -> str:
    return check_text(passage_text(value, where), f"{where}: 'text'")


def _same_query(pair: Pair) -> tuple[str, str, str | None, str]:
    """Equal for lines with the same query, as in training, where a batch has one task, prompt and type."""
    return normalize_whitespace(pair.query), pair.task, pair.prompt, pair.task_type


def _query_key(pair: Pair) -> int:
    return _hash(json.dumps(_same_query(pair)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _sorted_keys(keys: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of their keys, and the sorted keys."""
    key = np.array(keys, np.uint64)
    order = key.argsort(kind="stable").astype(np.int32)
    return order, key[order]


def _rows_with(key: int, keys: np.ndarray, row_by_key: np.ndarray) -> list[int]:
    """Rows with a key, in ascending order."""
    start, stop = (int(np.searchsorted(keys, np.uint64(key), side=side)) for side in ("left", "right"))
    rows: list[int] = row_by_key[start:stop].tolist()
    return rows


def _read_qrels(path: Path) -> dict[str, list[str]]:
    """Ids of the relevant passages (score above 0) by query id, from BEIR's table."""
    qrels: dict[str, list[str]] = {}
    for judgement in read_qrels(path):
        if judgement.score > 0:
            qrels.setdefault(judgement.query, []).append(judgement.passage)
    if not qrels:
        raise ValueError(f"{path}: must have at least one score above 0; choose the split with --split")
    return qrels
