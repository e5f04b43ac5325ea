"""nDCG@10 of a small retrieval set in JSONL files, without mteb.

run_train.py scores such folders before and after training, so this file imports neither mteb nor datasets. run_eval.py
scores the same folders with mteb, and a test compares the two results. A folder:

    corpus.jsonl    {"_id": "d1", "title": "", "text": "..."}           title is optional
    queries.jsonl   {"_id": "q1", "text": "..."}
    qrels.jsonl     {"query-id": "q1", "corpus-id": "d1", "score": 2}   an integer; 0 or less is not relevant
                    or qrels/test.tsv, BEIR's table                         query-id, corpus-id and score, tabs between
    task.json       {"class": "ArguAna", "instruction": "..."}          see `read_task_file`

P here counts all documents of the corpus.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ref.text.prompts import InContextExample
from ref.utils.corpus import check_id, passage_id, passage_text, read_qrels
from ref.utils.files import JsonLine, check_text, check_type, read_json, read_jsonl

CUTOFF = 10  # ranks that count
NO_INSTRUCTION = "none"  # in the place of an instruction, in task.json and --instructions
BEIR_QRELS = "qrels/test.tsv"  # instead of qrels.jsonl
TASK_KEYS: dict[str, tuple[type, str]] = {
    "class": (str, "the name of an mteb task"),
    "set": (dict, "an object of attribute to value"),
    "instruction": (str, "a string"),
}


class TextEmbedder(Protocol):
    """The part of `ref.embedder.Embedder` that scoring uses."""

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors, (texts, embedding_dim) float32, in the order of `texts`."""
        ...


def evaluate_retrieval(embedder: TextEmbedder, folder: str | Path, *, instructed: bool = True) -> float:
    """Return the mean nDCG@10 over the queries with judgements, in [0, 1].

        DCG = sum over ranks r = 1..10 of max(relevance, 0) / log2(r + 1);  nDCG = DCG / DCG of the ideal ranking

    Queries have the instruction of task.json (if that is "none" or `instructed` False, none), documents have none. A
    document with the query's own id is skipped. Raises ValueError for a malformed folder or a missing instruction.

    Source: trec_eval's ndcg_cut_10 (linear gain; ties by descending id), as mteb's ArguAna calls it through
    pytrec_eval. mteb rounds the mean to five digits, this function does not.
    """
    instruction = None
    if instructed:
        where = f"{Path(folder) / 'task.json'}: 'instruction'"
        instruction = check_text(read_task_file(folder).get("instruction"), where)
        instruction = None if instruction == NO_INSTRUCTION else instruction
    queries, documents, relevance = read_retrieval_folder(folder)
    query_QD = torch.from_numpy(embedder.encode(list(queries.values()), instruction=instruction))
    document_PD = torch.from_numpy(embedder.encode(list(documents.values())))
    # the operations and dtype of mteb's cos_sim, so that the same documents have equal scores
    unit_query_QD = torch.nn.functional.normalize(query_QD, p=2, dim=1)
    unit_document_PD = torch.nn.functional.normalize(document_PD, p=2, dim=1)
    score_QP = (unit_query_QD @ unit_document_PD.transpose(0, 1)).numpy()
    document_ids = np.array(list(documents))
    ndcg = [
        ndcg_at_10(top_k(score_P, document_ids, query_id), relevance[query_id])
        for query_id, score_P in zip(queries, score_QP, strict=True)
    ]
    return sum(ndcg) / len(ndcg)


def top_k(score_P: np.ndarray, document_ids: np.ndarray, query_id: str) -> list[str]:
    """Ids of the ten highest scores without the query's own id; ties in descending order of the id."""
    candidates = CUTOFF + 1  # one more, for the query's own id
    threshold = np.partition(score_P, -candidates)[-candidates] if len(score_P) > candidates else -np.inf
    above = np.flatnonzero(score_P >= threshold)
    order = sorted(((float(score_P[i]), str(document_ids[i])) for i in above), reverse=True)
    return [document_id for _, document_id in order if document_id != query_id][:CUTOFF]


def ndcg_at_10(ranked: Sequence[str], relevance: Mapping[str, int]) -> float:
    """nDCG@10 of one ranking; 0 if no document is relevant.

    Example: relevance {a: 2, b: 1}, ranked [b, a]: (1/1 + 2/log2 3) / (2/1 + 1/log2 3) = 0.860.
    """
    gains = [max(relevance.get(document_id, 0), 0) for document_id in ranked]
    ideal = _dcg(sorted((max(value, 0) for value in relevance.values()), reverse=True))
    return _dcg(gains) / ideal if ideal > 0 else 0.0


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:CUTOFF]))


# ---- files -------------------------------------------------------------------------------------------------


def read_retrieval_folder(
    folder: str | Path, *, qrels: Path | None = None, ignore_identical_ids: bool = True,
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Read queries with judgements (id -> text), documents (id -> text), relevance (query id -> document id -> score).

    A document's text is its title and text, joined as mteb does. `qrels`: the file of the judgements, by default
    qrels.jsonl, else qrels/test.tsv. `ignore_identical_ids`: a document with the query's own id is left out of its
    ranking, so it must not be the only relevant one. Raises ValueError that names file and line for a missing or empty
    file, a missing or invalid field, a duplicate id, and a judgement of an unknown id.
    """
    folder = Path(folder)
    documents = _texts_by_id(folder / "corpus.jsonl", with_title=True)
    queries = _texts_by_id(folder / "queries.jsonl", with_title=False)
    table = folder / BEIR_QRELS
    default = table if table.exists() and not (folder / "qrels.jsonl").exists() else folder / "qrels.jsonl"
    relevance = _read_judgements(qrels or default, queries, documents, ignore_identical_ids)
    return {key: text for key, text in queries.items() if key in relevance}, documents, relevance


def read_texts(path: Path, *, with_title: bool) -> Iterator[tuple[JsonLine, str, str]]:
    """(line, id, text) of corpus.jsonl or queries.jsonl; `with_title`: the text is title and text, joined."""
    for line in read_jsonl(path):
        key = passage_id(line.value, line.where)
        if key is None:
            raise ValueError(f"{line.where}: '_id' is missing")
        yield line, key, passage_text(line.value, line.where) if with_title else check_type(
            line.value.get("text"), str, f"{line.where}: 'text'", "a string")


def _texts_by_id(path: Path, *, with_title: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, key, text in read_texts(path, with_title=with_title):
        if key in texts:
            raise ValueError(f"{line.where}: '_id' must be unique (got {key!r:.60} again)")
        texts[key] = text
    return _not_empty(texts, path)


def _read_judgements(
    path: Path, queries: Mapping[str, str], documents: Mapping[str, str], ignore_identical_ids: bool,
) -> dict[str, dict[str, int]]:
    relevance: dict[str, dict[str, int]] = {}
    for where, query, document, score in read_judgements(path):
        for field, key, known, file in (("query-id", query, queries, "queries.jsonl"),
                                        ("corpus-id", document, documents, "corpus.jsonl")):
            if key not in known:
                raise ValueError(f"{where}: {field!r} must be an id of {file} (got {key!r:.60})")
        relevance.setdefault(query, {})[document] = score
    for query, scores in relevance.items():
        if ignore_identical_ids and [document for document, score in scores.items() if score > 0] == [query]:
            raise ValueError(f"{path}: the only relevant document of {query!r:.60} has the query's own id, so it is "
                             "left out of the ranking; give the documents other ids")
    return _not_empty(relevance, path)


def read_judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(FILE:LINE, query id, document id, score) of qrels.jsonl or of BEIR's table qrels/SPLIT.tsv."""
    if path.suffix == ".tsv":
        for where, query, document, score in read_qrels(path):
            if not score.is_integer():
                raise ValueError(f"{where}: the score must be an integer (got {score})")
            yield where, query, document, int(score)
        return
    for line in read_jsonl(path):
        query, document = (check_id(line.value.get(field), f"{line.where}: {field!r}")
                           for field in ("query-id", "corpus-id"))
        score = check_type(line.value.get("score"), (int, float), f"{line.where}: 'score'", "an integer")
        if not float(score).is_integer():  # nor infinite or not a number
            raise ValueError(f"{line.where}: 'score' must be an integer (got {score})")
        yield line.where, query, document, int(score)


def _not_empty(rows: dict[str, Any], path: Path) -> dict[str, Any]:
    if not rows:
        raise ValueError(f"{path}: must have at least one line (got an empty file)")
    return rows


def read_task_file(folder: str | Path) -> dict[str, Any]:
    """Read the folder's task.json; {} if there is none.

    Keys, all optional: "class", the mteb task whose class and metric are used; "set", attributes to set on it;
    "instruction", or "none" for none. Raises ValueError that names the file for an unknown key or another type.
    """
    path = Path(folder) / "task.json"
    if not path.is_file():
        return {}
    task = read_json(path)
    for key, value in task.items():
        if key not in TASK_KEYS:
            raise ValueError(f"{path}: {key!r:.60} is unknown (only {', '.join(TASK_KEYS)})")
        check_type(value, TASK_KEYS[key][0], f"{path}: {key!r}", TASK_KEYS[key][1])
    return task
