"""soft_labels.jsonl: every line is checked and named when it is wrong, and batches hold what they should.

Lines are made from one that is good, with one thing changed. Fuzzing: whatever the bytes, `parse` gives a checked Row
or a ValueError that says where.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.config import Options
from ref.data import KINDS, MAX_TEXT_CHARS, Row, SoftLabels, fold, parse

GOOD = {"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "pos_scores": [0.9], "neg_scores": [0.5, 0.1],
        "prompt": "Find it.", "type": "normal", "task": "T"}


def line(**changes: Any) -> dict[str, Any]:
    """The good line with changes; a value of ... takes the field out."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(
        b"".join(
            (x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode("utf-8", "surrogatepass")) + b"\n"
            for x in lines
        )
    )
    return path


def load(folder: Path, lines: list[Any], **options: Any) -> SoftLabels:
    return SoftLabels([write(folder / "some.jsonl", lines)], Options(**options))


def read(value: Any, **options: Any) -> Row:
    return parse(json.dumps(value).encode(), "here", "file", options.get("instruction"))


# ------------------------------------------------------------------------------------------------- schema

def test_a_line_becomes_a_row():
    row = read(GOOD)
    assert row == Row(("T", "Find it.", "normal"), "q", ["p"], ["n1", "n2"], [0.9], [0.5, 0.1])


@pytest.mark.parametrize(("changes", "field", "expected"), [
    ({"task": ...}, "task", ("file", "Find it.", "normal")),
    ({"type": ...}, "task", ("T", "Find it.", "normal")),
    ({"type": None}, "task", ("T", "Find it.", "normal")),
    ({"type": "symmetric_sts"}, "task", ("T", "Find it.", "symmetric_sts")),
    ({"prompt": ...}, "task", ("T", "by default", "normal")),
    ({"pos_scores": ..., "neg_scores": ...}, "positive_scores", None),
    ({"pos_scores": None, "neg_scores": None}, "negative_scores", None),
    ({"neg": ..., "neg_scores": ...}, "negatives", []),
    ({"neg": [], "neg_scores": None}, "negative_scores", []),
    ({"pos_scores": [1], "neg_scores": [0, -3]}, "negative_scores", [0.0, -3.0]),
    ({"extra": {"a": 1}}, "query", "q"),
], ids=str)
def test_what_may_be_left_out(changes, field, expected):
    assert getattr(read(line(**changes), instruction="by default"), field) == expected


def test_a_line_of_flagembedding_loads_unchanged(tmp_path):
    old = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": None, "neg_scores": None, "prompt": "Find it.",
           "pos_id": ["1"], "neg_id": ["2"]}
    data = load(tmp_path, [old, {"query": "q", "pos": ["p"], "neg": ["n"]}], instruction="Find it.")
    assert [data[i].task for i in range(2)] == [("some", "Find it.", "normal")] * 2
    assert data.with_labels == 0
    assert torch.isnan(data.batch(np.array([0, 1]), epoch=0, step=0).teacher_QC).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"query": ...}, "query is None"),
    ({"query": 3}, "query is 3"),
    ({"query": " \n"}, "query is .*not empty"),
    ({"query": "x" * (MAX_TEXT_CHARS + 1)}, "query has 1,000,001 characters"),
    ({"pos": ...}, "pos is missing or empty"),
    ({"pos": []}, "pos is missing or empty"),
    ({"pos": "p"}, "pos is 'p'. Expected is a list"),
    ({"pos": ["p", ""], "pos_scores": [1, 1]}, r"pos\[1\] is ''"),
    ({"neg": {"a": 1}}, "neg is .*Expected is a list"),
    ({"neg": ["n", None]}, r"neg\[1\] is None"),
    ({"neg": ["n", "y" * 10**7]}, r"neg\[1\] has 10,000,000 characters"),
    ({"pos_scores": [1, 2]}, "pos_scores has 2 entries for 1 pos texts"),
    ({"neg_scores": [1]}, "neg_scores has 1 entries for 2 neg texts"),
    ({"neg_scores": 0.5}, "neg_scores is 0.5"),
    ({"neg_scores": [math.nan, 0]}, r"neg_scores\[0\] is nan"),
    ({"neg_scores": [0, -math.inf]}, r"neg_scores\[1\] is -inf"),
    ({"pos_scores": [1e300]}, r"pos_scores\[0\] is 1e\+300"),
    ({"pos_scores": [10**400]}, r"pos_scores\[0\] is 1000"),
    ({"pos_scores": ["0.5"]}, r"pos_scores\[0\] is '0.5'"),
    ({"pos_scores": [True]}, r"pos_scores\[0\] is True"),
    ({"pos_scores": ...}, "one of pos_scores and neg_scores is missing"),
    ({"neg_scores": None}, "one of pos_scores and neg_scores is missing"),
    ({"prompt": ...}, "prompt is missing.*--instruction"),
    ({"prompt": ["a"]}, "prompt is"),
    ({"prompt": "  "}, "prompt is"),
    ({"type": "retrieval"}, "type is 'retrieval'. Expected is one of normal, only_1neg"),
    ({"type": ["normal"]}, "type is"),
    ({"task": 7}, "task is 7"),
    ({"neg": [], "neg_scores": [], "type": "symmetric_sts"}, "neg is empty.*symmetric_sts.*--in-batch all"),
    ({"query": "half \ud83d pair"}, "query has half a surrogate pair at character 5"),
    ({"pos": ["\udfff"]}, r"pos\[0\] has half a surrogate pair"),
    ({"prompt": "\udfff"}, "prompt has half a surrogate pair"),
], ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named_with_file_and_line(tmp_path, changes, message):
    bad = json.dumps(line(**changes)).encode()
    with pytest.raises(ValueError, match=r"some\.jsonl line 3: " + message) as error:
        load(tmp_path, [GOOD, GOOD, bad, GOOD])
    assert len(str(error.value)) < 500 + len(str(tmp_path))  # no megabytes on the screen
    assert str(error.value).count(". ") >= 2  # what is wrong, what is expected, what to do


@pytest.mark.parametrize(("bad", "message"), [
    (b'{"query": "q", ', "not valid JSON"),
    (b"hello", "not valid JSON"),
    (b"[" * 10**5, "not valid JSON"),
    (b'{"query": "q"} x', "not valid JSON"),
    (b'["q"]', "a list. Expected is one JSON object"),
    (b"3", "a int. Expected is one JSON object"),
    (b"null", "a NoneType. Expected is one JSON object"),
    (b'{"query": "caf\xe9"}', "not UTF-8 at its byte 14"),
    (json.dumps(GOOD).encode("utf-16"), "not UTF-8 at its byte 0"),
    (b'\xef\xbb\xbf{"query": "q"}', "not valid JSON.*BOM"),
    (b"\x00\x01", "not valid JSON"),
], ids=lambda value: str(value)[:30])
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=r"some\.jsonl line 2: " + message):
        load(tmp_path, [GOOD, bad])


@pytest.mark.parametrize("lines", [[], [b"", b"  ", b"\t"]], ids=["empty", "blank"])
def test_an_empty_file_is_an_error(tmp_path, lines):
    with pytest.raises(ValueError, match=r"some\.jsonl has no line"):
        load(tmp_path, lines)


def test_a_missing_file_names_the_one_that_is_there(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read.*data/soft_labels\.jsonl"):
            SoftLabels([path], Options())


def test_one_empty_file_among_good_ones_is_named(tmp_path):
    good, empty = write(tmp_path / "good.jsonl", [GOOD]), write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl has no line"):
        SoftLabels([good, empty], Options())


def test_blank_lines_and_windows_line_ends_are_no_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\n" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(line(query="last")).encode())
    data = SoftLabels([path], Options())
    assert [data[i].query for i in range(len(data))] == ["q", "last"]
    assert data.places([0]).endswith(".jsonl line 2") and data.places([0, 1]).endswith(".jsonl lines 2, 4")


def test_lines_without_negatives_need_others_in_the_batch(tmp_path):
    alone = line(neg=[], neg_scores=[])
    assert len(load(tmp_path, [alone, alone])) == 2
    with pytest.raises(ValueError, match="neg is empty"):
        load(tmp_path, [alone, alone], in_batch="none")
    assert len(load(tmp_path, [line(neg=[], neg_scores=[], type="symmetric_sts")] * 2, in_batch="all")) == 2
    with pytest.raises(ValueError, match=r"some.jsonl line 3: no negative, and the task has no other line"):
        load(tmp_path, [line(), line(), line(neg=[], neg_scores=[], task="lonely")], in_batch="all")
    with pytest.raises(ValueError, match="neg is empty"):
        load(tmp_path, [alone, alone], queries=1)
    with pytest.raises(ValueError, match="--negatives"):  # given, and yet none is used
        load(tmp_path, [GOOD], in_batch="none", negatives=0)


# ------------------------------------------------------------------------------------------------- batches

def test_no_query_is_left_alone(tmp_path):
    """9 lines in batches of 4: the ninth joins the batch before."""
    data = load(tmp_path, rows_of({"A": 9}), queries=4)
    assert sorted(map(len, data.batches(0))) == [4, 5]
    assert sorted(np.concatenate(data.batches(0)).tolist()) == list(range(9))


def rows_of(tasks: dict[str, int], **changes: Any) -> list[dict[str, Any]]:
    """`count` lines of each task, with texts that occur nowhere else, tasks mixed."""
    made = [line(task=task, query=f"{task} q{i}", pos=[f"{task} p{i}"], neg=[f"{task} n{i}.{j}" for j in range(9)],
                 pos_scores=[1.0], neg_scores=[0.1 * j for j in range(9)], **changes)
            for task, count in tasks.items() for i in range(count)]
    return sorted(made, key=lambda row: row["query"][::-1])


def passages(batch, i: int) -> list[str]:
    return [batch.passages[c] for c in batch.groups.column_QC[i].tolist() if c >= 0]


def test_every_line_once_an_epoch_and_one_task_a_batch(tmp_path):
    lines = rows_of({"A": 23, "B": 8, "C": 1})
    data = load(tmp_path, lines, queries=5)
    orders = []
    for epoch in range(3):
        batches = data.batches(epoch)
        assert sorted(n for batch in batches for n in batch) == list(range(32))
        assert max(map(len, batches)) == 5
        assert all(len({data[int(n)].task for n in batch}) == 1 for batch in batches)
        orders.append([batch.tolist() for batch in batches])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == [batch.tolist() for batch in data.batches(0)]
    assert orders[0] != [batch.tolist() for batch in load(tmp_path, lines, queries=5, seed=1).batches(0)]


@pytest.mark.parametrize("other", [{"prompt": "Another."}, {"type": "only_1neg"}, {"task": "B"}], ids=str)
def test_instruction_type_and_name_make_a_task(tmp_path, other):
    data = load(tmp_path, [GOOD, line(**other)] * 4)
    assert sorted(len(batch) for batch in data.batches(0)) == [4, 4]


def test_sizes_and_order_by_type(tmp_path):
    lines = [row for kind in KINDS for row in rows_of({kind: 12}, type=kind)]
    data = load(tmp_path, lines, queries=6, queries_symmetric=4, order="sts-first")
    kinds = [[data.tasks[data.task[b[0]]].kind, len(b)] for b in data.batches(0)]
    assert [kind for kind, _ in kinds[:3]] == ["symmetric_sts"] * 3
    assert dict(kinds) == {
        "normal": 6, "only_1neg": 6, "symmetric_sts": 4, "symmetric_clustering": 4, "symmetric_class": 4}


@pytest.mark.parametrize(("kind", "negatives", "in_batch"), [
    ("normal", 7, True), ("only_1neg", 1, True), ("symmetric_sts", 7, False), ("symmetric_clustering", 7, False),
    ("symmetric_class", 9, False)])
def test_first_negatives_and_in_batch_by_type(tmp_path, kind, negatives, in_batch):
    data = load(tmp_path, rows_of({"A": 3}, type=kind))
    batch = data.batch(np.arange(3), epoch=0, step=0)
    assert batch.in_batch is in_batch
    for i, number in enumerate(batch.rows):
        row = data[number]
        assert passages(batch, i) == [row.positives[0], *row.negatives[:negatives]]
        assert batch.teacher_QC[i].tolist() == pytest.approx([1.0, *row.negative_scores[:negatives]])
    for override, expected in (("all", True), ("none", False)):
        other = load(tmp_path, rows_of({"A": 3}, type=kind), in_batch=override)
        assert other.batch(np.arange(3), epoch=0, step=0).in_batch is expected


def test_fewer_negatives_are_used_as_they_are(tmp_path):
    data = load(tmp_path, [line(), line(neg=["n"], neg_scores=[0.5]), line(neg=[], neg_scores=[]),
                           line(pos_scores=None, neg_scores=None)])
    batch = data.batch(np.arange(4), epoch=0, step=0)
    assert batch.groups.column_QC.tolist() == [[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, 8]]
    assert batch.teacher_QC.isnan().tolist() == [[False] * 3, [False, False, True], [False, True, True], [True] * 3]
    assert data.with_labels == 3


def test_one_of_several_positives_is_drawn_each_epoch_with_its_score(tmp_path):
    scores = [0.1, 0.2, 0.3]
    data = load(tmp_path, [line(query=f"q{i}", pos=["a", "b", "c"], pos_scores=scores) for i in range(8)])
    drawn = []
    for epoch in range(12):
        batch = data.batch(np.arange(8), epoch=epoch, step=epoch)
        drawn.append([passages(batch, i)[0] for i in range(8)])
        for i, text in enumerate(drawn[-1]):
            assert batch.teacher_QC[i, 0].item() == pytest.approx(scores["abc".index(text)])
    assert {text for row in drawn for text in row} == set("abc")
    assert all(len({row[i] for row in drawn}) > 1 for i in range(8))
    again = data.batch(np.arange(8)[::-1].copy(), epoch=0, step=99)  # by line and epoch, whatever the batch
    assert [passages(again, i)[0] for i in range(8)][::-1] == drawn[0]


def test_known_positives_and_same_texts_are_numbered(tmp_path):
    data = load(tmp_path, [line(query="q0", pos=["a", "b"], pos_scores=[1, 1], neg=["x"], neg_scores=[0]),
                           line(query="q1", pos=["b "], neg=["q0", "x"]), line(query="q2", pos=["c"], neg=["d", "e"])])
    batch = data.batch(np.arange(3), epoch=0, step=0)
    number = dict(zip(map(fold, batch.passages), batch.groups.text_P.tolist(), strict=True))
    assert len(set(batch.groups.text_P.tolist())) == len(number)  # equal numbers for equal texts, white space folded
    known = [{n for n in row if n >= 0} for row in batch.groups.known_QX.tolist()]
    right = (["q0", "a", "b"], ["q1", "b"], ["q2", "c"])
    assert known == [{number[text] for text in texts if text in number} for texts in right]
    assert number["q0"] in known[0]


def test_positives_of_the_same_query_on_another_line_are_known(tmp_path):
    data = load(tmp_path, [line(query="q", pos=["a"]), line(query="other", pos=["b"]), line(query=" q ", pos=["c"])])
    batch = data.batch(np.arange(3), epoch=0, step=0)
    text = dict(zip(batch.groups.text_P.tolist(), batch.passages, strict=True))
    known = [{text[n] for n in row if n >= 0} for row in batch.groups.known_QX.tolist()]
    assert known == [{"a", "c"}, {"b"}, {"a", "c"}]


# ------------------------------------------------------------------------------------------------- examples

@pytest.mark.parametrize("per", ["batch", "query"])
def test_examples_are_of_the_task_and_never_of_the_batch(tmp_path, per):
    lines = rows_of({"A": 30, "B": 30})
    for i, row in enumerate(lines):
        row["pos"].append(f"{row['task']} shared {i // 6}")  # a positive of several queries, drawn or not
        row["pos_scores"].append(0.5)
    data = load(tmp_path, lines, queries=4, max_examples=5, examples_per=per)
    counts = []
    for step, numbers in enumerate(data.batches(0) * 3):
        batch = data.batch(numbers, epoch=step // 20, step=step)
        rows = [data[n] for n in batch.rows]
        own = {*batch.passages, *batch.queries, *(text for row in rows for text in row.positives)}
        assert len(batch.examples) == (1 if per == "batch" else len(rows))
        for examples in batch.examples:
            counts.append(len(examples))
            assert len(set(examples)) == len(examples)
            for example in examples:
                assert not own & {example.query, example.response}
                assert example.query.startswith(batch.task.name)
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    again = load(tmp_path, lines, queries=4, max_examples=5, examples_per=per)
    one, other = (source.batch(data.batches(0)[1], epoch=0, step=7) for source in (data, again))
    assert one.examples == other.examples


@pytest.mark.parametrize("inside", [2, 45])
def test_the_number_of_examples_is_uniform(tmp_path, inside):
    """P(k) = 1/6 each: 600 draws, every count within five standard deviations; also where most lines are in the batch.
    """
    data = load(tmp_path, rows_of({"A": 60}), queries=inside)
    drawn = [data.batch(np.arange(inside), epoch=0, step=step).examples[0] for step in range(600)]
    counts = np.bincount(list(map(len, drawn)), minlength=6)
    assert abs(counts - 100).max() < 5 * math.sqrt(600 / 6 * 5 / 6)


def test_no_examples_where_there_are_none(tmp_path):
    alone = load(tmp_path, rows_of({"A": 3}))
    assert all(alone.batch(np.arange(3), epoch=0, step=s).examples == [[]] for s in range(20))
    off = load(tmp_path, rows_of({"A": 30}), max_examples=0)
    assert all(off.batch(np.arange(3), epoch=0, step=s).examples == [[]] for s in range(20))


# ------------------------------------------------------------------------------------------------- any bytes

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800")
VALUES = (
    SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=1), max_size=3) | st.dictionaries(st.just("k"), SCALARS)
)
OBJECTS = st.builds(lambda changes: json.dumps({**GOOD, **changes}).encode(), st.dictionaries(
    st.sampled_from([*GOOD, "other"]), VALUES | st.sampled_from(list(GOOD.values())), max_size=3))
SPLICED = st.builds(
    lambda text, at, bytes_: text[:at] + bytes_ + text[at:], OBJECTS, st.integers(0, 150), st.binary(max_size=4)
)
LINES = OBJECTS | SPLICED | st.binary(max_size=60) | st.builds(lambda v: json.dumps(v).encode(), VALUES)


def is_checked(row: Row) -> bool:
    """All that the rest of the code takes for granted."""
    texts = [row.query, *row.positives, *row.negatives, *row.task]
    scores = [(row.positive_scores, row.positives), (row.negative_scores, row.negatives)]
    return (
        all(isinstance(t, str) and t.strip() and t.encode() for t in texts)
        and len(row.positives) > 0
        and row.task.kind in KINDS
        and len({score is None for score, _ in scores}) == 1
        and all(
            s is None or (len(s) == len(t) and all(type(x) is float and math.isfinite(x) for x in s)) for s, t in scores
        )
    )


def fuzz(text: bytes) -> None:
    try:
        row = parse(text, "here", "file", None)
    except ValueError as error:
        if type(error) is not ValueError or not str(error).startswith("here: "):
            raise AssertionError("a JSON or Unicode error slipped through") from error
    else:
        assert is_checked(row)


@settings(max_examples=2000)
@given(LINES)
def test_any_line_is_a_checked_row_or_an_error(text):
    fuzz(text)


@pytest.mark.record
@pytest.mark.parametrize("part", range(50))
def test_any_of_100_000_lines_is_a_checked_row_or_an_error(part, seed):
    """In parts with seeds of their own: a single search of that size remembers all it saw, and slows down."""
    given_a_line = settings(max_examples=2000)(given(LINES)(fuzz))
    hypothesis.seed(seed + part)(given_a_line)()


def test_control_the_fuzzed_lines_are_of_both_kinds_and_the_check_can_fail():
    found = []

    @settings(max_examples=300)
    @given(LINES)
    def collect(text):
        try:
            found.append(is_checked(parse(text, "here", "file", None)))
        except ValueError:
            found.append(None)
    collect()
    assert {True, None} == set(found)
    assert not is_checked(replace(read(GOOD), query=" "))
    assert not is_checked(replace(read(GOOD), negative_scores=[0.5, math.nan]))
