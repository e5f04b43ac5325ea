"""nDCG@10 of a small retrieval set kept as jsonl files, without mteb.

`run_train.py` calls `retrieval_ndcg10` before the first and after the last step, so it must start in a moment
and need neither mteb nor datasets; `run_eval.py` scores the same folder through mteb, and a test holds the
two equal. A folder:

    corpus.jsonl    {"_id": "d1", "title": "", "text": "..."}           title may be absent
    queries.jsonl   {"_id": "q1", "text": "..."}
    qrels.jsonl     {"query-id": "q1", "corpus-id": "d1", "score": 2}   an integer; 0 or less is irrelevant
    task.json       {"class": "ArguAna", "instruction": "..."}          see `read_task_file`

Here P counts all documents of the corpus.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ref.prompts import Example

CUT = 10  # documents that count
TASK_KEYS: dict[str, type] = {"class": str, "set": dict, "instruction": str}


class TextEmbedder(Protocol):
    """What scoring needs of `ref.embedder.Embedder`; tests pass stand-ins."""

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """Float32 array (texts, width), rows of unit length, in the order of `texts`."""
        ...


def retrieval_ndcg10(embedder: TextEmbedder, folder: str | Path, *, instructed: bool = True) -> float:
    """Mean nDCG@10 over the queries that have judgements, in [0, 1].

        DCG = sum over ranks r = 1..10 of max(relevance, 0) / log2(r + 1);  nDCG = DCG / DCG of the best order

    Queries carry the instruction of task.json, documents are bare (`instructed=False`: queries are bare too,
    to see what the instruction is worth). A document with the query's own id is left out.

    Source: trec_eval's ndcg_cut_10 (linear gain; of equal scores the larger id goes first), as mteb's ArguAna
    class calls it through pytrec_eval. mteb rounds the mean to five digits, this function does not.

    Raises: ValueError with file and line for anything malformed (see `read_retrieval_folder`), or if
    task.json gives no instruction while `instructed`.
    """
    instruction = read_task_file(folder).get("instruction") if instructed else None
    if instructed and not instruction:
        raise ValueError(
            f"{Path(folder) / 'task.json'}: no instruction. Expected: one for the queries. "
            'Add {"instruction": "..."}, or call with instructed=False.'
        )
    queries, documents, relevance = read_retrieval_folder(folder)
    query_QD = torch.from_numpy(embedder.encode(list(queries.values()), instruction=instruction))
    document_PD = torch.from_numpy(embedder.encode(list(documents.values())))
    # the same two steps, in the same type, as mteb's cos_sim: equal texts then tie there and here
    unit_query_QD = torch.nn.functional.normalize(query_QD, p=2, dim=1)
    unit_document_PD = torch.nn.functional.normalize(document_PD, p=2, dim=1)
    score_QP = (unit_query_QD @ unit_document_PD.transpose(0, 1)).numpy()
    document_ids = np.array(list(documents))
    ndcg = [
        ndcg10(top_documents(score_P, document_ids, query_id), relevance[query_id])
        for query_id, score_P in zip(queries, score_QP, strict=True)
    ]
    return sum(ndcg) / len(ndcg)


def top_documents(score_P: np.ndarray, document_ids: np.ndarray, query_id: str) -> list[str]:
    """Ids of the ten best documents but the query's own, best first; of equal scores the larger id first."""
    spare = CUT + 1  # one more than needed, for the query's own id
    threshold = np.partition(score_P, -spare)[-spare] if len(score_P) > spare else -np.inf
    candidates = np.flatnonzero(score_P >= threshold)
    order = sorted(((float(score_P[i]), str(document_ids[i])) for i in candidates), reverse=True)
    return [document_id for _, document_id in order if document_id != query_id][:CUT]


def ndcg10(ranked: Sequence[str], relevance: dict[str, int]) -> float:
    """nDCG@10 of one ranking; 0 where no document is relevant.

    Example: relevance {a: 2, b: 1}, ranked [b, a]: (1/1 + 2/log2 3) / (2/1 + 1/log2 3) = 0.860.
    """
    gain = [max(relevance.get(document_id, 0), 0) for document_id in ranked]
    best = sorted((max(value, 0) for value in relevance.values()), reverse=True)
    ideal = _discounted(best)
    return _discounted(gain) / ideal if ideal > 0 else 0.0


def _discounted(gain: Sequence[int]) -> float:
    return sum(value / math.log2(rank + 2) for rank, value in enumerate(gain[:CUT]))


# ---- reading -----------------------------------------------------------------------------------------------


def read_retrieval_folder(
    folder: str | Path,
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Queries with judgements (id -> text), documents (id -> text), relevance (query -> document -> score).

    A document's text is title + " " + text, stripped, as mteb joins them.

    Raises: ValueError naming file and line: a missing or empty file, broken JSON, a missing key, an id given
    twice, a judgement of an unknown query or document, a score that is not an integer.
    """
    folder = Path(folder)
    documents = _texts(folder / "corpus.jsonl", titled=True)
    queries = _texts(folder / "queries.jsonl", titled=False)
    relevance = _judgements(folder / "qrels.jsonl", queries, documents)
    return {key: text for key, text in queries.items() if key in relevance}, documents, relevance


def _texts(path: Path, *, titled: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for place, row in read_jsonl(path):
        identifier = str(_value(row, "_id" if "_id" in row else "id", place, (str, int)))
        if identifier in texts:
            raise ValueError(f"{place}: the id {identifier!r} is given twice. Ids must be unique. Rename one.")
        text = _value(row, "text", place, (str,))
        title = _value(row, "title", place, (str,)) if titled and row.get("title") else ""
        texts[identifier] = f"{title} {text}".strip() if titled else text
    return texts


def _judgements(path: Path, queries: dict[str, str], documents: dict[str, str]) -> dict[str, dict[str, int]]:
    relevance: dict[str, dict[str, int]] = {}
    for place, row in read_jsonl(path):
        query_id = str(_value(row, "query-id", place, (str, int)))
        document_id = str(_value(row, "corpus-id", place, (str, int)))
        for key, known, where in ((query_id, queries, "queries"), (document_id, documents, "corpus")):
            if key not in known:
                raise ValueError(
                    f"{place}: the id {key!r} is not in {where}.jsonl. "
                    "A judgement joins a known query to a known document. Add the text, or remove the line."
                )
        relevance.setdefault(query_id, {})[document_id] = _value(row, "score", place, (int,))
    return relevance


def _value(row: dict[str, Any], key: str, place: str, kinds: tuple[type, ...]) -> Any:
    value = row.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(kind.__name__ for kind in kinds)
        found = f"is {value!r}" if key in row else "is missing"
        raise ValueError(f"{place}: {key!r} {found}. Expected: {expected}. Correct the line, or remove it.")
    return value


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file line n", object) for each line that is not blank; at least one, else ValueError.

    Raises: ValueError if the file is missing, empty, not UTF-8, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected: corpus.jsonl, queries.jsonl and qrels.jsonl. Add it.")
    rows = 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            rows += 1
            place = f"{path} line {number}"
            yield place, _json_object(line, place)
    if rows == 0:
        raise ValueError(f"{path}: the file is empty. Expected: one JSON object a line. Write at least one.")


def read_task_file(folder: str | Path) -> dict[str, Any]:
    """The folder's task.json, {} if there is none.

    Keys, all optional: "class" (str) the mteb task whose class and metric to use; "set" (object) attributes
    to set on it; "instruction" (str) the task's instruction.

    Raises: ValueError naming the file if it is no JSON object, or a key is unknown or of another type.
    """
    path = Path(folder) / "task.json"
    if not path.is_file():
        return {}
    task = _json_object(path.read_bytes(), str(path))
    for key, value in task.items():
        if not isinstance(value, TASK_KEYS.get(key, ())):
            problem = f"{key!r} is {value!r}" if key in TASK_KEYS else f"unknown key {key!r}"
            raise ValueError(
                f"{path}: {problem}. Expected: the optional keys class (name of an mteb task), set (object, "
                'attribute to value), instruction (text), for example {"class": "ArguAna"}. Correct it.'
            )
    return task


def _json_object(raw: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error}). Expected: JSON in UTF-8. Convert the file.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: broken JSON ({error}). Expected: one JSON object. Correct it.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: JSON of type {type(value).__name__}. Expected: a JSON object. Correct it.")
    return value
