"""From raw pairs to soft labels: sources, candidates, cache, and the command with kills, processes and bad input."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, a_text
from hypothesis import given
from hypothesis import strategies as st

import run_label
import run_train
from labelling import cache as cache_module
from labelling import candidates, models, pipeline
from labelling.cache import Cache, key_of
from labelling.candidates import (
    GROUP,
    SCORES_AT_ONCE,
    TopK,
    WordSearch,
    best_of,
    keys_of,
    keys_reaching,
    kth_largest,
    on_device,
    ranks_of,
    scores_of,
    smallest,
)
from labelling.sources import Corpus, Pairs, corpus_from_pairs
from ref.data import parse

ROOT = Path(__file__).parent.parent


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def retriever(tiny_run):
    """Some vector for every text."""
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
    """`label(…)` runs the command on the raw data; small blocks, so that there are several of each."""
    for name, size in (("PASSAGES", 16), ("QUERIES", 8), ("BLOCKS_PER_SEARCH", 2), ("QUERIES_PER_RERANKING", 4)):
        monkeypatch.setattr(pipeline, name, size)

    def run(*options, output="out.jsonl", cache="cache"):
        return run_label.main([
            "--pairs", str(raw[0]), "--corpus", str(raw[1]), "--retriever", str(retriever), "--output",
            str(tmp_path / output), "--cache", str(tmp_path / cache), "--depth", "20", *map(str, options)])
    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- candidates

FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@given(st.lists(st.tuples(FLOATS, st.integers(0, 2**31 - 1)), min_size=1, max_size=30))
def test_keys_are_in_the_order_of_scores_then_ranks(hits):
    score, rank = (torch.tensor(part, dtype=dtype) for part, dtype in zip(
        zip(*hits, strict=True), (torch.float32, torch.int32), strict=True))
    key = keys_of(score, rank)
    assert torch.equal(scores_of(key), score) and torch.equal(ranks_of(key), rank)
    assert [hits[n] for n in key.argsort(stable=True)] == sorted(hits, key=lambda hit: (-hit[0], hit[1]))


def by_sorting(score, rank, count):
    """Of one row, by a full sort: scores and ranks of its best."""
    order = sorted(range(len(rank)), key=lambda j: (-score[j].item(), rank[j].item()))[:count]
    return score[order].tolist(), rank[order].tolist()


@pytest.mark.parametrize("bar", ["none", "low", "right", "some rows low"])
@pytest.mark.parametrize("columns", [GROUP, 3 * GROUP, 7 * GROUP, 40 * GROUP])
@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("levels", [1, 3, 50, 10**6, "in some rows"])
def test_the_best_reach_the_bar(columns, count, levels, bar):
    """Few levels of scores: ties everywhere, at the bar too. The last three columns are filling, and have no rank."""
    score, rank = torch.rand(17, columns), torch.randperm(columns - 3).int()
    score = torch.where(torch.arange(17)[:, None] % 5 == 0, 0.5, score) if levels == "in some rows" else (
        levels * score).floor()
    score[:, -3:] = -torch.inf
    best = [by_sorting(row[:-3], rank, count) for row in score]
    right = torch.tensor([scores[-1] for scores, _ in best])
    given = {"none": None, "low": right - 10**6, "right": right,
             "some rows low": torch.where(torch.arange(17) % 3 == 0, right, -1.0)}[bar]
    key = keys_reaching(score, rank, given, count)
    found = smallest(key, count)
    assert list(zip(scores_of(found).tolist(), ranks_of(found).tolist(), strict=True)) == best
    assert key.shape[1] <= 2 * count * GROUP + count  # of equal scores, too


@pytest.mark.parametrize(("count", "bar", "passed", "raised"), [
    (10, "none", 12 * 17, 1), (10, "good", 12 * 17, 0), (10, "low", 12 * 17, 1),
    (300, "none", 17 * 4096, 0),  # fewer groups than wanted
    (10, "one row equal", 12 * 17 + 4096, 2)])
def test_few_scores_are_looked_at_closely(count, bar, passed, raised, monkeypatch):
    """What a bar leaves of many different scores; rows with many equal ones are looked at in full, and only these."""
    score, rank = torch.rand(17, 4096), torch.arange(4096).int()
    if bar == "one row equal":
        score[3] = 0.5
    given = {"good": kth_largest(score, 10), "low": torch.full((17,), 0.5)}.get(bar)
    sizes, bars = [], []
    monkeypatch.setattr(candidates, "keys_of", lambda s, r: sizes.append(s.numel()) or keys_of(s, r))
    monkeypatch.setattr(candidates, "kth_largest", lambda x, k: bars.append(len(x)) or kth_largest(x, k))
    keys_reaching(score, rank, given, count)
    assert 0.8 * passed <= sum(sizes) <= passed and len(bars) == raised


def test_the_worst_so_far_is_the_bar_of_the_next_block(monkeypatch):
    bars = []
    monkeypatch.setattr(candidates, "kth_largest", lambda x, k: bars.append(len(x)) or kth_largest(x, k))
    best, passage = TopK(torch.rand(6, 8), 10), torch.rand(8000, 8)
    passage[2000:] /= 2  # few of them are among the best: another bar would be for rows that many reach
    for start in range(0, 8000, 2000):
        best.add(passage[start : start + 2000], torch.arange(start, start + 2000).int())
    assert bars == [6]


@pytest.mark.parametrize("falling", [False, True])
def test_dense_search_where_every_block_is_better_or_worse_than_all_before(falling):
    """Every passage of a new block reaches the bar, or none."""
    query, order = torch.ones(4, 1), torch.arange(600.0)
    passage = (order.flip(0) if falling else order)[:, None]
    best = TopK(query, 5)
    for start in range(0, 600, 200):
        best.add(passage[start : start + 200], torch.arange(start, start + 200).int())
    assert ranks_of(best.key_QK).tolist() == [[0, 1, 2, 3, 4] if falling else [599, 598, 597, 596, 595]] * 4


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("at_once", [700, 10**6])
@pytest.mark.parametrize("block", [7, 64, 200, 500, 1000])
def test_dense_search_by_blocks_equals_brute_force_with_ties(block, at_once, negative, monkeypatch):
    """Whole numbers as vectors: scores are exact, and many are equal. Few scores at once: queries come in parts.

    Some queries find much in the last passages, so that their bars are reached by many, the others' by few.
    """
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
    query, passage = torch.randint(-2, 3, (23, 6)).float(), torch.randint(-2, 3, (1000, 6)).float()
    passage[600:, 0], query[::5, 0] = 3, 2
    if negative:
        query, passage = query.abs(), -passage.abs() - 1
    rank = torch.randperm(1000).int()
    best = TopK(query, 12)
    for start in range(0, 1000, block):
        best.add(passage[start : start + block], rank[start : start + block])
    for row, score in enumerate(query @ passage.T):
        key_K = best.key_QK[row]
        assert (scores_of(key_K).tolist(), ranks_of(key_K).tolist()) == by_sorting(score, rank, 12)


def test_blocks_on_a_cpu_are_read_as_they_are_used_and_cuda_is_not_touched(monkeypatch):
    """Asking for CUDA's stream fails on a Mac, and starts CUDA where it is there."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    read = []
    vectors = on_device(lambda n: read.append(n) or np.full(2, n), range(3), torch.device("cpu"))
    assert [(next(vectors).tolist(), len(read)) for _ in range(2)] == [([0, 0], 1), ([1, 1], 2)]


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(1, 31), seed=st.integers(0, 9))
def test_best_of_a_list(scores, count, seed):
    rank = np.random.default_rng(seed).permutation(len(scores))
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], rank[j]))[:count]
    assert best_of(np.array(scores, np.float32), count, rank).tolist() == order


def test_bm25_is_the_lucene_formula_and_bm25s_own_ranking(tmp_path):
    import bm25s

    draw = random.Random(3)
    texts = [a_text(draw, draw.randrange(3, 15)) for _ in range(50)]
    queries = [a_text(draw, 3) for _ in range(10)] + ["unheard words", "river river boat"]
    found = WordSearch(texts, stemmer=None)
    rows = found.top(queries, 50, np.arange(50))
    words, lengths = [text.split() for text in texts], [len(text.split()) for text in texts]

    def by_hand(query, n):
        total = 0.0
        for word in query.split():
            frequency, holders = words[n].count(word), sum(word in w for w in words)
            idf = math.log(1 + (50 - holders + 0.5) / (holders + 0.5))
            total += idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * lengths[n] / np.mean(lengths)))
        return total

    library = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    library.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    found.save(tmp_path / "index")
    again = WordSearch.load(tmp_path / "index", stemmer=None).top(queries, 50, np.arange(50))
    assert (again == rows).all()
    for query, hits in zip(queries, rows, strict=True):
        hits = hits[hits >= 0].tolist()
        score = [by_hand(query, n) for n in range(50)]
        assert len(hits) == sum(s > 0 for s in score)
        assert [score[n] for n in hits] == pytest.approx(sorted((s for s in score if s > 0), reverse=True), rel=1e-5)
        if hits:
            theirs, their_scores = library.retrieve(bm25s.tokenize([query], show_progress=False), k=10,
                                                    show_progress=False)
            assert their_scores[0][their_scores[0] > 0] == pytest.approx([score[n] for n in hits[:10]], rel=1e-5)
            assert score[theirs[0][0]] == pytest.approx(score[hits[0]], rel=1e-5)


# ------------------------------------------------------------------------------------------------- sources

def test_layouts_say_the_same(tmp_path):
    """Ours, BEIR's and FlagEmbedding's of the same two queries."""
    passages = [("d1", "A title", "and a text"), ("d2", "", "another text")]
    ours = Corpus(write(tmp_path / "corpus.jsonl", [{"id": i, "text": f"{t} {x}".strip()} for i, t, x in passages]))
    pairs = write(tmp_path / "pairs.jsonl", [{"query": "one", "pos": ["d1"]}, {"query": "two", "pos": ["d2", "d1"]}])
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write(beir / "corpus.jsonl", [{"_id": i, "title": t, "text": x} for i, t, x in passages])
    write(beir / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(("one", "two", "tests"))])
    (beir / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td2\t0\nq1\td2\t1\nq1\td1\t2\n")
    flag = write(tmp_path / "flag.jsonl", [
        {"query": "one", "pos": ["A title and a text"]},
        {"query": "two", "pos": ["another text", "A title and a text"], "neg": ["c"]}])
    no_ids = Corpus(corpus_from_pairs(flag, tmp_path / "cache"))
    assert len(no_ids) == 3 and not no_ids.has_ids
    found = []
    for source, corpus in ((pairs, ours), (beir, Corpus(beir)), (flag, no_ids)):
        each = Pairs(source, corpus)
        found.append([(pair.query, [text for _, _, text in each.positives(pair)])
                      for pair in (each[n] for n in range(len(each)))])
    assert found[0] == found[1] == found[2] == [
        ("one", ["A title and a text"]), ("two", ["another text", "A title and a text"])]
    assert no_ids.row("not there") is None


GOOD_CORPUS = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
GOOD_PAIRS = [{"query": "q", "pos": ["a"]}]


@pytest.mark.parametrize(("corpus", "pairs", "words"), [
    ([], GOOD_PAIRS, r"corpus.jsonl holds no passage"),
    ([*GOOD_CORPUS, {"id": "a", "text": "z"}], GOOD_PAIRS, r"'a' stands on more than one line \(passages 1 and 3\)"),
    ([{"id": "a", "text": " "}], GOOD_PAIRS, r"line 1: text is ' '"),
    ([{"id": "a", "text": "x"}, {"text": "y"}], GOOD_PAIRS, r"line 2: id is missing, and the first line has one"),
    ([{"id": ["a"], "text": "x"}], GOOD_PAIRS, r"line 1: id is \['a'\]"),
    ([3], GOOD_PAIRS, r"line 1: a int. Expected is one JSON object"),
    (GOOD_CORPUS, [], r"pairs.jsonl holds no pair"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"]}, {"query": "r", "pos": ["c"]}], r"line 2: pos has 'c', which is no id"),
    (GOOD_CORPUS, [{"query": "q", "pos": []}], r"line 1: pos is \[\]"),
    (GOOD_CORPUS, [{"query": "q"}], r"line 1: pos is None"),
    (GOOD_CORPUS, [{"query": "", "pos": ["a"]}], r"line 1: query is ''"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"], "type": "odd"}], r"line 1: type is 'odd'"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"], "prompt": 3}], r"line 1: prompt is 3"),
])
def test_bad_sources(corpus, pairs, words, tmp_path):
    write(tmp_path / "corpus.jsonl", corpus)
    write(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(ValueError, match=words):
        Pairs(tmp_path / "pairs.jsonl", Corpus(tmp_path / "corpus.jsonl"))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl cannot be read"):
        Corpus(tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.jsonl").write_bytes(b'{"id": "a", "text": "x"}\n{"id"\n')
    with pytest.raises(ValueError, match="broken.jsonl line 2: not valid JSON"):
        Corpus(tmp_path / "broken.jsonl")
    corpus = Corpus(write(tmp_path / "corpus.jsonl", GOOD_CORPUS))
    (tmp_path / "beir/qrels").mkdir(parents=True)
    write(tmp_path / "beir/queries.jsonl", [{"_id": "q", "text": "x"}])
    with pytest.raises(ValueError, match="dev.tsv cannot be read"):
        Pairs(tmp_path / "beir", corpus, split="dev")
    (tmp_path / "beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\tmany\n")
    with pytest.raises(ValueError, match="train.tsv line 2"):
        Pairs(tmp_path / "beir", corpus)
    for rows, queries, words in (
        ("q\ta\tnan\n", ["q"], "train.tsv line 1: the score is 'nan'"),
        ("q\ta\t1\nr\ta\t1\n", ["q"], "train.tsv judges 1 queries that .*queries.jsonl does not have, such as 'r'"),
        ("q\ta\t1\n", ["q", "q"], "queries.jsonl line 2: _id 'q' stands on an earlier line too"),
    ):
        (tmp_path / "beir/qrels/train.tsv").write_text(rows)
        write(tmp_path / "beir/queries.jsonl", [{"_id": name, "text": "x"} for name in queries])
        with pytest.raises(ValueError, match=words):
            Pairs(tmp_path / "beir", corpus)
    write(tmp_path / "titled.jsonl", [{"_id": "a", "title": ["x"], "text": "y"}])
    with pytest.raises(ValueError, match=r"line 1: title is \['x'\]"):
        Corpus(tmp_path / "titled.jsonl")


# ------------------------------------------------------------------------------------------------- the command

def test_the_output_is_what_training_takes(label, tmp_path):
    assert label("--negatives", 3) == 0
    rows, about = rows_of(tmp_path / "out.jsonl"), json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 40
    for row in rows:
        parsed = parse(json.dumps(row).encode(), "line", "out", None)
        assert parsed.positive_scores is not None and len(parsed.negatives) <= 3
        bar = min(0.95 * s if s >= 0 else 1.05 * s for s in row["pos_scores"])
        assert all(score < bar for score in row["neg_scores"])
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        assert not set(row["neg"]) & set(row["pos"]) and len(set(row["neg"])) == len(row["neg"])
    task = about["by_task"]["Harbour"]
    assert task["queries"] == 40 and sum(task["fates"].values()) == sum(r["mining"]["candidates"] for r in rows)
    assert task["queries_with_fewer_negatives"] == sum(len(r["neg"]) < 3 for r in rows)
    assert 0 < task["label_entropy"] <= task["entropy_of_flat_labels"] + 1e-9
    assert about["scale"] == "cosine" and (tmp_path / "out.png").stat().st_size > 1000
    assert run_train.main(["--data", str(tmp_path / "out.jsonl"), "--model", "tiny", "--steps", "2", "--output",
                           str(tmp_path / "run"), "--queries", "8"]) == 0


def test_scores_are_cosines_of_the_retriever_and_candidates_the_fused_lists(label, retriever, raw, tmp_path):
    """Everything again without blocks, cache and libraries."""
    from ref import Embedder
    from ref.mining import Candidate, mine, reciprocal_rank_fusion

    assert label("--rule", "none", "--negatives", 15, "--candidates", 15) == 0
    embedder = Embedder.from_pretrained(retriever)
    passages = rows_of(raw[1])
    text = {p["id"]: p["text"] for p in passages}
    ids = sorted(text)
    vectors = embedder.encode([text[i] for i in ids])
    words = WordSearch([p["text"] for p in passages], stemmer=None)
    rank = np.array([ids.index(p["id"]) for p in passages])
    for pair, row in zip(rows_of(raw[0]), rows_of(tmp_path / "out.jsonl"), strict=True):
        cosine = embedder.encode([pair["query"]], instruction=pair["prompt"])[0] @ vectors.T
        score = dict(zip(ids, cosine.tolist(), strict=True))
        dense = sorted(ids, key=lambda i: (-round(score[i], 6), i))[:20]
        bm25 = [passages[n]["id"] for n in words.top([pair["query"]], 20, rank)[0] if n >= 0]
        fused = [i for i, _ in reciprocal_rank_fusion([bm25, dense])[:15]]
        mined = mine(pair["query"], [Candidate(i, text[i], score[i]) for i in pair["pos"]],
                     [Candidate(i, text[i], score[i]) for i in fused], rule="none", negatives=15)
        assert sorted(row["neg"]) == sorted(n.text for n in mined)
        assert row["neg_scores"] == pytest.approx([n.score for n in mined], abs=2e-6)
        assert row["pos_scores"] == pytest.approx([score[i] for i in pair["pos"]], abs=2e-6)


def test_positives_of_the_same_query_on_other_lines_are_no_negatives(label, raw, tmp_path):
    """One positive a line, as such files often are; another task's lines are its own affair."""
    passages = [passage["text"] for passage in rows_of(raw[1])]
    twice = {passages.index(text) for text in passages if passages.count(text) > 1}
    chosen = [n for n in range(20) if n not in twice][:3]
    lines = [{"query": "harbour lights", "pos": [f"d{n}"], "task": "Harbour", "prompt": "Find it."} for n in chosen]
    others = [{**lines[0], "task": "Sea", "pos": ["d30"]}, {**lines[0], "prompt": "Find another.", "pos": ["d31"]}]
    write(raw[0], [*lines, *others])
    assert label("--rule", "none", "--negatives", 60, "--candidates", 60, "--depth", 60) == 0
    right = {passages[n] for n in chosen}
    *found, by_task, by_prompt = rows_of(tmp_path / "out.jsonl")
    for row in found:
        assert not right & set(row["neg"]) and row["mining"]["known positive"] == 3
    assert right <= set(by_task["neg"]) and right <= set(by_prompt["neg"])  # control: they are among the candidates
    assert label("--rule", "margin", "--value", "nan") == 2


def test_another_rule_computes_nothing(label, tmp_path, capsys, monkeypatch):
    assert label() == 0
    assert "blocks from the cache" in capsys.readouterr().out

    def never(*_):
        raise AssertionError("a model was asked")
    monkeypatch.setattr(models.OurRetriever, "queries", never)
    monkeypatch.setattr(models.OurRetriever, "passages", never)
    monkeypatch.setattr(WordSearch, "__init__", never)
    assert label("--rule", "margin", "--value", "0.1", output="other.jsonl") == 0
    assert re.search(r"blocks from the cache \d+, computed 0", capsys.readouterr().out)
    assert label("--rules-report", output="none.jsonl") == 0
    table = capsys.readouterr().out
    assert "percentage     0.95" in table and not (tmp_path / "none.jsonl").exists()
    kept = [float(line.split()[2]) for line in table.splitlines() if line.startswith("percentage")]
    assert kept == sorted(kept, reverse=True)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert label() == 0 and (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("lists", ["words", "vectors"])
def test_each_list_alone(label, lists, tmp_path):
    assert label("--lists", lists) == 0
    assert label(output="both.jsonl") == 0
    alone, both = ([row["neg"] for row in rows_of(tmp_path / name)] for name in ("out.jsonl", "both.jsonl"))
    assert alone != both and any(alone)


def test_a_damaged_block_is_noticed_and_computed_again(label, tmp_path, capsys):
    assert label() == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    blocks = sorted(tmp_path.glob("cache/*/*.block"))
    assert {path.parent.name for path in blocks} == {"vectors", "words", "nearest", "cosines"}
    for n, path in enumerate(blocks):
        content = bytearray(path.read_bytes())
        if n % 2:
            content[len(content) // 2] ^= 1
        path.write_bytes(content if n % 2 else content[: len(content) // 2])
    capsys.readouterr()
    assert label() == 0
    assert capsys.readouterr().out.count("is damaged; it is computed again") >= len(blocks)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_cache_of_another_model_is_not_used(label, tmp_path, retriever, capsys):
    assert label() == 0
    assert "than last time" not in capsys.readouterr().out
    path = next((retriever / "model").glob("*.safetensors"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-4] + np.float32(3.0).tobytes())
        assert label(output="other.jsonl") == 0
    finally:
        path.write_bytes(content)
    assert "another retriever than last time" in capsys.readouterr().out
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


class Stub:
    """A reranker: the share of the query's words that a passage has, as a logit."""

    name, key = "stub", "stub"

    def logits(self, pairs):
        return np.array([4 * len(set(q.split()) & set(p.split())) / len(set(q.split())) - 2 for q, p in pairs],
                        np.float32)


def test_a_rerankers_logits_are_stored_raw_and_judged_through_a_sigmoid(label, tmp_path, monkeypatch):
    monkeypatch.setattr(run_label, "open_reranker", lambda *_: Stub())
    assert label("--reranker", "stub", "--rule", "margin", "--value", "0.2") == 0
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["scale"] == "logit" and about["by_task"]["Harbour"]["label_temperature"] == 1.0
    for row in rows_of(tmp_path / "out.jsonl"):
        for texts, scores in ((row["pos"], row["pos_scores"]), (row["neg"], row["neg_scores"])):
            assert scores == pytest.approx(Stub().logits([(row["query"], text) for text in texts]).tolist(), abs=1e-6)
        bar = 1 / (1 + math.exp(-min(row["pos_scores"]))) - 0.2
        assert all(1 / (1 + math.exp(-score)) < bar for score in row["neg_scores"])


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
    assert label("--reranker", tmp_path / "reranker-3") == 2
    assert "it has 3 outputs. Expected is one" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["queries", "passages"])
def test_a_number_that_is_not_finite_names_the_text(label, who, monkeypatch, tmp_path, capsys):
    original = getattr(models.OurRetriever, who)

    def broken(self, texts, *rest):
        vectors = original(self, texts, *rest)
        vectors[2, 1] = np.nan
        broken.text = texts[2]
        return vectors
    monkeypatch.setattr(models.OurRetriever, who, broken)
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


@pytest.mark.parametrize(("options", "words"), [
    (["--depth", 0], "--depth is 0"), (["--value", "1.5"], "--value is 1.5"), (["--stemmer", "klingon"], "--stemmer"),
    (["--retriever", "no/such-model"], "no/such-model"), (["--retriever", "."], "holds neither config.json")])
def test_bad_options(label, options, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert label(*options) == 2
    assert words in capsys.readouterr().err


def test_two_keys_never_run_together():
    assert key_of("ab", "c") != key_of("a", "bc") and key_of(b"1") == key_of(1) and len(key_of()) == 40


def test_two_processes_give_the_same_bytes(raw, retriever, tmp_path):
    """Under torchrun's variables, each with a share of passages and blocks."""
    for count in (1, 2):
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20000, 40000)),
                       "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen(command(raw, retriever, tmp_path, f"{count}"), cwd=ROOT,
                                      env={**environment, "RANK": str(rank)}) for rank in range(count)]
        assert [process.wait(timeout=300) for process in processes] == [0] * count
    assert (tmp_path / "out-1.jsonl").read_bytes() == (tmp_path / "out-2.jsonl").read_bytes()
    assert list(tmp_path.glob("cache-2/part/*"))


def command(raw, retriever, folder, name):
    """The command in a process of its own, with small blocks."""
    code = ("import sys; from labelling import pipeline as p; p.PASSAGES, p.QUERIES, p.BLOCKS_PER_SEARCH, "
            "p.QUERIES_PER_RERANKING = 8, 4, 2, 4; import run_label; sys.exit(run_label.main(sys.argv[1:]))")
    return [sys.executable, "-c", code, "--pairs", str(raw[0]), "--corpus", str(raw[1]), "--retriever", str(retriever),
            "--output", str(folder / f"out-{name}.jsonl"), "--cache", str(folder / f"cache-{name}"), "--depth", "20",
            "--device", "cpu"]


def kill_and_resume(raw, retriever, folder, kills):
    """Kill the command at random moments, then let it end; returns its output and that of an undisturbed run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start_s = time.monotonic()
    subprocess.run(command(raw, retriever, folder, "whole"), cwd=ROOT, env=environment, check=True)
    whole_s = time.monotonic() - start_s
    killed = 0
    while killed < kills:
        if (folder / "out-killed.jsonl").exists():  # it came to its end: start anew, and kill earlier
            (folder / "out-killed.jsonl").unlink()
            shutil.rmtree(folder / "cache-killed")
            whole_s *= 0.8
        process = subprocess.Popen(command(raw, retriever, folder, "killed"), cwd=ROOT, env=environment)
        time.sleep(whole_s * random.uniform(0.4, 1.0))  # the first part is imports
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    subprocess.run(command(raw, retriever, folder, "killed"), cwd=ROOT, env=environment, check=True)
    return [(folder / f"out-{name}.jsonl").read_bytes() for name in ("killed", "whole")]


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.record)])
def test_killed_and_resumed_gives_the_same_bytes(kills, raw, retriever, tmp_path):
    killed, whole = kill_and_resume(raw, retriever, tmp_path, kills)
    assert killed == whole


def test_the_cache_counts_what_it_did(tmp_path):
    cache = Cache(tmp_path)
    made = cache.block("kind", "key", lambda: {"x": np.arange(3)})
    again = Cache(tmp_path).block("kind", "key", lambda: {})
    assert (made["x"] == again["x"]).all()
    assert cache.computed == 1 and cache_module.Cache(tmp_path).read(cache.path("kind", "other")) is None


# ------------------------------------------------------------------------------------------------- what a review found

def relabelled(label, raw, tmp_path, change):
    """The output after the input was changed, from the old cache and from a fresh one: they must be the same."""
    assert label() == 0
    change()
    assert label(output="warm.jsonl") == 0 and label(output="cold.jsonl", cache="fresh") == 0
    assert (tmp_path / "warm.jsonl").read_bytes() == (tmp_path / "cold.jsonl").read_bytes()
    assert (tmp_path / "warm.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


def test_a_positive_that_moves_to_the_next_query_takes_its_score_along(label, raw, tmp_path):
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
    assert "no head that scores a pair" in capsys.readouterr().err


def test_the_output_never_overwrites_what_is_read_or_its_own_companion(label, raw, tmp_path, capsys):
    for output, words in (("out.json", "ends in .jsonl"), (raw[0].name, "which is read"), (".", "ends in .jsonl")):
        assert label(output=output) == 2
        assert words in capsys.readouterr().err
    assert label("--label-temperature", 0) == 2


def test_words_of_nothing_but_stop_words_are_an_error_and_blank_lines_change_nothing(tmp_path):
    with pytest.raises(ValueError, match="no passage has a word that BM25 counts"):
        WordSearch(["the", "!!!", "a"], stemmer=None)
    plain, blank = tmp_path / "plain.jsonl", tmp_path / "blank.jsonl"
    passages = [{"text": f"text {n}"} for n in range(12)]
    write(plain, passages)
    blank.write_text("\n".join(f"\n{json.dumps(passage)}" for passage in passages))
    one, other = Corpus(plain), Corpus(blank)
    assert (one.rank == other.rank).all() and [one.read(n) for n in range(12)] == [other.read(n) for n in range(12)]


@pytest.mark.parametrize(("row", "words"), [({"query": "q", "pos": 5}, "line 1: pos is 5"),
                                            ({"query": "q", "pos": "text"}, "line 1: pos is 'text'"),
                                            ({"query": "q", "pos": ["n1"], "neg": ["n2"]}, "look like ids.*--corpus")])
def test_pairs_without_a_corpus_must_hold_lists_of_texts(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        corpus_from_pairs(write(tmp_path / "pairs.jsonl", [row]), tmp_path)


def test_a_damaged_index_is_built_again(label, tmp_path, capsys):
    assert label() == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    for path in (tmp_path / "cache/words").glob("*"):
        path.unlink()  # so that the index is asked again
    path = next((tmp_path / "cache/index").glob("*/data*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert label() == 0 and "is damaged" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_histogram_is_on_one_scale(label, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run_label, "draw_histogram", lambda tallies, *_, **__: seen.append(tallies) or "not drawn")
    monkeypatch.setattr(run_label, "open_reranker", lambda *_: Stub())
    assert label("--reranker", "stub") == 0
    scores = seen[0]["Harbour"].scores
    assert min(scores["candidate"]) < -0.5 and max(scores["positive"]) <= 2.0  # logits, all of them
