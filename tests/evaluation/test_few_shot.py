"""In-context examples: pairs by task type, the seed, exclusion of scored texts, zero-shot, examples from a file."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
import pytest
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader
from tiny_mteb import OFFSET, TOPICS, TRAINED, sentence, write_lines, write_task

from ref.evaluation import few_shot
from ref.evaluation.few_shot import FewShotExamples, draw_examples, read_example_file, read_example_folder
from ref.evaluation.tasks import benchmark_tasks, select_tasks
from ref.text.prompts import InContextExample

datasets.disable_progress_bars()


def tiny(folder: Path, name: str, *, train: bool = True) -> AbsTask:
    """The task on a tiny data set, with or without a training split."""
    if not (folder / name).exists():
        write_task(folder / name, name, rows=24, train=train)
    (task,) = select_tasks(name, folder).tasks
    return task


def number(text: str) -> int:
    """The number of a sentence. Example: "about tea kettle water and word12 or word7" is 12."""
    found = re.search(r" word(\d+) ", text)
    assert found is not None
    return int(found[1])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- every task type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "Banking77Classification",
    "MTOPDomainClassification",  # subsets as configurations
    "MassiveIntentClassification",  # subsets in a column
    "TwentyNewsgroupsClustering.v2",  # the class drops the split
    "ArXivHierarchicalClusteringS2S",  # and the labels are paths
    "BiorxivClusteringP2P.v2",  # the class keeps it
])
def test_the_response_is_of_the_same_class_and_all_classes_occur(name: str, tmp_path: Path) -> None:
    result = draw_examples(tiny(tmp_path, name), 4, seed=0)
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
def test_the_response_is_the_other_text_of_a_similar_pair(name: str, apart: int, tmp_path: Path) -> None:
    result = draw_examples(tiny(tmp_path, name), 3, seed=0)
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
    result = draw_examples(tiny(tmp_path, name), 5, seed=0)
    assert result.source == "train split, seed 0" and len({e.query for e in result.examples}) == 5
    for example in result.examples:
        n = number(example.query)
        title = f"title{n} " if name == "TRECCOVID" else ""
        assert n in range(8, 16) and example.response == title + sentence(n), "title and text as mteb joins them"


def test_a_high_gold_score_depends_on_the_scale_of_its_task(tmp_path: Path) -> None:
    task: Any = tiny(tmp_path, "STS22.v2")  # 1 to 4
    assert few_shot._is_high(task, 3.4) and not few_shot._is_high(task, 3.39)
    task = tiny(tmp_path, "STS12")  # 0 to 5
    assert few_shot._is_high(task, 4.0) and not few_shot._is_high(task, 3.99)


# ---- the seed, and the task is not modified ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["STS12", "Banking77Classification", "FiQA2018"])
def test_the_examples_are_a_function_of_the_seed(name: str, tmp_path: Path) -> None:
    first = draw_examples(tiny(tmp_path, name), 3, seed=5)
    assert draw_examples(tiny(tmp_path, name), 3, seed=5) == first
    loaded = tiny(tmp_path, name)
    loaded.load_data()
    data = loaded.dataset
    assert draw_examples(loaded, 3, seed=5) == first
    assert loaded.data_loaded and loaded.dataset is data and list(loaded.eval_splits) == ["test"]
    assert draw_examples(loaded, 3, seed=6).examples != first.examples
    assert draw_examples(loaded, 2, seed=5).examples == first.examples[:2]
    fresh = tiny(tmp_path, name)
    draw_examples(fresh, 3, seed=5)
    assert not fresh.data_loaded and fresh.metadata == tiny(tmp_path, name).metadata


def test_more_examples_than_the_split_has(tmp_path: Path) -> None:
    result = draw_examples(tiny(tmp_path, "STS12"), 99, seed=0)
    assert len(result.examples) == 8 and result.source == "train split, seed 0, 8 of 99 requested"
    result = draw_examples(tiny(tmp_path, "Banking77Classification"), 99, seed=0)
    texts = [text for e in result.examples for text in (e.query, e.response)]
    assert len(texts) == len(set(texts)) == 24, "each text once"


# ---- scored texts are excluded -------------------------------------------------------------------------------


def plant(folder: Path, name: str) -> None:
    """Make the training split repeat the scored one, with other white space and case, beside pairs of its own."""
    test = lines(folder / name / "test.jsonl")
    own = lines(folder / name / "train.jsonl")[:9:4]  # 0, 4, 8: one topic; of the pairs only 0 is similar
    column = "sentence1" if name == "STS12" else "text"
    write_lines(folder / name / "train.jsonl", own + [row | {column: f" {row[column].upper()}  "} for row in test])


@pytest.mark.parametrize("name", ["STS12", "Banking77Classification"])
def test_a_scored_text_is_excluded(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    tiny(tmp_path, name)
    plant(tmp_path, name)
    task = tiny(tmp_path, name)
    result = draw_examples(task, 5, seed=0)
    assert result.source == "train split, seed 0, 1 of 5 requested"
    assert all(number(text) >= OFFSET["train"] for e in result.examples for text in (e.query, e.response))
    monkeypatch.setattr(few_shot, "_texts", lambda data: [])
    without = draw_examples(task, 5, seed=0)  # negative control
    assert any(text.isupper() or text.strip() != text for e in without.examples for text in (e.query, e.response))


def test_a_scored_query_and_its_passages_are_excluded(tmp_path: Path, monkeypatch: Any) -> None:
    """q8 has the text of a scored query; q9's best passage is relevant to the scored q0; q10 to q15 are usable."""
    folder = tmp_path / "FiQA2018"
    tiny(tmp_path, "FiQA2018")
    queries = lines(folder / "queries.jsonl")
    write_lines(folder / "queries.jsonl", [
        row | {"text": queries[0]["text"].upper()} if row["_id"] == "q8" else row for row in queries])
    judged = lines(folder / "qrels-test.jsonl")
    write_lines(folder / "qrels-test.jsonl", [*judged, {"query-id": "q0", "corpus-id": "d9", "score": 1}])
    task = tiny(tmp_path, "FiQA2018")
    result = draw_examples(task, 8, seed=0)
    assert {number(e.response) for e in result.examples} == set(range(10, 16))
    assert result.source == "train split, seed 0, 6 of 8 requested"
    monkeypatch.setattr(few_shot, "_texts", lambda data: [])
    assert len(draw_examples(task, 8, seed=0).examples) == 8


def test_a_scored_training_split_is_not_used(tmp_path: Path) -> None:
    task = tiny(tmp_path, "STS12").filter_eval_splits(["train", "test"])
    assert draw_examples(task, 2, seed=0) == FewShotExamples([], "none: the train split is scored, zero-shot")


# ---- zero-shot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "STS13", "TwitterURLCorpus", "SummEvalSummarization.v2", "ArguAna", "MindSmallReranking", "BiorxivClusteringP2P.v2",
    "STS17",
])
def test_without_a_training_split_there_are_no_examples_and_the_reason_is_given(name: str, tmp_path: Path) -> None:
    assert name not in TRAINED
    result = draw_examples(tiny(tmp_path, name, train=False), 2, seed=0)
    assert result == FewShotExamples([], "none: the task has no training split, zero-shot")


def test_mteb_alone_would_use_the_scored_judgements_for_training(tmp_path: Path, monkeypatch: Any) -> None:
    """Why the splits are listed first: the loader replaces a missing split by the only one there is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = tiny(tmp_path, "ArguAna", train=False)
    task.load_data()
    scored: Any = task.dataset
    place = task.metadata.dataset
    loaded = RetrievalDatasetLoader(place["path"], place["revision"], split="train").load()
    assert loaded["relevant_docs"] == scored["default"]["test"]["relevant_docs"]
    task.unload_data()


def test_a_split_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    def malformed(*_: Any, **__: Any) -> list[str]:
        raise ValueError("no such column")

    task = tiny(tmp_path, "STS12")
    monkeypatch.setattr(datasets, "get_dataset_split_names", malformed)
    result = draw_examples(task, 2, seed=0)
    assert not result.examples
    assert result.source == "none: the training split cannot be read (ValueError: no such column), zero-shot"


CLIENT_ERROR = type("ConnectTimeout", (Exception,), {"__module__": "httpx"})  # of the hub's client


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, CLIENT_ERROR])
def test_without_the_hub_a_task_is_not_taken_for_one_without_examples(
    error: type[Exception], tmp_path: Path, monkeypatch: Any,
) -> None:
    """Its results with examples would be replaced by zero-shot ones."""
    def unreachable(*_: Any, **__: Any) -> list[str]:
        raise error("hub unreachable")

    task = tiny(tmp_path, "STS12")
    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ConnectionError, match=r"--examples: the training split of STS12 .*hub unreachable"):
        draw_examples(task, 2, seed=0)


@pytest.mark.parametrize(("error", "is_of_the_hub"), [
    (huggingface_hub.errors.LocalEntryNotFoundError, True), (OSError, True), (ValueError, False),
    (datasets.exceptions.DatasetNotFoundError, False)])
def test_a_hub_that_fails_and_a_data_set_that_is_gated(
    error: type[Exception], is_of_the_hub: bool, monkeypatch: Any,
) -> None:
    def fail(*_: Any, **__: Any) -> list[str]:
        raise error("503")

    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    task = mteb.get_task("FiQA2018")
    if is_of_the_hub:
        with pytest.raises(ConnectionError, match="FiQA2018 cannot be read"):
            draw_examples(task, 2, seed=0)
    else:
        assert "cannot be read" in draw_examples(task, 2, seed=0).source


def test_offline_a_cached_data_set_without_its_list_of_splits_says_nothing(monkeypatch: Any) -> None:
    task = mteb.get_task("FiQA2018")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: ["default"])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="FiQA2018 cannot be read"):
        draw_examples(task, 2, seed=0)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert "no training split" in draw_examples(task, 2, seed=0).source


def test_no_examples_requested_no_pair_no_such_task_type(tmp_path: Path) -> None:
    task = tiny(tmp_path, "STS12")
    assert draw_examples(task, 0, seed=0) == FewShotExamples([], "none: no examples requested, zero-shot")
    with pytest.raises(ValueError, match=r"count must be >= 0 \(got -1\)"):
        draw_examples(task, -1, seed=0)
    low = [row | {"score": 3.9} for row in lines(tmp_path / "STS12" / "train.jsonl")]
    write_lines(tmp_path / "STS12" / "train.jsonl", low)
    assert draw_examples(task, 2, seed=0).source == "none: the train split has no usable pair, zero-shot"
    task.metadata = task.metadata.model_copy(update={"type": "Regression"})
    assert draw_examples(task, 2, seed=0).source == "none: tasks of type Regression have no examples, zero-shot"


def test_on_real_data(data_dir: Path) -> None:
    (task,) = select_tasks("STSBenchmark", data_dir / "mteb").tasks
    result = draw_examples(task, 3, seed=0)
    read = {split: datasets.Dataset.from_parquet(
        str(data_dir / "mteb" / "STSBenchmark" / f"{split}.parquet"), keep_in_memory=True).to_list()
        for split in ("train", "test")}
    gold = {(row["sentence1"], row["sentence2"]): row["score"] for row in read["train"]}
    scored = {row[column] for row in read["test"] for column in ("sentence1", "sentence2")}
    assert len(result.examples) == 3
    for example in result.examples:
        assert gold[example.query, example.response] >= 4
        assert not {example.query, example.response} & scored


# ---- examples from files --------------------------------------------------------------------------------------------

GOOD = {"query": "a", "response": "b"}


def test_examples_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"STS12": [{"query": "a", "response": "b"}], "Mine": []}))
    found = read_example_file(path, ["Mine"])
    assert {name: each.examples for name, each in found.items()} == {"STS12": [InContextExample("a", "b")], "Mine": []}
    assert found["STS12"].source == "file own.json"


def test_a_folder_of_examples_as_bge_en_icl_publishes_them(tmp_path: Path, capsys: Any) -> None:
    """Its files have the names of the tasks at that time; the tasks of today made from them use them."""
    row = {"instruct": "Own instruction", "query": "q", "response": "r"}
    names = ("STS12", "ClimateFEVER", "CQADupstackRetrieval", "ArxivClusteringP2P", "EmotionClassification", "SummEval",
             "SummEvalSummarization.v2", "Mine")
    for name in names:
        rows = [GOOD, row] if name == "STS12" else [{**GOOD, "query": name}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "law.jsonl").write_text("not read")
    found = read_example_folder(tmp_path, ["Mine"])
    queries = {name: [e.query for e in each.examples] for name, each in found.items()}
    assert queries == {
        "STS12": ["a", "q"], "ClimateFEVERHardNegatives": ["ClimateFEVER"], "Mine": ["Mine"],
        "CQADupstackGamingRetrieval": ["CQADupstackRetrieval"], "CQADupstackUnixRetrieval": ["CQADupstackRetrieval"],
        "ArXivHierarchicalClusteringP2P": ["ArxivClusteringP2P"],
        "SummEvalSummarization.v2": ["SummEvalSummarization.v2"]}  # the file of its own name goes first
    assert found["STS12"].examples == [InContextExample("a", "b"), InContextExample("q", "r", "Own instruction")]
    assert found["ClimateFEVERHardNegatives"].source == "file ClimateFEVER.json"
    assert "2 of 8 files are of other tasks (EmotionClassification, SummEval)" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "content", "message"), [
    ("Other.json", [GOOD], r"--examples-file \S+: must hold a file TASK.json"),
    ("STS12.json", {"a": 1}, r"STS12.json: must be a JSON list \(got dict\)"),
    ("STS12.json", [GOOD, GOOD | {"instruct": ""}], r"STS12.json, example 2: 'instruct' must be a non-empty string"),
    ("STS12.json", [{"query": "a"}], r"STS12.json, example 1: 'response' must be a non-empty string"),
])
def test_a_malformed_folder_of_examples(name: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_example_folder(tmp_path, [])


@pytest.mark.parametrize(("content", "message"), [
    ([], r"own\.json: must be a JSON object \(got list\)"),
    ({"STS112": [GOOD]}, r"task 'STS112' is unknown \(nearest: STS12"),
    ({"STS12": GOOD}, "'STS12' must be a list of .*got {'query': 'a', 'response': 'b'}"),
    ({"STS12": [GOOD, {"query": "a"}]}, r"'STS12', example 2: 'response' must be a non-empty string \(got None\)"),
    ({"STS12": [{"query": "a", "response": 3}]}, r"example 1: 'response' must be a non-empty string \(got 3\)"),
    ({"STS12": [{"query": "  ", "response": "b"}]}, r"example 1: 'query' must be a non-empty string \(got '  '\)"),
    ({"STS12": [GOOD | {"answer": "c"}]}, r"example 1: 'answer' is unknown \(only instruct, query, response\)"),
    ({"STS12": ["a"]}, r"'STS12', example 1 must be an object .*\(got 'a'\)"),
])
def test_a_malformed_file_is_named_with_task_and_field(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_example_file(tmp_path / "own.json", [])
    assert str(tmp_path / "own.json") in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: file does not exist"):
        read_example_file(tmp_path / "none.json", [])
    (tmp_path / "own.json").write_text('{"STS12": ')
    with pytest.raises(ValueError, match=r"own\.json: invalid JSON \(Expecting value"):
        read_example_file(tmp_path / "own.json", [])


def test_the_trained_tasks_of_the_tiny_data_are_tasks() -> None:
    assert set(TRAINED) <= set(benchmark_tasks()) and len(TOPICS) == 4
