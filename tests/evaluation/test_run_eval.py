"""The command run_eval.py: options and errors, resuming, examples, interruptions, result files."""

import io
import json
import os
import random
import shutil
import ssl
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import datasets
import mteb
import numpy as np
import pytest
import torch
from conftest import adapted
from ranks import start_ranks
from sample_sets import WordHash, world, write_retrieval
from tiny_mteb import write_json, write_lines

import ref.evaluation.run as evaluation
import run_eval
import run_train
from ref.embedder import Embedder
from ref.evaluation.few_shot import load_examples
from ref.evaluation.model_identity import default_output, model_label
from ref.evaluation.results import TaskScore
from ref.evaluation.retrieval import evaluate_retrieval
from ref.model.adapter import save_adapter
from ref.model.checkpoint import load_model

__all__ = ["world"]  # a fixture
ROOT = Path(__file__).parents[2]
TASK = "Given a question, retrieve passages that answer it"


def command(model: Path, world: Path, output: Path, *options: Any) -> list[str]:
    return ["--model", str(model), "--data-dir", str(world), "--output", str(output), *map(str, options)]


def scores_of(output: Path) -> dict[str, Any]:
    """Task name to score, from mteb's result files."""
    return {path.stem: json.loads(path.read_text())["scores"] for path in output.rglob("*.json")
            if path.parent.name.endswith("-local-data") and path.name != "model_meta.json"}


# ---- with an embedder that needs no model ------------------------------------------------------------------


@pytest.fixture
def embedder(monkeypatch: Any) -> WordHash:
    """What the command loads, whatever model is named."""
    words = WordHash()
    monkeypatch.setattr("ref.embedder.Embedder.from_pretrained", lambda name, **options: words)

    def no_plan(*given: Any) -> tuple[dict[str, Any], list[str]]:  # tokens and speed need a model
        write_json(given[-1], {})
        return {}, []
    monkeypatch.setattr("ref.evaluation.plan.make_plan", no_plan)
    monkeypatch.setattr("ref.evaluation.plan.measure_speed", lambda *_: 1.0)
    words.prompt_encoder, words.precision = SimpleNamespace(template_name="paper"), "words"  # type: ignore[attr-defined]
    return words


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_json(tmp_path / "model" / "config.json", {"hidden_size": 64})
    return tmp_path / "model"


@pytest.mark.parametrize(("given", "dtype", "why"), [
    ([], "bfloat16", "this processor's matrix products are 4.0 times as fast in bfloat16"),
    (["--dtype", "float32"], "float32", "as given")])
def test_dtype(
    given: list[str], dtype: str, why: str, world: Path, model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any,
) -> None:
    """Chosen by the processor's speed or given, printed, and passed to the embedder."""
    seen: list[str] = []

    def load(name: str, **options: Any) -> None:
        seen.append(options["dtype"])
        raise ValueError("that is all")
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", lambda: 4.0)
    monkeypatch.setattr("ref.embedder.Embedder.from_pretrained", load)
    assert run_eval.main([*command(model, world, tmp_path / "out"), "--tasks", "STS", *given]) == 2
    assert seen == [dtype] and f"dtype: {dtype} ({why})\n" in capsys.readouterr().out


def test_a_folder_of_the_user_is_not_an_output(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    assert run_eval.main(command(model, world, tmp_path / "mine", "--tasks", "STS")) == 2
    assert "report.html exists and was not written by this command" in capsys.readouterr().err
    assert run_eval.main(command(model, world, world / "out", "--tasks", "STS")) == 2
    assert "must not be an input or lie in one" in capsys.readouterr().err
    for cache in (world / "BIOSSES", model, model / "vectors"):
        assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "STS", "--embedding-cache", cache)) == 2
        assert f"--embedding-cache {cache}: must not be an input or lie in one" in capsys.readouterr().err
        assert not (model / "vectors").exists() and not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["report.html"] and not (world / "out").exists()


@pytest.mark.parametrize("name", ["results", "plan.json"])
def test_a_folder_with_names_of_this_command_is_not_an_output(
    name: str, world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any,
) -> None:
    """The working directory has results/ after an evaluation of a hub model; a plan.json may be anyone's."""
    mine = tmp_path / "mine"
    (mine / "results").mkdir(parents=True)
    if name == "plan.json":
        write_json(mine / name, {"monday": "run"})
    (mine / "report.md").write_text("mine")
    assert run_eval.main(command(model, world, mine, "--tasks", "STS")) == 2
    assert "exists and was not written by this command" in capsys.readouterr().err
    assert (mine / "report.md").read_text() == "mine"


@pytest.mark.parametrize(("options", "words"), [
    (["--seed", "1"], "--seed is for --examples (got 1)"),
    (["--embedding-cache-gb", "2"], "--embedding-cache-gb is for --embedding-cache (got 2.0)"),
    (["--model", "m", "--runs", "r"], "--runs is for the newest run, without --model (got r)"),
    (["--download", "d", "--plan"], "--plan is for scoring, not for --download (got True)"),
    (["--download", "d", "--tasks", "STS", "--dtype", "float32"], "--dtype is for scoring, not for --download")])
def test_options_without_effect(options: list[str], words: str, capsys: Any) -> None:
    assert run_eval.main(options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_cache_needs_a_size(size: str, capsys: Any) -> None:
    assert run_eval.main(["--embedding-cache", "cache", "--embedding-cache-gb", size]) == 2
    assert "--embedding-cache-gb must be a finite number > 0" in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """As in a container whose user is unknown; mteb creates its cache when it is imported."""
    (tmp_path / "home").write_text("")
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    environment.pop("MTEB_CACHE", None)
    call = [sys.executable, ROOT / "run_eval.py", "--model", "owner/name", "--tasks", "STS"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == (f"error: {tmp_path}/home/.cache/mteb: the cache cannot be written (Not a directory); set "
                           "MTEB_CACHE to a folder that can be\n")


def test_without_a_network_every_task_fails_at_once_and_the_first_line_says_why(
    model: Path, tmp_path: Path, embedder: WordHash, monkeypatch: Any, capsys: Any,
) -> None:
    """The libraries would try each task for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    command = ["--model", str(model), "--tasks", "STS", "--output", str(tmp_path / "out")]
    assert run_eval.main(command) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"model: {model}\noffline: http://127.0.0.1:9 cannot be reached (")
    assert printed.count("(OfflineModeIsEnabled)") == 9


def test_a_hub_whose_certificate_python_does_not_know_is_not_offline(monkeypatch: Any, capsys: Any) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate"))
    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    evaluation.read_caches_if_offline([mteb.get_task("STS12")])
    assert not datasets.config.HF_HUB_OFFLINE and capsys.readouterr().out == ""


def test_the_command_scores_resumes_and_lists_missing_tasks(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    arguments = command(model, world, tmp_path / "out")
    assert run_eval.main([*arguments, "--tasks", "STS,MyRetrieval"]) == 0
    text = capsys.readouterr().out
    assert "[1/2] BIOSSES (STS)\n  " in text and "not available, 41 of 41 tasks missing" in text
    assert "selected but without data (8): STS12" in text or "selected but without data (8): SICK-R" in text
    assert "unofficial data: not compared with published scores (2 of 2 tasks" in text
    assert list((tmp_path / "out" / "results" / "local__model").glob("*-local-data/BIOSSES.json"))
    embedder.calls.clear()
    assert run_eval.main([*arguments, "--tasks", "STS,MyRetrieval"]) == 0
    assert embedder.calls == [] and "(from the result cache)" in capsys.readouterr().out
    write_json(model / "config.json", {"hidden_size": 65})  # another model with the same name
    assert run_eval.main([*arguments, "--tasks", "STS"]) == 0
    assert embedder.calls


def test_a_file_of_instructions_may_name_folders_that_are_not_selected(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    write_json(tmp_path / "own.json", {"MyRetrieval": "Find", "BIOSSES": "Say it again"})
    arguments = command(model, world, tmp_path / "out", "--tasks", "BIOSSES")
    assert run_eval.main([*arguments, "--instructions", str(tmp_path / "own.json")]) == 0
    write_json(tmp_path / "own.json", {"MyRetrieva": "Find"})
    assert run_eval.main([*arguments, "--instructions", str(tmp_path / "own.json")]) == 2
    assert "'MyRetrieva' is unknown (nearest: MyRetrieval" in capsys.readouterr().err


def test_the_tokens_of_a_failed_task_do_not_remain(monkeypatch: Any, capsys: Any) -> None:
    def score(encoder: Any, task: Any, output: Path) -> TaskScore:
        if task.metadata.name == "broken":
            raise ValueError("no data")
        return TaskScore("good", "STS", "spearman", 0.5, elapsed_s=2.0)
    monkeypatch.setattr(evaluation, "score_task", score)
    unloaded: list[str] = []
    tasks: Any = [SimpleNamespace(metadata=SimpleNamespace(name=name, type="STS"),
                                  unload_data=partial(unloaded.append, name)) for name in ("broken", "good")]
    plans = {name: evaluation.TaskPlan("", tokens=tokens) for name, tokens in (("broken", 900), ("good", 100))}
    scores, failed = evaluation.score_tasks(None, tasks, Path(), plans)  # type: ignore[arg-type]
    assert [each.task for each in scores] == ["good"] and list(failed) == ["broken"] == unloaded
    assert "(2.0 s, 100 tokens; remaining: 0 tokens)" in capsys.readouterr().out


def test_a_failed_task_is_reported_and_the_others_are_scored(
    world: Path, model: Path, tmp_path: Path, embedder: WordHash, capsys: Any
) -> None:
    write_lines(world / "STS12" / "test.jsonl", [{"wrong": "columns"}])
    assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "STS")) == 1
    text = capsys.readouterr().out
    assert "STS12 (STS)\n  failed: " in text and "BIOSSES (STS)\n  " in text and "; failed: STS12" in text
    assert "mean of scored tasks (1)" in text


def test_invalid_input_is_one_line_without_traceback(world: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--model", str(model), "--data-dir", str(world)]
    assert run_eval.main([*arguments, "--tasks", "STS122"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tasks: task or category 'STS122' is unknown (nearest: STS12")
    assert run_eval.main(["--runs", str(tmp_path / "runs")]) == 2
    assert "no complete run" in capsys.readouterr().err
    assert run_eval.main([*arguments, "--instructions", str(tmp_path / "none.json")]) == 2
    assert "none.json: file does not exist" in capsys.readouterr().err
    assert run_eval.main(["--model", str(model), "--data-dir", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert run_eval.main([*arguments, "--examples", "2", "--examples-file", str(tmp_path / "none.json")]) == 2
    assert "--examples and --examples-file exclude each other" in capsys.readouterr().err


def test_the_newest_complete_run_on_the_sample_data(
    tmp_path: Path, embedder: WordHash, capsys: Any, monkeypatch: Any
) -> None:
    times = {"old": "2026-03-01T10:00:00+00:00", "new": "2026-03-01T10:30:00+01:00"}  # the second is earlier
    for name, finished in times.items():
        write_json(tmp_path / "runs" / name / "run.json", {"complete": True, "finished": finished})
        write_json(tmp_path / "runs" / name / "model" / "config.json", {"hidden_size": 64})
    write_retrieval(tmp_path / "sample" / "Tiny", {"class": "ArguAna", "instruction": "Find"})
    monkeypatch.setattr(run_eval, "SAMPLE_DATA", tmp_path / "sample")
    assert run_eval.main(["--runs", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "runs/old, the newest complete run" in text and "sample data" in text and "Tiny" in text
    assert list((tmp_path / "runs" / "old" / "mteb" / "results").rglob("Tiny.json"))


def test_the_parser_imports_neither_torch_nor_mteb() -> None:
    code = "import sys, run_eval; run_eval.build_parser(); sys.exit('torch' in sys.modules or 'mteb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- with a small model ------------------------------------------------------------------------------------


def test_examples_are_on_the_query_side_and_are_recorded(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """From a file; for all texts of a symmetric task, for the queries of retrieval."""
    examples = {"BIOSSES": [{"query": "one", "response": "two"}], "MyRetrieval": [{"query": "q", "response": "p"}]}
    own = write_json(tmp_path / "examples.json", examples)
    options = ("--tasks", "BIOSSES,MyRetrieval,TwitterURLCorpus", "--examples-file", own)
    calls = []
    original = Embedder.encode

    def encode(self, texts, *, instruction=None, examples=(), progress=False):
        calls.append((instruction is not None, list(examples)))
        return original(self, texts, instruction=instruction, examples=examples, progress=progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "encode", encode)
        assert run_eval.main(command(tiny_run, world, tmp_path / "out", *options)) == 0
    assert all(instructed or not examples for instructed, examples in calls)
    assert {tuple(x.query for x in examples) for instructed, examples in calls if instructed} >= {("one",), ("q",), ()}
    lines = [json.loads(line) for path in (tmp_path / "out").rglob("run_settings.jsonl")
             for line in path.read_text().splitlines()]
    recorded = {line["task"]: line["encode_kwargs"] for line in lines}
    assert recorded["BIOSSES"]["examples"] == [["one", "two"]]
    assert recorded["BIOSSES"]["examples_source"] == "file examples.json"
    assert recorded["TwitterURLCorpus"]["examples"] == []


def test_other_options_leave_the_results_of_the_model_as_it_is(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Apart for mteb too. Tasks that the options do not concern are not scored again."""
    own = write_json(tmp_path / "examples.json", {"BIOSSES": [{"query": "one", "response": "two"}]})
    results = tmp_path / "out/results"
    plain = command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES,TwitterURLCorpus")
    assert run_eval.main(plain) == 0
    before = {path: path.read_bytes() for path in results.rglob("*.json")}
    report = (tmp_path / "out/report.md").read_bytes()
    capsys.readouterr()
    assert run_eval.main([*plain, "--examples-file", str(own)]) == 0
    assert capsys.readouterr().out.count("from the result cache") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "out/report.md").read_bytes() == report
    [other] = (tmp_path / "out").glob("report-examples-file-examples.json-*.md")  # and a hash of the file
    assert "file examples.json" in other.read_text()
    [new] = [path for path in results.rglob("*.json") if path not in before and path.stem == "BIOSSES"]
    assert new.parent.parent.name == "experiments"
    [loaded] = mteb.ResultCache(tmp_path / "out").load_results().model_results
    shown = {result.task_name: result.get_score() for result in loaded.task_results}
    written = {path.stem: json.loads(path.read_text())["scores"]["test"][0]["main_score"] for path in before
               if path.stem in ("BIOSSES", "TwitterURLCorpus")}
    assert shown == written
    assert run_eval.main([*plain, "--max-text-tokens", "9"]) == 0
    assert "from the result cache" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_result_that_is_replaced_is_announced(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")
    assert run_eval.main(arguments) == 0
    assert "replaces" not in capsys.readouterr().out
    own = write_json(tmp_path / "instructions.json", {"BIOSSES": "Another"})
    assert run_eval.main([*arguments, "--instructions", str(own)]) == 0
    assert "replaces a result of another instruction" in capsys.readouterr().out


def test_a_gpu_without_memory_ends_the_command(
    world: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Inside a task too, whose other errors leave the next tasks alone."""
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")
    monkeypatch.setattr(evaluation, "score_task", fail)
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES,TwitterURLCorpus")) == 3
    assert "TwitterURLCorpus (" not in capsys.readouterr().out


def test_a_folder_of_examples_and_the_instructions_that_mteb_has_for_the_model(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = dict.fromkeys(["BIOSSES", "TwitterURLCorpus"], "Mine")
    monkeypatch.setattr(evaluation, "published_instructions", lambda model: published)
    rows = [{"instruct": "Another", "query": "one", "response": "two"}, {"query": "three", "response": "four"}]
    write_json(tmp_path / "examples/BIOSSES.json", rows)
    own = write_json(tmp_path / "instructions.json", {"TwitterURLCorpus": "Given"})
    options = ("--tasks", "BIOSSES,TwitterURLCorpus", "--examples-file", tmp_path / "examples", "--instructions", own)
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", *options)) == 0
    lines = [json.loads(line) for path in (tmp_path / "out").rglob("run_settings.jsonl")
             for line in path.read_text().splitlines()]
    recorded = {line["task"]: line["encode_kwargs"] for line in lines}
    instructions = {name: each["instruction"] for name, each in recorded.items()}
    assert instructions == {"BIOSSES": "Mine", "TwitterURLCorpus": "Given"}
    assert recorded["BIOSSES"]["examples"] == [["one", "two", "Another"], ["three", "four"]]
    assert recorded["BIOSSES"]["examples_source"] == "file BIOSSES.json"
    assert "instructions: mteb has one for this model and BIOSSES, TwitterURLCorpus\n" in capsys.readouterr().out


def test_an_instruction_of_a_local_folder_goes_before_the_one_that_mteb_has_for_the_model(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "published_instructions", lambda model: {"BIOSSES": "Mine", "STS13": "Unused"})
    write_json(world / "BIOSSES/task.json", {"class": "BIOSSES", "instruction": "The folder's"})
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    recorded = json.loads(next((tmp_path / "out").rglob("run_settings.jsonl")).read_text().splitlines()[0])
    assert recorded["encode_kwargs"]["instruction"] == "The folder's"
    assert "instructions:" not in capsys.readouterr().out  # none of mteb's is used


def test_examples_of_selected_tasks_outside_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as BGE-EN-ICL publishes it has SciFact, which can be selected by name."""
    write_json(tmp_path / "examples/SciFact.json", [{"query": "one", "response": "two"}])
    seen = {}

    def stop(tasks: Any, known: Any, **options: Any) -> None:
        seen.update(load_examples(tasks, known, **options))
        raise ValueError("seen enough")
    monkeypatch.setattr(evaluation, "load_examples", stop)
    monkeypatch.setattr(evaluation, "read_caches_if_offline", lambda tasks: None)
    assert run_eval.main(["--model", str(tmp_path), "--tasks", "SciFact", "--output", str(tmp_path / "out"),
                          "--examples-file", str(tmp_path / "examples")]) == 2
    assert [example.query for example in seen["SciFact"].examples] == ["one"]


def test_k_examples_for_a_task_without_a_training_split(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    capsys.readouterr()
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES", "--examples", 3)) == 0
    assert "from the result cache" in capsys.readouterr().out  # it is scored as without examples
    text = (tmp_path / "out/report-examples-3.md").read_text()
    assert "zero-shot" in text
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--examples", -1)) == 2
    assert "--examples must be >= 0 (got -1)" in capsys.readouterr().err


def test_examples_that_do_not_fit_the_prompt_are_not_recorded(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    many = [{"query": "word " * 300, "response": f"{n} " * 300} for n in range(6)]
    own = write_json(tmp_path / "examples.json", {"BIOSSES": many})
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES", "--examples-file", own)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("examples for BIOSSES"))
    shown = int(line.split(": ")[1].split()[0])
    assert shown < 6 and f"{6 - shown} dropped (prompt limit)" in line
    recorded = json.loads(next((tmp_path / "out").rglob("run_settings.jsonl")).read_text().splitlines()[0])
    assert len(recorded["encode_kwargs"]["examples"]) == shown


def test_texts_of_no_and_of_a_million_characters(tiny_run: Path) -> None:
    embedder = Embedder.from_pretrained(tiny_run)
    vectors = embedder.encode(["", "word " * 200_000, " ", "word"], instruction=TASK)
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_higher_limit_for_texts_raises_the_limit_for_prompts(tiny_run: Path) -> None:
    """Otherwise long texts would be truncated further than the recorded limit says."""
    for limit in (100, 4096):
        prompt_encoder = Embedder.from_pretrained(tiny_run, device="cpu", max_text_tokens=limit).prompt_encoder
        for instruction in (None, TASK):
            prefix = prompt_encoder.prefix(instruction)
            [ids] = prompt_encoder.encode(["a b " * 8000], prefix)
            assert len(ids) == limit + len(prefix.suffix) + 1


# ---- results: interruptions, resuming ----------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.record)])
def test_the_final_table_is_the_same_after_kills_at_random_times(
    kills: int, world: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments_for(name: str) -> list[str]:
        return command(tiny_run, world, tmp_path / name, "--embedding-cache", tmp_path / f"vectors-{name}")

    def table() -> list[str]:
        lines = capsys.readouterr().out.splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("Classification"))
        return [line for line in lines[start:] if not line.startswith(("report:", "results:"))]
    start_s = time.monotonic()
    assert run_eval.main(arguments_for("whole")) == 0
    whole_s, whole = time.monotonic() - start_s, table()
    for _ in range(kills):
        [process] = start_ranks(1, ["run_eval.py", *arguments_for("killed")])
        time.sleep(whole_s * random.uniform(0.1, 0.95))
        process.kill()
    assert run_eval.main(arguments_for("killed")) == 0
    assert table() == whole
    assert scores_of(tmp_path / "killed") == scores_of(tmp_path / "whole")


def test_a_damaged_result_file_is_replaced(world: Path, tiny_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_eval.main(command(tiny_run, world, output, "--tasks", "BIOSSES")) == 0
    before = scores_of(output)
    path = next(path for path in output.rglob("BIOSSES.json"))
    path.write_text(path.read_text()[:40])
    assert run_eval.main(command(tiny_run, world, output, "--tasks", "BIOSSES")) == 0
    assert scores_of(output) == before


def test_a_truncated_record_of_settings_is_replaced(world: Path, tiny_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_eval.main(command(tiny_run, world, output, "--tasks", "BIOSSES")) == 0
    path = next(output.rglob("run_settings.jsonl"))
    path.write_text(path.read_text()[:30])
    assert run_eval.main(command(tiny_run, world, output, "--tasks", "BIOSSES")) == 0
    assert run_eval.main(command(tiny_run, world, output, "--tasks", "BIOSSES")) == 0


def test_the_result_files_have_the_layout_of_the_public_repository(world: Path, tiny_run: Path, tmp_path: Path) -> None:
    """mteb's own loader for the public repository of results reads them."""
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    cache = mteb.ResultCache(tmp_path / "out")
    results = cache.load_results()
    assert [task.task_name for result in results.model_results for task in result.task_results] == ["BIOSSES"]


def test_a_second_evaluation_of_a_run_reads_the_results_beside_its_weights(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    arguments = ["--model", str(run), "--data-dir", str(world), "--tasks", "BIOSSES"]
    assert run_eval.main(arguments) == 0 and run_eval.main(arguments) == 0
    assert "from the result cache" in capsys.readouterr().out


def test_the_base_of_an_adapter_that_was_moved(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapted(load_model(tiny_run / "model", device=torch.device("cpu"))), adapter, base="/nowhere/model")
    arguments = command(adapter, world, tmp_path / "out", "--tasks", "BIOSSES")
    assert run_eval.main(arguments) == 2
    assert "write there where the base is now, or give --base to run_eval.py" in capsys.readouterr().err
    assert run_eval.main([*arguments, "--base", str(tiny_run)]) == 0
    assert set(scores_of(tmp_path / "out")) == {"BIOSSES"}


def test_a_result_of_another_precision_is_not_reused(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    arguments = command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")
    assert run_eval.main(arguments) == run_eval.main(arguments) == 0
    assert "from the result cache" in capsys.readouterr().out
    monkeypatch.setattr(Embedder, "precision", "torch.bfloat16 cuda")
    assert run_eval.main(arguments) == 0
    assert "from the result cache" not in capsys.readouterr().out


def test_the_report_has_the_scored_tasks_beside_one_whose_score_is_not_finite(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    original = Embedder.encode

    def collapsed(self, texts, **options):
        vectors = original(self, texts, **options)
        return np.ones_like(vectors) / vectors.shape[1] ** 0.5 if any("gauge" in text for text in texts) else vectors
    monkeypatch.setattr(Embedder, "encode", collapsed)
    rows = [{"sentence1": f"gauge {n}", "sentence2": f"gauge other {n}", "score": n % 5} for n in range(20)]
    write_lines(world / "BIOSSES/test.jsonl", rows)
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES,MyRetrieval")) == 1
    printed = capsys.readouterr().out
    assert "failed: ValueError: BIOSSES: the score must be finite (got nan" in printed
    assert "; failed: BIOSSES" in printed
    assert "MyRetrieval" in (tmp_path / "out/report.md").read_text()
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES,MyRetrieval")) == 1
    assert "; failed: BIOSSES" in capsys.readouterr().out  # from the cache, without loading its data


def test_the_model_card_has_scores_of_the_model_as_it_is(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those with in-context examples or other settings, and not those of a run that was extended meanwhile."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "scores.json").unlink(missing_ok=True)
    own = write_json(tmp_path / "examples.json", {"BIOSSES": [{"query": "one", "response": "two"}]})
    for options, words in ((("--examples-file", own), "--examples-file is not the model's own"),
                           (("--max-text-tokens", 4), "--max-text-tokens is not the model's own")):
        assert run_eval.main(command(run, world, tmp_path / "out", "--tasks", "BIOSSES", *options)) == 0
        assert words in capsys.readouterr().out and not (run / "scores.json").exists()
    assert run_eval.main(command(run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    assert "BIOSSES" in (run / "model/README.md").read_text()
    (run / "scores.json").unlink()
    times = iter(["before", "after"])
    monkeypatch.setattr(evaluation, "time_of_completion", lambda run: next(times))
    assert run_eval.main(command(run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    assert "model card: not updated (the run has changed)" in capsys.readouterr().out
    assert not (run / "scores.json").exists()


def test_the_scores_of_the_folder_that_stands_for_a_run_are_the_runs(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "scores.json").unlink(missing_ok=True)
    shutil.copytree(run / "model", run / "merged")
    assert run_eval.main(command(run / "merged", world, tmp_path / "merged", "--tasks", "BIOSSES")) == 0
    assert "model card: not updated (a run's scores are those of its model/)\n" in capsys.readouterr().out
    assert not (run / "scores.json").exists()
    assert run_eval.main(command(run / "model", world, tmp_path / "model", "--tasks", "BIOSSES")) == 0
    assert "model card" not in capsys.readouterr().out
    assert "BIOSSES" in json.loads((run / "scores.json").read_text())


def test_output_without_the_terminals_characters(
    world: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another encoding than UTF-8 a sign that it lacks is escaped, in training and in evaluation."""
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="latin-1", write_through=True))
    run = tmp_path / "\u65b0"
    data, model = tiny_run.parent / "data.jsonl", tiny_run.parent / "config.json"
    assert run_train.main(["--data", str(data), "--model", str(model), "--steps", "1", "--output", str(run)]) == 0
    assert run_eval.main(command(run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    assert b"done: " in screen.getvalue() and b"/\\u65b0" in screen.getvalue()


def test_a_run_without_instructions_is_scored_without(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    """During training and by run_eval.py, which takes instructions from --instructions only; then also examples."""
    lines = [json.loads(line) for line in (tiny_run.parent / "data.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "data.jsonl", [{**line, "prompt": ""} for line in lines])
    shutil.copytree(world / "MyRetrieval", tmp_path / "held/MyRetrieval")
    run = tmp_path / "run"
    assert run_train.main([
        "--data", str(tmp_path / "data.jsonl"), "--model", str(tiny_run.parent / "config.json"), "--steps", "1",
        "--instruction", "none", "--eval-data", str(tmp_path / "held"), "--output", str(run)]) == 0
    score = json.loads((run / "run.json").read_text())["eval_after"]
    said = f"after training: {score:.3f} (MyRetrieval {score:.3f}), without instructions, as in training\n"
    assert said in capsys.readouterr().out
    assert score == evaluate_retrieval(Embedder.from_pretrained(run), world / "MyRetrieval", instructed=False)
    arguments = command(run, world, tmp_path / "out", "--tasks", "MyRetrieval")
    assert run_eval.main(arguments) == 0
    assert "instructions: none, as in the run's training (see --instructions)\n" in capsys.readouterr().out
    (found,) = scores_of(tmp_path / "out").values()
    assert found["test"][0]["main_score"] == pytest.approx(score, abs=6e-6)
    own = write_json(tmp_path / "examples.json", {"MyRetrieval": [{"query": "one", "response": "two"}]})
    assert run_eval.main([*arguments, "--examples-file", str(own)]) == 2
    assert "MyRetrieval: in-context examples need an instruction (got none); give" in capsys.readouterr().err
    given = write_json(tmp_path / "instructions.json", {"MyRetrieval": "Find it."})
    assert run_eval.main([*arguments, "--instructions", str(given)]) == 0
    assert "Find it." in (tmp_path / "out/report.md").read_text()


def test_a_failed_evaluation_leaves_the_report_of_an_earlier_one(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    before = (tmp_path / "out/report.md").read_text()
    write_lines(world / "STS12" / "test.jsonl", [{"wrong": "columns"}])
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", "--tasks", "STS12")) == 1
    assert (tmp_path / "out/report.md").read_text() == before
    assert run_eval.main(command(tiny_run, world, tmp_path / "new", "--tasks", "STS12")) == 1
    assert "STS12" in (tmp_path / "new/report.md").read_text()


def test_results_of_a_runs_folders_are_kept_apart(tiny_run: Path, tmp_path: Path) -> None:
    assert default_output(str(tiny_run)) == tiny_run / "mteb"
    assert default_output(str(tiny_run / "model")) == tiny_run / "mteb-model"
    assert model_label(str(tiny_run / "model")) == f"local/{tiny_run.name}-model"
    (tmp_path / "model").mkdir()
    assert default_output(str(tmp_path / "model")) == Path("results/local__model")
    write_json(tmp_path / "model/run.json", {})  # a run of that name
    assert default_output(str(tmp_path / "model")) == tmp_path / "model/mteb"
    assert model_label(str(tmp_path / "model")) == "local/model"


def test_unsuitable_examples_and_folders_are_one_line(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    write_json(tmp_path / "examples/BIOSSES.json", [{"query": "one", "response": "two"}])
    options = ("--tasks", "TwitterURLCorpus", "--examples-file", tmp_path / "examples")
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", *options)) == 2
    assert "must have examples for a selected task (got BIOSSES)" in capsys.readouterr().err
    write_json(tmp_path / "other/stsb.json", [])
    options = ("--tasks", "BIOSSES", "--examples-file", tmp_path / "other")
    assert run_eval.main(command(tiny_run, world, tmp_path / "out", *options)) == 2
    assert "such as STS12.json (got stsb.json)" in capsys.readouterr().err
    assert run_eval.main(command(tiny_run, world / "MyRetrieval", tmp_path / "out")) == 2
    assert "MyRetrieval: is a data set; give the folder that holds it" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_scored_with_a_note(
    world: Path, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    facts = json.loads((tiny_run / "run.json").read_text())
    write_json(tmp_path / "run/run.json", {**facts, "complete": False})
    assert run_eval.main(command(tmp_path / "run", world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    assert "note: this run is not complete" in (printed := capsys.readouterr().out) and "model card" not in printed
