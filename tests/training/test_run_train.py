"""run_train.py from the command line to the exported model, on a few lines with a very small Mistral.

Bit for bit: the same seed gives the same weights file, and so does a run that was stopped and resumed. Peers: what is
exported is loaded by sentence-transformers and transformers, and embeds the same.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_training_lines, edit_json

import run_train
from ref import Embedder
from ref.config import PRESETS, TrainConfig
from ref.evaluation.retrieval import evaluate_retrieval
from ref.model import transformer
from ref.model.card import Score, add_scores
from ref.model.checkpoint import read_tensors
from ref.model.compiled_block import compiled_block
from ref.text.prompts import InContextExample
from ref.training import metrics, model_source, run_dir
from ref.training.arguments import parse_args, train_config
from ref.training.data import Task
from ref.training.export import earlier_results, exported_prompts, named_prompts, usage
from ref.training.trainer import Trainer, learning_rate
from ref.utils.compile import compile_once

ROOT = Path(run_train.__file__).parent
CONFIG = {
    "model_type": "mistral",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "sliding_window": 16,
}
INSTRUCTIONS = {"Jobs": "Find a person with the same job.", "Towns": "Find a person who lives there."}
WORDS = "anna bert carl dora baker smith tailor miner lisbon oslo turin ghent sings paints".split()  # noqa: SIM905
STEPS = 6
TEXTS = [
    "anna bakes",
    "a much longer text about carl, who paints in turin and sings in ghent",
    "  two spaces",
    "oslo\nturin",
    "x",
]


def lines(count: int = 32) -> list[dict[str, Any]]:
    return draw_training_lines(WORDS, INSTRUCTIONS, count)


def write_data(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """Data, configuration, and `train(name, *options)` -> exit status."""
    folder = tmp_path_factory.mktemp("train")
    data = write_data(folder / "some.jsonl", lines())
    (folder / "config.json").write_text(json.dumps(CONFIG))

    def arguments(name: str, *options: object) -> list[str]:
        given = [str(x) for x in options]
        standard = {"--data": data, "--model": folder / "config.json", "--steps": STEPS, "--batch-size": 5,
                    "--device": "cpu", "--learning-rate": "5e-3", "--max-text-tokens": 80,
                    "--max-examples": 2, "--output": folder / name}
        if {"--minutes", "--epochs"} & set(given):
            del standard["--steps"]
        return given + [str(x) for key, value in standard.items() if key not in given for x in (key, value)]
    return SimpleNamespace(folder=folder, data=data, arguments=arguments,
                           train=lambda name, *options: run_train.main(arguments(name, *options)))


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """An undisturbed run of all weights."""
    assert place.train("whole") == 0
    return place.folder / "whole"


@pytest.fixture(scope="module")
def adapter(place, whole) -> Path:
    """An adapter on the checkpoint of `whole`, merged too; B is far from zero."""
    options = ["--model", whole / "model", "--merge", "--lora-rank", 4, "--learning-rate", "0.05"]
    assert place.train("adapter", *options) == 0
    return place.folder / "adapter"


@pytest.fixture(scope="module")
def fresh_adapter(place) -> Path:
    """An adapter on fresh weights."""
    assert place.train("fresh", "--train", "lora", "--lora-rank", 4, "--merge", "--learning-rate", "0.05") == 0
    return place.folder / "fresh"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def weights(folder: Path) -> bytes:
    paths = [folder / name for name in ("model/model.safetensors", "adapter/adapter_model.safetensors")]
    return next(path.read_bytes() for path in paths if path.exists())


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "elapsed_s")} for row in rows_of(folder)]


@contextlib.contextmanager
def ctrl_c_at(step: int, signals: tuple[int, ...] = (signal.SIGINT,)):
    """Ctrl-C while that step runs: a real signal, sent where the progress is updated."""
    original = metrics.TrainingProgress.update

    def update(self, row):
        original(self, row)
        if row["step"] == step:
            for number in signals:
                signal.raise_signal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.TrainingProgress, "update", update)
        yield


# ------------------------------------------------------------------------------------------------- what a run leaves

def test_run_json_says_what_was_done(place, whole):
    run = facts(whole)
    assert run["complete"] is True
    assert run["started"] <= run["finished"]
    assert set(run["options"]) == set(TrainConfig.__dataclass_fields__)
    assert (run["options"]["seed"], run["options"]["train"], run["options"]["preset"]) == (0, "all", "small")
    assert run["options"]["dtype"] == "float32"
    assert {"torch", "python", "tokenizers", "safetensors"} <= {k for k, v in run["versions"].items() if v}
    assert run["hardware"]["cores"] >= 1
    assert (run["num_lines"], run["num_lines_with_labels"]) == (32, 21)
    (data,) = run["data"]
    assert (data["file"], data["bytes"], len(data["sha256"])) == ("some.jsonl", place.data.stat().st_size, 64)
    assert "commit" in run


def test_metrics_are_complete(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert {"loss", "contrastive_loss", "soft_label_loss", "learning_rate", "grad_norm", "tokens_per_s",
                "examples_per_prompt", "num_masked", "label_entropy",
                "epoch", "task", "tokens", "elapsed_s"} <= set(row)
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["soft_label_loss"], rel=1e-5)
        assert row["soft_label_loss"] >= row["label_entropy"] > 0
        assert row["task"] in INSTRUCTIONS
        assert row["grad_norm"] > 0 < row["tokens_per_s"]
    assert max(row["examples_per_prompt"] for row in rows) > 0
    assert sorted({row["learning_rate"] for row in rows}) != [rows[0]["learning_rate"]]
    assert [row["elapsed_s"] for row in rows] == sorted(row["elapsed_s"] for row in rows)


def test_loss_goes_down(place):
    assert place.train("long", "--steps", 60, "--batch-size", 8, "--max-examples", 0, "--learning-rate", "0.01") == 0
    contrastive = [row["contrastive_loss"] for row in rows_of(place.folder / "long")]
    assert sum(contrastive[-8:]) < 0.7 * sum(contrastive[:8])


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate(schedule, middle):
    options = TrainConfig(learning_rate=2.0, warmup_ratio=0.2, lr_scheduler=schedule)
    rate = [learning_rate(options, share) for share in (0, 0.1, 0.2, 0.6, 1.0, 1.5)]
    assert rate == pytest.approx([0, 1, 2, 2 * middle, 0, 0])
    quarter = learning_rate(options, 0.4)
    assert quarter == pytest.approx(1.5 if schedule == "linear" else 1 + math.cos(math.pi / 4))


# ------------------------------------------------------------------------------------------------- bit for bit

def test_same_seed_same_result_and_another_seed_another(place, whole):
    assert place.train("again") == 0
    assert weights(place.folder / "again") == weights(whole)
    assert untimed(place.folder / "again") == untimed(whole)
    assert place.train("other", "--seed", 1) == 0
    assert weights(place.folder / "other") != weights(whole)


def test_chunks_change_only_rounding(place, whole):
    assert place.train("chunked", "--mini-batch-tokens", 64) == 0
    for one, other in zip(untimed(whole), untimed(place.folder / "chunked"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize(
    "options",
    [[], ["--train", "lora", "--lora-dropout", "0.2", "--lora-rank", 4, "--mini-batch-tokens", 64]],
    ids=["all", "lora with dropout"],
)
def test_a_stopped_run_goes_on_as_if_undisturbed(place, options, capsys):
    name = f"stop{len(options)}"
    assert place.train(f"{name}-not", *options) == 0
    with ctrl_c_at(2):
        assert place.train(name, *options) == 130
    folder = place.folder / name
    assert f"--resume --output {folder}" in capsys.readouterr().out
    assert facts(folder)["complete"] is False
    assert len(rows_of(folder)) == 4  # a step's line comes while the next one runs
    started = facts(folder)["started"]
    half = weights(folder)
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert weights(folder) == weights(place.folder / f"{name}-not") != half
    assert untimed(folder) == untimed(place.folder / f"{name}-not")
    assert facts(folder)["complete"] is True
    assert facts(folder)["started"] == started


def test_a_run_that_crashed_goes_on_from_its_last_saved_step(place, whole, monkeypatch, capsys):
    """Steps 4 and 5 are done again, from the state saved before step 4."""
    original = Trainer.update
    calls = itertools.count()

    def update(self, rate):
        if next(calls) == 5:
            raise RuntimeError("power cut")
        return original(self, rate)
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(RuntimeError, match="power cut"):
        place.train("crash", "--save-steps", 2)
    monkeypatch.undo()
    folder = place.folder / "crash"
    with pytest.raises(ValueError, match=r"no model yet.*--resume"):
        Embedder.from_pretrained(folder)
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert weights(folder) == weights(whole)
    assert untimed(folder) == untimed(whole)


def test_what_a_killed_process_was_writing_is_swept_by_the_resume(place):
    """A draft bears its process's number, so no later save would write over it."""
    with ctrl_c_at(2):
        assert place.train("drafts") == 130
    folder = place.folder / "drafts"
    for path in (folder / "state/.00000009.1234.draft", folder / ".model.1234.draft"):
        path.mkdir()
        (path / "half").write_bytes(b"half")
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert not list(folder.rglob("*.draft"))


def test_a_resume_keeps_files_of_the_user(place, capsys):
    with ctrl_c_at(2):
        assert place.train("kept") == 130
    folder = place.folder / "kept"
    kept = [folder / ".letter.draft", folder / ".loss.png.old", folder / "model/notes.txt"]
    for path in kept:
        path.write_text("mine")
    assert run_train.main(["--resume", "--output", str(folder)]) == 2
    assert re.search(r"model/notes\.txt was not written by this command, .* move it first", capsys.readouterr().err)
    kept.pop().rename(folder / "notes.txt")
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert [path.read_text() for path in [*kept, folder / "notes.txt"]] == ["mine"] * 3


def test_only_the_files_that_were_written_are_replaced(whole, fresh_adapter, tmp_path):
    """Not others with such names, or with those of another result; weights in several files are ours by the index."""
    for run in (whole, fresh_adapter):
        shutil.copytree(run, tmp_path / run.name)
        assert tmp_path / run.name / "merged" in earlier_results(tmp_path / run.name)
    model, adapter = tmp_path / "whole/model", tmp_path / "fresh/adapter"
    for path in (
        model / "model-mine.safetensors", model / "model-00001-of-00002.safetensors", model / "mine/config.json",
        model / "adapter_config.json", adapter / "config.json", adapter / "adapter_model-2.safetensors",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        with pytest.raises(ValueError, match=rf"^{path} was not written by this command"):
            earlier_results(path.parents[1 + ("mine/" in str(path))])
        path.unlink()
    (model / "mine").rmdir()
    parts = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    (model / "model.safetensors").rename(model / parts[0])
    (model / parts[1]).touch()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}))
    assert earlier_results(tmp_path / "whole")


@pytest.mark.parametrize("where", ["run_train.describe_data", "run_train.plot_loss"])
def test_ctrl_c_before_the_first_and_after_the_last_step(place, where, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(where, interrupted)
    name = where.replace(".", "-")
    assert place.train(name) == 130
    assert capsys.readouterr().err == "stopped; --resume continues a run that has begun\n"
    monkeypatch.undo()
    if where == "run_train.plot_loss":
        assert run_train.main(["--resume", "--output", str(place.folder / name)]) == 0


def test_the_present_folder_as_the_model_names_the_run(place, whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "model", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    config = train_config(parse_args(["--model", ".", "--data", str(place.data)]), model_source.resolve_model("."))
    with pytest.raises(ValueError, match=r"--output runs/mine-.*must not be an input or lie in one"), \
            run_dir.open_run_dir(config, model_source.resolve_model(".")):
        pass


def test_soft_labels_alone_without_soft_labels_is_an_error(place, tmp_path, capsys):
    unlabelled = [{key: value for key, value in row.items() if not key.endswith("scores")} for row in lines(8)]
    data = write_data(tmp_path / "none.jsonl", unlabelled)
    assert place.train("bad", "--data", data, "--contrastive-weight", "0") == 2
    assert "but no line has 'pos_scores' and 'neg_scores'" in capsys.readouterr().err


def test_another_template_than_the_checkpoints_own_is_a_note(place, whole, tmp_path, capsys):
    shutil.copytree(whole / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/embedder.json").read_text())
    (tmp_path / "model/embedder.json").write_text(json.dumps({**settings, "template": "bge-en-icl"}))
    for name, expected in (("noted", True), ("not-noted", False)):
        model = tmp_path / "model" if expected else whole / "model"
        assert place.train(name, "--model", model, "--train", "lora", "--steps", 1) == 0
        note = "note: the checkpoint's own template is bge-en-icl; --template is paper"
        assert (note in capsys.readouterr().out) == expected


def test_an_adapters_own_tokenizer_is_used(adapter, tmp_path):
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/tokenizer.json"
    layout = json.loads(path.read_text())
    assert Embedder.from_pretrained(tmp_path / "adapter").prompt_encoder.tokenizer.encode(["ANNA"], max_tokens=9) != [
        [layout["model"]["vocab"][layout["model"]["unk_token"]]]]
    layout["normalizer"] = None  # no lower case: the word is not in the vocabulary
    path.write_text(json.dumps(layout))
    unknown = Embedder.from_pretrained(tmp_path / "adapter").prompt_encoder.tokenizer.encode(["ANNA"], max_tokens=9)
    assert set(unknown[0]) == {layout["model"]["vocab"][layout["model"]["unk_token"]]}
    path.unlink()
    base = Embedder.from_pretrained(tmp_path / "adapter").prompt_encoder.tokenizer
    assert base.encode(["ANNA"], max_tokens=9) == base.encode(["anna"], max_tokens=9)


def test_a_run_that_crashed_before_its_first_save_starts_again(place, whole, monkeypatch):
    def update(self, rate):
        raise RuntimeError("power cut")
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(RuntimeError, match="power cut"):
        place.train("early")
    monkeypatch.undo()
    assert run_train.main(["--resume", "--output", str(place.folder / "early")]) == 0
    assert weights(place.folder / "early") == weights(whole)


def test_resuming_what_is_no_run_is_an_error(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert run_train.main(["--resume", "--output", str(tmp_path)]) == 2
    assert "must have 'options', 'model' and 'data'" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"options": {"unheard_of": 1}, "model": "tiny", "data": []}))
    assert run_train.main(["--resume", "--output", str(tmp_path)]) == 2
    assert "the option 'unheard_of' is unknown" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"options": {}, "model": "tiny", "data": []}))
    assert run_train.main(["--resume", "--output", str(tmp_path)]) == 2  # defaults fill the gaps; the data differ


def test_an_adapter_names_its_base_by_a_path_that_holds_anywhere(place, whole, monkeypatch):
    monkeypatch.chdir(place.folder)
    assert place.train("relative", "--model", "whole/model", "--train", "lora", "--lora-rank", 2, "--steps", 1) == 0
    config = json.loads((place.folder / "relative/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((whole / "model").resolve())


def test_two_instructions_under_one_name_are_both_exported(place, tmp_path):
    rows = [{**row, "task": "same"} for row in lines()]
    assert place.train("names", "--data", write_data(tmp_path / "same.jsonl", rows), "--steps", 1) == 0
    settings = json.loads((place.folder / "names/model/config_sentence_transformers.json").read_text())
    prompts = {name: text for name, text in settings["prompts"].items() if name not in ("query", "document")}
    assert set(prompts) == {"same", "same-2"} and len(set(prompts.values())) == 2


def exported(kinds: list[tuple[str, str | None, str, int]]) -> dict[str, str | None]:
    """Prompts for tasks of (name, instruction, type, lines)."""
    tasks = [Task(name, instruction, kind) for name, instruction, kind, _ in kinds]
    lines = np.repeat(np.arange(len(kinds)), [count for *_, count in kinds])
    return exported_prompts(SimpleNamespace(tasks=tasks, task=lines))


def test_the_use_that_a_card_shows_is_of_the_largest_retrieval_task():
    """Or of the largest task, with its instruction on passages if training had it there."""
    retrieval, same = Task("a", "Find.", "normal"), Task("b", "Same?", "symmetric_sts")
    data = SimpleNamespace(tasks=[same, retrieval], task=np.array([0, 0, 0, 1]))
    expected = {"instructions": ["Find.", None], "prompts": ["Instruct: Find.\nQuery: ", ""]}
    assert usage(data, "paper") == expected
    assert usage(data, "bge-en-icl") == {**expected, "prompts": None}
    data = SimpleNamespace(tasks=[Task("c", "Else", "symmetric_sts"), same], task=np.array([0, 1, 1]))
    assert usage(data, "paper")["instructions"] == ["Same?", "Same?"]
    assert usage(SimpleNamespace(tasks=[Task("d", None, "normal")], task=np.array([0])), "paper")["prompts"] == ["", ""]


def test_query_and_document_prompts():
    """The retrieval instruction with the most lines, or the only instruction; documents only where it is theirs too."""
    qa, sts = ("qa", "Find it.", "normal", 5), ("sts", "Same.", "symmetric_sts", 50)
    assert exported([sts, qa, ("web", "Search.", "only_1neg", 9)]) == {
        "query": "Search.", "document": None, "sts": "Same.", "qa": "Find it.", "web": "Search."}
    assert exported([sts]) == {"query": "Same.", "document": "Same.", "sts": "Same."}
    assert exported([sts, ("other", "Else.", "symmetric_class", 9)]) == {"sts": "Same.", "other": "Else."}
    assert exported([("bare", None, "normal", 3)]) == {"query": None, "document": None}
    named = [("query", "Mine.", "symmetric_sts", 5), ("document", "Its.", "symmetric_class", 9)]
    assert exported([*named, qa]) == {  # tasks of these names do not take their places
        "query": "Find it.", "document": None, "query-2": "Mine.", "document-2": "Its.", "qa": "Find it."}


def test_sentence_transformers_encode_query_and_document_give_our_embeddings(place):
    library = pytest.importorskip("sentence_transformers")
    rows = [{**row, "prompt": "Find the passage.", "type": "normal"} for row in lines()]
    data = write_data(place.folder / "one.jsonl", rows)
    assert place.train("one", "--data", data, "--steps", 2) == 0
    ours = Embedder.from_pretrained(place.folder / "one", device="cpu")
    theirs = library.SentenceTransformer(str(place.folder / "one/model"), device="cpu")
    queries = ours.encode(TEXTS, instruction="Find the passage.")
    np.testing.assert_allclose(theirs.encode_query(TEXTS), queries, atol=2e-6)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), ours.encode(TEXTS), atol=2e-6)
    assert np.abs(theirs.encode_query(TEXTS) - ours.encode(TEXTS)).max() > 1e-3  # control: the prompt matters


def test_training_without_instructions(place):
    """Queries and passages alike; the exported model has no prompts to add."""
    rows = [{**row, "prompt": ""} for row in lines()]
    data = write_data(place.folder / "bare.jsonl", rows)
    assert place.train("bare", "--data", data, "--instruction", "none", "--steps", 2, "--eval-data", "none") == 0
    settings = json.loads((place.folder / "bare/model/config_sentence_transformers.json").read_text())
    assert set(settings["prompts"].values()) <= {""}
    assert {row["examples_drawn"] for row in rows_of(place.folder / "bare")} == {0.0}


def test_an_unrelated_folder_named_held_out_is_left_alone(place, tmp_path, capsys):
    data = write_data(tmp_path / "d.jsonl", lines())
    (tmp_path / "held_out/pictures").mkdir(parents=True)
    assert place.train("unrelated", "--data", data, "--steps", 1) == 0
    printed = capsys.readouterr().out
    assert "held-out nDCG@10" not in printed and f"held-out sets: none in {tmp_path / 'held_out'} (" in printed


def test_a_numbered_name_takes_no_name_that_a_task_has():
    """In whatever order they come."""
    given = [("a-2", "x"), ("a", "y"), ("a", "z"), ("a", "w")]
    for order in (given, [*given[1:], given[0]]):
        tasks = [Task(name, prompt, "normal") for name, prompt in order]
        assert named_prompts(SimpleNamespace(tasks=tasks)) == {"a-2": "x", "a": "y", "a-3": "z", "a-4": "w"}


def held_out(folder: Path) -> Path:
    """A folder with one retrieval set."""
    (folder / "Set").mkdir(parents=True)
    (folder / "Set/task.json").write_text(json.dumps({"class": "ArguAna", "instruction": INSTRUCTIONS["Jobs"]}))
    for name, rows in (
        ("corpus", [{"_id": f"d{i}", "text": word} for i, word in enumerate(WORDS)]),
        ("queries", [{"_id": "q", "text": "anna"}]),
        ("qrels", [{"query-id": "q", "corpus-id": "d0", "score": 1}]),
    ):
        write_data(folder / "Set" / f"{name}.jsonl", rows)
    return folder


def test_merging_does_not_touch_what_the_held_out_score_is_of(place, tmp_path, monkeypatch):
    """The adapter is scored, and merged after that."""
    order = []
    for name in ("evaluate", "save_merged"):
        call = getattr(run_train, name)
        monkeypatch.setattr(run_train, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    options = ("--train", "lora", "--lora-rank", 2, "--merge", "--steps", 1, "--eval-data", held_out(tmp_path / "sets"))
    assert place.train("order", *options) == 0
    assert order == ["evaluate", "evaluate", "save_merged"]


@pytest.mark.parametrize(("options", "message"), [
    (["--steps", 2, "--minutes", 1], "--steps and --minutes exclude each other"),
    (["--steps", 2, "--epochs", 1], "--epochs and --steps exclude each other"),
    (["--seed", 2**31], "--seed must be a finite number >= 0 and < 2147483648 (got 2147483648)"),
])
def test_options_that_cannot_be_are_refused(place, capsys, options, message):
    assert place.train("never", *options) == 2
    assert message in capsys.readouterr().err
    assert not (place.folder / "never").exists()


def test_a_run_that_ends_before_its_first_step(place, capsys):
    assert place.train("short", "--minutes", "1e-9") == 0
    assert "no step was completed" in capsys.readouterr().out


def test_sigint_in_a_process_of_its_own(place):
    folder = place.folder / "process"
    command = [sys.executable, "run_train.py", *place.arguments("process", "--steps", 2000)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (
            (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopping after this step" in output
    position = json.loads((next(folder.glob("state/0*")) / "position.json").read_text())
    assert position["step"] == len(rows_of(folder)) >= 3
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]  # nothing half-written
    assert Embedder.from_pretrained(folder).encode(["anna"]).shape == (1, 32)


def test_resume_refuses_what_would_be_another_run(place, whole, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert run_train.main(["--resume", *arguments]) == 2
        return capsys.readouterr().err
    assert "run.json: file does not exist" in error("--output", str(tmp_path))
    assert "--learning-rate must be as in" in error("--output", str(whole), "--learning-rate", "1")
    assert "--dtype must be as in" in error("--output", str(whole), "--dtype", "bfloat16")
    data = write_data(tmp_path / "mine.jsonl", lines())
    with ctrl_c_at(1):
        assert place.train("changed", "--data", data) == 130
    write_data(data, lines()[:-1])
    assert "'data' of" in error("--output", str(place.folder / "changed"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    with ctrl_c_at(1):
        assert place.train("remodelled", "--model", config) == 130
    config.write_text(json.dumps({**CONFIG, "sliding_window": 3, "rope_theta": 50.0}))
    assert "'model_config' of" in error("--output", str(place.folder / "remodelled"))


def test_a_resume_may_repeat_dtype_auto(place):
    """run.json has the precision that it stood for."""
    with ctrl_c_at(2):
        assert place.train("auto", "--dtype", "auto") == 130
    assert run_train.main(["--resume", "--output", str(place.folder / "auto"), "--dtype", "auto"]) == 0


def test_the_default_model_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_source.resolve_model(None).name == "mistralai/Mistral-7B-v0.1"
    assert model_source.resolve_model(None, "cpu").name == model_source.resolve_model(None, "cpu:0").name == "tiny"


def test_the_learning_rate_of_lora_is_announced_for_all_weights(place, whole, capsys):
    options = ["--model", str(whole / "model"), "--data", str(place.data), "--train", "all", "--steps", "1"]
    for given, told in (([], True), (["--learning-rate", "1e-4"], False)):
        assert run_train.main([*options, *given, "--output", str(place.folder / f"all-{told}")]) == 0
        assert ("was chosen for LoRA" in capsys.readouterr().out) == told


def test_a_run_of_an_earlier_version_continues(place):
    """Whose run.json has fewer fields of the model, and no options that did not exist."""
    with ctrl_c_at(2):
        assert place.train("earlier") == 130
    path = place.folder / "earlier/run.json"
    saved = json.loads(path.read_text())
    del saved["usage"], saved["model_config"]["max_positions"], saved["options"]["compile"]
    path.write_text(json.dumps(saved))
    assert run_train.main(["--resume", "--output", str(path.parent)]) == 0
    assert "usage" in json.loads(path.read_text())


def test_what_a_message_advises_may_be_given_with_resume(place, whole, capsys):
    """Less memory, another pace of saving: the same run but for rounding."""
    with ctrl_c_at(2):
        assert place.train("less") == 130
    folder = place.folder / "less"
    less = ["--mini-batch-tokens", "64", "--gradient-checkpointing", "--save-steps", "1", "--save-total-limit", "9",
            "--distributed-timeout", "5"]
    assert run_train.main(["--resume", "--output", str(folder), *less]) == 0
    assert facts(folder)["options"]["mini_batch_tokens"] == 64 and len(list((folder / "state").glob("0*"))) > 2
    for one, other in zip(rows_of(folder), rows_of(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_complete_run_gets_its_merged_model_later(keep_best, place, tmp_path, capsys):
    """What the hub's command advises for an adapter on a local base: equal to the merged model of the run itself."""
    options = ["--train", "lora", "--lora-rank", 4, "--learning-rate", "0.5"]
    if keep_best:
        options += ["--eval-data", held_out(tmp_path / "sets"), "--eval-steps", 1, "--keep-best"]
    names = [f"later-{keep_best}", f"at-once-{keep_best}"]
    assert place.train(names[0], *options) == place.train(names[1], *options, "--merge") == 0
    later, at_once = (place.folder / name for name in names)
    before = weights(later)
    assert run_train.main(["--resume", "--output", str(later), "--merge"]) == 0
    assert f"written: {later / 'merged'}" in capsys.readouterr().out and weights(later) == before
    one, other = ((folder / "merged/model.safetensors").read_bytes() for folder in (later, at_once))
    assert one == other and (later / "merged/README.md").exists()
    assert facts(later)["options"]["merge"] and facts(later)["complete"]
    time_of = (later / "merged/model.safetensors").stat().st_mtime_ns
    assert run_train.main(["--resume", "--output", str(later), "--merge"]) == 0
    assert (later / "merged/model.safetensors").stat().st_mtime_ns == time_of


def test_a_merged_model_is_that_of_the_result_or_there_is_none(place, whole, tmp_path, capsys):
    """If the last state is gone; and --merge of a run without an adapter."""
    assert place.train("stateless", "--train", "lora", "--lora-rank", 2, "--save-steps", 1) == 0
    folder = place.folder / "stateless"
    shutil.rmtree(max((folder / "state").iterdir()))
    assert run_train.main(["--resume", "--output", str(folder), "--merge"]) == 2
    assert re.search(r"must have the state of step (\d+), the run's result \(got \d+\)", capsys.readouterr().err)
    assert not (folder / "merged").exists() and not facts(folder)["options"]["merge"]
    assert run_train.main(["--resume", "--output", str(whole), "--merge"]) == 2
    assert "--merge is for --train lora (this run has --train all)" in capsys.readouterr().err


def test_other_files_beside_a_model_and_another_place_do_not_prevent_resuming(whole, adapter, tmp_path, monkeypatch):
    """The hub's folder of a model can get further weights; an adapter's base can come to lie elsewhere."""
    shutil.copytree(whole / "model", tmp_path / "model")
    before = model_source.ModelSource(str(tmp_path / "model"), "").fingerprint()
    (tmp_path / "model/consolidated.safetensors").write_bytes(b"another program's")
    assert model_source.ModelSource(str(tmp_path / "model"), "").fingerprint() == before
    (tmp_path / "model/tokenizer.json").write_text("{}")
    assert model_source.ModelSource(str(tmp_path / "model"), "").fingerprint() != before
    found = []
    for base, top in (("a", "b"), ("b", "a")):
        chain = [tmp_path / f"{base} under {top}" / name for name in (top, base)]
        for folder, source in zip(chain, (adapter / "adapter", whole / "model"), strict=True):
            shutil.copytree(source, folder)
        monkeypatch.setattr(model_source, "adapter_chain", lambda _, chain=chain: chain)
        found.append(model_source.ModelSource(str(chain[0]), "").fingerprint())
    assert found[0] == found[1] != before


def test_a_fingerprint_sees_the_middle_of_the_weights_and_the_begin_token(whole, tmp_path):
    """Version 1 saw neither, and is still computed for the runs that have it."""
    folder = shutil.copytree(whole / "model", tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(40_000_000)
    source, digest = model_source.ModelSource(str(folder), ""), hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}".encode() + content[:65536] + content[-65536:])
    stored = digest.hexdigest()
    found = {source.fingerprint()}
    assert source.fingerprint(like=stored) == stored
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(20_000_000)
        file.write(bytes([1]) * 2_000_000)
    found.add(source.fingerprint())
    edit_json(folder / "tokenizer_config.json", {"add_bos_token": False})
    found.add(source.fingerprint())
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}")
        found.add(source.fingerprint())
    assert len(found) == 5 and source.fingerprint(like=stored) == stored


def test_a_run_of_an_earlier_version_is_resumed(place, whole):
    with ctrl_c_at(2):
        assert place.train("version-1", "--model", whole / "model", "--lora-rank", 2) == 130
    folder = place.folder / "version-1"
    source = model_source.ModelSource(str(whole / "model"), "")
    for stored in ("0" * 64, source.fingerprint(like="")):
        edit_json(folder / "run.json", {"model_files": stored})
        assert run_train.main(["--resume", "--output", str(folder)]) == 2 * (stored == "0" * 64)
    assert facts(folder)["complete"] and facts(folder)["model_files"] == source.fingerprint()


def test_a_complete_run_has_nothing_to_go_on_with(place, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run_train.main(["--resume", "--output", str(whole)]) == 0
    assert "is complete: nothing to resume" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def extended(place, name: str, *options: object) -> Path:
    """A complete run of STEPS steps, whose model card has scores."""
    assert place.train(name, *options) == 0
    score = Score("STS", "cosine_spearman", 70.0, "local", "local-1", "test", False)
    add_scores(place.folder / name, {"STS12": score})
    return place.folder / name


def test_a_complete_run_is_extended_with_a_schedule_of_its_own(place, whole, capsys):
    """Steps, data and AdamW's moments continue; the learning rate rises and falls again over the added steps."""
    folder = extended(place, "extended")
    assert "STS12" in (folder / "model/README.md").read_text()
    before = weights(folder)
    assert run_train.main(["--resume", "--output", str(folder), "--steps", str(STEPS + 4)]) == 0
    rows, run = rows_of(folder), facts(folder)
    assert [row["step"] for row in rows] == list(range(STEPS + 4)) and untimed(folder)[:STEPS] == untimed(whole)
    config = TrainConfig(lr_scheduler="cosine", learning_rate=5e-3)
    rates = [learning_rate(config, (n + 0.5) / 4) for n in range(4)]
    assert [row["learning_rate"] for row in rows[STEPS:]] == pytest.approx(rates)
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows) and rows[-1]["epoch"] > 0
    assert run["complete"] and run["options"]["steps"] == STEPS + 4 and run["schedule_start"]["step"] == STEPS
    assert weights(folder) != before
    assert not (folder / "scores.json").exists() and "STS12" not in (folder / "model/README.md").read_text()
    capsys.readouterr()
    for length in ([], ["--steps", str(STEPS)], ["--epochs", "0.1"], ["--minutes", "0.0001"]):
        assert run_train.main(["--resume", "--output", str(folder), *length]) == 0
        assert "is complete: nothing to resume; a larger --steps" in capsys.readouterr().out


@pytest.mark.parametrize("length", [["--epochs", "2"], ["--steps", "12"]])
def test_an_extension_that_was_stopped_goes_on_as_if_undisturbed(place, length):
    runs = []
    for name in ("once", "twice"):
        folder = place.folder / f"{name}{length[0]}"
        assert place.train(folder.name, length[0], 1 if length[0] == "--epochs" else STEPS) == 0
        command = ["--resume", "--output", str(folder), *length]
        if name == "twice":
            with ctrl_c_at(len(rows_of(folder)) + 1):
                assert run_train.main(command) == 130
            assert not facts(folder)["complete"] and Embedder.from_pretrained(folder)
            command = command[:3]
        assert run_train.main(command) == 0
        runs.append((weights(folder), untimed(folder), facts(folder)["schedule_start"]["step"]))
    assert runs[0] == runs[1]


def test_what_cannot_be_extended(place, capsys):
    folder = extended(place, "edited")
    with (folder / "model/README.md").open("a") as card:
        card.write("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    extend = ["--resume", "--output", str(folder), "--steps", "9"]
    for more, message in (
        ([], "README.md was edited, and its folder is replaced; move it first"),
        (["--learning-rate", "1"], "--learning-rate must be as in"),
        (["--epochs", "9"], "--epochs and --steps exclude each other; give one"),
    ):
        assert run_train.main([*extend, *more]) == 2
        assert message in capsys.readouterr().err
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with ctrl_c_at(2):
        assert place.train("unfinished") == 130
    unfinished = ["--resume", "--output", str(place.folder / "unfinished")]
    assert run_train.main([*unfinished, "--steps", "9"]) == 2
    assert "--steps must be as in" in capsys.readouterr().err
    assert run_train.main([*unfinished, "--epochs", "24"]) == 0  # the preset's, which this run does not use
    assert len(rows_of(place.folder / "unfinished")) == STEPS


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_an_extension_starts_from_the_last_state_or_not_at_all(place, capsys, damage):
    """An earlier state would be trained with a schedule that has not begun; the result stays."""
    folder = extended(place, f"early-{damage}", "--save-steps", 3)
    last = folder / "state/00000006"
    if damage == "removed":
        shutil.rmtree(last)
    else:
        (last / "state.safetensors").write_bytes((last / "state.safetensors").read_bytes()[:-9])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run_train.main(["--resume", "--output", str(folder), "--steps", "9"]) == 2
    error = capsys.readouterr().err
    if damage == "removed":
        assert "must have a state of step 6 or later, from where the run is extended (got 3)" in error
    else:
        assert f"remove {last} to resume from" in error
    assert run_train.main(["--resume", "--output", str(folder)]) == 0  # nothing to do, whatever states there are
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_has_the_base_and_the_held_out_sets_of_its_start(place, tmp_path, capsys):
    """An adapter's base that was trained further, or other sets to choose the best state with, are other inputs."""
    sets = held_out(tmp_path / "sets")
    assert place.train("base") == 0
    with ctrl_c_at(2):
        options = ["--model", place.folder / "base", "--lora-rank", 4, "--eval-data", sets, "--eval-steps", 2]
        assert place.train("above", *options, "--keep-best") == 130
    above = ["--resume", "--output", str(place.folder / "above")]
    with (sets / "Set/corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "more", "text": "more"}) + "\n")
    assert run_train.main(above) == 2
    assert "'held_out' of" in (error := capsys.readouterr().err) and "must be as at the start of the run" in error
    held_out(tmp_path / "again")
    shutil.copytree(tmp_path / "again", sets, dirs_exist_ok=True)
    assert run_train.main(["--resume", "--output", str(place.folder / "base"), "--steps", str(STEPS + 1)]) == 0
    assert facts(place.folder / "base")["extended"][0]["end"]["step"] == STEPS
    assert run_train.main(above) == 2
    assert "'model_files' of" in capsys.readouterr().err


def test_held_out_sets_that_only_score_the_result_may_change(place, tmp_path):
    """Without --eval-steps they choose no state and draw no curve."""
    sets = held_out(tmp_path / "sets")
    with ctrl_c_at(2):
        assert place.train("scored-at-the-end", "--eval-data", sets) == 130
    before = facts(place.folder / "scored-at-the-end")["held_out"]
    with (sets / "Set/corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "more", "text": "more"}) + "\n")
    assert run_train.main(["--resume", "--output", str(place.folder / "scored-at-the-end")]) == 0
    after = facts(place.folder / "scored-at-the-end")
    assert after["held_out"] != before and after["eval_before"] is None is not after["eval_after"]


def test_an_adapter_on_a_base_that_has_changed_is_refused(place, tmp_path, capsys):
    """Also one further up, and with a fingerprint of version 1; another place is none, and --base is a choice."""
    assert place.train("changing") == 0
    assert place.train("on-it", "--model", place.folder / "changing", "--lora-rank", 2) == 0
    assert place.train("upper", "--model", place.folder / "on-it", "--lora-rank", 2) == 0
    lower, upper = place.folder / "on-it/adapter", place.folder / "upper/adapter"
    shutil.copytree(place.folder / "changing/model", tmp_path / "moved")
    before = Embedder.from_pretrained(lower).encode(TEXTS)
    assert run_train.main(["--resume", "--output", str(place.folder / "changing"), "--steps", str(STEPS + 1)]) == 0
    edit_json(place.folder / "on-it/run.json", {
        "model_files": model_source.ModelSource(str(tmp_path / "moved"), "").fingerprint(like="")})
    for adapter, base in ((lower, place.folder / "changing/model"), (upper, lower)):
        with pytest.raises(ValueError, match=rf"^{base}: must be as when {adapter} was trained on it \(got other"):
            Embedder.from_pretrained(adapter)
    assert place.train("third-storey", "--model", lower, "--lora-rank", 2) == 2
    assert "was trained on it" in capsys.readouterr().err
    assert np.array_equal(Embedder.from_pretrained(lower, base=str(tmp_path / "moved")).encode(TEXTS), before)
    edit_json(lower / "adapter_config.json", {"base_model_name_or_path": str(tmp_path / "moved")})
    assert np.array_equal(Embedder.from_pretrained(lower).encode(TEXTS), before)
    with pytest.raises(ValueError, match=rf"^{lower}: must be as when"):  # its own file has changed
        Embedder.from_pretrained(upper)


def test_what_a_run_remembers_of_the_run_it_started_from(place, whole, tmp_path, capsys):
    """The names of its training tasks, and the model below; a run that was stopped is used with a note."""
    other = write_data(tmp_path / "other.jsonl", draw_training_lines(WORDS, {"Songs": "Find who sings."}, 20))
    with ctrl_c_at(2):
        assert place.train("second", "--model", whole, "--lora-rank", 4, "--data", other) == 130
    run = facts(place.folder / "second")
    assert run["tasks"] == sorted(["Songs", *INSTRUCTIONS]) and run["root"] == str(place.folder / "config.json")
    capsys.readouterr()
    assert place.train("third", "--model", place.folder / "second", "--lora-rank", 4, "--steps", 1) == 0
    assert f"note: the run {place.folder / 'second'} is not complete" in capsys.readouterr().out
    assert facts(place.folder / "third")["root"] == run["root"]
    assert place.train("fourth", "--model", place.folder / "second", "--train", "all", "--steps", 1) == 2
    assert "is an adapter on a frozen base; give a merged model" in capsys.readouterr().err
    assert run_train.main(["--resume"]) == 2
    assert "--resume needs --output" in capsys.readouterr().err


def test_a_run_starts_from_an_adapter_or_a_merged_model_with_other_data(place, adapter):
    """Both begin with the same loss: the new adapter lies on the trained model."""
    other = write_data(place.folder / "other.jsonl", draw_training_lines(WORDS, {"Songs": "Find who sings."}, 20))
    losses = []
    for part in ("adapter", "merged"):
        folder = place.folder / f"from-{part}"
        assert place.train(folder.name, "--model", adapter / part, "--data", other, "--lora-rank", 4, "--merge") == 0
        losses.append(rows_of(folder)[0]["loss"])
        assert "Songs" in facts(folder)["tasks"] and facts(folder)["options"]["train"] == "lora"
        ours = Embedder.from_pretrained(folder, device="cpu").encode(TEXTS)
        assert np.abs(ours - Embedder.from_pretrained(folder / "merged", device="cpu").encode(TEXTS)).max() < 1e-4
        assert np.abs(ours - Embedder.from_pretrained(adapter, device="cpu").encode(TEXTS)).max() > 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_that_crashes_leaves_no_older_model(place, monkeypatch):
    with ctrl_c_at(2):
        assert place.train("older") == 130
    folder = place.folder / "older"
    assert Embedder.from_pretrained(folder)

    def update(self, rate):
        raise RuntimeError("power cut")
    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(RuntimeError, match="power cut"):
        run_train.main(["--resume", "--output", str(folder)])
    with pytest.raises(ValueError, match=r"no model yet.*--resume"):
        Embedder.from_pretrained(folder)


def test_a_second_sigterm_changes_nothing(place):
    """A scheduler sends it to the launcher and to each process; also while the result is written."""
    save = run_train.save_result

    def save_result(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)
    with ctrl_c_at(2, (signal.SIGTERM, signal.SIGTERM)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_train, "save_result", save_result)
        assert place.train("twice") == 130
    assert (place.folder / "twice/model").is_dir() or (place.folder / "twice/adapter").is_dir()


def test_slurms_signal_before_the_end_stops_and_saves(place):
    with ctrl_c_at(2, (signal.SIGUSR1,)):
        assert place.train("preempted") == 130
    assert list((place.folder / "preempted/state").iterdir())


def test_a_second_ctrl_c_ends_at_once(place):
    with ctrl_c_at(2, (signal.SIGINT, signal.SIGINT)):
        assert place.train("at-once") == 130
    assert not (place.folder / "at-once/state").exists()


def test_an_option_of_another_version_is_named(place, whole, capsys):
    folder = shutil.copytree(whole, place.folder / "newer")
    run = facts(folder)
    run["options"]["moon_phase"] = 3
    (folder / "run.json").write_text(json.dumps(run))
    assert run_train.main(["--resume", "--output", str(folder)]) == 2
    assert "run.json: the option 'moon_phase' is unknown" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_resumed_run_keeps_no_saved_state_mapped(place):
    """On a network file system a mapped file cannot be removed, and the states are removed one after the other."""
    with ctrl_c_at(2):
        assert place.train("mapped") == 130
    folder, seen = place.folder / "mapped", []
    original = run_train.train

    def look(*arguments):
        seen.append(str(folder) in Path("/proc/self/maps").read_text())
        return original(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_train, "train", look)
        assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert seen == [False]


def test_device_and_backend_may_change(place, whole):
    """run.json as of a run that began on a GPU."""
    with ctrl_c_at(2):
        assert place.train("moved") == 130
    folder = place.folder / "moved"
    run = facts(folder)
    run["options"] |= {"device": "cuda", "backend": "triton"}
    (folder / "run.json").write_text(json.dumps(run))
    assert run_train.main(["--resume", "--output", str(folder), "--device", "cpu", "--backend", "chunked"]) == 0
    assert facts(folder)["options"]["backend"] == "chunked" and len(untimed(folder)) == len(untimed(whole))
    np.testing.assert_allclose([row["loss"] for row in untimed(folder)], [row["loss"] for row in untimed(whole)],
                               rtol=1e-4)


def test_a_damaged_state_names_the_one_before_it(place, capsys):
    with ctrl_c_at(2):
        assert place.train("damaged", "--save-steps", 2) == 130
    folder = place.folder / "damaged"
    older, newest = sorted((folder / "state").glob("0*"))
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-9])
    assert run_train.main(["--resume", "--output", str(folder)]) == 2
    assert f"remove {newest} to resume from {older}" in capsys.readouterr().err
    shutil.rmtree(newest)
    assert run_train.main(["--resume", "--output", str(folder)]) == 0


@pytest.mark.parametrize(("options", "words"), [
    (["--max-prompt-tokens", 40, "--max-text-tokens", 20], "were drawn: raise --max-prompt-tokens"),
    (["--batch-size", 32], "where all lines of a task are in one batch: lower --batch-size"),
    ([], r"on average, drawn from 0 to 2$"),
])
def test_why_prompts_have_no_examples(place, options, words, capsys):
    name = f"why{len(options)}{options[:1]}"
    assert place.train(name, *options) == 0
    lines_out = capsys.readouterr().out.splitlines()
    said = next(line for line in lines_out if line.startswith("in-context examples per prompt"))
    assert re.search(words, said), said


# ------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("options", "message"), [
    (["--output", "whole"], r"already holds a run.*--resume"),
    (["--output", "config.json/x"], r"--output .*cannot be written"),
    (["--output", "some.jsonl"], r"--output .*must not be an input"),
    (["--data", "none.jsonl"], r"none\.jsonl: file does not exist"),
    (["--device", "mps"], r"--device must be cpu or cuda .got 'mps'"),
    (["--model", "nowhere"], r"must be a folder with config.json or a hub id OWNER/NAME .got 'nowhere'"),
    (["--model", "none.json"], r"none\.json: file does not exist"),
    (["--model", "own/er/name"], r"must be a folder with config.json or a hub id"),
    (["--preset", "huge"], r"--preset must be one of paper, small, small-pretrained .got 'huge'"),
    (["--template", "mine"], r"--template must be one of paper, bge-en-icl .got 'mine'"),
    (["--learning-rate", "-1"], r"--learning-rate must be a finite number > 0 .got -1"),
    (["--learning-rate", "nan"], r"--learning-rate must be .*got nan"),
    (["--contrastive-weight", "0", "--soft-label-weight", "0"], r"both 0"),
    (["--max-prompt-tokens", "8", "--max-text-tokens", "4"], r"leaves no room for a text in max_prompt_tokens"),
    (["--max-text-tokens", "4096"], r"--max-prompt-tokens must be at least --max-text-tokens . 2 .got 2048 and 4096"),
    (["--train", "lora", "--lora-target-modules", "x_proj"], r"must be some of .*got 'x_proj'"),
    (["--eval-steps", "2"], r"--eval-steps needs held-out sets: give their folder as --eval-data"),
    (["--eval-steps", "2", "--eval-data", "none"], r"--eval-steps needs held-out sets"),
    (["--eval-steps", "0"], r"--eval-steps must be a finite number >= 1 .got 0"),
    (["--eval-data", "alone/set"], r"must hold folders with task.json.*got one of these folders"),
    (["--keep-best"], r"--keep-best needs --eval-steps"),
    (["--eval-data", "."], r"--eval-data .*must hold folders with task.json"),
    (["--model", "whole/model", "--output", "whole/model/bad"], r"--output .*must not be an input or lie in one"),
    (["--lora-rank", "8"], r"--lora-rank is for --train lora"),
    (["--merge"], r"--merge is for --train lora"),
    (["--max-examples", "0", "--examples-per", "query"], r"--examples-per is for --max-examples above 0 \(got query\)"),
    (["--max-examples", "0", "--max-example-tokens", "9"], r"--max-example-tokens is for --max-examples above 0"),
    (["--in-batch-negatives", "none", "--false-negative-margin", "0.2"], r"--false-negative-margin is for in-"),
    (["--model", "whole/model", "--no-lowercase"], r"--lowercase is for random initialisation"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_clear_error(place, whole, capsys, monkeypatch, options, message):
    monkeypatch.chdir(place.folder)
    (place.folder / "alone/set").mkdir(parents=True, exist_ok=True)
    (place.folder / "alone/set/task.json").write_text("{}")
    before = weights(whole)
    assert place.train("bad", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (place.folder / "bad").exists()
    assert weights(whole) == before


@pytest.mark.parametrize(
    "options", [["--learning-rate", "fast"], ["--in-batch-negatives", "some"], ["--no-such-option"]], ids=" ".join
)
def test_argparse_refuses_the_rest(place, options):
    with pytest.raises(SystemExit) as end:
        place.train("bad", *options)
    assert end.value.code == 2


def test_a_long_prompt_in_the_data_is_an_error(place, tmp_path, capsys):
    data = write_data(tmp_path / "long.jsonl", [*lines(4), {**lines(1)[0], "prompt": "very " * 3000}])
    assert place.train("bad", "--data", data) == 2
    assert "very very" in (error := capsys.readouterr().err)
    assert "long.jsonl:5: 'prompt': " in error and "leaves no room" in error
    assert not (place.folder / "bad").exists()


def test_a_loss_that_is_not_finite_names_the_lines(place, capsys, monkeypatch):
    original = Trainer.loss

    def loss(self, batch, vectors):
        terms = original(self, batch, vectors)
        return dataclasses.replace(terms, total=terms.total * math.nan) if self.broken else terms
    monkeypatch.setattr(Trainer, "loss", loss)
    broken = property(lambda self: (place.folder / "nan/state").exists())
    monkeypatch.setattr(Trainer, "broken", broken, raising=False)
    assert place.train("nan", "--save-steps", 2, "--batch-size", 3) == 2
    error = capsys.readouterr().err
    assert "step 2: loss and gradient norm must be finite (got nan" in error
    named = re.findall(r"some\.jsonl:(\d+)", error)
    assert len(named) == 3
    assert len({lines()[int(number) - 1]["task"] for number in named}) == 1
    saved = read_tensors(place.folder / "nan/state/00000002/state.safetensors", device=torch.device("cpu"))
    assert all(torch.isfinite(tensor).all() for _, tensor in saved)


def test_a_huge_learning_rate_ends_with_the_same_error(place, capsys):
    assert place.train("huge", "--learning-rate", "1e30", "--warmup-ratio", 0) == 2
    assert "lower --learning-rate" in capsys.readouterr().err


def test_the_loss_is_fp32_whatever_the_model_computes_in(place, monkeypatch):
    """Its products in bf16 would be off by percents at a temperature of 0.02."""
    seen = []

    def loss(self, batch, vectors):
        seen.append((torch.is_autocast_enabled("cpu"), vectors.dtype))
        return original(self, batch, vectors)
    original = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", loss)
    assert place.train("low", "--dtype", "bfloat16", "--steps", 2, "--mini-batch-tokens", 64) == 0
    assert seen == [(False, torch.float32)] * 2


# ------------------------------------------------------------------------------------------------- options

def test_the_first_lines_say_dtype_and_mini_batches_and_why(place, capsys, monkeypatch):
    """A frozen base takes the faster dtype; --train all stays fp32 on a CPU, because its weights are."""
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", lambda: 4.0)
    assert place.train("dtype-lora", "--train", "lora", "--lora-rank", 4, "--steps", 1, "--preset", "paper") == 0
    printed = capsys.readouterr().out
    assert "dtype: bfloat16 (this processor's matrix products are 4.0 times as fast in bfloat16)\n" in printed
    assert re.search(r"^mini-batches: [\d,]+ tokens \([\d.]+ MB per token, [\d.]+ GB free\)$", printed, re.MULTILINE)
    options = facts(place.folder / "dtype-lora")["options"]
    assert options["dtype"] == "bfloat16" and options["mini_batch_tokens"] >= 256
    assert place.train("dtype-all", "--steps", 1) == 0
    assert "dtype: float32 (default on a CPU for --train all" in capsys.readouterr().out
    assert place.train("dtype-note", "--dtype", "bfloat16", "--steps", 1) == 0
    assert "dtype: bfloat16 (as given)\n" in capsys.readouterr().out


def test_the_size_of_mini_batches_changes_rounding_alone(place):
    for tokens in (64, "auto"):
        assert place.train(f"tokens-{tokens}", "--mini-batch-tokens", tokens, "--steps", 3) == 0
    few, auto = (rows_of(place.folder / name) for name in ("tokens-64", "tokens-auto"))
    assert [row["loss"] for row in few] == pytest.approx([row["loss"] for row in auto], rel=1e-4)


def test_a_folder_that_is_no_run_is_rejected_untouched(place, capsys):
    """Not even where the user's files are named as those of a run."""
    for name in ("model/config.json", "metrics.jsonl", "base/model.safetensors"):
        path = place.folder / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert place.train("mine") == 2
    assert "exists and was not written by this command" in capsys.readouterr().err
    assert [path.read_text() for path in sorted((place.folder / "mine").rglob("*")) if path.is_file()] == ["mine"] * 3


def test_default_names_of_runs_of_the_same_second_differ(place, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)
    monkeypatch.setattr(run_dir, "datetime", Clock)
    (place.folder / "sweep").mkdir()
    monkeypatch.chdir(place.folder / "sweep")
    for _ in range(2):
        options = place.arguments("unused", "--steps", 1)
        place_of = options.index("--output")
        assert run_train.main(options[:place_of] + options[place_of + 2 :]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "config-20260102-030405", "config-20260102-030405-2"]


def test_lists_of_an_option_that_is_repeated_are_joined():
    given = parse_args(["--data", "a.jsonl", "b.jsonl", "--data", "c.jsonl"])
    assert given.data == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_an_option_that_the_data_does_not_use_is_named(place, tmp_path, capsys):
    fields = ("query", "pos", "neg", "prompt")
    rows = [{name: row[name] for name in fields} for row in map(json.loads, place.data.read_text().splitlines())]
    plain = write_data(tmp_path / "plain.jsonl", rows)
    classes = write_data(tmp_path / "classes.jsonl", [{**row, "type": "symmetric_class"} for row in rows])
    for options, name, reason in (
            (["--batch-size-symmetric", 3], "batch-size-symmetric", "every task has in-batch negatives"),
            (["--in-batch-negatives", "none"], "batch-size", "no task has in-batch negatives"),
            (["--data", classes, "--in-batch-negatives", "by-type", "--false-negative-margin", 0.2],
             "false-negative-margin", "no task has in-batch negatives"),
            (["--data", plain, "--teacher-temperature", 0.1], "teacher-temperature", "no line has teacher scores")):
        with ctrl_c_at(1):
            assert place.train(f"unused-{name}", *options) == 130
        assert f"note: --{name} is not used: {reason}" in capsys.readouterr().out
    with ctrl_c_at(1):
        assert place.train("used") == 130
    assert "is not used" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "preset"), [(10**9, "small-pretrained"), (10, "paper")])
def test_a_checkpoints_preset_depends_on_its_size(limit, preset, place, whole, fresh_adapter, monkeypatch):
    """Of an adapter the size of its base decides."""
    monkeypatch.setattr(model_source, "SMALL", limit)
    for name in (whole / "model", whole, fresh_adapter / "adapter"):
        given = parse_args(["--model", str(name)])
        config = train_config(given, model_source.resolve_model(str(name)))
        assert (config.preset, config.train) == (preset, "lora")
        assert config.lora_rank == {**vars(TrainConfig()), **PRESETS[preset]}["lora_rank"]


def test_without_a_gpu_the_default_is_tiny_and_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [x for x in place.arguments("tiny", "--steps", 1) if x != str(place.folder / "config.json")]
    options.remove("--model")
    assert run_train.main(options) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("model: tiny (default without a GPU")
    assert "--model" in first
    assert f"held-out sets: none in {place.folder / 'held_out'} (--eval-data names another folder)" in others


@pytest.mark.parametrize("options", [[], ["--train", "lora", "--lora-rank", 4]], ids=["all", "lora"])
def test_bf16(place, options):
    name = f"bf16{len(options)}"
    assert place.train(name, "--dtype", "bfloat16", "--steps", 3, *options) == 0
    folder = place.folder / name
    assert facts(folder)["options"]["dtype"] == "bfloat16"
    assert all(math.isfinite(row["loss"]) for row in rows_of(folder))
    if not options:
        assert b'"BF16"' not in weights(folder)  # what learns is fp32
        assert [r["loss"] for r in rows_of(folder)] != [r["loss"] for r in rows_of(place.folder / "whole")][:3]


def test_minutes(place, monkeypatch):
    """--minutes ends the run by the clock, here one that advances by 50 ms whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(metrics.Stopwatch, "clock", staticmethod(lambda: 0.05 * next(ticks)))
    assert place.train("minutes", "--minutes", "0.01") == 0
    rows = rows_of(place.folder / "minutes")
    assert len(rows) > 1
    assert 0.3 < rows[-1]["elapsed_s"] < 1.2
    assert rows[-1]["learning_rate"] < max(row["learning_rate"] for row in rows) / 2


@pytest.mark.parametrize(
    "options",
    [
        ["--examples-per", "query"],
        ["--template", "bge-en-icl"],
        ["--in-batch-negatives", "none"],
        ["--soft-label-weight", 0],
        ["--contrastive-weight", 0],
        ["--no-lowercase"],
        ["--false-negative-margin", "none"],
        ["--batch-size", 1],
    ],
    ids=lambda o: " ".join(map(str, o)),
)
def test_every_option_trains(place, whole, options):
    name = options[0].strip("-")
    assert place.train(name, *options) == 0
    rows = rows_of(place.folder / name)
    assert len(rows) == STEPS
    assert weights(place.folder / name) != weights(whole)
    if "--template" in options:
        embedder = Embedder.from_pretrained(place.folder / name)
        assert embedder.prompt_encoder.template.markers
        assert all(embedder.prompt_encoder.tokenizer.token_id(m) for m in embedder.prompt_encoder.template.markers)
    if "--contrastive-weight" in options:
        assert all(row["loss"] == pytest.approx(row["soft_label_loss"]) for row in rows)


def test_held_out_sets_are_scored_before_and_after(place, tmp_path, capsys):
    (tmp_path / "held/STS").mkdir(parents=True)
    (tmp_path / "held/STS/task.json").write_text('{"class": "STSBenchmark", "instruction": "Find it."}')
    assert place.train("held", "--eval-data", held_out(tmp_path / "held")) == 0
    output = capsys.readouterr().out
    assert "STS" not in output  # no retrieval set
    run = facts(place.folder / "held")
    for when in ("before", "after"):
        assert f"held-out nDCG@10 {when} training: {run[f'eval_{when}']:.3f}" in output
        assert 0 <= run[f"eval_{when}"] <= 1


def test_held_out_sets_are_scored_during_training(place, whole, tmp_path, capsys):
    """Every four steps and at the end; the weights are those of a run without, a score is that of the saved model."""
    options = ["--eval-data", held_out(tmp_path / "held"), "--eval-steps", 4]
    assert place.train("scored", *options, "--keep-best") == 0
    folder, printed = place.folder / "scored", capsys.readouterr().out
    scores = metrics.held_out_scores(folder)
    assert list(scores) == [4, 6] and f"held-out nDCG@10 after 4 steps: {scores[4]:.3f} (Set " in printed
    assert untimed(folder) == untimed(whole)
    best, run = max(scores, key=lambda step: (scores[step], -step)), facts(folder)
    assert f"the result is the state after {best} steps, which has the best" in printed
    assert (run["result_step"], run["eval_after"]) == (best, scores[best]) and "after training" not in printed
    again = evaluate_retrieval(Embedder.from_pretrained(folder, device="cpu"), tmp_path / "held/Set")
    assert again == pytest.approx(scores[best], abs=1e-6)


def test_a_failure_while_scoring_loses_no_step(place, whole, tmp_path, monkeypatch):
    """The state at the end is saved before, and the resumed run scores it."""
    options = ["--eval-data", held_out(tmp_path / "held"), "--eval-steps", 4]
    original = run_train.evaluate

    def evaluate(trainer, sets, when):
        if when == "after 6 steps":
            raise RuntimeError("power cut")
        return original(trainer, sets, when)
    monkeypatch.setattr(run_train, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="power cut"):
        place.train("scoring", *options)
    folder = place.folder / "scoring"
    assert [path.name for path in (folder / "state").iterdir()] == ["00000006"]
    monkeypatch.setattr(run_train, "evaluate", original)
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert list(metrics.held_out_scores(folder)) == [4, 6] and weights(folder) == weights(whole)
    assert untimed(folder) == untimed(whole)


@pytest.mark.parametrize(("scores", "best"), [([0.5, 0.9, 0.7], 4), ([0.2, 0.3, 0.4], 6), ([0.9, 0.9, 0.1], 2)])
@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_best_state_is_kept(place, tmp_path, monkeypatch, scores, best, train):
    """Also by a run that was stopped; it is the state after the step with the best score, the first of equals."""
    seen: dict[int, Any] = {}

    def score(trainer, sets, when):
        if not (match := re.fullmatch(r"after (\d) steps", when)):  # before or after training
            return 0.0
        step = int(match[1])
        seen[step] = {k: v.detach().clone() for k, v in run_dir.trainable_parameters(trainer.model).items()}
        return scores[step // 2 - 1]
    monkeypatch.setattr(run_train, "evaluate", score)
    sets, exported = held_out(tmp_path / "held"), []
    for name in (f"best-{train}-{best}", f"best-{train}-{best}-stopped"):
        options = ["--eval-data", sets, "--eval-steps", 2, "--keep-best", "--train", train]
        if name.endswith("stopped"):
            with ctrl_c_at(2):
                assert place.train(name, *options) == 130
            assert run_train.main(["--resume", "--output", str(place.folder / name)]) == 0
        else:
            assert place.train(name, *options) == 0
        exported.append(weights(place.folder / name))
        assert facts(place.folder / name)["result_step"] == best
        assert metrics.held_out_scores(place.folder / name) == dict(zip((2, 4, 6), scores, strict=True))
        found = dict(read_tensors(place.folder / name / "best/state.safetensors", device=torch.device("cpu")))
        assert all(torch.equal(found[key], value) for key, value in seen[best].items())
        assert any(not torch.equal(found[key], value) for key, value in seen[8 - best if best != 4 else 2].items())
    assert exported[0] == exported[1]


def test_a_resumed_run_does_not_score_a_step_again(place, tmp_path, monkeypatch):
    """Killed after step 4 was saved and scored: it goes on from there."""
    options = ["--eval-data", held_out(tmp_path / "held"), "--eval-steps", 2, "--save-steps", 2]
    scored, original, updates = [], Trainer.update, itertools.count()

    def update(self, rate):
        if next(updates) == 5:
            raise RuntimeError("power cut")
        return original(self, rate)
    monkeypatch.setattr(Trainer, "update", update)
    monkeypatch.setattr(run_train, "evaluate", lambda trainer, sets, when: (scored.append(when), 0.5)[1])
    with pytest.raises(RuntimeError, match="power cut"):
        place.train("scored-once", *options)
    assert run_train.main(["--resume", "--output", str(place.folder / "scored-once")]) == 0
    assert scored == ["before training", "after 2 steps", "after 4 steps", "after 6 steps"]


def test_a_run_resumes_no_earlier_than_its_best_state(place, tmp_path, monkeypatch):
    """Killed long before --save-steps: otherwise the best state could be one of steps that the resumed run replaces."""
    options = ["--eval-data", held_out(tmp_path / "held"), "--eval-steps", 2, "--keep-best"]
    original, updates = Trainer.update, itertools.count()

    def update(self, rate):
        if next(updates) == 5:
            raise RuntimeError("power cut")
        return original(self, rate)
    monkeypatch.setattr(Trainer, "update", update)
    scores = {"before training": 0.0, "after 2 steps": 0.2, "after 4 steps": 0.9, "after 6 steps": 0.5}
    monkeypatch.setattr(run_train, "evaluate", lambda trainer, sets, when: scores[when])
    with pytest.raises(RuntimeError, match="power cut"):
        place.train("best-cut", *options)
    folder = place.folder / "best-cut"
    assert run_dir.last_position(folder)["step"] == 4 == json.loads((folder / "best/score.json").read_text())["step"]
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert facts(folder)["result_step"] == 4 and len(untimed(folder)) == 6


def test_a_best_state_of_removed_steps_is_dropped(place, tmp_path):
    model = torch.nn.Linear(2, 1)
    run_dir.save_if_best(tmp_path, model, 4, 0.9)
    run_dir.drop_best_after(tmp_path, 4)
    assert run_dir.load_best(tmp_path, model) == 4
    run_dir.drop_best_after(tmp_path, 3)
    assert not (tmp_path / "best").exists()


def test_scoring_is_not_time_of_training(monkeypatch):
    now = iter([0.0, 10.0, 110.0, 111.0])
    monkeypatch.setattr(metrics.Stopwatch, "clock", staticmethod(lambda: next(now)))
    stopwatch = metrics.Stopwatch(5.0)
    with stopwatch.paused():
        pass
    assert stopwatch.elapsed_s == 16.0


# ------------------------------------------------------------------------------------------------- what is exported

def peer_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """transformers: the last token's hidden state, unit length, one text at a time."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1).numpy()


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The smallest cosine of any row of one with the same row of the other."""
    return float((one * other).sum(-1).min() / max(1, np.linalg.norm(other, axis=-1).max()))


@pytest.mark.parametrize("which", ["whole/model", "adapter/merged", "fresh/merged"])
def test_peers_load_the_model_and_embed_the_same(place, whole, adapter, fresh_adapter, which):
    library = pytest.importorskip("sentence_transformers")
    folder = place.folder / which
    ours = Embedder.from_pretrained(folder)
    peer = library.SentenceTransformer(str(folder), device="cpu")
    passages = ours.encode(TEXTS)
    assert cosine(passages, peer.encode(TEXTS)) >= 0.99999
    assert cosine(passages, peer_vectors(folder, TEXTS)) >= 0.99999
    long = [" ".join(WORDS * 30)]  # cut by both
    assert cosine(ours.encode(long), peer.encode(long)) >= 0.99999
    for task, instruction in INSTRUCTIONS.items():
        queries = ours.encode(TEXTS, instruction=instruction)
        assert cosine(queries, peer.encode(TEXTS, prompt_name=task)) >= 0.99999
        strings = [f"Instruct: {instruction}\nQuery: {text}" for text in TEXTS]
        assert cosine(queries, peer_vectors(folder, strings)) >= 0.99999
        assert cosine(queries, passages) < 0.9999  # control: the instruction shows
    ids = peer.tokenizer(TEXTS[0])["input_ids"]
    assert (ids[0], ids[-1]) == (ours.prompt_encoder.tokenizer.bos_id, ours.prompt_encoder.tokenizer.eos_id)
    without_end = peer_vectors_without_end(folder, TEXTS)
    assert cosine(passages, without_end) < 0.9999  # control: the end token shows


def peer_vectors_without_end(folder: Path, texts: list[str]) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        rows = [model(torch.tensor([tokenizer(text)["input_ids"][:-1]])).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("whole", "whole/model"),
        ("adapter", "adapter/adapter"),
        ("adapter", "adapter/merged"),
        ("fresh", "fresh/adapter"),
        ("fresh", "fresh/merged"),
    ],
)
def test_every_folder_of_a_run_is_an_embedder(place, whole, adapter, fresh_adapter, one, other):
    vectors = [Embedder.from_pretrained(place.folder / name).encode(TEXTS, instruction="Find it.")
               for name in (one, other)]
    assert vectors[0].dtype == np.float32
    assert vectors[0].shape == (len(TEXTS), CONFIG["hidden_size"])
    np.testing.assert_allclose(np.linalg.norm(vectors[0], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(*vectors, atol=2e-6)


@pytest.mark.parametrize(("base", "learnt"), [("whole/model", "adapter"), ("fresh/base", "fresh")])
def test_control_an_adapter_is_not_its_base(place, whole, adapter, fresh_adapter, base, learnt):
    one, other = (Embedder.from_pretrained(place.folder / name).encode(TEXTS) for name in (base, learnt))
    assert np.abs(one - other).max() > 1e-3


def test_a_fresh_adapter_finds_its_base_where_the_run_was_moved_to(fresh_adapter, tmp_path):
    shutil.copytree(fresh_adapter, tmp_path / "moved")
    one, other = (Embedder.from_pretrained(folder).encode(TEXTS) for folder in (fresh_adapter, tmp_path / "moved"))
    np.testing.assert_array_equal(one, other)


def test_a_plain_transformers_folder_is_an_embedder(whole, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.AutoModel.from_pretrained(whole / "model").save_pretrained(tmp_path / "plain")
    transformers.AutoTokenizer.from_pretrained(whole / "model").save_pretrained(tmp_path / "plain")
    plain = Embedder.from_pretrained(tmp_path / "plain")
    np.testing.assert_allclose(plain.encode(TEXTS), Embedder.from_pretrained(whole).encode(TEXTS), atol=2e-6)


def test_template_and_lengths_travel_with_the_model(place):
    assert place.train("travel", "--template", "bge-en-icl", "--max-text-tokens", 7, "--steps", 1) == 0
    embedder = Embedder.from_pretrained(place.folder / "travel")
    assert (embedder.prompt_encoder.max_text_tokens, embedder.prompt_encoder.template.suffix) == (7, "\n<response>")
    exported = json.loads((place.folder / "travel/model/config_sentence_transformers.json").read_text())
    assert exported["prompts"] == {}  # a prompt that lacks the suffix would be another one
    given = Embedder.from_pretrained(place.folder / "travel", template="paper", max_text_tokens=9)
    assert (given.prompt_encoder.max_text_tokens, given.prompt_encoder.template.suffix) == (9, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "mine"}, "'template' must be one of .*got 'mine'"),
        ({"template": ["paper"]}, "template"),
        ({"max_text_tokens": 0}, "max_text_tokens'? must be a number of tokens >= 1 .got 0"),
        ({"max_text_tokens": "9"}, "'max_text_tokens' must be .*got '9'"),
        ({"other": 1}, "'other' is unknown"),
        ({"max_prompt_tokens": 2}, "'max_prompt_tokens' must be at least 'max_text_tokens' . 2 .got 2 and 512"),
    ],
)
def test_a_bad_settings_file_is_named(whole, tmp_path, settings, message):
    shutil.copytree(whole / "model", tmp_path / "model")
    (tmp_path / "model" / "embedder.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"embedder\.json.*{message}"):
        Embedder.from_pretrained(tmp_path / "model")


def test_a_bad_argument_is_not_blamed_on_the_settings_file(whole):
    for given in ({"template": "mine"}, {"max_text_tokens": 0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(given))} ") as error:
            Embedder.from_pretrained(whole, **given)
        assert "embedder.json" not in str(error.value)


def test_a_checkpoint_beside_a_run_json_of_others_is_a_checkpoint(whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    (tmp_path / "model/run.json").write_text('{"by": "someone else"}')
    assert Embedder.from_pretrained(tmp_path / "model").encode(["anna"]).shape == (1, 32)


def test_a_number_of_thousands_of_digits_is_named_with_its_file(whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"vocab_size": 1' + "0" * 5000 + "}")
    with pytest.raises(ValueError, match=r"config\.json: invalid JSON"):
        Embedder.from_pretrained(tmp_path / "model")


def test_the_time_left_is_never_below_zero():
    progress = metrics.TrainingProgress(dataclasses.replace(TrainConfig(), minutes=1.0), 9, 0, enabled=True)
    progress.update({"elapsed_s": 63.0, "examples_per_prompt": 0, "examples_drawn": 0, "loss": 1.0,
                     "contrastive_loss": 1.0, "soft_label_loss": 1.0, "tokens_per_s": 1.0})
    assert progress.bar.postfix.endswith("0:00 left")


def test_an_adapter_on_itself_is_refused(adapter, tmp_path):
    shutil.copytree(adapter / "adapter", tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(
        {**config, "base_model_name_or_path": str(tmp_path / "a")}))
    with pytest.raises(ValueError, match="must be the model under the adapter"):
        Embedder.from_pretrained(tmp_path / "a")


# ------------------------------------------------------------------------------------------------- the embedder

def test_encode_in_any_batch_and_order_gives_the_same_rows(whole):
    embedder = Embedder.from_pretrained(whole)
    small = Embedder.from_pretrained(whole, tokens_per_batch=16)
    texts = [*TEXTS, *TEXTS[::-1], "", " "]
    examples = [InContextExample("anna", "bert"), InContextExample("oslo", "turin")]
    task = {"instruction": INSTRUCTIONS["Jobs"]}
    for given in ({}, task, {**task, "examples": examples}):
        rows = embedder.encode(texts, **given)
        np.testing.assert_allclose(rows, np.concatenate([small.encode([text], **given) for text in texts]), atol=2e-6)
        np.testing.assert_array_equal(rows[0], rows[9])  # a text that comes twice is embedded once
    assert np.abs(embedder.encode(texts, instruction="") - embedder.encode(texts)).max() > 1e-3
    assert embedder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("texts", ["a text", [3], [None], ["fine", "half \ud83d pair"]], ids=repr)
def test_encode_refuses_what_is_no_text(whole, texts):
    with pytest.raises(ValueError, match="texts must be a sequence of str|unpaired surrogate"):
        Embedder.from_pretrained(whole).encode(texts)
    for bad in (InContextExample("half \ud83d pair", "anna"), InContextExample("anna", "half \ud83d pair")):
        with pytest.raises(ValueError, match="unpaired surrogate"):
            Embedder.from_pretrained(whole).encode(["anna"], instruction="Find", examples=[bad])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype must be .*got 'float64'"),
        ({"device": "mps"}, "must be cpu or cuda .got 'mps'"),
        ({"template": "mine"}, "template must be one of .*got 'mine'"),
        ({"max_text_tokens": 0}, "max_text_tokens'? must be a number of tokens >= 1 .got 0"),
    ],
)
def test_from_pretrained_refuses_unknown_options(whole, options, message):
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(whole, **options)


def test_an_adapter_on_top_of_a_run_finds_its_base(place, tmp_path):
    """The base is a run folder, which holds the model in a folder of its own."""
    assert place.train("under") == 0
    assert place.train("on-top", "--model", place.folder / "under", "--merge") == 0
    adapter, merged = (Embedder.from_pretrained(place.folder / "on-top" / name, device="cpu").encode(["some text"])
                       for name in ("adapter", "merged"))
    under = Embedder.from_pretrained(place.folder / "under", device="cpu").encode(["some text"])
    assert adapter @ merged.T == pytest.approx(1.0, abs=1e-5) and adapter @ under.T < 1 - 1e-5


def test_the_rate_of_a_step_is_its_own(place, monkeypatch):
    """Not that of the step before or after it, and not that of a flush which follows at once."""
    now = [0.0]
    monkeypatch.setattr(metrics.Stopwatch, "clock", staticmethod(lambda: now[0]))
    original = Trainer.step

    def step(self, prepared, **options):
        now[0] += 1.0 if prepared.step == 2 else 0.125
        return original(self, prepared, **options)
    monkeypatch.setattr(Trainer, "step", step)
    assert place.train("rates", "--save-steps", 1) == 0
    for row in rows_of(place.folder / "rates"):
        assert row["tokens_per_s"] == row["tokens"] / (1.0 if row["step"] == 2 else 0.125)


@pytest.mark.skipif(sys.platform != "linux", reason="memory and handles are read from /proc")
@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.record)])
def test_a_long_run_takes_no_more_memory_and_no_more_files(steps, place, monkeypatch):
    """From a quarter of the run to its end: resident memory within 1 %, open files the same; states are saved."""
    seen = []
    original = metrics.MetricsLogger.add

    def add(self, row, *rest):
        original(self, row, *rest)
        if row["step"] % (steps // 20) == steps // 20 - 1:
            status = Path("/proc/self/status").read_text()
            seen.append((int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(list(Path("/proc/self/fd").iterdir()))))
    monkeypatch.setattr(metrics.MetricsLogger, "add", add)
    assert place.train(f"long{steps}", "--steps", steps, "--save-steps", steps // 10) == 0
    memory, files = zip(*seen, strict=True)
    assert max(memory[-5:]) <= 1.01 * max(memory[5:10]), memory
    assert max(files[-5:]) <= max(files[5:10]), files


def test_a_full_disk_leaves_the_last_saved_state_whole(place, whole, monkeypatch, capsys):
    """The third save fails half-way; the run ends with the reason, and goes on from the second."""
    original, calls = run_dir.save_file, itertools.count()

    def full(tensors, path):
        if next(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)
    monkeypatch.setattr(run_dir, "save_file", full)
    assert place.train("full", "--save-steps", 1) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    folder = place.folder / "full"
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["00000001", "00000002"]
    assert run_train.main(["--resume", "--output", str(folder)]) == 0
    assert weights(folder) == weights(whole)


def test_out_of_memory_on_a_gpu_names_what_helps(place, monkeypatch, capsys):
    def step(self, prepared, **options):
        raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB\nmore")
    monkeypatch.setattr(Trainer, "step", step)
    assert place.train("memory") == 3
    error = capsys.readouterr().err
    assert all(part in error for part in ("--mini-batch-tokens", "--gradient-checkpointing", "20 GiB"))
    assert "more\n" not in error


def test_the_page_on_training_has_every_option_with_its_defaults():
    """docs/training.md: the flags of its tables, and where these have columns for the presets, their values."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in (ROOT / "docs/training.md").read_text().splitlines() if line.startswith("| `--")]
    flags = {flag.replace("-", "_") for row in rows for flag in re.findall("--([a-z-]+)", row[0])}
    assert flags == {field.name for field in dataclasses.fields(TrainConfig)}
    spelled = {False: "off", True: "on"}
    for first, *shown in (row for row in rows if len(row) == 5 and row[0].count("--") == 1):
        name = first.strip("`-").replace("-", "_")
        values = [vars(TrainConfig())[name], *(PRESETS[preset].get(name) for preset in ("small", "small-pretrained"))]
        for cell, value in zip(shown, values, strict=False):
            if value is None:
                assert cell == "" or name in ("device", "backend"), name
            elif isinstance(value, (bool, str)):
                assert cell.strip("`") == spelled.get(value, value), name
            else:
                assert float(cell.replace(",", "")) == value, name


def test_gradient_checkpointing_gives_the_same_weights(place, whole):
    assert place.train("checkpointing", "--gradient-checkpointing") == 0
    ours, truth = (dict(read_tensors(folder / "model/model.safetensors", device=torch.device("cpu")))
                   for folder in (place.folder / "checkpointing", whole))
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.record)])
def test_compiled_blocks_give_the_same_weights(backend, place, whole, monkeypatch, capsys):
    """As without --compile but for rounding: traced and differentiated by torch.compile, and in C++ as well."""
    calls, torch_compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(f, **{**options, "backend": backend}))
    monkeypatch.setattr(transformer, "compiled_block", lambda *inputs: calls.append(1) or compiled_block(*inputs))
    compile_once.cache_clear()
    code = place.train("compiled", "--compile")
    compile_once.cache_clear()
    assert code == 0 and calls and "compiled blocks (--compile)" in capsys.readouterr().out
    ours, truth = (dict(read_tensors(folder / "model/model.safetensors", device=torch.device("cpu")))
                   for folder in (place.folder / "compiled", whole))
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def test_blocks_on_cuda_are_always_compiled(place, monkeypatch, capsys):
    monkeypatch.setattr(run_train, "resolve_device", lambda device: torch.device("cuda"))
    assert place.train("cuda", "--no-compile") == 2
    assert "--no-compile is for a CPU" in capsys.readouterr().err
    assert not (place.folder / "cuda").exists()


def test_without_a_compiler_nothing_begins(place, tmp_path, monkeypatch, capsys):
    """As torch finds it, so that its error is the one that is caught."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    assert place.train("uncompiled", "--compile") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --compile: needs a C++ compiler and Python's headers (")
    assert not (place.folder / "uncompiled").exists()


def test_other_libraries_load_the_adapter_folder_from_anywhere(place, fresh_adapter, tmp_path, monkeypatch):
    """PEFT, and sentence-transformers with the prompts; also after the run was moved, by this project."""
    peft, library = pytest.importorskip("peft"), pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    ours = Embedder.from_pretrained(fresh_adapter, device="cpu")
    theirs = library.SentenceTransformer(str(fresh_adapter / "adapter"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=2e-6)
    assert set(theirs.prompts) >= {task["task"] for task in lines()}
    peft.AutoPeftModelForFeatureExtraction.from_pretrained(str(fresh_adapter / "adapter"))
    moved = tmp_path / "moved"
    shutil.copytree(fresh_adapter, moved)
    path = moved / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/another/machine/base"}))
    np.testing.assert_array_equal(Embedder.from_pretrained(moved, device="cpu").encode(TEXTS), ours.encode(TEXTS))
    shutil.rmtree(moved / "base")
    message = r"adapter_config\.json: 'base_model_name_or_path' must be a folder of this machine .*/another/machine"
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(moved, device="cpu")
