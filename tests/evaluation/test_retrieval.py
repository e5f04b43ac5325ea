"""nDCG@10 without mteb: equal to mteb's, by hand, malformed folders."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_sets import WordHash, encoder_of, write_retrieval
from tiny_mteb import write_json

from ref.evaluation.results import score_task
from ref.evaluation.retrieval import evaluate_retrieval, ndcg_at_10, read_retrieval_folder
from ref.evaluation.tasks import select_tasks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("documents", [8, 40, 60])
def test_ndcg_equals_that_of_mteb(documents: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Per query, so before mteb rounds. The folder has ties, graded and negative judgements, shared ids."""
    folder = tmp_path / "data" / "Own"
    write_retrieval(
        folder, {"class": "ArguAna", "instruction": "Find"}, queries=min(12, documents), documents=documents
    )
    (task,) = select_tasks("all", tmp_path / "data").tasks
    by_query: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(
        type(task),
        "task_specific_scores",
        lambda self, scores, *args, **options: by_query.update(scores) or {},
    )
    embedder = WordHash()
    row = score_task(encoder_of(embedder), task, tmp_path / "out")
    theirs = np.mean([scores["ndcg_cut_10"] for scores in by_query.values()])
    ours_embedder = WordHash()
    ours = evaluate_retrieval(ours_embedder, folder)
    assert ours == pytest.approx(theirs, abs=1e-6) and ours == pytest.approx(row.score, abs=6e-6)
    assert 0.05 < ours < 0.999
    assert ours_embedder.texts(instructed=True) == embedder.texts(instructed=True)
    assert ours_embedder.texts(instructed=False) == embedder.texts(instructed=False)


def test_ndcg_by_hand_and_without_instruction(tmp_path: Path) -> None:
    assert ndcg_at_10(["b", "a"], {"a": 2, "b": 1}) == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))
    assert ndcg_at_10(["a"], {"a": 0, "b": -1}) == 0.0
    write_retrieval(tmp_path, {"instruction": "Find"})
    embedder = WordHash()
    evaluate_retrieval(embedder, tmp_path, instructed=False)
    assert embedder.texts(instructed=True) == set()
    write_json(tmp_path / "task.json", {})
    with pytest.raises(ValueError, match=r"task.json: 'instruction' must be a non-empty string \(got None\)"):
        evaluate_retrieval(embedder, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", b'{"_id": "x0", "text": "t"}\n{"_id": ', r"corpus.jsonl:2: invalid JSON"),
        (
            "corpus.jsonl",
            b'{"_id": "x0", "text": "t"}\n\n{"_id": "x0", "text": "t"}',
            r"corpus.jsonl:3: '_id' must be unique \(got 'x0' again\)",
        ),
        ("corpus.jsonl", b'{"_id": "x0"}', r"corpus.jsonl:1: 'text' must be a string \(got None\)"),
        (
            "corpus.jsonl",
            b'{"_id": "x0", "title": ["t"], "text": "t"}',
            r"corpus.jsonl:1: 'title' must be a string \(got \['t'\]\)",
        ),
        ("corpus.jsonl", b'{"text": "t"}', "corpus.jsonl:1: '_id' is missing"),
        ("corpus.jsonl", b"[" * 100_000, "corpus.jsonl:1: invalid JSON"),
        ("corpus.jsonl", b'{"_id": 1' + b"0" * 5000 + b"}", "corpus.jsonl:1: invalid JSON"),
        ("corpus.jsonl", b"", r"corpus.jsonl: must have at least one line \(got an empty file\)"),
        ("corpus.jsonl", None, "corpus.jsonl: file does not exist"),
        ("queries.jsonl", b'{"_id": "x0", "text": "\xff"}', "queries.jsonl:1: not UTF-8"),
        ("queries.jsonl", b"[]", r"queries.jsonl:1: must be a JSON object \(got list\)"),
        ("queries.jsonl", b'{"_id": "x0", "text": 3}', r"queries.jsonl:1: 'text' must be a string \(got 3\)"),
        (
            "qrels.jsonl",
            b'{"query-id": "x0", "corpus-id": "y", "score": 1}',
            r"qrels.jsonl:1: 'corpus-id' must be an id of corpus.jsonl \(got 'y'\)",
        ),
        (
            "qrels.jsonl",
            b'{"query-id": "y", "corpus-id": "x0", "score": 1}',
            r"qrels.jsonl:1: 'query-id' must be an id of queries.jsonl \(got 'y'\)",
        ),
        (
            "qrels.jsonl",
            b'{"query-id": "x0", "corpus-id": "x1", "score": 0.5}',
            r"qrels.jsonl:1: 'score' must be an integer \(got 0.5\)",
        ),
    ],
)
def test_a_malformed_retrieval_folder_is_an_error_with_its_line(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    write_retrieval(tmp_path, {"instruction": "Find"})
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(WordHash(), tmp_path)


def test_a_relevant_document_with_the_querys_own_id(tmp_path: Path) -> None:
    """It could never be found where such documents are left out of the ranking, as ArguAna's class does."""
    write_retrieval(tmp_path, {"instruction": "Find"})
    (tmp_path / "qrels.jsonl").write_text('{"query-id": "x0", "corpus-id": "x0", "score": 0}\n'
                                          '{"query-id": "x0", "corpus-id": "x0", "score": 1}\n')
    with pytest.raises(ValueError, match="qrels.jsonl: the only relevant document of 'x0' has the query's own id"):
        evaluate_retrieval(WordHash(), tmp_path)
    assert read_retrieval_folder(tmp_path, ignore_identical_ids=False)[2] == {"x0": {"x0": 1}}


def test_retrieval_needs_no_mteb() -> None:
    code = ("import sys, ref.evaluation.retrieval; "
            "sys.exit(any(name in sys.modules for name in ('mteb', 'datasets')))")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
