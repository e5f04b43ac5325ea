"""soft_labels.jsonl: every line is validated, errors name file, line and field, and batches hold what they should.

Lines are made from a valid one with one change. Fuzzing: any bytes give a validated example or a ValueError with the
location.
"""

import json
import math
import os
import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.config import TrainConfig
from ref.task_types import TASK_TYPES
from ref.training.data import SoftLabelDataset, TrainingExample, parse_example
from ref.utils.files import MAX_TEXT_CHARS, parse_json_object
from ref.utils.text import normalize_whitespace

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


def load(folder: Path, lines: list[Any], **options: Any) -> SoftLabelDataset:
    return SoftLabelDataset([write(folder / "some.jsonl", lines)], TrainConfig(**options))


def read(value: Any, **options: Any) -> TrainingExample:
    return parse(json.dumps(value).encode(), **options)


def parse(raw: bytes, **options: Any) -> TrainingExample:
    return parse_example(parse_json_object(raw, "here"), "here", "file", options.get("instruction"))


# ------------------------------------------------------------------------------------------------- schema

def test_a_line_becomes_a_training_example():
    row = read(GOOD)
    assert row == TrainingExample(("T", "Find it.", "normal"), "q", ["p"], ["n1", "n2"], [0.9], [0.5, 0.1])


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
def test_optional_fields(changes, field, expected):
    assert getattr(read(line(**changes), instruction="by default"), field) == expected


def test_a_line_of_flagembedding_loads_unchanged(tmp_path):
    old = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": None, "neg_scores": None, "prompt": "Find it.",
           "pos_id": ["1"], "neg_id": ["2"]}
    data = load(tmp_path, [old, {"query": "q", "pos": ["p"], "neg": ["n"]}], instruction="Find it.")
    assert [data[i].task for i in range(2)] == [("some", "Find it.", "normal")] * 2
    assert data.num_with_labels == 0
    assert torch.isnan(data.batch(np.array([0, 1]), epoch=0, step=0).teacher_QC).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"query": ...}, "'query' must be a non-empty string .got None"),
    ({"query": 3}, "'query' must be .* .got 3"),
    ({"query": " \n"}, "'query' must be a non-empty string"),
    ({"query": "x" * (MAX_TEXT_CHARS + 1)}, "'query' must have at most 1,000,000 characters .got 1,000,001"),
    ({"pos": ...}, "'pos' must have at least one text"),
    ({"pos": []}, "'pos' must have at least one text"),
    ({"pos": "p"}, "'pos' must be a list of texts .got 'p'"),
    ({"pos": ["p", ""], "pos_scores": [1, 1]}, r"'pos\[1\]' must be a non-empty string .got ''"),
    ({"neg": {"a": 1}}, "'neg' must be a list of texts"),
    ({"neg": ["n", None]}, r"'neg\[1\]' must be .*got None"),
    ({"neg": ["n", "y" * 10**7]}, r"'neg\[1\]' must have .*got 10,000,000"),
    ({"pos_scores": [1, 2]}, "'pos_scores' must have one score per text in 'pos' .got 2 for 1"),
    ({"neg_scores": [1]}, "'neg_scores' must have one score per text in 'neg' .got 1 for 2"),
    ({"neg_scores": 0.5}, "'neg_scores' must have .*got 0.5"),
    ({"neg_scores": [math.nan, 0]}, r"'neg_scores\[0\]' must be a finite number .got nan"),
    ({"neg_scores": [0, -math.inf]}, r"'neg_scores\[1\]' must be .*got -inf"),
    ({"pos_scores": [1e300]}, r"'pos_scores\[0\]' must be .*got 1e\+300"),
    ({"pos_scores": [10**400]}, r"'pos_scores\[0\]' must be .*got 1000"),
    ({"pos_scores": ["0.5"]}, r"'pos_scores\[0\]' must be .*got '0.5'"),
    ({"pos_scores": [True]}, r"'pos_scores\[0\]' must be .*got True"),
    ({"pos_scores": ...}, "'pos_scores' is missing"),
    ({"neg_scores": None}, "'neg_scores' is missing"),
    ({"prompt": ...}, "'prompt' is missing.*--instruction"),
    ({"prompt": ["a"]}, "'prompt' must be"),
    ({"prompt": "  "}, "'prompt' must be"),
    ({"type": "retrieval"}, "'type' must be one of normal, only_1neg.*got 'retrieval'"),
    ({"type": ["normal"]}, "'type' must be"),
    ({"task": 7}, "'task' must be .*got 7"),
    ({"neg": [], "neg_scores": [], "type": "symmetric_sts"}, "'neg' must have a text for type symmetric_sts"),
    ({"query": "half \ud83d pair"}, "'query' has an unpaired surrogate at character 5"),
    ({"pos": ["\udfff"]}, r"'pos\[0\]' has an unpaired surrogate"),
    ({"prompt": "\udfff"}, "'prompt' has an unpaired surrogate"),
], ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named_with_file_and_line(tmp_path, changes, message):
    bad = json.dumps(line(**changes)).encode()
    with pytest.raises(ValueError, match=r"some\.jsonl:3: " + message) as error:
        load(tmp_path, [GOOD, GOOD, bad, GOOD])
    assert len(str(error.value)) < 500 + len(str(tmp_path))  # no megabytes on the screen
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("bad", "message"), [
    (b'{"query": "q", ', "invalid JSON"),
    (b"hello", "invalid JSON"),
    (b"[" * 10**5, "invalid JSON"),
    (b'{"query": "q"} x', "invalid JSON"),
    (b'["q"]', "must be a JSON object .got list"),
    (b"3", "must be a JSON object .got int"),
    (b"null", "must be a JSON object .got NoneType"),
    (b'{"query": "caf\xe9"}', "not UTF-8 .byte 14"),
    (json.dumps(GOOD).encode("utf-16"), "not UTF-8 .byte 0"),
    (b'\xef\xbb\xbf\xef\xbb\xbf{"query": "q"}', "invalid JSON"),
    (b"\x00\x01", "invalid JSON"),
], ids=lambda value: str(value)[:30])
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=r"some\.jsonl:2: " + message):
        load(tmp_path, [GOOD, bad])


@pytest.mark.parametrize("lines", [[], [b"", b"  ", b"\t"]], ids=["empty", "blank"])
def test_an_empty_file_is_an_error(tmp_path, lines):
    with pytest.raises(ValueError, match=r"some\.jsonl: must have at least one line"):
        load(tmp_path, lines)


def test_a_missing_file_is_named(tmp_path):
    for path, message in ((tmp_path / "none.jsonl", r"none\.jsonl: file does not exist"), (tmp_path, "must be a file")):
        with pytest.raises(ValueError, match=message):
            SoftLabelDataset([path], TrainConfig())


def test_files_of_equal_names_are_different_tasks(tmp_path):
    """Named after their folders too; a name in the line itself stays."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [write(tmp_path / name, [line(task=None), line(task="own")])
             for name in ("a/train.jsonl", "b/train.jsonl", "b/other.jsonl")]
    data = SoftLabelDataset(paths, TrainConfig())
    assert {task.name for task in data.tasks} == {"a/train", "b/train", "other", "own"}
    for name in ("a/x", "b/x"):
        (tmp_path / name).mkdir()
    paths = [write(tmp_path / name, [line(task=None)])
             for name in ("a/x/train.jsonl", "b/x/train.jsonl", "b/train.jsonl", "b/nq.json", "b/nq.jsonl")]
    data = SoftLabelDataset(paths, TrainConfig())
    assert {task.name for task in data.tasks} == {"a/x/train", "b/x/train", "b/train", *map(str, paths[3:])}
    (tmp_path / "nq.jsonl").symlink_to(paths[0])
    (task, _) = SoftLabelDataset([tmp_path / "nq.jsonl", paths[0]], TrainConfig()).tasks
    assert task.name == "nq"  # not the name of the file that the link leads to


def test_more_files_than_may_be_open(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", [line(query=f"q{n}"), line(query=f"r{n}")]) for n in range(60)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ref.training.data.OPEN_FILES", 10)
            data = SoftLabelDataset(paths, TrainConfig())
            order = random.Random(0).sample(range(120), 120)
            assert [data[n].query for n in order] == [f"{'qr'[n % 2]}{n // 2}" for n in order]
            assert len(data.files) == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_training_without_an_instruction(tmp_path):
    """Where the line has none; no in-context examples then, which contain it."""
    rows = [{**line(query=f"q{n}"), "prompt": prompt} for n, prompt in enumerate(["", None, "Find it.", ""] * 3)]
    data = load(tmp_path, rows, instruction="none", batch_size=2, max_examples=3)
    assert {task.instruction for task in data.tasks} == {None, "Find it."}
    for step, lines in enumerate(data.batches(0)):
        batch = data.batch(lines, epoch=0, step=step)
        if batch.task.instruction is None:
            assert batch.in_context_examples == [[]]
    with pytest.raises(ValueError, match="'prompt' is missing.*--instruction none"):
        load(tmp_path, rows)


def test_an_instruction_that_no_line_takes_is_refused(tmp_path):
    rows = [line(query="q0"), line(query="q1")]
    with pytest.raises(ValueError, match="^--instruction is for lines without 'prompt'"):
        load(tmp_path, rows, instruction="none")
    load(tmp_path, [*rows, {**line(query="q2"), "prompt": ""}], instruction="Other.")
    load(tmp_path, rows, instruction="none", resume=True, output="r")  # accepted when the run began


def test_one_empty_file_among_good_ones_is_named(tmp_path):
    good, empty = write(tmp_path / "good.jsonl", [GOOD]), write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl: must have at least one line"):
        SoftLabelDataset([good, empty], TrainConfig())


def test_one_file_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"^--data: .*good\.jsonl is given twice"):
        SoftLabelDataset([path, tmp_path / "." / ".." / tmp_path.name / "good.jsonl"], TrainConfig())


def test_a_list_of_objects_is_no_jsonl(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([GOOD], indent=1))
    with pytest.raises(ValueError, match=r"list\.json:1: invalid JSON \(.*\); wanted: a JSON object, no list$"):
        SoftLabelDataset([path], TrainConfig())
    path.write_text('{"anchor": "a", "positive": "b"}')
    with pytest.raises(ValueError, match=r"list\.json:1: 'query' must be a non-empty string"):
        SoftLabelDataset([path], TrainConfig())


def test_blank_lines_and_windows_line_ends_are_no_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\n" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(line(query="last")).encode())
    data = SoftLabelDataset([path], TrainConfig())
    assert [data[i].query for i in range(len(data))] == ["q", "last"]
    assert data.locations([0]) == f"{path}:2" and data.locations([0, 1]) == f"{path}:2, {path}:4"


def test_lines_without_negatives_need_others_in_the_batch(tmp_path):
    alone = line(neg=[], neg_scores=[])
    assert len(load(tmp_path, [alone, alone])) == 2
    with pytest.raises(ValueError, match="'neg' must have a text"):
        load(tmp_path, [alone, alone], in_batch_negatives="none")
    assert len(load(tmp_path, [line(neg=[], neg_scores=[], type="symmetric_sts")] * 2, in_batch_negatives="all")) == 2
    with pytest.raises(ValueError, match=r"some.jsonl:3: 'neg' must have a text, because the task has no other line"):
        load(tmp_path, [line(), line(), line(neg=[], neg_scores=[], task="lonely")], in_batch_negatives="all")
    with pytest.raises(ValueError, match="'neg' must have a text"):
        load(tmp_path, [alone, alone], batch_size=1)
    with pytest.raises(ValueError, match="--num-negatives 0"):  # given, and yet none is used
        load(tmp_path, [GOOD], in_batch_negatives="none", num_negatives=0)


# ------------------------------------------------------------------------------------------------- batches

def test_no_batch_has_a_single_query(tmp_path):
    """9 lines in batches of 4: the ninth joins the batch before."""
    data = load(tmp_path, rows_of({"A": 9}), batch_size=4)
    assert sorted(map(len, data.batches(0))) == [4, 5]
    assert sorted(np.concatenate(data.batches(0)).tolist()) == list(range(9))


def rows_of(tasks: dict[str, int], **changes: Any) -> list[dict[str, Any]]:
    """`count` lines of each task, with texts that occur nowhere else, tasks mixed."""
    made = [line(task=task, query=f"{task} q{i}", pos=[f"{task} p{i}"], neg=[f"{task} n{i}.{j}" for j in range(9)],
                 pos_scores=[1.0], neg_scores=[0.1 * j for j in range(9)], **changes)
            for task, count in tasks.items() for i in range(count)]
    return sorted(made, key=lambda row: row["query"][::-1])


def passages(batch, i: int) -> list[str]:
    return [batch.passages[c] for c in batch.candidates.candidate_idx_QC[i].tolist() if c >= 0]


def test_every_line_once_an_epoch_and_one_task_a_batch(tmp_path):
    lines = rows_of({"A": 23, "B": 8, "C": 1})
    data = load(tmp_path, lines, batch_size=5)
    orders = []
    for epoch in range(3):
        batches = data.batches(epoch)
        assert sorted(n for batch in batches for n in batch) == list(range(32))
        assert max(map(len, batches)) == 5
        assert all(len({data[int(n)].task for n in batch}) == 1 for batch in batches)
        orders.append([batch.tolist() for batch in batches])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == [batch.tolist() for batch in data.batches(0)]
    assert orders[0] != [batch.tolist() for batch in load(tmp_path, lines, batch_size=5, seed=1).batches(0)]


@pytest.mark.parametrize("other", [{"prompt": "Another."}, {"type": "only_1neg"}, {"task": "B"}], ids=str)
def test_instruction_type_and_name_make_a_task(tmp_path, other):
    data = load(tmp_path, [GOOD, line(**other)] * 4)
    assert sorted(len(batch) for batch in data.batches(0)) == [4, 4]


def test_batch_sizes_by_type(tmp_path):
    lines = [row for kind in TASK_TYPES for row in rows_of({kind: 12}, type=kind)]
    data = load(tmp_path, lines, batch_size=6, batch_size_symmetric=4)
    kinds = [[data.tasks[data.task[b[0]]].type, len(b)] for b in data.batches(0)]
    assert dict(kinds) == {
        "normal": 6, "only_1neg": 6, "symmetric_sts": 4, "symmetric_clustering": 4, "symmetric_class": 4}


@pytest.mark.parametrize(("kind", "negatives", "in_batch"), [
    ("normal", 7, True), ("only_1neg", 1, True), ("symmetric_sts", 7, False), ("symmetric_clustering", 7, False),
    ("symmetric_class", 9, False)])
def test_first_negatives_and_in_batch_by_type(tmp_path, kind, negatives, in_batch):
    data = load(tmp_path, rows_of({"A": 3}, type=kind))
    batch = data.batch(np.arange(3), epoch=0, step=0)
    assert batch.in_batch_negatives is in_batch
    for i, number in enumerate(batch.lines):
        row = data[number]
        assert passages(batch, i) == [row.positives[0], *row.negatives[:negatives]]
        assert batch.teacher_QC[i].tolist() == pytest.approx([1.0, *row.negative_scores[:negatives]])
    for override, expected in (("all", True), ("none", False)):
        other = load(tmp_path, rows_of({"A": 3}, type=kind), in_batch_negatives=override)
        assert other.batch(np.arange(3), epoch=0, step=0).in_batch_negatives is expected


def test_fewer_negatives_are_used_as_they_are(tmp_path):
    data = load(tmp_path, [line(), line(neg=["n"], neg_scores=[0.5]), line(neg=[], neg_scores=[]),
                           line(pos_scores=None, neg_scores=None)])
    batch = data.batch(np.arange(4), epoch=0, step=0)
    assert batch.candidates.candidate_idx_QC.tolist() == [[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, 8]]
    assert batch.teacher_QC.isnan().tolist() == [[False] * 3, [False, False, True], [False, True, True], [True] * 3]
    assert data.num_with_labels == 3


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
    again = data.batch(np.arange(8)[::-1].copy(), epoch=0, step=99)  # by line and epoch, for any batch
    assert [passages(again, i)[0] for i in range(8)][::-1] == drawn[0]


def test_known_positives_and_same_texts_are_numbered(tmp_path):
    data = load(tmp_path, [line(query="q0", pos=["a", "b"], pos_scores=[1, 1], neg=["x"], neg_scores=[0]),
                           line(query="q1", pos=["b "], neg=["q0", "x"]), line(query="q2", pos=["c"], neg=["d", "e"])])
    batch = data.batch(np.arange(3), epoch=0, step=0)
    number = dict(zip(map(normalize_whitespace, batch.passages), batch.candidates.text_id_P.tolist(), strict=True))
    assert len(set(batch.candidates.text_id_P.tolist())) == len(number)  # equal ids for equal texts
    known = [{n for n in row if n >= 0} for row in batch.candidates.known_positive_id_QX.tolist()]
    right = (["q0", "a", "b"], ["q1", "b"], ["q2", "c"])
    assert known == [{number[text] for text in texts if text in number} for texts in right]
    assert number["q0"] in known[0]


def test_positives_of_the_same_query_on_another_line_are_known(tmp_path):
    data = load(tmp_path, [line(query="q", pos=["a"]), line(query="other", pos=["b"]), line(query=" q ", pos=["c"])])
    batch = data.batch(np.arange(3), epoch=0, step=0)
    text = dict(zip(batch.candidates.text_id_P.tolist(), batch.passages, strict=True))
    known = [{text[n] for n in row if n >= 0} for row in batch.candidates.known_positive_id_QX.tolist()]
    assert known == [{"a", "c"}, {"b"}, {"a", "c"}]


# ------------------------------------------------------------------------------------------------- examples

@pytest.mark.parametrize("per", ["batch", "query"])
def test_examples_are_of_the_task_and_never_of_the_batch(tmp_path, per):
    lines = rows_of({"A": 30, "B": 30})
    for i, row in enumerate(lines):
        row["pos"].append(f"{row['task']} shared {i // 6}")  # a positive of several queries, drawn or not
        row["pos_scores"].append(0.5)
    data = load(tmp_path, lines, batch_size=4, max_examples=5, examples_per=per)
    counts = []
    for step, numbers in enumerate(data.batches(0) * 3):
        batch = data.batch(numbers, epoch=step // 20, step=step)
        rows = [data[n] for n in batch.lines]
        own = {*batch.passages, *batch.queries, *(text for row in rows for text in row.positives)}
        assert len(batch.in_context_examples) == (1 if per == "batch" else len(rows))
        for examples in batch.in_context_examples:
            counts.append(len(examples))
            assert len(set(examples)) == len(examples)
            for example in examples:
                assert not own & {example.query, example.response}
                assert example.query.startswith(batch.task.name)
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    again = load(tmp_path, lines, batch_size=4, max_examples=5, examples_per=per)
    one, other = (source.batch(data.batches(0)[1], epoch=0, step=7) for source in (data, again))
    assert one.in_context_examples == other.in_context_examples


@pytest.mark.parametrize("inside", [2, 45])
def test_the_number_of_examples_is_uniform(tmp_path, inside):
    """P(k) = 1/6 each: 600 draws, every count within five standard deviations; also where most lines are in the batch.
    """
    data = load(tmp_path, rows_of({"A": 60}), batch_size=inside)
    drawn = [data.batch(np.arange(inside), epoch=0, step=step).in_context_examples[0] for step in range(600)]
    counts = np.bincount(list(map(len, drawn)), minlength=6)
    assert abs(counts - 100).max() < 5 * math.sqrt(600 / 6 * 5 / 6)


def test_no_examples_where_there_are_none(tmp_path):
    alone = load(tmp_path, rows_of({"A": 3}))
    assert all(alone.batch(np.arange(3), epoch=0, step=s).in_context_examples == [[]] for s in range(20))
    off = load(tmp_path, rows_of({"A": 30}), max_examples=0)
    assert all(off.batch(np.arange(3), epoch=0, step=s).in_context_examples == [[]] for s in range(20))


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


def is_valid(row: TrainingExample) -> bool:
    """All that the rest of the code takes for granted."""
    texts = [row.query, *row.positives, *row.negatives, *row.task]
    scores = [(row.positive_scores, row.positives), (row.negative_scores, row.negatives)]
    return (
        all(isinstance(t, str) and t.strip() and t.encode() for t in texts)
        and len(row.positives) > 0
        and row.task.type in TASK_TYPES
        and len({score is None for score, _ in scores}) == 1
        and all(
            s is None or (len(s) == len(t) and all(type(x) is float and math.isfinite(x) for x in s)) for s, t in scores
        )
    )


def fuzz(text: bytes) -> None:
    try:
        row = parse(text)
    except ValueError as error:
        if type(error) is not ValueError or not str(error).startswith("here: "):
            raise AssertionError("a JSON or Unicode error was not converted") from error
    else:
        assert is_valid(row)


@settings(max_examples=2000)
@given(LINES)
def test_any_line_is_a_valid_example_or_an_error(text):
    fuzz(text)


@pytest.mark.record
@pytest.mark.parametrize("part", range(50))
def test_any_of_100_000_lines_is_a_valid_example_or_an_error(part, seed):
    """In parts with seeds of their own: a single search of that size remembers all it saw, and slows down."""
    given_a_line = settings(max_examples=2000)(given(LINES)(fuzz))
    hypothesis.seed(seed + part)(given_a_line)()


def test_control_the_fuzzed_lines_are_of_both_kinds_and_the_check_can_fail():
    found = []

    @settings(max_examples=300)
    @given(LINES)
    def collect(text):
        try:
            found.append(is_valid(parse(text)))
        except ValueError:
            found.append(None)
    collect()
    assert {True, None} == set(found)
    assert not is_valid(replace(read(GOOD), query=" "))
    assert not is_valid(replace(read(GOOD), negative_scores=[0.5, math.nan]))
