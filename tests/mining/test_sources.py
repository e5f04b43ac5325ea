"""Pairs and corpus: three layouts of the same data, and bad input."""

import json
import tracemalloc
from pathlib import Path

import pytest

from ref.mining.sources import Corpus, Pairs, corpus_from_pairs
from ref.utils.corpus import read_qrels


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_all_layouts_give_the_same_pairs(tmp_path):
    """This project's, BEIR's and FlagEmbedding's layout of the same two queries."""
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


def test_the_task_of_the_present_folder_is_the_folders_name(tmp_path, monkeypatch):
    write(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "a text"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q0", "text": "one"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    monkeypatch.chdir(tmp_path)
    assert Pairs(Path(), Corpus(Path()))[0].task == tmp_path.name


def test_white_space_around_a_text_does_not_hide_it(tmp_path):
    """Passages are stripped; so are the positives that are given as texts."""
    flag = write(tmp_path / "flag.jsonl", [{"query": "q", "pos": [" a text\n", "a text"], "neg": ["a text "]}])
    corpus = Corpus(corpus_from_pairs(flag, tmp_path / "cache"))
    pairs = Pairs(flag, corpus)
    assert len(corpus) == 1 and pairs.positives(pairs[0]) == [(0, "1", "a text")]


def test_passages_without_text_are_skipped_and_known(tmp_path):
    """Published corpora have some; rows, ids and texts of the others stay together."""
    rows = [{"_id": "a", "title": "", "text": "x"}, {"_id": "b", "title": "", "text": " "},
            {"_id": "c", "title": "", "text": "z"}, {"_id": "d", "text": ""}]
    corpus = Corpus(write(tmp_path / "corpus.jsonl", rows))
    assert [corpus.read(n) for n in range(len(corpus))] == [("a", "x"), ("c", "z")]
    assert (corpus.row("c"), corpus.row("b"), corpus.empty) == (1, None, {"b", "d"})
    pairs = Pairs(write(tmp_path / "pairs.jsonl", [{"query": "q", "pos": ["c"]}]), corpus)
    assert pairs.positives(pairs[0]) == [(1, "c", "z")]


def test_an_empty_prompt_or_task_is_as_absent_as_in_training(tmp_path):
    corpus = Corpus(write(tmp_path / "corpus.jsonl", GOOD_CORPUS))
    pairs = Pairs(write(tmp_path / "pairs.jsonl", [{**GOOD_PAIRS[0], "prompt": "", "task": "", "type": ""}]), corpus)
    assert (pairs[0].prompt, pairs[0].task, pairs[0].task_type) == (None, "pairs", "normal")


def test_other_positives_are_those_of_equal_queries(tmp_path):
    corpus = Corpus(write(tmp_path / "corpus.jsonl", [{"id": f"d{n}", "text": f"text {n}"} for n in range(5)]))
    lines = [{"query": "q", "pos": ["d0"]}, {"query": " q\n", "pos": ["d1"]},
             {"query": "q", "pos": ["d2"], "task": "t"}, {"query": "other", "pos": ["d3"]},
             {"query": "q", "pos": ["d4", "d0"]}]
    pairs = Pairs(write(tmp_path / "pairs.jsonl", lines), corpus)
    others = [[name for _, name, _ in pairs.other_positives(pairs[n])] for n in range(5)]
    assert others == [["d1", "d4", "d0"], ["d0", "d4", "d0"], [], [], ["d0", "d1"]]


def test_a_corpus_from_pairs_is_not_held_in_memory(tmp_path):
    rows = [{"query": "q", "pos": [f"{n} {'word ' * 800}"], "neg": ["the same negative"]} for n in range(1000)]
    path = write(tmp_path / "pairs.jsonl", rows)
    tracemalloc.start()
    target = corpus_from_pairs(path, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6 < target.stat().st_size / 4
    assert [json.loads(line)["text"][:3] for line in target.open()][:3] == ["0 w", "the", "1 w"]


GOOD_CORPUS = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
GOOD_PAIRS = [{"query": "q", "pos": ["a"]}]


@pytest.mark.parametrize(("corpus", "pairs", "words"), [
    ([], GOOD_PAIRS, r"corpus.jsonl: must have at least one passage"),
    ([*GOOD_CORPUS, {"id": "a", "text": "z"}], GOOD_PAIRS, r"ids must be unique \('a' is the id of passages 1 and 3\)"),
    ([*GOOD_CORPUS[1:], {"id": "a", "text": " "}], GOOD_PAIRS,
     r"pairs.jsonl:1: 'pos' must hold passages with text of .*corpus.jsonl \(got 'a'\)"),
    ([{"id": "a", "text": ""}], GOOD_PAIRS, r"corpus.jsonl: must have at least one passage \(the file has none\)"),
    ([{"text": " "}], GOOD_PAIRS, r"corpus.jsonl:1: 'text' must be a non-empty string \(got ''\)"),
    ([{"id": "a", "text": "x"}, {"text": "y"}], GOOD_PAIRS, r":2: must have an id, like the first line \(got None\)"),
    ([{"text": "x"}, {"id": "a", "text": "y"}], GOOD_PAIRS, r":2: must have no id, like the first line \(got 'a'\)"),
    ([{"id": ["a"], "text": "x"}], GOOD_PAIRS, r":1: 'id' must be a non-empty string or an integer \(got \['a'\]\)"),
    ([3], GOOD_PAIRS, r":1: must be a JSON object \(got int\)"),
    (GOOD_CORPUS, [], r"pairs.jsonl: must have at least one pair"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"]}, {"query": "r", "pos": ["c"]}],
     r"pairs.jsonl:2: 'pos' must hold ids of .*corpus.jsonl \(got 'c'\)"),
    (GOOD_CORPUS, [{"query": "q", "pos": []}], r":1: 'pos' must be a list of at least one id \(got \[\]\)"),
    (GOOD_CORPUS, [{"query": "q"}], r":1: 'pos' must be a list of at least one id \(got None\)"),
    (GOOD_CORPUS, [{"query": "", "pos": ["a"]}], r":1: 'query' must be a non-empty string \(got ''\)"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"], "type": "odd"}], r":1: 'type' must be one of normal, .*\(got 'odd'\)"),
    (GOOD_CORPUS, [{"query": "q", "pos": ["a"], "prompt": 3}], r":1: 'prompt' must be a non-empty string \(got 3\)"),
])
def test_bad_sources(corpus, pairs, words, tmp_path):
    write(tmp_path / "corpus.jsonl", corpus)
    write(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(ValueError, match=words):
        Pairs(tmp_path / "pairs.jsonl", Corpus(tmp_path / "corpus.jsonl"))


def test_ids_need_a_corpus_with_ids(tmp_path):
    """Otherwise an id would be embedded as if it were a text."""
    corpus = Corpus(write(tmp_path / "corpus.jsonl", [{"docid": "d1", "text": "one text"}, {"text": "日本語の文"}]))
    pairs = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match=r"'pos' must hold texts, not ids, because .* has no ids \(got 'd1'\)"):
        Pairs(write(pairs, [{"query": "q", "pos": ["d1"]}]), corpus)
    write(pairs, [{"query": "q", "pos": ["d-1"]}, {"query": "r", "pos": ["one text"]}])
    assert len(Pairs(pairs, corpus)) == 2
    for texts in (["d1", "one text"], ["not there"], ["日本語1"], ["Paris"]):
        assert len(Pairs(write(pairs, [{"query": "q", "pos": texts}]), corpus)) == 1
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\td1\t1\n")
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "x"}])
    with pytest.raises(ValueError, match=r"corpus.jsonl: must have ids \('_id' or 'id'\), which the qrels name"):
        Pairs(tmp_path, corpus)


def test_queries_of_a_beir_folder_may_have_id(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("7\td1\t1\n")
    corpus = Corpus(write(tmp_path / "corpus.jsonl", [{"id": "d1", "text": "one text"}]))
    write(tmp_path / "queries.jsonl", [{"id": 7, "text": "x"}])
    pairs = Pairs(tmp_path, corpus)
    assert pairs.positives(pairs[0]) == [(0, "d1", "one text")]
    write(tmp_path / "queries.jsonl", [{"name": 7, "text": "x"}])
    with pytest.raises(ValueError, match="queries.jsonl:1: '_id' is missing"):
        Pairs(tmp_path, corpus)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl: file does not exist"):
        Corpus(tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.jsonl").write_bytes(b'{"id": "a", "text": "x"}\n{"id"\n')
    with pytest.raises(ValueError, match="broken.jsonl:2: invalid JSON"):
        Corpus(tmp_path / "broken.jsonl")
    corpus = Corpus(write(tmp_path / "corpus.jsonl", GOOD_CORPUS))
    (tmp_path / "beir/qrels").mkdir(parents=True)
    write(tmp_path / "beir/queries.jsonl", [{"_id": "q", "text": "x"}])
    with pytest.raises(ValueError, match="dev.tsv: cannot be read"):
        Pairs(tmp_path / "beir", corpus, split="dev")
    (tmp_path / "beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\tmany\n")
    with pytest.raises(ValueError, match="train.tsv:2: must be query-id, corpus-id and score"):
        Pairs(tmp_path / "beir", corpus)
    for rows, queries, words in (
        ("q\ta\tnan\n", ["q"], "train.tsv:1: the score must be a finite number .got 'nan'"),
        ("q\ta\t1\nr\ta\t1\n", ["q"], "queries.jsonl: must have all queries of the qrels .1 are missing, such as 'r'"),
        ("q\ta\t1\n", ["q", "q"], "queries.jsonl:2: '_id' must be unique .an earlier line has 'q' too"),
        ("q\ta\t0\n", ["q"], "train.tsv: must have at least one score above 0"),
    ):
        (tmp_path / "beir/qrels/train.tsv").write_text(rows)
        write(tmp_path / "beir/queries.jsonl", [{"_id": name, "text": "x"} for name in queries])
        with pytest.raises(ValueError, match=words):
            Pairs(tmp_path / "beir", corpus)
    write(tmp_path / "titled.jsonl", [{"_id": "a", "title": ["x"], "text": "y"}])
    with pytest.raises(ValueError, match=r"titled.jsonl:1: 'title' must be a string \(got \['x'\]\)"):
        Corpus(tmp_path / "titled.jsonl")


def test_blank_lines_change_nothing(tmp_path):
    plain, blank = tmp_path / "plain.jsonl", tmp_path / "blank.jsonl"
    passages = [{"text": f"text {n}"} for n in range(12)]
    write(plain, passages)
    blank.write_text("\n".join(f"\n{json.dumps(passage)}" for passage in passages))
    one, other = Corpus(plain), Corpus(blank)
    assert (one.id_order == other.id_order).all()
    assert [one.read(n) for n in range(12)] == [other.read(n) for n in range(12)]


@pytest.mark.parametrize(("row", "words"), [
    ({"query": "q", "pos": 5}, ":1: 'pos' must be a list of texts .got 5"),
    ({"query": "q", "pos": "text"}, ":1: 'pos' must be a list of texts .got 'text'"),
    ({"query": "q", "pos": ["n1"], "neg": ["n2"]}, "must hold texts, not ids.*got 'n1'.*--corpus")])
def test_pairs_without_a_corpus_must_hold_lists_of_texts(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        corpus_from_pairs(write(tmp_path / "pairs.jsonl", [row]), tmp_path)


def test_judgements_have_three_columns(tmp_path):
    """Without a score two numeric ids would be a passage and its score; TREC's form has four."""
    path = tmp_path / "train.tsv"
    path.write_text("12\t345\n")
    with pytest.raises(ValueError, match=r"train.tsv:1: must be query-id, corpus-id and score"):
        list(read_qrels(path))
    path.write_text("12\t0\t345\t1\n7\t8\t2\n")
    found = [each[1:] for each in read_qrels(path)]
    assert found == [("12", "345", 1.0), ("7", "8", 2.0)]
