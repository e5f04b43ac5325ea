"""Examples for scoring: what answers what in each type, the same by seed, never from what is scored, a user's file."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("mteb")

import datasets
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader
from tiny_mteb import OFFSET, TOPICS, TRAINED, sentence, write_lines, write_task

from ref.prompts import Example
from scoring import few_shot
from scoring.few_shot import FewShot, examples_for, examples_from_file
from scoring.tasks import benchmark_tasks, tasks_from

datasets.disable_progress_bars()


def tiny(folder: Path, name: str, *, train: bool = True) -> AbsTask:
    """The task on a tiny data set, with or without a training split."""
    if not (folder / name).exists():
        write_task(folder / name, name, rows=24, train=train)
    (task,) = tasks_from(name, folder).tasks
    return task


def number(text: str) -> int:
    """Which sentence it is. Example: "about tea kettle water and word12 or word7" is 12."""
    found = re.search(r" word(\d+) ", text)
    assert found is not None
    return int(found[1])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- every type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "Banking77Classification",
    "MTOPDomainClassification",  # subsets as configurations
    "MassiveIntentClassification",  # subsets in a column
    "TwentyNewsgroupsClustering.v2",  # the class drops the split
    "ArXivHierarchicalClusteringS2S",  # and the labels are paths
    "BiorxivClusteringP2P.v2",  # the class keeps it
])
def test_the_response_is_of_the_same_class_and_the_classes_take_turns(name: str, tmp_path: Path) -> None:
    result = examples_for(tiny(tmp_path, name), 4, seed=0)
    assert result.source == "train split, seed 0" and len(result.examples) == 4
    for example in result.examples:
        assert number(example.query) % 4 == number(example.response) % 4
        assert number(example.query) != number(example.response)
    assert {number(e.query) % 4 for e in result.examples} == {0, 1, 2, 3}
    assert all(number(text) >= OFFSET["train"] for e in result.examples for text in (e.query, e.response))


@pytest.mark.parametrize(("name", "apart"), [
    ("STS12", 0), ("STSBenchmark", 0), ("STS22.v2", 0),  # pairs n, n + n % 3: only n, n scores high
    ("TwitterURLCorpus", 0), ("SprintDuplicateQuestions", 0),  # the second with all pairs in one row
    ("SummEvalSummarization.v2", 800),
])
def test_the_response_is_the_other_text_of_a_pair_of_one_meaning(name: str, apart: int, tmp_path: Path) -> None:
    result = examples_for(tiny(tmp_path, name), 3, seed=0)
    assert result.source == "train split, seed 0" and len(result.examples) == 3
    for query, response in ((e.query, e.response) for e in result.examples):
        assert number(query) >= OFFSET["train"]
        if name.startswith("SummEval"):
            ours = lines(tmp_path / name / "train.jsonl")[number(query) - OFFSET["train"] - 400]
            gold = dict(zip(ours["machine_summaries"], ours["relevance"], strict=True))
            assert query == ours["human_summaries"][0] and gold[response] >= 4.0
        else:
            assert number(response) == number(query)


@pytest.mark.parametrize("name", ["FiQA2018", "AskUbuntuDupQuestions", "TRECCOVID"])
def test_the_response_is_the_most_relevant_passage_of_a_training_query(name: str, tmp_path: Path) -> None:
    result = examples_for(tiny(tmp_path, name), 5, seed=0)
    assert result.source == "train split, seed 0" and len({e.query for e in result.examples}) == 5
    for example in result.examples:
        n = number(example.query)
        title = f"title{n} " if name == "TRECCOVID" else ""
        assert n in range(8, 16) and example.response == title + sentence(n), "title and text as mteb joins them"


def test_a_gold_score_is_high_on_the_scale_of_its_task(tmp_path: Path) -> None:
    task: Any = tiny(tmp_path, "STS22.v2")  # 1 to 4
    assert few_shot._strong(task, 3.4) and not few_shot._strong(task, 3.39)
    task = tiny(tmp_path, "STS12")  # 0 to 5
    assert few_shot._strong(task, 4.0) and not few_shot._strong(task, 3.99)


# ---- the same by seed, and the task untouched ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["STS12", "Banking77Classification", "FiQA2018"])
def test_the_seed_decides(name: str, tmp_path: Path) -> None:
    first = examples_for(tiny(tmp_path, name), 3, seed=5)
    assert examples_for(tiny(tmp_path, name), 3, seed=5) == first
    loaded = tiny(tmp_path, name)
    loaded.load_data()
    data = loaded.dataset
    assert examples_for(loaded, 3, seed=5) == first
    assert loaded.data_loaded and loaded.dataset is data and list(loaded.eval_splits) == ["test"]
    assert examples_for(loaded, 3, seed=6).examples != first.examples
    assert examples_for(loaded, 2, seed=5).examples == first.examples[:2]
    fresh = tiny(tmp_path, name)
    examples_for(fresh, 3, seed=5)
    assert not fresh.data_loaded and fresh.metadata == tiny(tmp_path, name).metadata


def test_more_than_there_is(tmp_path: Path) -> None:
    result = examples_for(tiny(tmp_path, "STS12"), 99, seed=0)
    assert len(result.examples) == 8 and result.source == "train split, seed 0, 8 of the 99 asked for"
    result = examples_for(tiny(tmp_path, "Banking77Classification"), 99, seed=0)
    texts = [text for e in result.examples for text in (e.query, e.response)]
    assert len(texts) == len(set(texts)) == 24, "each text once"


# ---- nothing of what is scored -------------------------------------------------------------------------------


def plant(folder: Path, name: str) -> None:
    """Make the training split repeat the scored one, with other blanks and capitals, beside two pairs of its own."""
    test = lines(folder / name / "test.jsonl")
    own = lines(folder / name / "train.jsonl")[:9:4]  # 0, 4, 8: a topic; of the pairs only 0 is alike
    column = "sentence1" if name == "STS12" else "text"
    write_lines(folder / name / "train.jsonl", own + [row | {column: f" {row[column].upper()}  "} for row in test])


@pytest.mark.parametrize("name", ["STS12", "Banking77Classification"])
def test_a_text_that_is_scored_too_is_not_shown(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    tiny(tmp_path, name)
    plant(tmp_path, name)
    task = tiny(tmp_path, name)
    result = examples_for(task, 5, seed=0)
    assert result.source == "train split, seed 0, 1 of the 5 asked for"
    assert all(number(text) >= OFFSET["train"] for e in result.examples for text in (e.query, e.response))
    monkeypatch.setattr(few_shot, "_texts", lambda data: [])
    careless = examples_for(task, 5, seed=0)
    assert any(text.isupper() or text.strip() != text for e in careless.examples for text in (e.query, e.response))


def test_a_scored_query_or_its_passage_is_not_shown(tmp_path: Path, monkeypatch: Any) -> None:
    """q8's text is a scored query's; q9's best passage is relevant to the scored q0; q10 to q15 are free."""
    folder = tmp_path / "FiQA2018"
    tiny(tmp_path, "FiQA2018")
    queries = lines(folder / "queries.jsonl")
    write_lines(folder / "queries.jsonl", [
        row | {"text": queries[0]["text"].upper()} if row["_id"] == "q8" else row for row in queries])
    judged = lines(folder / "qrels-test.jsonl")
    write_lines(folder / "qrels-test.jsonl", [*judged, {"query-id": "q0", "corpus-id": "d9", "score": 1}])
    task = tiny(tmp_path, "FiQA2018")
    result = examples_for(task, 8, seed=0)
    assert {number(e.response) for e in result.examples} == set(range(10, 16))
    assert result.source == "train split, seed 0, 6 of the 8 asked for"
    monkeypatch.setattr(few_shot, "_texts", lambda data: [])
    assert len(examples_for(task, 8, seed=0).examples) == 8


def test_a_training_split_that_is_scored_is_left_alone(tmp_path: Path) -> None:
    task = tiny(tmp_path, "STS12").filter_eval_splits(["train", "test"])
    assert examples_for(task, 2, seed=0) == FewShot([], "none: the train split is scored, zero-shot")


# ---- zero-shot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "STS13", "TwitterURLCorpus", "SummEvalSummarization.v2", "ArguAna", "MindSmallReranking", "BiorxivClusteringP2P.v2",
    "STS17",
])
def test_without_a_training_split_there_are_no_examples_and_it_is_said(name: str, tmp_path: Path) -> None:
    assert name not in TRAINED
    result = examples_for(tiny(tmp_path, name, train=False), 2, seed=0)
    assert result == FewShot([], "none: the task has no training split, zero-shot")


def test_mteb_alone_would_take_the_scored_judgements_for_training(tmp_path: Path, monkeypatch: Any) -> None:
    """Why the splits are listed first: the loader answers a split that is not there with the only one that is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = tiny(tmp_path, "ArguAna", train=False)
    task.load_data()
    scored: Any = task.dataset
    place = task.metadata.dataset
    quietly = RetrievalDatasetLoader(place["path"], place["revision"], split="train").load()
    assert quietly["relevant_docs"] == scored["default"]["test"]["relevant_docs"]
    task.unload_data()


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    def offline(*_: Any, **__: Any) -> list[str]:
        raise ConnectionError("no way to the hub")

    task = tiny(tmp_path, "STS12")
    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    result = examples_for(task, 2, seed=0)
    assert not result.examples
    assert result.source == "none: the training split cannot be read (ConnectionError: no way to the hub), zero-shot"


def test_no_pair_no_example_no_rule(tmp_path: Path) -> None:
    task = tiny(tmp_path, "STS12")
    assert examples_for(task, 0, seed=0) == FewShot([], "none: no examples asked for, zero-shot")
    with pytest.raises(ValueError, match=r"count is -1\. Expected"):
        examples_for(task, -1, seed=0)
    low = [row | {"score": 3.9} for row in lines(tmp_path / "STS12" / "train.jsonl")]
    write_lines(tmp_path / "STS12" / "train.jsonl", low)
    assert examples_for(task, 2, seed=0).source == "none: the train split has no pair that may be shown, zero-shot"
    task.metadata = task.metadata.model_copy(update={"type": "Regression"})
    assert examples_for(task, 2, seed=0).source == "none: no rule for tasks of type Regression, zero-shot"


def test_on_real_data(data_dir: Path) -> None:
    (task,) = tasks_from("STSBenchmark", data_dir / "mteb").tasks
    result = examples_for(task, 3, seed=0)
    read = {split: datasets.Dataset.from_parquet(
        str(data_dir / "mteb" / "STSBenchmark" / f"{split}.parquet"), keep_in_memory=True).to_list()
        for split in ("train", "test")}
    gold = {(row["sentence1"], row["sentence2"]): row["score"] for row in read["train"]}
    scored = {row[column] for row in read["test"] for column in ("sentence1", "sentence2")}
    assert len(result.examples) == 3
    for example in result.examples:
        assert gold[example.query, example.response] >= 4
        assert not {example.query, example.response} & scored


# ---- a user's file -------------------------------------------------------------------------------------------


def test_examples_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"STS12": [{"query": "a", "response": "b"}], "Mine": []}))
    assert examples_from_file(path, ["Mine"]) == {"STS12": [Example("a", "b")], "Mine": []}


GOOD = {"query": "a", "response": "b"}


@pytest.mark.parametrize(("content", "message"), [
    ([], r"JSON of type list. Expected: \{"),
    ({"STS112": [GOOD]}, "unknown task 'STS112'. Nearest: STS12"),
    ({"STS12": GOOD}, "STS12: {'query': 'a', 'response': 'b'} is not a list. Expected"),
    ({"STS12": [GOOD, {"query": "a"}]}, "STS12, example 2: 'response' is None. Expected: query and response"),
    ({"STS12": [{"query": "a", "response": 3}]}, "STS12, example 1: 'response' is 3"),
    ({"STS12": [{"query": "  ", "response": "b"}]}, "STS12, example 1: 'query' is '  '"),
    ({"STS12": [GOOD | {"answer": "c"}]}, "STS12, example 1: 'answer' is 'c'"),
    ({"STS12": ["a"]}, "STS12, example 1: 'query' is None"),
])
def test_a_bad_file_is_named_with_task_and_field(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        examples_from_file(tmp_path / "own.json", [])
    assert str(tmp_path / "own.json") in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json.*Expected: a readable JSON file"):
        examples_from_file(tmp_path / "none.json", [])
    (tmp_path / "own.json").write_text('{"STS12": ')
    with pytest.raises(ValueError, match=r"own\.json: Expecting value.*Correct"):
        examples_from_file(tmp_path / "own.json", [])


def test_the_trained_tasks_of_the_tiny_data_are_tasks() -> None:
    assert set(TRAINED) <= set(benchmark_tasks()) and len(TOPICS) == 4
