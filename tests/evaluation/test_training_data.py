"""Which tasks are marked because the model was trained on their data, and where the mark appears."""

import json
from pathlib import Path
from typing import Any

import mteb
import pytest
from sample_sets import world
from tiny_mteb import write_json

import run_eval
from ref.evaluation.tasks import benchmark_tasks
from ref.evaluation.training_data import tasks_in_training_data

__all__ = ["world"]  # a fixture


def run_of(folder: Path, *tasks: str, root: str = "tiny") -> Path:
    write_json(folder / "run.json", {"tasks": tasks, "root": root})
    return folder


@pytest.mark.parametrize(("name", "tasks"), [
    ("stsb", ["STSBenchmark"]),
    ("sts-benchmark_train", ["STSBenchmark"]),
    ("Banking77Classification", ["Banking77Classification"]),
    ("biorxiv", ["BiorxivClusteringP2P.v2"]),
    ("ArxivClusteringS2S", ["ArXivHierarchicalClusteringS2S", "ArXivHierarchicalClusteringP2P"]),  # not told apart
    ("sts12_train", ["STS12"]),
    ("touche2020", ["Touche2020Retrieval.v3"]),
    ("banking77_classification", ["Banking77Classification"]),
    ("toxic_conversations_50k", ["ToxicConversationsClassification"]),
    ("trec", []),
    ("scidocsrr", []),
    ("stackexchange_dupquestions", []),
    ("climate_fever", ["ClimateFEVERHardNegatives"]),
    ("fever", ["FEVERHardNegatives"]),
    ("fiqa", ["FiQA2018"]),
    ("CQADupstackRetrieval", ["CQADupstackGamingRetrieval", "CQADupstackUnixRetrieval"]),
    ("sts", []),
    ("nq", []),
    ("clinc150", []),
    ("fiqa/train", ["FiQA2018"]),
    ("mteb/stsb/validation_test", ["STSBenchmark"]),
    ("fiqa/other", []),
])
def test_names_of_training_data(name: str, tasks: list[str], tmp_path: Path) -> None:
    found = tasks_in_training_data(str(run_of(tmp_path, "other", name)), benchmark_tasks())
    assert found == dict.fromkeys(sorted(tasks, key=list(benchmark_tasks()).index), name)


def test_the_training_sets_of_a_published_model_are_those_of_mteb() -> None:
    """As docs/reproduce.md lists them: 20 of the 41 tasks."""
    model = "annamodels/LGAI-Embedding-Preview"
    found = tasks_in_training_data(model, benchmark_tasks())
    assert len(found) == 20
    meta = mteb.get_model_meta(model)
    assert set(found) == {name for name, task in benchmark_tasks().items() if not meta.is_zero_shot_on([task])}


def test_a_run_has_the_training_data_of_the_model_below_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "banking77", "folder/stsb", root="intfloat/e5-mistral-7b-instruct")
    for folder in (run, run / "merged", run / "adapter"):
        assert tasks_in_training_data(str(folder), benchmark_tasks()) == {
            "Banking77Classification": "banking77", "STSBenchmark": "folder/stsb",
            **{name: name for name in ("HotpotQAHardNegatives", "FEVERHardNegatives")}}  # mteb's names
    write_json(tmp_path / "old/run.json", {"data": [{"file": "sts22.jsonl"}], "model": "tiny"})
    assert tasks_in_training_data(str(tmp_path / "old"), benchmark_tasks()) == {"STS22.v2": "sts22"}
    assert tasks_in_training_data(str(tmp_path / "no-run"), benchmark_tasks()) == {}


def test_plan_and_report_mark_the_tasks(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = json.loads((tiny_run / "run.json").read_text())
    assert run["tasks"] == ["data"]
    (tmp_path / "run").mkdir()
    for path in tiny_run.iterdir():
        (tmp_path / "run" / path.name).symlink_to(path)
    (tmp_path / "run/run.json").unlink()
    write_json(tmp_path / "run/run.json", {**run, "tasks": ["biosses"]})
    command = ["--model", str(tmp_path / "run"), "--data-dir", str(world), "--tasks", "BIOSSES,TwitterURLCorpus",
               "--output", str(tmp_path / "out")]
    assert run_eval.main([*command, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "†" in line] == [["BIOSSES", "†"], ["†", "trained"]]
    assert run_eval.main(command) == 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "BIOSSES †" in text and "TwitterURLCorpus †" not in text
        assert "Trained on data of 1 task, judged by name: BIOSSES (biosses)." in text
    capsys.readouterr()
    assert run_eval.main(["--model", str(tiny_run), *command[2:], "--plan"]) == 0
    assert "†" not in capsys.readouterr().out
