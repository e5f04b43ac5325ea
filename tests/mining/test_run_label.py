"""The command run_label.py: its output, cache, kills, several processes and bad input."""

import json
import math
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, a_text
from ranks import exit_codes, start_ranks

import run_label
import run_train
from ref.config import TrainConfig
from ref.mining import labels, pipeline, teachers
from ref.mining.bm25 import BM25Index
from ref.model.checkpoint import resolve_checkpoint
from ref.training.data import SoftLabelDataset, parse_example
from ref.utils.distributed import RankFailure

ROOT = Path(__file__).parent.parent.parent
BLOCK_SIZES = {"PASSAGES_PER_BLOCK": 16, "QUERIES_PER_BLOCK": 8, "BLOCKS_PER_SEARCH": 2, "QUERIES_PER_RERANKING": 4}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def retriever(tiny_run):
    """A model of this project that gives some vector for every text."""
    return tiny_run


@pytest.fixture
def raw(tmp_path):
    """Sixty passages and forty queries; some passages twice under another id."""
    draw = random.Random(1)
    passages = [{"id": f"d{n}", "text": a_text(draw)} for n in range(55)]
    passages += [{"id": f"e{n}", "text": passages[n]["text"]} for n in range(5)]
    pairs = [{"query": a_text(draw, 4), "pos": [f"d{n}", *([f"d{n + 1}"] if n % 4 == 0 else [])], "task": "Harbour",
              "prompt": "Find it." if n % 2 else "Find another."} for n in range(40)]
    return write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "corpus.jsonl", passages)


@pytest.fixture
def label(raw, retriever, tmp_path, monkeypatch):
    """`label(…)` runs the command on the raw data, with small blocks, so that there are several of each."""
    for name, size in BLOCK_SIZES.items():
        monkeypatch.setattr(pipeline, name, size)

    def run(*options, output="out.jsonl", cache="cache"):
        return run_label.main([
            "--pairs", str(raw[0]), "--corpus", str(raw[1]), "--retriever", str(retriever), "--output",
            str(tmp_path / output), "--cache", str(tmp_path / cache), "--top-k", "20", *map(str, options)])
    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_output_is_what_training_takes(label, tmp_path):
    assert label("--num-negatives", 3) == 0
    rows, about = rows_of(tmp_path / "out.jsonl"), json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 40
    for row in rows:
        parsed = parse_example(row, "line", "out", None)
        assert parsed.positive_scores is not None and len(parsed.negatives) <= 3
        limit = min(0.95 * s if s >= 0 else 1.05 * s for s in row["pos_scores"])
        assert all(score < limit for score in row["neg_scores"])
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        assert not set(row["neg"]) & set(row["pos"]) and len(set(row["neg"])) == len(row["neg"])
    task = about["by_task"]["Harbour"]
    assert task["queries"] == 40 and sum(task["decisions"].values()) == sum(r["mining"]["candidates"] for r in rows)
    assert task["queries_with_fewer_negatives"] == sum(len(r["neg"]) < 3 for r in rows)
    assert 0 < task["label_entropy"] <= task["max_label_entropy"] + 1e-9
    assert about["scale"] == "cosine" and (tmp_path / "out.png").stat().st_size > 1000
    assert run_train.main(["--data", str(tmp_path / "out.jsonl"), "--model", "tiny", "--steps", "2", "--output",
                           str(tmp_path / "run"), "--batch-size", "8"]) == 0


def test_scores_are_cosines_of_the_retriever_and_candidates_the_fused_lists(label, retriever, raw, tmp_path):
    """Everything again without blocks and cache."""
    from ref import Embedder
    from ref.mining.fusion import reciprocal_rank_fusion
    from ref.mining.rules import Candidate, select_hard_negatives

    assert label("--rule", "none", "--num-negatives", 15, "--num-candidates", 15) == 0
    embedder = Embedder.from_pretrained(retriever)
    passages = rows_of(raw[1])
    text = {p["id"]: p["text"] for p in passages}
    ids = sorted(text)
    vectors = embedder.encode([text[i] for i in ids])
    index = BM25Index([p["text"] for p in passages], stemmer=None)
    rank = np.array([ids.index(p["id"]) for p in passages])
    for pair, row in zip(rows_of(raw[0]), rows_of(tmp_path / "out.jsonl"), strict=True):
        cosine = embedder.encode([pair["query"]], instruction=pair["prompt"])[0] @ vectors.T
        score = dict(zip(ids, cosine.tolist(), strict=True))
        dense = sorted(ids, key=lambda i: (-round(score[i], 6), i))[:20]
        bm25 = [passages[n]["id"] for n in index.search([pair["query"]], 20, rank)[0] if n >= 0]
        fused = [i for i, _ in reciprocal_rank_fusion([bm25, dense])[:15]]
        positives, candidates = ([Candidate(i, text[i], score[i]) for i in some] for some in (pair["pos"], fused))
        mined = select_hard_negatives(pair["query"], positives, candidates, rule="none", num_negatives=15)
        assert sorted(row["neg"]) == sorted(n.text for n in mined)
        assert row["neg_scores"] == pytest.approx([n.score for n in mined], abs=2e-6)
        assert row["pos_scores"] == pytest.approx([score[i] for i in pair["pos"]], abs=2e-6)


def test_positives_of_the_same_query_on_other_lines_are_no_negatives(label, raw, tmp_path):
    """One positive per line, as in many such files; lines of another task or prompt do not count."""
    passages = [passage["text"] for passage in rows_of(raw[1])]
    twice = {passages.index(text) for text in passages if passages.count(text) > 1}
    chosen = [n for n in range(20) if n not in twice][:3]
    lines = [{"query": "harbour lights", "pos": [f"d{n}"], "task": "Harbour", "prompt": "Find it."} for n in chosen]
    others = [{**lines[0], "task": "Sea", "pos": ["d30"]}, {**lines[0], "prompt": "Find another.", "pos": ["d31"]}]
    write(raw[0], [*lines, *others])
    assert label("--rule", "none", "--num-negatives", 60, "--num-candidates", 60, "--top-k", 60) == 0
    known = {passages[n] for n in chosen}
    *found, by_task, by_prompt = rows_of(tmp_path / "out.jsonl")
    for row in found:
        assert not known & set(row["neg"]) and row["mining"]["known positive"] == 3
    assert known <= set(by_task["neg"]) and known <= set(by_prompt["neg"])  # control: they are among the candidates
    assert label("--rule", "margin", "--value", "nan") == 2


def test_dtype_of_the_retriever(label, tmp_path, capsys, monkeypatch):
    """Printed with the reason; vectors of another dtype are not taken from the cache."""
    assert label("--dtype", "float32") == 0
    assert "; float32 (as given)\n" in capsys.readouterr().out
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", lambda: 4.0)
    assert label(output="low.jsonl") == 0
    printed = capsys.readouterr().out
    assert "; bfloat16 (this processor's matrix products are 4.0 times as fast in bfloat16)\n" in printed
    assert not re.search(r"computed: 0$", printed, re.MULTILINE)
    for name, dtype in (("out.json", "float32"), ("low.json", "bfloat16")):
        assert json.loads((tmp_path / name).read_text())["teacher"]["retriever_hash"].split()[-1] == dtype


def test_another_rule_computes_nothing(label, tmp_path, capsys, monkeypatch):
    assert label() == 0
    assert "blocks from the cache:" in capsys.readouterr().out

    def never(*_):
        raise AssertionError("a model or the index was used")
    monkeypatch.setattr(teachers.EmbedderRetriever, "encode_queries", never)
    monkeypatch.setattr(teachers.EmbedderRetriever, "encode_passages", never)
    monkeypatch.setattr(BM25Index, "__init__", never)
    assert label("--rule", "margin", "--value", "0.1", output="other.jsonl") == 0
    assert re.search(r"blocks from the cache: \d+, computed: 0", capsys.readouterr().out)
    assert label("--compare-rules", output="none.jsonl") == 0
    table = capsys.readouterr().out
    assert "percentage     0.95" in table and not (tmp_path / "none.jsonl").exists()
    below = [float(line.split()[2]) for line in table.splitlines() if line.startswith("percentage")]
    assert below == sorted(below, reverse=True)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert label() == 0 and (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("retrieval", ["bm25", "dense"])
def test_each_kind_of_retrieval_alone(label, retrieval, tmp_path):
    assert label("--retrieval", retrieval) == 0
    assert label(output="both.jsonl") == 0
    alone, both = ([row["neg"] for row in rows_of(tmp_path / name)] for name in ("out.jsonl", "both.jsonl"))
    assert alone != both and any(alone)


def test_a_damaged_block_is_noticed_and_computed_again(label, tmp_path, capsys):
    assert label() == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    blocks = sorted(tmp_path.glob("cache/*/*.block"))
    assert {path.parent.name for path in blocks} == {"vectors", "bm25", "dense", "cosines"}
    for n, path in enumerate(blocks):
        content = bytearray(path.read_bytes())
        if n % 2:
            content[len(content) // 2] ^= 1
        path.write_bytes(content if n % 2 else content[: len(content) // 2])
    capsys.readouterr()
    assert label() == 0
    assert capsys.readouterr().out.count("is damaged and will be computed again") >= len(blocks)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ['{"my": "own"}', "[1, 2]", "{"])
def test_a_file_of_the_user_in_the_cache_is_not_overwritten(label, tmp_path, content, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/last.json").write_text(content)
    assert label() == 2
    assert re.match(r"error: .*last\.json.*(was not written by this command|JSON)", capsys.readouterr().err)
    assert (tmp_path / "cache/last.json").read_text() == content and not (tmp_path / "out.jsonl").exists()


def test_nothing_is_written_into_a_model(label, tmp_path, retriever, capsys):
    before = sorted(retriever.rglob("*"))
    inside = str(retriever / "model/x")
    for options in (["--output", f"{inside}.jsonl"], ["--cache", inside]):
        assert label(*options) == 2
        assert "must not be an input or lie in one" in capsys.readouterr().err
    assert sorted(retriever.rglob("*")) == before


def test_a_cache_of_another_model_is_not_used(label, tmp_path, retriever, capsys):
    assert label() == 0
    assert "differs from the last run" not in capsys.readouterr().out
    path = next((retriever / "model").glob("*.safetensors"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-4] + np.float32(3.0).tobytes())
        assert label(output="other.jsonl") == 0
    finally:
        path.write_bytes(content)
    assert "the retriever differs from the last run" in capsys.readouterr().out
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


class Stub:
    """A reranker: the share of the query's words that a passage has, as a logit."""

    num_tokens = 0
    name, key, precision = "stub", "stub", "exact"

    def score_pairs(self, pairs):
        return np.array([4 * len(set(q.split()) & set(p.split())) / len(set(q.split())) - 2 for q, p in pairs],
                        np.float32)


def test_a_rerankers_logits_are_stored_raw_and_compared_through_a_sigmoid(label, tmp_path, monkeypatch):
    monkeypatch.setattr(run_label, "load_reranker", lambda *_: Stub())
    assert label("--reranker", "stub", "--rule", "margin", "--value", "0.2") == 0
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["scale"] == "logit" and about["by_task"]["Harbour"]["teacher_temperature"] == 1.0
    for row in rows_of(tmp_path / "out.jsonl"):
        for texts, scores in ((row["pos"], row["pos_scores"]), (row["neg"], row["neg_scores"])):
            again = Stub().score_pairs([(row["query"], text) for text in texts])
            assert scores == pytest.approx(again.tolist(), abs=1e-6)
        limit = 1 / (1 + math.exp(-min(row["pos_scores"]))) - 0.2
        assert all(1 / (1 + math.exp(-score)) < limit for score in row["neg_scores"])


def test_queries_without_negatives_are_left_out_where_training_could_not_use_them(raw, label, tmp_path, capsys):
    pairs = [{**row, "task": kind, "type": kind} for row in rows_of(raw[0]) for kind in ("normal", "symmetric_sts")]
    write(raw[0], pairs)
    assert label("--rule", "absolute", "--value", "-1") == 0  # no negatives at all
    assert [row["type"] for row in rows_of(tmp_path / "out.jsonl")] == ["normal"] * 40
    assert "symmetric_sts: 40 queries without negatives are left out" in capsys.readouterr().out
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["queries_left_out"] == {"symmetric_sts": 40} and list(about["by_task"]) == ["normal"]
    SoftLabelDataset([tmp_path / "out.jsonl"], TrainConfig())
    assert label("--rule", "none") == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 80
    write(raw[0], [row for row in pairs if row["type"] == "symmetric_sts"])
    before = (tmp_path / "out.jsonl").read_bytes()
    assert label("--rule", "absolute", "--value", "-1") == 2
    message = "--rule absolute: no query has a negative, which their types need (got --value -1.0)"
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_instructions_reach_a_library_model_that_declares_prompts_with_them(retriever, tmp_path, label, capsys):
    """Others keep their own prompts, and the command says so."""
    library = pytest.importorskip("sentence_transformers")
    source = resolve_checkpoint(str(retriever))
    texts, keys = ["one query", "another"], set()
    for name, prompts, expected in (
            ("instructed", {"web": "Instruct: Find it.\nQuery: "}, "Instruct: Other.\nQuery: "),
            ("without a space", {"web": "Instruct: Find it.\nQuery:"}, "Instruct: Other.\nQuery:"),
            ("another word", {"web": "Instruct: Find it.\n Search query: "}, "Instruct: Other.\n Search query: "),
            ("fixed", {"query": "query: "}, "query: ")):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / "embedder.json").unlink()
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": prompts}))
        model = library.SentenceTransformer(str(folder), device="cpu")
        ours = teachers.load_retriever(str(folder), "cpu")
        np.testing.assert_allclose(
            ours.encode_queries(texts, "Other."), model.encode(texts, prompt=expected), atol=1e-6)
        np.testing.assert_allclose(ours.encode_passages(texts), model.encode(texts), atol=1e-6)
        assert ours.uses_instructions == (name != "fixed")
        keys.add(ours.key.partition(" ")[2])
        lengths = [int(model.tokenize([text])["attention_mask"].sum()) for text in texts]
        assert ours.num_tokens == 2 * sum(lengths) > 0  # as queries and as passages, without the prompt
    assert len(keys) == 4
    assert label("--retriever", tmp_path / "fixed", "--instruction", "Find it.") == 0
    assert "instructions are not used: " in capsys.readouterr().out


@pytest.mark.parametrize("prompts", [0, 1, 40])
def test_pairs_with_a_prompt_say_when_the_teacher_ignores_it(prompts, raw, label, tmp_path, monkeypatch, capsys):
    """Also if one pair has it."""
    monkeypatch.setattr(
        run_label, "load_retriever", lambda *given: without_instructions(teachers.load_retriever(*given)))
    write(raw[0], [{**row, "prompt": "Find it." if n < prompts else None} for n, row in enumerate(rows_of(raw[0]))])
    assert label() == 0
    assert ("instructions are not used: " in capsys.readouterr().out) == (prompts > 0)


def without_instructions(retriever):
    retriever.uses_instructions = False
    return retriever


def test_a_cross_encoder_gives_raw_logits_and_one_with_several_outputs_is_refused(tmp_path, label, capsys):
    library = pytest.importorskip("sentence_transformers")
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for outputs in (1, 3):
        config = transformers.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=32, num_labels=outputs)
        folder = tmp_path / f"reranker-{outputs}"
        model = transformers.BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight, std=3.0)
        model.save_pretrained(folder)
        transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    assert label("--reranker", tmp_path / "reranker-1", "--rule", "none") == 0
    row = rows_of(tmp_path / "out.jsonl")[0]
    plain = library.CrossEncoder(str(tmp_path / "reranker-1"), activation_fn=torch.nn.Identity(), device="cpu")
    texts = row["pos"] + row["neg"]
    assert row["pos_scores"] + row["neg_scores"] == pytest.approx(
        plain.predict([(row["query"], text) for text in texts]).tolist(), abs=1e-4)
    ours = teachers.load_reranker(str(tmp_path / "reranker-1"), "cpu")
    ours.score_pairs([(row["query"], text) for text in texts])
    assert ours.num_tokens == sum(len(plain.tokenizer(row["query"], text)["input_ids"]) for text in texts)
    assert label("--reranker", tmp_path / "reranker-3") == 2
    assert "must have one output, the relevance of a passage (got 3)" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["encode_queries", "encode_passages"])
def test_an_output_that_is_not_finite_names_the_text(label, method, monkeypatch, tmp_path, capsys):
    original = getattr(teachers.EmbedderRetriever, method)

    def broken(self, texts, *rest):
        vectors = original(self, texts, *rest)
        vectors[2, 1] = np.nan
        broken.text = texts[2]
        return vectors
    monkeypatch.setattr(teachers.EmbedderRetriever, method, broken)
    assert label() == 2
    error = capsys.readouterr().err
    assert "not finite" in error and broken.text in error
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_nothing_half_written(label, monkeypatch, tmp_path, capsys):
    count = iter(range(1000))
    original = Path.write_bytes

    def full(self, data):
        if next(count) == 5:
            original(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return original(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert label() == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.draft")) and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("error", "code"), [
    (torch.cuda.OutOfMemoryError("no memory\nadvice"), 3), (RankFailure("rank 1: no response"), 4)])
def test_failures_that_the_same_command_mends(label, error, code, monkeypatch, capsys):
    def fail(self):
        raise error
    monkeypatch.setattr(pipeline.LabellingPipeline, "encode", fail)
    assert label() == code
    message = str(error).splitlines()[0]
    assert f"error: {message}; the same command continues from the cache\n" in capsys.readouterr().err


def test_a_full_disk_at_the_end_leaves_labels_that_may_be_replaced(label, monkeypatch, tmp_path, capsys):
    """The description beside the labels says that they are this command's; it is written before them."""
    assert label() == 0
    before = (tmp_path / "out.jsonl").read_bytes()

    def full(path, value):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(labels, "write_json", full)
    assert label("--rule", "none") == 2 and "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert label("--rule", "none") == 0 and (tmp_path / "out.jsonl").read_bytes() != before


@pytest.mark.parametrize(("options", "words"), [
    (["--top-k", 0], "--top-k must be >= 1 (got 0)"),
    (["--split", "dev"], "--split is for --pairs FOLDER (got dev)"),
    (["--stemmer", "english", "--bm25-tokens", "subwords"], "--stemmer is for BM25 over words (got english)"),
    (["--stemmer", "english", "--retrieval", "dense"], "--stemmer is for BM25 over words (got english)"),
    (["--bm25-tokens", "subwords", "--retrieval", "dense"], "--bm25-tokens is for BM25 (got subwords)"),
    (["--compare-rules", "--rule", "percentage"], "--rule is for labels, which --compare-rules does not"),
    (["--compare-rules", "--value", "0.5"], "--value is for one --rule other than none (got 0.5)"),
    (["--compare-rules", "--teacher-temperature", "1"], "--teacher-temperature is for labels, which --compare-rules"),
    (["--rule", "none", "--value", "0.5"], "--value is for one --rule other than none (got 0.5)"),
    (["--value", "1.5"], "--value must be > 0 and <= 1 for --rule percentage (got 1.5)"),
    (["--stemmer", "klingon"], "--stemmer must be one of"), (["--retriever", "no/such-model"], "no/such-model"),
    (["--retriever", "."], "a model folder must have config.json or modules.json")])
def test_bad_options(label, options, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert label(*options) == 2
    assert words in capsys.readouterr().err


def test_two_processes_give_the_same_bytes(raw, retriever, tmp_path):
    """With torchrun's variables; each has a shard of the passages and blocks."""
    for count in (1, 2):
        ranks = start_ranks(count, command(raw, retriever, tmp_path, f"{count}"))
        assert exit_codes(ranks) == [0] * count
        assert [bool(rank.stdout) for rank in ranks] == [True, False][:count]  # rank 0 speaks for all
    assert (tmp_path / "out-1.jsonl").read_bytes() == (tmp_path / "out-2.jsonl").read_bytes()
    assert list(tmp_path.glob("cache-2/part/*"))


def command(raw, retriever, folder, name):
    """The command in a process of its own, with small blocks."""
    code = ("import sys; from ref.mining import pipeline as p; p.PASSAGES_PER_BLOCK, p.QUERIES_PER_BLOCK, "
            "p.BLOCKS_PER_SEARCH, p.QUERIES_PER_RERANKING = 8, 4, 2, 4; import run_label; "
            "sys.exit(run_label.main(sys.argv[1:]))")
    return ["-c", code, "--pairs", str(raw[0]), "--corpus", str(raw[1]), "--retriever", str(retriever),
            "--output", str(folder / f"out-{name}.jsonl"), "--cache", str(folder / f"cache-{name}"), "--top-k", "20",
            "--device", "cpu"]


def kill_and_resume(raw, retriever, folder, kills):
    """Kill the command at random moments, then run it to its end; returns its output and an uninterrupted run's."""
    def start(name):
        [process] = start_ranks(1, command(raw, retriever, folder, name))
        return process
    start_s = time.monotonic()
    assert start("whole").wait() == 0
    whole_s = time.monotonic() - start_s
    killed = 0
    while killed < kills:
        if (folder / "out-killed.jsonl").exists():  # it was complete before the kill: start again, and kill earlier
            (folder / "out-killed.jsonl").unlink()
            shutil.rmtree(folder / "cache-killed")
            whole_s *= 0.8
        process = start("killed")
        time.sleep(whole_s * random.uniform(0.1, 1.0))
        killed += process.kill() == -signal.SIGKILL
    assert start("killed").wait() == 0
    return [(folder / f"out-{name}.jsonl").read_bytes() for name in ("killed", "whole")]


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.record)])
def test_killed_and_resumed_gives_the_same_bytes(kills, raw, retriever, tmp_path):
    killed, whole = kill_and_resume(raw, retriever, tmp_path, kills)
    assert killed == whole


def relabelled(label, raw, tmp_path, change):
    """The output after the input was changed, from the old cache and from a fresh one: they must be the same."""
    assert label() == 0
    change()
    assert label(output="warm.jsonl") == 0 and label(output="cold.jsonl", cache="fresh") == 0
    assert (tmp_path / "warm.jsonl").read_bytes() == (tmp_path / "cold.jsonl").read_bytes()
    assert (tmp_path / "warm.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


def test_a_positive_moved_to_the_next_query_keeps_its_score(label, raw, tmp_path):
    def change():
        pairs = rows_of(raw[0])
        moved = pairs[4]["pos"].pop()  # d5, which is query 5's too
        pairs[3]["pos"].append(moved)
        write(raw[0], pairs)
    relabelled(label, raw, tmp_path, change)


def test_other_ids_for_the_same_texts_are_another_corpus(label, raw, tmp_path):
    def change():
        passages = rows_of(raw[1])
        names = [passage["id"] for passage in passages]
        write(raw[1], [{**passage, "id": name} for passage, name in zip(passages, names[::-1], strict=True)])
    relabelled(label, raw, tmp_path, change)


def test_a_bi_encoder_is_no_reranker(label, tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert label("--reranker", tmp_path / "encoder") == 2
    assert "must be a …ForSequenceClassification, with a head that scores a pair" in capsys.readouterr().err


def test_the_output_never_overwrites_what_is_read_or_its_own_companion(label, raw, tmp_path, capsys):
    for output, words in (
        ("out.json", "must be a file that ends in .jsonl"), (raw[0].name, "must not be an input"),
        (".", "must be a file that ends in .jsonl"),
    ):
        assert label(output=output) == 2
        assert words in capsys.readouterr().err
    assert label("--teacher-temperature", 0) == 2


@pytest.mark.parametrize("given", ["none", ""])
def test_no_instruction_is_none(label, raw, tmp_path, given):
    """As in run_train.py: the word is no instruction, and the lines have no prompt."""
    pairs = [{key: value for key, value in pair.items() if key != "prompt"} for pair in rows_of(raw[0])]
    write(raw[0], pairs)
    assert label(output="plain.jsonl") == 0 and label("--instruction", given) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert all("prompt" not in row for row in rows_of(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(("options", "words"), [
    (["--stemmer", "klingon"], "--stemmer must be one of"), ([], "BM25 needs the package bm25s")])
def test_what_bm25_lacks_is_said_before_the_long_work(label, monkeypatch, capsys, options, words):
    def encode(self):
        raise AssertionError("too early")
    monkeypatch.setattr("ref.mining.pipeline.LabellingPipeline.encode", encode)
    if not options:
        monkeypatch.setitem(sys.modules, "bm25s", None)
    assert label(*options) == 2
    assert words in capsys.readouterr().err


def test_sigterm_leaves_nothing_half_written(raw, retriever, tmp_path):
    """As Ctrl-C: exit code 130, and the lock of the output is gone."""
    [rank] = start_ranks(1, ["run_label.py", *command(raw, retriever, tmp_path, "stopped")[2:]])
    while rank.is_running and not (tmp_path / "cache-stopped/vectors").exists():
        time.sleep(0.005)
    rank.process.terminate()
    code = rank.wait()
    assert code == 130 or (code == 0 and (tmp_path / "out-stopped.jsonl").exists())
    assert not list(tmp_path.rglob(".*"))


def test_a_dead_rank_ends_the_others(raw, retriever, tmp_path):
    """A launcher that is not torchrun does not end them."""
    code = ("import os, run_label; from datetime import timedelta; run_label.RANK_TIMEOUT = timedelta(seconds=2); "
            "from ref.mining.pipeline import LabellingPipeline as L; encode = L.encode\n"
            "def die(self):\n"
            "    if os.environ['RANK'] == '1': os._exit(9)\n"
            "    encode(self)\n"
            "L.encode = die; import sys; sys.exit(run_label.main(sys.argv[1:]))")
    ranks = start_ranks(2, ["-c", code, *command(raw, retriever, tmp_path, "dead")[2:]])
    assert exit_codes(ranks) == [4, 9]
    assert "error: rank 1 of 2 failed, noticed by rank 0" in ranks[0].stderr


@pytest.mark.parametrize("name", ["mine.json", "mine.png", "mine.jsonl"])
def test_files_of_the_user_beside_the_output_are_not_overwritten(label, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    assert label(output="mine.jsonl") == 2
    assert f"{name} exists and was not written by this command" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "{}" and len(list(tmp_path.glob("mine.*"))) == 1


def test_queries_without_a_bm25_hit_are_counted(raw, label, tmp_path, capsys):
    pairs = [json.loads(line) for line in raw[0].read_text().splitlines()]
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps({**pair, **({"query": f"zzz{n}"} if n < 3 else {})}) + "\n"
                               for n, pair in enumerate(pairs)))
    assert label("--pairs", changed) == 0
    assert f"BM25 finds no passage for 3 of {len(pairs)} queries; for languages" in capsys.readouterr().out
    assert label("--bm25-tokens", "subwords", output="sub.jsonl") == 0
    assert "BM25 finds no passage" not in capsys.readouterr().out
    assert json.loads((tmp_path / "sub.json").read_text())["retrieval"]["bm25_tokens"] == "subwords"
    assert rows_of(tmp_path / "sub.jsonl") != rows_of(tmp_path / "out.jsonl")


def test_own_labels_are_replaced_until_they_are_edited(label, tmp_path, capsys):
    assert label() == 0 and label("--rule", "none") == 0
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write("\n")
    assert label() == 2 and "out.jsonl exists and was not written" in capsys.readouterr().err


def test_a_damaged_index_is_built_again(label, tmp_path, capsys):
    assert label() == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    for path in (tmp_path / "cache/bm25").glob("*"):
        path.unlink()  # so that the index is used again
    path = next((tmp_path / "cache/index").glob("*/data*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert label() == 0 and "is damaged" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_histogram_is_on_one_scale(label, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_label, "plot_histogram", lambda statistics, *_, **__: seen.append(statistics) or "no plot")
    monkeypatch.setattr(run_label, "load_reranker", lambda *_: Stub())
    assert label("--reranker", "stub") == 0
    scores = seen[0]["Harbour"].scores
    assert min(scores["candidate"]) < -0.5 and max(scores["positive"]) <= 2.0  # logits, all of them
