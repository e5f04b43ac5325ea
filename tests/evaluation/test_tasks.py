"""Selection of tasks, local folders, malformed task files, downloads."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
from sample_sets import WordHash, encoder_of, sts_pair, world, write_retrieval
from tiny_mteb import write_json, write_lines

import run_eval
from ref.evaluation import card_scores
from ref.evaluation.encoder import instruction_for
from ref.evaluation.results import TaskScore, score_task
from ref.evaluation.retrieval import read_retrieval_folder
from ref.evaluation.tasks import CATEGORIES, data_origin, download, is_official, select_tasks

__all__ = ["world"]  # a fixture


@pytest.mark.parametrize("name", ["brackets [v2]", "a:b", "ümlaut and space", "*?"])
def test_a_path_may_have_any_characters(world: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(world, tmp_path / name)
    embedder = encoder_of(WordHash())
    for task in select_tasks("BIOSSES,MyRetrieval", tmp_path / name).tasks:
        score = score_task(embedder, task, tmp_path / "out").score
        (usual,) = select_tasks(task.metadata.name, world).tasks
        assert score == score_task(embedder, usual, tmp_path / "usual").score


def test_judgements_may_be_written_as_floats(world: Path, tmp_path: Path) -> None:
    """As pandas writes a column with missing values."""
    path = world / "MyRetrieval" / "qrels.jsonl"
    (task,) = select_tasks("MyRetrieval", world).tasks
    before = score_task(encoder_of(WordHash()), task, tmp_path / "one").score
    write_lines(path, [{**row, "score": float(row["score"])} for row in map(json.loads, path.read_text().splitlines())])
    (task,) = select_tasks("MyRetrieval", world).tasks
    assert score_task(encoder_of(WordHash()), task, tmp_path / "two").score == before


def test_lines_may_differ_in_their_fields(world: Path, tmp_path: Path) -> None:
    """Integers as ids, `id` for `_id`, titles here and there, columns that mteb does not know: the same score."""
    before = score_task(encoder_of(WordHash()), select_tasks("MyRetrieval", world).tasks[0], tmp_path / "one").score
    def rewrite(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        path = world / "MyRetrieval" / name
        write_lines(path, [change(row) for row in map(json.loads, path.read_text().splitlines())])

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["_id"][1:])  # of "x7"
        title = {"title": row["title"]} if row.get("title") else {"title": None} if number % 2 else {}
        return {"id": number, "text": row["text"], **title, **({"metadata": {str(number): []}} if number % 3 else {})}
    rewrite("corpus.jsonl", plain)
    rewrite("queries.jsonl", plain)
    rewrite("qrels.jsonl", lambda row: {**row, "query-id": row["query-id"][1:], "corpus-id": int(row["corpus-id"][1:])})
    [task] = select_tasks("MyRetrieval", world).tasks
    assert score_task(encoder_of(WordHash()), task, tmp_path / "two").score == before


@pytest.mark.parametrize(("file", "line", "message"), [
    ("qrels.jsonl", {"query-id": "x0", "corpus-id": "x1", "score": 0.7}, r"qrels\.jsonl:1: 'score' must be an integer"),
    ("qrels.jsonl", {"query-id": "x0", "corpus-id": "x1", "score": float("inf")}, r"jsonl:1: 'score' must be an"),
    ("qrels.jsonl", {"query-id": "x0", "corpus-id": "x1", "score": float("nan")}, r"jsonl:1: 'score' must be an"),
    ("qrels.jsonl", {"query-id": "x0", "corpus-id": "no", "score": 1}, r"qrels\.jsonl:1: 'corpus-id' must be an id of"),
    ("qrels.jsonl", {"query-id": "no", "corpus-id": "x1", "score": 1}, r"qrels\.jsonl:1: 'query-id' must be an id of"),
    ("corpus.jsonl", {"_id": "x1", "text": "twice"}, r"corpus\.jsonl:3: '_id' must be unique \(got 'x1' again\)"),
    ("queries.jsonl", {"_id": "x0", "text": None}, r"queries\.jsonl:1: 'text' must be a string \(got None\)"),
])
def test_a_malformed_retrieval_folder_is_an_error_with_file_and_line(
    world: Path, tmp_path: Path, file: str, line: dict[str, Any], message: str,
) -> None:
    path = world / "MyRetrieval" / file
    path.write_text(json.dumps(line) + "\n" + path.read_text())
    (task,) = select_tasks("MyRetrieval", world).tasks
    with pytest.raises(ValueError, match=message):
        score_task(encoder_of(WordHash()), task, tmp_path / "out")


# ---- selection ---------------------------------------------------------------------------------------------


def test_the_benchmark_is_41_english_tasks_on_their_test_splits() -> None:
    tasks = select_tasks("all").tasks
    assert len(tasks) == 41 and {task.metadata.type for task in tasks} == set(CATEGORIES)
    assert all(list(task.eval_splits) == ["test"] for task in tasks)
    assert {subset for task in tasks for subset in task.hf_subsets} == {"default", "en", "en-en"}
    assert all(instruction_for(task.metadata, {}) for task in tasks)


def test_selection_by_category_and_name() -> None:
    names = [task.metadata.name for task in select_tasks("reranking, STS12,STS12").tasks]
    assert names == ["AskUbuntuDupQuestions", "MindSmallReranking", "STS12"]
    assert len(select_tasks("sts").tasks) == 9


def test_tasks_without_a_folder_are_reported_as_missing(world: Path) -> None:
    selection = select_tasks("STS", world)
    assert [task.metadata.name for task in selection.tasks] == ["BIOSSES"]
    assert len(selection.missing) == 8 and "STS12" in selection.missing
    assert len(select_tasks("all", world).missing) == 41 - 4
    assert select_tasks("MyRetrieval,STS12", world).missing == ["STS12"]
    with pytest.raises(ValueError, match=r"no folder for any of STS12 \(only BIOSSES"):
        select_tasks("STS12", world)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("CQADupstackRetrieval", r"--tasks: CQADupstackRetrieval is the mean of other tasks; give these: CQADupstackA"),
        ("STSBenchmrk", r"--tasks: task or category 'STSBenchmrk' is unknown \(nearest: STSBenchmark"),
        ("Retreival", r"\(nearest: Retrieval"),
        (" , ", r"--tasks must be all, a category or task names \(got ' , '\)"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_names(selection: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_tasks(selection)


# ---- local folders -----------------------------------------------------------------------------------------


def test_a_folder_with_its_own_name_takes_the_metric_but_not_the_prompt(world: Path) -> None:
    (task,) = select_tasks("MyReranking", world).tasks
    assert task.metadata.main_score == "map_at_1000" and task.metadata.type == "Reranking"
    assert instruction_for(task.metadata, {}) == "Retrieve text based on user query."
    (task,) = select_tasks("MyRetrieval", world).tasks
    assert instruction_for(task.metadata, {}) == "Find the same topic"
    assert task.ignore_identical_ids, "as ArguAna"
    (task,) = select_tasks("MyClusters", world).tasks
    assert task.max_fraction_of_documents_to_embed is None


def test_of_a_task_in_many_languages_a_folder_is_the_english_part(world: Path) -> None:
    shutil.copytree(world / "BIOSSES", world / "Similar")
    write_json(world / "Similar" / "task.json", {"class": "STSBenchmarkMultilingualSTS"})
    (task,) = select_tasks("Similar", world).tasks
    assert "en" in task.hf_subsets
    assert len(task.hf_subsets) < len(mteb.get_task("STSBenchmarkMultilingualSTS").hf_subsets)


def test_a_folder_takes_the_metric_of_a_task_in_another_language(world: Path) -> None:
    write_json(world / "MyRetrieval" / "task.json", {"class": "T2Retrieval", "instruction": "Find it"})
    (task,) = select_tasks("MyRetrieval", world).tasks
    assert task.metadata.main_score == "ndcg_at_10" and "eng" not in mteb.get_task("T2Retrieval").languages
    task.load_data()
    assert task.dataset is not None
    task.unload_data()


def test_changed_files_are_loaded_again_in_spite_of_the_cache_of_datasets(tmp_path: Path, monkeypatch: Any) -> None:
    """With README.md and parquet, for which `datasets` 5.2 returns the old rows (as the plain class shows)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data" / "BIOSSES"
    folder.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files: [{split: test, path: test.parquet}]\n---\n"
    (folder / "README.md").write_text(card)
    plain, ours = [], []
    for rows in (6, 9):
        datasets.Dataset.from_list([sts_pair(n) for n in range(rows)]).to_parquet(folder / "test.parquet")
        task = mteb.get_task("BIOSSES")
        task.metadata = task.metadata.model_copy(update={"dataset": {"path": str(folder), "revision": "1"}})
        task.load_data()
        plain.append(len(task.dataset["test"]))
        (task,) = select_tasks("all", tmp_path / "data").tasks
        task.load_data()
        ours.append(len(task.dataset["test"]))
        task.unload_data()
    assert ours == [6, 9]
    assert plain == [6, 6], "datasets notices changed files now: LocalDataMixin.load_data can be simpler"
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE


def test_a_failed_load_can_be_repeated(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A retrieval folder without README.md is read through a scratch folder, which the next attempt needs again."""
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("passing fault")

    (task,) = select_tasks("MyRetrieval", world).tasks
    assert not (world / "MyRetrieval" / "README.md").exists()
    with monkeypatch.context() as patch:
        patch.setattr(mteb.abstasks.AbsTaskRetrieval, "load_data", broken)
        with pytest.raises(OSError, match="passing fault"):
            score_task(encoder_of(WordHash()), task, tmp_path)
    (fresh,) = select_tasks("MyRetrieval", world).tasks
    assert score_task(encoder_of(WordHash()), task, tmp_path).score == score_task(
        encoder_of(WordHash()), fresh, tmp_path / "fresh").score


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('{"class": "ArguAnna"}', r"mteb task 'ArguAnna' is unknown \(nearest: ArguAna"),
        ('{"class": 3}', r"task.json: 'class' must be the name of an mteb task \(got 3\)"),
        ('{"klass": "ArguAna"}', r"task.json: 'klass' is unknown \(only class, set, instruction\)"),
        ('{"class": "CQADupstackRetrieval"}', "CQADupstackRetrieval is the mean of other tasks; give these: CQADupst"),
        ('{"class": "ArguAna", "set": {"k_valeus": [1]}}', r"attribute 'k_valeus' is unknown \(nearest: k_values"),
        ('{"class": "ArguAna", "set": {"eval_splits": ["dev"]}}', "'set': attribute 'eval_splits' is read-only"),
        ('{"class": ', "task.json: invalid JSON"),
        ("[]", r"task.json: must be a JSON object \(got list\)"),
        ("{}", "mteb task 'Bad' is unknown.*needs a task.json"),
    ],
)
def test_a_malformed_task_file_is_named(task: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "Bad").mkdir()
    (tmp_path / "Bad" / "task.json").write_text(task)
    with pytest.raises(ValueError, match=message) as error:
        select_tasks("all", tmp_path)
    assert str(tmp_path / "Bad") in str(error.value)


# ---- download ----------------------------------------------------------------------------------------------


def test_download_lists_each_repository_and_continues_after_a_failure(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The hub is replaced by a copy of a folder; one repository does not exist."""
    requests: list[tuple[str, str, str]] = []

    def snapshot_download(path: str, *, repo_type: str, revision: str, local_dir: str) -> None:
        requests.append((path, repo_type, revision))
        Path(local_dir).mkdir(parents=True)
        if "biosses" in path.lower():
            raise OSError("gone")
        write_lines(Path(local_dir) / "test.jsonl", [{"a": 1}])
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tasks = select_tasks("STS").tasks
    failed = download(tasks, tmp_path / "data")
    assert list(failed) == ["BIOSSES"] and len(requests) == len(tasks)
    assert all(request[1] == "dataset" and request[2] for request in requests)
    assert (tmp_path / "data/STS12/test.jsonl").exists() and not (tmp_path / "data/BIOSSES").exists()
    printed = capsys.readouterr().out
    assert all(task.metadata.name in printed and task.metadata.dataset["revision"] in printed for task in tasks)
    requests.clear()
    assert run_eval.main(["--tasks", "STS", "--download", str(tmp_path / "data")]) == 1
    assert [path for path, *_ in requests if "biosses" not in path.lower()] == []  # the others exist


def test_downloaded_data_are_official_until_they_change(tmp_path: Path, monkeypatch: Any) -> None:
    """Neither with another file, nor with other content, nor as a copy with a name of its own."""
    def snapshot_download(path: str, *, repo_type: str, revision: str, local_dir: str) -> None:
        write_lines(Path(local_dir) / "test.jsonl", [{"a": 1}])
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    [hub] = select_tasks("BIOSSES").tasks
    assert is_official(hub) and download([hub], tmp_path) == {}

    def official() -> dict[str, bool]:
        return {task.metadata.name: is_official(task) for task in select_tasks("all", tmp_path).tasks}
    assert official() == {"BIOSSES": True}
    [local] = select_tasks("all", tmp_path).tasks
    assert local.metadata.revision == hub.metadata.revision  # of the result, which mteb compares
    assert data_origin(local) == data_origin(hub) == ("mteb/biosses-sts", hub.metadata.dataset["revision"])
    written: dict[str, Any] = {}  # the model card names the hub's data too, not a folder of this machine
    monkeypatch.setattr(card_scores, "time_of_completion", lambda run: "noon")
    monkeypatch.setattr(card_scores, "add_scores", lambda run, scores: written.update(scores) or [])
    card_scores.update_cards(tmp_path, [local], [TaskScore("BIOSSES", "STS", "cosine_spearman", 0.8)], "noon", [])
    assert (written["BIOSSES"].dataset, written["BIOSSES"].is_official) == ("mteb/biosses-sts", True)
    [other] = select_tasks("TwentyNewsgroupsClustering").tasks  # the benchmark has .v2, from the same data
    scores = [TaskScore("TwentyNewsgroupsClustering", "Clustering", "v_measure", 0.5)]
    card_scores.update_cards(tmp_path, [other], scores, "noon", [])
    assert not written["TwentyNewsgroupsClustering"].is_official
    [counterfactual] = select_tasks("AmazonCounterfactualClassification").tasks
    scores = [TaskScore("AmazonCounterfactualClassification", "Classification", "accuracy", 0.5)]
    card_scores.update_cards(tmp_path, [counterfactual], scores, "noon", [])
    assert written["AmazonCounterfactualClassification"].subset == "en"
    shutil.copytree(tmp_path / "BIOSSES", tmp_path / "Mine")
    (tmp_path / "Mine/task.json").write_text('{"class": "BIOSSES"}')
    write_lines(tmp_path / "BIOSSES/test.jsonl", [{"a": 2}])
    assert official() == {"BIOSSES": False, "Mine": False}
    write_lines(tmp_path / "BIOSSES/test.jsonl", [{"a": 1}])
    assert official()["BIOSSES"]
    (tmp_path / "BIOSSES/task.json").write_text('{"instruction": "Other"}')
    assert not official()["BIOSSES"]
    assert data_origin(next(task for task in select_tasks("all", tmp_path).tasks if task.metadata.name == "BIOSSES"))[
        1].startswith("local-")


def test_a_beir_folder_is_the_set_that_qrels_jsonl_makes(tmp_path: Path) -> None:
    """For mteb, and for run_train.py's own scoring."""
    write_retrieval(tmp_path / "Lines", {"class": "ArguAna", "instruction": "Find it."})
    shutil.copytree(tmp_path / "Lines", tmp_path / "Beir")
    rows = [json.loads(line) for line in (tmp_path / "Beir/qrels.jsonl").read_text().splitlines()]
    (tmp_path / "Beir/qrels.jsonl").unlink()
    (tmp_path / "Beir/qrels").mkdir()
    table = ["query-id\tcorpus-id\tscore", *(f"{r['query-id']}\t{r['corpus-id']}\t{r['score']}" for r in rows)]
    (tmp_path / "Beir/qrels/test.tsv").write_text("\n".join(table) + "\n")
    assert read_retrieval_folder(tmp_path / "Beir") == read_retrieval_folder(tmp_path / "Lines")
    loaded = []
    for task in select_tasks("all", tmp_path).tasks:
        task.load_data()
        loaded.append(task.dataset["default"]["test"]["relevant_docs"])
    assert loaded[0] == loaded[1] and len(loaded[0]) > 9
    with (tmp_path / "Beir/qrels/test.tsv").open("a") as file:
        file.write(f"{rows[0]['query-id']}\t{rows[0]['corpus-id']}\t0.5\n")
    with pytest.raises(ValueError, match=rf"test\.tsv:{len(rows) + 2}: the score must be an integer \(got 0\.5\)"):
        read_retrieval_folder(tmp_path / "Beir")


def test_a_table_of_judgements_is_that_of_the_split_that_the_class_evaluates(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "Passages"
    write_retrieval(folder, {"class": "MSMARCO"})
    (folder / "qrels.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nx0\tx1\t1\n")
    (task,) = select_tasks("all", tmp_path / "data").tasks
    message = r"Passages: must have qrels\.jsonl, or qrels/dev\.tsv, the split.*evaluates \(got qrels/test\.tsv\)"
    with pytest.raises(ValueError, match=message):
        task.load_data()
    (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\nx2\tx3\t1\n")
    task.load_data()
    assert {split: part["relevant_docs"] for split, part in task.dataset["default"].items()} == {
        "dev": {"x2": {"x3": 1}}}
    (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\nx2\tno\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv:2: 'corpus-id' must be an id of corpus\.jsonl \(got 'no'\)"):
        select_tasks("all", tmp_path / "data").tasks[0].load_data()


@pytest.mark.parametrize("name", ["corpus.small.jsonl", "corpus.jsonl.gz", "corpus.parquet"])
def test_beside_a_jsonl_file_others_of_its_name_are_not_read(world: Path, name: str) -> None:
    folder = world / "MyRetrieval"
    before = (folder / "corpus.jsonl").read_bytes()
    line = before.splitlines()[0]
    (folder / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    (task,) = select_tasks("MyRetrieval", world).tasks
    task.load_data()
    assert len(task.dataset["default"]["test"]["corpus"]) == len(before.splitlines()) > 1
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.large.jsonl").write_bytes(before)
    (task,) = select_tasks("MyRetrieval", world).tasks
    with pytest.raises(ValueError, match=r"MyRetrieval: must have one file corpus\.jsonl or corpus\.parquet \(got c"):
        task.load_data()


@pytest.mark.parametrize(("lines", "message"), [
    (None, r"MyReranking: reranking needs the candidates of each query, top_ranked\.jsonl or top_ranked\.parquet"),
    ([{"query-id": "x0", "corpus-ids": ["x1", "no"]}], r"jsonl:1: 'corpus-ids' must be ids of corpus.jsonl \(got 'no'"),
    ([{"query-id": "x0", "corpus-ids": "x1"}], r"jsonl:1: 'corpus-ids' must be a list of ids \(got 'x1'\)"),
    ([{"query-id": "x0", "corpus-ids": []}], r"jsonl:1: 'corpus-ids' must have at least one id \(got an empty list\)"),
    ([{"query-id": "x0", "corpus-ids": ["x1"]}] * 2, r"jsonl:2: 'query-id' must be unique \(got 'x0' again\)"),
    ([{"query-id": "x0", "corpus-ids": ["x1"]}],
     r"top_ranked\.jsonl: must have a line for every query with judgements \(got none for 'x1'\)"),
])
def test_malformed_candidates_of_reranking(world: Path, lines: list[dict[str, Any]] | None, message: str) -> None:
    path = world / "MyReranking" / "top_ranked.jsonl"
    path.unlink() if lines is None else write_lines(path, lines)
    (task,) = select_tasks("MyReranking", world).tasks
    with pytest.raises(ValueError, match=message):
        task.load_data()


def test_lines_of_candidates_may_have_integers_and_other_fields(world: Path) -> None:
    for name, fields in (("corpus", ["_id"]), ("queries", ["_id"]), ("qrels", ["query-id", "corpus-id"])):
        path = world / "MyReranking" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [row | {field: int(row[field][1:]) for field in fields} for row in rows])
    candidates = [{"query-id": n, "corpus-ids": [1, 2, "3"], "source": "BM25"} for n in range(12)]
    write_lines(world / "MyReranking" / "top_ranked.jsonl", candidates)
    (task,) = select_tasks("MyReranking", world).tasks
    task.load_data()
    assert task.dataset["default"]["test"]["top_ranked"] == {str(n): ["1", "2", "3"] for n in range(12)}


def test_other_english_text_tasks_can_be_named() -> None:
    (similar,) = select_tasks("STSBenchmark.v2").tasks
    assert list(similar.metadata.eval_splits) == ["validation", "test"] and list(similar.eval_splits) == ["test"]
    selection = select_tasks("NFCorpus,STS12")
    assert [task.metadata.name for task in selection.tasks] == ["NFCorpus", "STS12"] and not selection.missing
    with pytest.raises(ValueError, match=r"--tasks: GermanQuAD-Retrieval has no English texts \(only text in deu\)"):
        select_tasks("GermanQuAD-Retrieval")
    assert len(select_tasks("all").tasks) == 41
