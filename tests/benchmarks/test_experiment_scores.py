"""The study's scores by query, as mteb computes them, and its shortened tasks; the study is in test_claims.py."""

import json

import numpy as np
import pytest
from conftest import WORDS, draw_training_lines
from sample_sets import WordHash, encoder_of, world, write_retrieval  # noqa: F401 (a fixture)
from tiny_mteb import sentence, write_json, write_lines

from benchmarks import experiment, experiment_data, experiment_scores
from benchmarks.arms import ARMS, trained_alike
from benchmarks.experiment import Setting, run_arms
from benchmarks.experiment_data import teacher_folder
from benchmarks.experiment_scores import TeacherEmbedder, keep_query_scores, shorten
from benchmarks.mining_world import read_lines
from ref.evaluation.results import score_task
from ref.evaluation.tasks import select_tasks


@pytest.mark.parametrize("name", ["MyRetrieval", "MyReranking"])
def test_scores_by_query_have_the_mean_that_mteb_reports(name, world, tmp_path):  # noqa: F811
    [task] = select_tasks(name, world).tasks
    by_query = keep_query_scores(task)
    assert by_query == {}
    score = score_task(encoder_of(WordHash()), task, tmp_path / "results").score
    assert {f"x{n}" for n in range(11)} <= by_query.keys() and len(set(by_query.values())) > 3
    assert np.mean(list(by_query.values())) == pytest.approx(score, abs=1e-5)


def test_tasks_without_queries_have_no_scores_by_query(world, tmp_path):  # noqa: F811
    [task] = select_tasks("BIOSSES", world).tasks
    by_query = keep_query_scores(task)
    score_task(encoder_of(WordHash()), task, tmp_path / "results")
    assert by_query == {}


def test_the_larger_tasks_are_reduced(world, tmp_path):  # noqa: F811
    """Every n-th row; of a corpus all judged passages and every third of the others; three experiments."""
    write_retrieval(world / "MedQuADRetrieval", {"class": "ArguAna"}, documents=30)
    tweets = [{"sent1": sentence(n), "sent2": sentence(n), "labels": n // 40 % 2} for n in range(81)]
    write_lines(world / "TwitterURLCorpus" / "test.jsonl", tweets)
    names = ("TwitterURLCorpus", "MedQuADRetrieval", "MyRetrieval", "Banking77Classification")
    tasks = {task.metadata.name: task for task in select_tasks(",".join(names), world).tasks}
    assert tasks.keys() == set(names)
    texts = {}
    for name, task in tasks.items():
        shorten(task)
        embedder = WordHash()
        score_task(encoder_of(embedder), task, tmp_path / "results")
        texts[name] = {text for _, given in embedder.calls for text in given}
    assert texts["TwitterURLCorpus"] == {sentence(n) for n in (0, 40, 80)}
    judged = {line["corpus-id"] for line in read_lines(world / "MedQuADRetrieval/qrels.jsonl")}
    for row, document in enumerate(read_lines(world / "MedQuADRetrieval/corpus.jsonl")):
        text = f"{document['title']} {document['text']}".strip()
        assert (text in texts["MedQuADRetrieval"]) == (document["_id"] in judged or row % 3 == 0)
    assert {sentence(n) for n in range(30) if n % 3} <= texts["MyRetrieval"]
    assert tasks["Banking77Classification"].n_experiments == 3


def test_the_teacher_ignores_instructions():
    pytest.importorskip("sentence_transformers")
    teacher = TeacherEmbedder("cpu")
    one, other = teacher.encode(["a text"]), teacher.encode(["a text"], instruction="Find texts.")
    assert teacher_folder().endswith("model") and one.shape == (1, 384) and np.array_equal(one, other)


def test_a_run_of_the_pretrained_setting(world, tiny_run, tmp_path, monkeypatch):  # noqa: F811
    """Two steps of LoRA on a small checkpoint: its scores, by query where there are any, and how it was trained."""
    instructions = {"BIOSSES": "Find it.", "TwitterURLCorpus": "Find it.", "MyRetrieval": "No line has it."}
    shortened = []
    monkeypatch.setattr(experiment_scores, "shorten", lambda task: shortened.append(task.metadata.name))
    for module in (experiment_data, experiment_scores):
        monkeypatch.setattr(module, "REAL_INSTRUCTIONS", write_json(tmp_path / "instructions.json", instructions))
    for folder in ("soft_labels", "pairs"):
        (tmp_path / "real" / folder).mkdir(parents=True)
    world.rename(tmp_path / "real/mteb")
    lines = [{**line, "pos_scores": [0.9, 0.8], "neg_scores": [0.6, 0.3, 0.1]}
             for line in draw_training_lines(WORDS, {"some": "Find it."}, 40)]
    (tmp_path / "real/soft_labels/some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path / "real"))
    setting = Setting("llm", 2, str(tiny_run / "model"))
    limits = []

    def evaluated(embedder, *given, **named):
        limits.append(embedder.prompt_encoder.max_text_tokens)
        return experiment_scores.evaluate_real(embedder, *given, **named)
    monkeypatch.setattr(experiment, "evaluate_real", evaluated)
    rows = run_arms(setting, [ARMS[name] for name in trained_alike("random examples")], 0)
    for row in rows:
        assert (row["steps"], row["dtype"], row["task_scores"].keys()) == (2, "float32", instructions.keys())
        assert row["query_scores"].keys() == {"MyRetrieval"} and len(row["query_scores"]["MyRetrieval"]) >= 11
        assert row["score"] == pytest.approx(np.mean(list(row["task_scores"].values())))
    plain, two, five = rows
    assert limits == [48] * 3
    assert plain["task_scores"] != two["task_scores"] and sorted(shortened) == sorted([*instructions] * 3)
    assert plain["query_scores"] == two["query_scores"] == five["query_scores"]  # no example has its instruction
