"""What the tests of evaluation share: an embedder without a model, and a folder with a small set of each task type."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_mteb import TOPICS, sentence, write_json, write_lines

from ref.evaluation.encoder import MtebEncoder


class WordHash:
    """Bag of words, hashed into 64 dimensions, the instruction with a small weight. `calls`: (instruction, texts)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | None, list[str]]] = []

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Any] = (),
        progress: bool = False,
    ) -> np.ndarray:
        self.calls.append((instruction, list(texts)))
        counts = np.full((len(texts), 64), 1e-3, np.float32)
        for row, text in zip(counts, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % 64] += 1
            for word in (instruction or "").lower().split():
                row[zlib.crc32(word.encode()) % 64] += 0.05
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def texts(self, *, instructed: bool) -> set[str]:
        return {text for instruction, texts in self.calls if (instruction is not None) == instructed for text in texts}


def encoder_of(embedder: Any, **options: Any) -> MtebEncoder:
    return MtebEncoder(embedder, name="test/words", revision="1", **options)


def sts_pair(number: int) -> dict[str, Any]:
    return {"sentence1": sentence(number), "sentence2": sentence(number + number % 2), "score": 1 - number % 2}


def write_retrieval(folder: Path, task: dict[str, Any], *, queries: int = 12, documents: int = 40) -> None:
    """Graded and negative judgements, duplicate texts (ties), ids that queries and documents share."""
    write_json(folder / "task.json", task)
    corpus = [
        {"_id": f"x{n}", "title": "" if n % 3 else f"title{n}", "text": sentence(n % 30)} for n in range(documents)
    ]
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "queries.jsonl", [{"_id": f"x{n}", "text": f"about {sentence(n)}"} for n in range(queries)])
    judged = [(q, d) for q in range(queries - 1) for d in range(q % 3, documents, 5)]  # the last query has none
    write_lines(
        folder / "qrels.jsonl",
        [{"query-id": f"x{q}", "corpus-id": f"x{d}", "score": (q + d) % 4 - 1} for q, d in judged],
    )


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A data folder with a small set of each of the seven task types, in the columns that mteb's classes load."""
    folder = tmp_path / "data"
    pairs = [{"sentence1": sentence(n), "sentence2": sentence(n + n % 3), "score": 5 - n % 3} for n in range(24)]
    write_lines(folder / "BIOSSES" / "test.jsonl", pairs)
    labelled = [{"text": sentence(n), "label": n % 4, "label_text": TOPICS[n % 4]} for n in range(48)]
    write_lines(folder / "Banking77Classification" / "train.jsonl", labelled)
    write_lines(folder / "Banking77Classification" / "test.jsonl", labelled[::3])
    posts = [{"sentences": [sentence(n) for n in range(60)], "labels": [n % 4 for n in range(60)]}]
    write_lines(folder / "MyClusters" / "test.jsonl", posts)
    everything = {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": 60}
    write_json(folder / "MyClusters" / "task.json", {"class": "TwentyNewsgroupsClustering.v2", "set": everything})
    tweets = [{"sent1": sentence(n), "sent2": sentence(n + n % 2), "labels": 1 - n % 2} for n in range(24)]
    write_lines(folder / "TwitterURLCorpus" / "test.jsonl", tweets)
    summaries = [
        {
            "text": sentence(n),
            "human_summaries": [sentence(n), sentence(n + 4)],
            "machine_summaries": [sentence(n + 8), sentence(n + 1), TOPICS[n % 4]],
            "relevance": [3.0 + n % 2, 1.0, 5.0],
        }
        for n in range(8)
    ]
    write_lines(folder / "SummEvalSummarization.v2" / "test.jsonl", summaries)
    write_retrieval(folder / "MyRetrieval", {"class": "ArguAna", "instruction": "Find the same topic"})
    write_retrieval(folder / "MyReranking", {"class": "AskUbuntuDupQuestions"})
    candidates = [{"query-id": f"x{n}", "corpus-ids": [f"x{m}" for m in range(40)]} for n in range(12)]
    write_lines(folder / "MyReranking" / "top_ranked.jsonl", candidates)
    return folder
