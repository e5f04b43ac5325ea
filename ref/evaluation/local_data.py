"""Data of an mteb task from a local folder, uncached; files of retrieval and reranking are checked first.

A retrieval folder without README.md holds corpus, queries and qrels, and top_ranked for reranking (evaluation.md in
docs). Of a file in several formats the JSONL one counts; in place of qrels BEIR's table of the evaluated split.

Importing this file imports mteb (three seconds). Written for mteb 2.26.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from mteb.abstasks.abstask import AbsTask

from ref.evaluation.retrieval import read_judgements, read_retrieval_folder, read_texts
from ref.utils.corpus import check_id
from ref.utils.files import check_type, read_jsonl

# name of a file of a retrieval set -> configuration of the data set that mteb loads
RETRIEVAL_FILES = {"corpus": "corpus", "queries": "queries", "qrels": "default", "top_ranked": "top_ranked"}


class LocalDataMixin(AbsTask):
    """Makes a task class load a local folder, uncached and through links.

    `datasets` caches what it has loaded and, for a folder with a README.md, does not notice changed files; so each task
    has a cache of its own, deleted with the task. It takes brackets in a path for a pattern, so it is given links. For
    a retrieval folder without README.md, one with the configurations that mteb loads is written, beside copies of the
    texts in the one form that mteb reads (string ids under '_id', a title on every line). The files are checked first:
    mteb's own errors name neither file nor line.
    """

    downloaded: Mapping[str, Any] | None = None  # the hub's data set whose files these are, unchanged since `download`

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        if self.data_loaded:
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="ref-data-")  # removed with the task, and at exit
        folder, link = Path(self.metadata.dataset["path"]), Path(self._scratch.name) / "data"
        if not (folder / "README.md").is_file() and any(folder.glob("corpus.*")):
            _link_with_card(_checked_files(self, folder), link)
        else:
            link_files(folder, link)
        self.metadata = self.metadata.model_copy(  # until unload_data
            update={"dataset": {**self.metadata.dataset, "path": str(link)}})
        shared = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = Path(self._scratch.name) / "cache"
        try:
            super().load_data(num_proc=num_proc, **options)
        except BaseException:
            self.__dict__.pop("metadata", None)  # the next attempt starts from the folder again
            raise
        finally:
            datasets.config.HF_DATASETS_CACHE = shared

    def unload_data(self) -> None:
        if not self.data_loaded:
            return
        super().unload_data()
        self.__dict__.pop("metadata", None)
        self._scratch.cleanup()


def link_files(folder: Path, linked: Path) -> None:
    """Make the folder `linked` with links to the files of `folder`; a link to the folder itself would be resolved."""
    shutil.copytree(folder.resolve(), linked, copy_function=os.symlink)


# ---- retrieval folders without README.md -------------------------------------------------------------------


def _checked_files(task: AbsTask, folder: Path) -> dict[str, dict[str, Path]]:
    """Configuration -> split -> file of a retrieval folder, checked where all that it takes is text.

    Raises ValueError that names folder or file for a missing, ambiguous or malformed one.
    """
    found = {name: path for name in RETRIEVAL_FILES if (path := _file_named(folder, name)) is not None}
    if task.metadata.type == "Reranking" and "top_ranked" not in found:
        raise ValueError(f"{folder}: reranking needs the candidates of each query, top_ranked.jsonl or "
                         "top_ranked.parquet (got neither)")
    judged = {"test": found["qrels"]} if "qrels" in found else _tables(folder, task.eval_splits)
    if all(found.get(name, Path()).suffix == ".jsonl" for name in ("corpus", "queries")):
        for qrels in (path for path in judged.values() if path.suffix in (".jsonl", ".tsv")):
            _, documents, relevance = read_retrieval_folder(
                folder, qrels=qrels, ignore_identical_ids=getattr(task, "ignore_identical_ids", False))
            if (ranked := found.get("top_ranked", Path())).suffix == ".jsonl":
                _check_candidates(ranked, documents, relevance)
    files = {config: {"test": found[name]} for name, config in RETRIEVAL_FILES.items() if name in found}
    return {**files, RETRIEVAL_FILES["qrels"]: judged}


def _file_named(folder: Path, name: str) -> Path | None:
    """NAME.jsonl of a folder, else its only file NAME.*; None if there is none. Raises ValueError for several."""
    if (lines := folder / f"{name}.jsonl").is_file():
        return lines
    paths = sorted(path for path in folder.glob(f"{name}.*") if path.is_file())
    if len(paths) > 1:
        raise ValueError(f"{folder}: must have one file {name}.jsonl or {name}.parquet "
                         f"(got {', '.join(path.name for path in paths)})")
    return paths[0] if paths else None


def _tables(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """BEIR's table of judgements of each split that the task evaluates. Raises ValueError for a missing one."""
    tables = {split: folder / "qrels" / f"{split}.tsv" for split in splits}
    for split, path in tables.items():
        if not path.is_file():
            names = ", ".join(f"qrels/{other.name}" for other in sorted((folder / "qrels").glob("*.tsv")))
            raise ValueError(f"{folder}: must have qrels.jsonl, or qrels/{split}.tsv, the split that the task evaluates"
                             f" (got {names or 'neither'})")
    return tables


def _check_candidates(path: Path, documents: Mapping[str, str], relevance: Mapping[str, Any]) -> None:
    """Raise ValueError for a candidate that is no document, and for a judged query without candidates."""
    queries = set()
    for where, query, candidates in _read_candidates(path):
        if query in queries:
            raise ValueError(f"{where}: 'query-id' must be unique (got {query!r:.60} again)")
        queries.add(query)
        for document in candidates:
            if document not in documents:
                raise ValueError(f"{where}: 'corpus-ids' must be ids of corpus.jsonl (got {document!r:.60})")
    if missing := [query for query in relevance if query not in queries]:
        raise ValueError(f"{path}: must have a line for every query with judgements (got none for {missing[0]!r:.60})")


def _read_candidates(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(FILE:LINE, query id, document ids) of top_ranked.jsonl."""
    for line in read_jsonl(path):
        what = f"{line.where}: 'corpus-ids'"
        ids = check_type(line.value.get("corpus-ids"), list, what, "a list of ids")
        if not ids:
            raise ValueError(f"{what} must have at least one id (got an empty list)")
        query = check_id(line.value.get("query-id"), f"{line.where}: 'query-id'")
        yield line.where, query, [check_id(each, f"{what}: an id") for each in ids]


def _link_with_card(files: Mapping[str, Mapping[str, Path]], linked: Path) -> None:
    """Make the folder `linked` with the files as mteb reads them and a README.md that declares them.

    `files`: configuration -> split -> file.
    """
    linked.mkdir()
    card = ["---", "configs:"]
    for config, path_of in files.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, path in path_of.items():
            name = f"{path.stem}.jsonl" if path.suffix == ".tsv" else path.name
            rows = ROWS.get(config) if path.suffix in (".jsonl", ".tsv") else None
            if rows is None:
                (linked / name).symlink_to(path)
            else:
                with (linked / name).open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows(path))
            card.append(f"  - {{split: {split}, path: {name}}}")
    (linked / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of corpus.jsonl or queries.jsonl with the fields that mteb reads."""
    for line, key, text in read_texts(path, with_title=path.name == "corpus.jsonl"):
        row = {"_id": key, "title": "", "text": text}
        if "instruction" in line.value:  # of mteb's retrieval by instructions
            row["instruction"] = line.value["instruction"]
        yield row


def _judgement_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of qrels.jsonl, from a file of that name or BEIR's table, with string ids."""
    for _, query, document, score in read_judgements(path):
        yield {"query-id": query, "corpus-id": document, "score": score}


def _candidate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of top_ranked.jsonl with string ids and no other fields."""
    for _, query, documents in _read_candidates(path):
        yield {"query-id": query, "corpus-ids": documents}


ROWS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {  # by configuration
    "corpus": _text_rows, "queries": _text_rows, "default": _judgement_rows, "top_ranked": _candidate_rows}
