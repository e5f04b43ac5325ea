"""Scoring at scale: published checkpoints, processes, the plan, vectors kept, examples, interruptions."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from mistral_tokenizer import mistral
from test_scoring import WordHash, encoder_of, sentence, world, write_json, write_lines

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import run_eval
from labelling.cache import Cache, CachedEmbedder
from labelling.cache import __file__ as cache_file
from ref import embedder as embedder_module
from ref.embedder import Embedder
from ref.overlap import first_of_equal
from ref.prompts import Example
from ref.published import PUBLISHED
from scoring import plan
from scoring.score import score_task
from scoring.tasks import fetch, is_official, tasks_from

__all__ = ["world"]  # a fixture
ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tiny_run):
    """A small run."""
    return tiny_run


TASK = "Given a question, retrieve passages that answer it"
TEXTS = ["how do magnets work", "  two  spaces", "a line\nand another", "", "</s> in a text", "日本語の文", "x" * 3000]


# ------------------------------------------------------------------------------------------------- published models

def checkpoint(folder, *, vocab_size, eos_by_tokenizer, padding_side):
    """A small Mistral with random weights in the layout of a published repository, a sentence-transformers one too."""
    transformers = pytest.importorskip("transformers")
    markers = ("<instruct>", "<query>", "<response>") if vocab_size == 32003 else ()
    tokens = mistral(markers=markers)
    config = transformers.MistralConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=64, max_position_embeddings=4096)
    theirs = transformers.MistralModel(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    theirs.save_pretrained(folder)
    tokens.save(folder)
    layout = json.loads((folder / "tokenizer.json").read_text())
    if not eos_by_tokenizer:  # as e5-mistral's file once was: whoever calls appends </s>
        layout["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": padding_side}))
    write_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 4096, "do_lower_case": False})
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode": "lasttoken"})


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("eos_by_tokenizer", "padding_side"), [(True, "right"), (True, "left"), (False, "left")])
def test_a_published_model_by_its_name_gives_sentence_transformers_vectors(
        name, eos_by_tokenizer, padding_side, tmp_path, monkeypatch):
    """The template, `</s>` and vocabulary of each row, whatever the tokenizer's file does about the end token."""
    library = pytest.importorskip("sentence_transformers")
    row = PUBLISHED[name]
    checkpoint(tmp_path, vocab_size=row.vocab_size, eos_by_tokenizer=eos_by_tokenizer, padding_side=padding_side)
    monkeypatch.setattr(embedder_module, "locate", lambda _: tmp_path)
    ours = Embedder.from_pretrained(name, max_text_tokens=3000, device="cpu")
    prompt = "<instruct>{0}\n<query>{1}\n<response>" if "bge" in name else "Instruct: {0}\nQuery: {1}"
    texts = [text for text in TEXTS if text and "</s>" not in text]  # there the two differ, and say so (README, Limits)
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    end = "" if eos_by_tokenizer else row.end_token
    start = "" if eos_by_tokenizer else "<s>"
    for instruction in (TASK, None):
        strings = [start + (prompt.format(instruction, text) if instruction else text) + end for text in texts]
        mine = ours.encode(texts, instruction=instruction)
        other = theirs.encode(strings, normalize_embeddings=True)
        assert (mine * other).sum(1).min() >= 0.99999
    forgotten = theirs.encode([prompt.format(TASK, text) for text in texts], normalize_embeddings=True)
    if not eos_by_tokenizer:  # control: without the end token the vectors are others
        assert (ours.encode(texts, instruction=TASK) * forgotten).sum(1).max() < 0.999


def test_a_checkpoint_that_is_not_what_its_name_says(tmp_path, monkeypatch):
    checkpoint(tmp_path, vocab_size=32000, eos_by_tokenizer=True, padding_side="right")
    monkeypatch.setattr(embedder_module, "locate", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"bge-en-icl: the embedding has 32000 rows. Expected are 32003"):
        Embedder.from_pretrained("BAAI/bge-en-icl", device="cpu")


def test_a_half_downloaded_folder(tmp_path, monkeypatch):
    checkpoint(tmp_path, vocab_size=32000, eos_by_tokenizer=True, padding_side="right")
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(embedder_module, "locate", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        Embedder.from_pretrained("intfloat/e5-mistral-7b-instruct", device="cpu")


# ------------------------------------------------------------------------------------------------- the command

def command(model, world, output, *options):
    return ["--model", str(model), "--data-dir", str(world), "--output", str(output), *map(str, options)]


def scores_of(output):
    """Task name to score, from mteb's result files."""
    return {path.stem: json.loads(path.read_text())["scores"] for path in output.rglob("*.json")
            if path.parent.name.endswith("-local-data") and path.name != "model_meta.json"}


def test_the_plan_counts_what_is_asked_for(world, model, tmp_path, capsys):
    """Texts, different texts, and tokens as the tokenizer counts them, without a single vector of the model."""
    asked = WordHash()
    encoder = encoder_of(asked)
    tasks = tasks_from("BIOSSES,MyRetrieval,TwitterURLCorpus", world).tasks
    prompter = Embedder.from_pretrained(model).prompter
    plans, sample = plan.make_plan(encoder, tasks, prompter, tmp_path / "plan.json")
    assert not asked.calls and sample

    for task in tasks:
        asked.calls.clear()
        score_task(encoder, task, tmp_path / "results")
        found = plans[task.metadata.name]
        assert found.texts == sum(len(texts) for _, texts in asked.calls)
        assert found.different == sum(len(set(texts)) for _, texts in asked.calls)
        prefixes = [prompter.prefix(instruction) for instruction, _ in asked.calls]
        assert found.tokens == sum(len(prefix.ids) + sum(map(len, prompter.texts(sorted(set(texts)), prefix)))
                                   for prefix, (_, texts) in zip(prefixes, asked.calls, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.mteb, "evaluate", None)  # read, not counted
        again, _ = plan.make_plan(encoder, tasks_from("BIOSSES", world).tasks, prompter, tmp_path / "plan.json")
    assert again["BIOSSES"] == plans["BIOSSES"]
    assert run_eval.main(command(model, world, tmp_path / "out", "--plan")) == 0
    printed = capsys.readouterr().out
    assert "expected: " in printed and "hours at" in printed and not scores_of(tmp_path / "out")


def test_a_score_is_the_same_behind_a_plan_and_that_of_mteb_alone(world, model, tmp_path):
    """A clustering draws its texts from the task's random state, which the plan has used."""
    name = "MyClusters"
    encoder = encoder_of(WordHash())
    [planned], [fresh], [theirs] = (tasks_from(name, world).tasks for _ in range(3))
    plan.make_plan(encoder, [planned], Embedder.from_pretrained(model).prompter, tmp_path / "plan.json")
    behind, alone = (score_task(encoder, task, tmp_path / folder) for task, folder in (
        (planned, "behind"), (fresh, "alone")))
    official = mteb.evaluate(encoder, theirs, cache=mteb.ResultCache(tmp_path / "official"), co2_tracker=False)
    assert behind.score == alone.score == pytest.approx(official.task_results[0].get_score(), abs=5e-7)
    assert score_task(encoder, planned, tmp_path / "again").score == behind.score


def test_examples_stand_on_the_query_side_and_are_recorded(world, model, tmp_path, capsys):
    """From a file; on both sides of a symmetric task, on the queries of retrieval."""
    examples = {"BIOSSES": [{"query": "one", "response": "two"}], "MyRetrieval": [{"query": "q", "response": "p"}]}
    own = write_json(tmp_path / "examples.json", examples)
    options = ("--tasks", "BIOSSES,MyRetrieval,TwitterURLCorpus", "--examples-file", own)
    seen = []
    original = Embedder.encode

    def encode(self, texts, *, instruction=None, examples=(), progress=False):
        seen.append((instruction is not None, list(examples)))
        return original(self, texts, instruction=instruction, examples=examples, progress=progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "encode", encode)
        assert run_eval.main(command(model, world, tmp_path / "out", *options)) == 0
    assert all(instructed or not examples for instructed, examples in seen)
    assert {tuple(x.query for x in examples) for instructed, examples in seen if instructed} >= {("one",), ("q",), ()}
    lines = [json.loads(line) for path in (tmp_path / "out").rglob("run_settings.jsonl")
             for line in path.read_text().splitlines()]
    recorded = {line["task"]: line["encode_kwargs"] for line in lines}
    assert recorded["BIOSSES"]["examples"] == [["one", "two"]]
    assert recorded["BIOSSES"]["examples_source"] == "the file examples.json"
    assert recorded["TwitterURLCorpus"]["examples"] == []
    capsys.readouterr()
    assert run_eval.main(command(model, world, tmp_path / "out", *options[:2])) == 0  # without: scored anew
    assert "left" in capsys.readouterr().out


def test_k_examples_where_no_split_has_them(world, model, tmp_path, capsys):
    assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "BIOSSES", "--examples", 3)) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "zero-shot" in text
    assert run_eval.main(command(model, world, tmp_path / "out", "--examples", -1)) == 2
    assert "--examples is -1" in capsys.readouterr().err


def test_texts_of_no_and_of_a_million_characters(model):
    embedder = Embedder.from_pretrained(model)
    vectors = embedder.encode(["", "word " * 200_000, " ", "word"], instruction=TASK)
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_fetching_lists_each_repository_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """The hub is replaced by a copy of a folder; one repository is gone."""
    asked = []

    def download(path, *, repo_type, revision, local_dir):
        asked.append((path, repo_type, revision))
        Path(local_dir).mkdir(parents=True)
        if "biosses" in path.lower():
            raise OSError("gone")
        write_lines(Path(local_dir) / "test.jsonl", [{"a": 1}])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    tasks = tasks_from("STS").tasks
    failed = fetch(tasks, tmp_path / "data")
    assert list(failed) == ["BIOSSES"] and len(asked) == len(tasks) and all(x[1] == "dataset" and x[2] for x in asked)
    assert (tmp_path / "data/STS12/test.jsonl").exists() and not (tmp_path / "data/BIOSSES").exists()
    printed = capsys.readouterr().out
    assert all(task.metadata.name in printed and task.metadata.dataset["revision"] in printed for task in tasks)
    asked.clear()
    assert run_eval.main(["--tasks", "STS", "--fetch", str(tmp_path / "data")]) == 1
    assert [path for path, *_ in asked if "biosses" not in path.lower()] == []  # the others are there


def test_what_was_fetched_is_official_until_it_is_changed(tmp_path, monkeypatch):
    """Neither one more file, nor another content, nor a copy under a name of its own."""
    def download(path, *, repo_type, revision, local_dir):
        write_lines(Path(local_dir) / "test.jsonl", [{"a": 1}])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    [hub] = tasks_from("BIOSSES").tasks
    assert is_official(hub) and fetch([hub], tmp_path) == {}

    def official() -> dict[str, bool]:
        return {task.metadata.name: is_official(task) for task in tasks_from("all", tmp_path).tasks}
    assert official() == {"BIOSSES": True}
    shutil.copytree(tmp_path / "BIOSSES", tmp_path / "Mine")
    (tmp_path / "Mine/task.json").write_text('{"class": "BIOSSES"}')
    write_lines(tmp_path / "BIOSSES/test.jsonl", [{"a": 2}])
    assert official() == {"BIOSSES": False, "Mine": False}
    write_lines(tmp_path / "BIOSSES/test.jsonl", [{"a": 1}])
    assert official()["BIOSSES"]
    (tmp_path / "BIOSSES/task.json").write_text('{"instruction": "Other"}')
    assert not official()["BIOSSES"]


# ------------------------------------------------------------------------------------------------- vectors kept

def test_kept_vectors_are_the_same_and_a_stopped_task_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("labelling.cache.TEXTS_PER_BLOCK", 10)
    texts = [sentence(n % 37) for n in range(100)]
    words = WordHash()
    plain = words.encode(texts, instruction=TASK)
    words.calls.clear()
    kept = CachedEmbedder(words, Cache(tmp_path), key="m", max_bytes=1e9)
    assert (kept.encode(texts, instruction=TASK) == plain).all()
    assert [len(texts) for _, texts in words.calls] == [10, 10, 10, 7]  # 37 different ones
    assert sorted((tmp_path / "texts").glob("*"))[0].unlink() is None
    words.calls.clear()
    assert (kept.encode(texts, instruction=TASK) == plain).all() and len(words.calls) == 1
    words.calls.clear()
    for other in ({"instruction": None}, {"instruction": TASK, "examples": [Example("a", "b")]}):
        kept.encode(texts, **other)
    assert len(words.calls) == 8  # another prompt has other vectors
    assert len(kept.encode([], instruction=TASK)) == 0


def test_kept_vectors_stay_below_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("labelling.cache.TEXTS_PER_BLOCK", 10)
    kept = CachedEmbedder(WordHash(), Cache(tmp_path), key="m", max_bytes=9000)
    for start in range(0, 200, 40):
        kept.encode([f"text {n}" for n in range(start, start + 40)])
        assert sum(path.stat().st_size for path in (tmp_path / "texts").glob("*")) <= 9000
    assert Path(cache_file).name == "cache.py"


def test_a_kept_block_that_another_process_removed_is_no_error(tmp_path):
    kept = CachedEmbedder(WordHash(), Cache(tmp_path), key="m", max_bytes=0)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/gone.block").symlink_to(tmp_path / "nowhere")  # listed, but not there
    assert len(kept.encode(["a", "b"])) == 2


# ------------------------------------------------------------------------------------------------- processes

SHARED = """
import json, sys
from pathlib import Path
import mteb
import numpy as np
from ref.embedder import Embedder
from scoring.sharding import SharedEmbedder
from ref.team import Team
texts = json.loads(open(sys.argv[2]).read())
team = Team()
shared = SharedEmbedder(Embedder.from_pretrained(sys.argv[1], device="cpu"), team)
if team.rank:
    shared.serve()
else:
    np.save(sys.argv[3], shared.encode(texts, instruction="Find it."))
    np.save(sys.argv[4], shared.encode(texts[:1]))
    shared.dismiss()
team.close()
assert not any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))  # no thread is left
"""


def together(count, arguments, **more):
    """Processes as torchrun starts them."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20000, 40000)),
                   "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT,
                                  env={**environment, "RANK": str(rank)}, **more) for rank in range(count)]
    assert [process.wait(timeout=300) for process in processes] == [0] * count


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_the_same_vectors_in_the_same_order(count, model, tmp_path):
    texts = [sentence(n % 31) + " more" * (n % 5) for n in range(100)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    together(count, ["-c", SHARED, model, tmp_path / "texts.json", tmp_path / "all.npy", tmp_path / "one.npy"])
    embedder = Embedder.from_pretrained(model, device="cpu")
    found = np.load(tmp_path / "all.npy")
    assert np.abs(found - embedder.encode(texts, instruction="Find it.")).max() <= 1e-6
    assert (found == found[first_of_equal(texts)]).all()
    assert np.abs(np.load(tmp_path / "one.npy") - embedder.encode(texts[:1])).max() <= 1e-6


def test_the_command_on_two_processes_has_the_same_table(world, model, tmp_path):
    assert run_eval.main(command(model, world, tmp_path / "alone", "--tasks", "BIOSSES,MyRetrieval")) == 0
    together(2, [ROOT / "run_eval.py", *command(model, world, tmp_path / "both", "--tasks", "BIOSSES,MyRetrieval")])
    alone, both = scores_of(tmp_path / "alone"), scores_of(tmp_path / "both")
    assert alone.keys() == both.keys() == {"BIOSSES", "MyRetrieval"}
    for name in alone:
        ours, theirs = (scores[name]["test"][0]["main_score"] for scores in (alone, both))
        assert ours == pytest.approx(theirs, abs=5e-3)  # rounding tells texts of nearly one vector apart


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.record)])
def test_killed_at_random_moments_the_final_table_is_the_same(kills, world, model, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    def arguments_for(name):
        return [sys.executable, str(ROOT / "run_eval.py"), *command(
            model, world, tmp_path / name, "--vector-cache", tmp_path / f"vectors-{name}")]
    start_s = time.monotonic()
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": True}
    whole = subprocess.run(arguments_for("whole"), **options)
    whole_s = time.monotonic() - start_s
    for _ in range(kills):
        process = subprocess.Popen(arguments_for("killed"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(whole_s * random.uniform(0.3, 0.95))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(arguments_for("killed"), **options)

    def final(output):
        lines = output.splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("Classification"))
        return [line for line in lines[start:] if not line.startswith(("report:", "results:"))]
    assert final(last.stdout) == final(whole.stdout)
    assert scores_of(tmp_path / "killed") == scores_of(tmp_path / "whole")


def test_a_damaged_result_file_is_made_again(world, model, tmp_path):
    output = tmp_path / "out"
    assert run_eval.main(command(model, world, output, "--tasks", "BIOSSES")) == 0
    before = scores_of(output)
    path = next(path for path in output.rglob("BIOSSES.json"))
    path.write_text(path.read_text()[:40])
    assert run_eval.main(command(model, world, output, "--tasks", "BIOSSES")) == 0
    assert scores_of(output) == before


def test_the_layout_is_that_of_the_public_repository(world, model, tmp_path):
    """mteb's own loader of the repository of results reads what we wrote."""
    mteb = pytest.importorskip("mteb")
    assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "BIOSSES")) == 0
    cache = mteb.ResultCache(tmp_path / "out")
    results = cache.load_results()
    assert [task.task_name for result in results.model_results for task in result.task_results] == ["BIOSSES"]


# ------------------------------------------------------------------------------------------------- what a review found

def test_scoring_a_run_again_beside_its_weights_reads_the_results(world, model, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(model, run)
    arguments = ["--model", str(run), "--data-dir", str(world), "--tasks", "BIOSSES"]
    assert run_eval.main(arguments) == 0 and run_eval.main(arguments) == 0
    assert "from the result cache" in capsys.readouterr().out


def test_a_record_of_settings_that_was_cut_short_is_made_again(world, model, tmp_path):
    output = tmp_path / "out"
    assert run_eval.main(command(model, world, output, "--tasks", "BIOSSES")) == 0
    path = next(output.rglob("run_settings.jsonl"))
    path.write_text(path.read_text()[:30])
    assert run_eval.main(command(model, world, output, "--tasks", "BIOSSES")) == 0
    assert run_eval.main(command(model, world, output, "--tasks", "BIOSSES")) == 0


def test_examples_for_which_there_is_no_room_are_not_recorded_as_shown(world, model, tmp_path, capsys):
    many = [{"query": "word " * 300, "response": f"{n} " * 300} for n in range(6)]
    own = write_json(tmp_path / "examples.json", {"BIOSSES": many})
    assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "BIOSSES", "--examples-file", own)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("examples for BIOSSES"))
    shown = int(line.split(": ")[1].split()[0])
    assert shown < 6 and f"{6 - shown} left out for want of room" in line
    recorded = json.loads(next((tmp_path / "out").rglob("run_settings.jsonl")).read_text().splitlines()[0])
    assert len(recorded["encode_kwargs"]["examples"]) == shown


def test_a_result_of_another_precision_is_not_reused(world, model, tmp_path, capsys, monkeypatch):
    arguments = command(model, world, tmp_path / "out", "--tasks", "BIOSSES")
    assert run_eval.main(arguments) == run_eval.main(arguments) == 0
    assert "from the result cache" in capsys.readouterr().out
    monkeypatch.setattr(Embedder, "precision", "torch.bfloat16 cuda")
    assert run_eval.main(arguments) == 0
    assert "from the result cache" not in capsys.readouterr().out


def test_more_tokens_of_a_text_make_the_prompt_longer(model):
    """Half of a long text would be cut off otherwise, behind a record that says the contrary."""
    for asked in (100, 4096):
        prompter = Embedder.from_pretrained(model, device="cpu", max_text_tokens=asked).prompter
        for instruction in (None, TASK):
            prefix = prompter.prefix(instruction)
            [ids] = prompter.texts(["a b " * 8000], prefix)
            assert len(ids) == asked + len(prefix.suffix) + 1


def test_other_weights_in_a_run_are_another_revision(model, tmp_path):
    shutil.copytree(model, tmp_path / "run")
    name, before = run_eval.identity(str(tmp_path / "run"))
    weights = next((tmp_path / "run/model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert name == "local/run" and run_eval.identity(str(tmp_path / "run")) != (name, before)


def test_other_weights_under_an_adapter_are_another_revision_and_a_plan_is_none(model, tmp_path):
    shutil.copytree(model / "model", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    before = run_eval.identity(str(tmp_path / "adapter"))
    for part in ("adapter", "base"):
        (tmp_path / part / "plan.json").write_text("{}")
    assert run_eval.identity(str(tmp_path / "adapter")) == before
    weights = next((tmp_path / "base").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert run_eval.identity(str(tmp_path / "adapter")) != before


def test_the_commit_of_an_adapter_on_the_hub_is_its_revision(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: (
        str(tmp_path / "abc" / name) if name == "adapter_config.json" else None))
    assert run_eval.identity("someone/adapter") == ("someone/adapter", "abc")


def test_the_tasks_that_scored_are_reported_beside_one_whose_score_is_no_number(world, tmp_path, capsys, monkeypatch,
                                                                                model):
    original = Embedder.encode

    def collapsed(self, texts, **options):
        vectors = original(self, texts, **options)
        return np.ones_like(vectors) / vectors.shape[1] ** 0.5 if any("gauge" in text for text in texts) else vectors
    monkeypatch.setattr(Embedder, "encode", collapsed)
    rows = [{"sentence1": f"gauge {n}", "sentence2": f"gauge other {n}", "score": n % 5} for n in range(20)]
    write_lines(world / "BIOSSES/test.jsonl", rows)
    assert run_eval.main(command(model, world, tmp_path / "out", "--tasks", "BIOSSES,MyRetrieval")) == 1
    printed = capsys.readouterr().out
    assert "failed, ValueError: the score is nan" in printed and "failed: BIOSSES" in printed
    assert "MyRetrieval" in (tmp_path / "out/report.md").read_text()


BROKEN = SHARED.replace("team = Team()", """
team = Team()
original = Embedder.encode
def encode(self, texts, **options):
    if team.rank == int(sys.argv[5]) and len(texts) > 1:
        raise MemoryError("too much")
    return original(self, texts, **options)
Embedder.encode = encode
""").replace("    np.save(sys.argv[3], shared.encode(texts, instruction=\"Find it.\"))", """
    try:
        shared.encode(texts, instruction="Find it.")
        raise SystemExit(9)
    except RuntimeError as error:
        assert f"rank {sys.argv[5]}: MemoryError: too much" in str(error), error
""")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_one_failed_task(rank, model, tmp_path):
    """The next call works again, on all."""
    (tmp_path / "texts.json").write_text(json.dumps([sentence(n) for n in range(10)]))
    together(2, ["-c", BROKEN, model, tmp_path / "texts.json", tmp_path / "x", tmp_path / "one.npy", rank])
    assert np.load(tmp_path / "one.npy").shape == (1, 32)
