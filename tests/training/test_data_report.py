"""What is said about the training data before the first step."""

import json
import math

import numpy as np
import pytest

from ref.config import TrainConfig
from ref.training.data import SoftLabelDataset
from ref.training.data_report import DataReport


def load(path, lines, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SoftLabelDataset([path], TrainConfig(**options))


def line(number, *, scores=(0.9, 0.8), prompt="Find it.", **changes):
    return {"query": f"q{number}", "pos": [f"p{number}"], "neg": [f"n{number}"], "pos_scores": [scores[0]],
            "neg_scores": [scores[1]], "prompt": prompt, **changes}


def said(data, batch_size=512):
    tasks = len({(task.name, task.type) for task in data.tasks})
    return data.report.lines(
        lambda: data.batches(0), instructions_per_task=len(data.tasks) / tasks, batch_size=batch_size)


def test_ordinary_data_need_no_words(tmp_path):
    assert said(load(tmp_path / "a.jsonl", [line(n) for n in range(20)])) == []


def test_a_positive_among_the_negatives_is_dropped_with_its_score_and_counted(tmp_path):
    rows = [line(0, neg=["p0", "x", " p0 "], neg_scores=[0.9, 0.8, 0.9]), line(1), line(2, neg=["p2"])]
    data = load(tmp_path / "a.jsonl", rows)
    assert said(data) == ["dropped: 3 negatives that repeat the query, a positive or another negative of their line"]
    assert (data[0].negatives, data[0].negative_scores) == (["x"], [0.8])
    assert (data[2].negatives, data[2].negative_scores) == ([], [])


def test_the_query_and_a_repeated_text_are_no_negatives(tmp_path):
    """The query would be pushed from itself; a repeated text would count twice."""
    rows = [line(0, neg=["x", " q0", "y", "x ", "z"], neg_scores=[0.5, 0.4, 0.3, 0.2, 0.1]), line(1)]
    data = load(tmp_path / "a.jsonl", rows)
    assert data[0].query == "q0" and data.report.num_dropped == 2
    assert (data[0].negatives, data[0].negative_scores) == (["x", "y", "z"], [0.5, 0.3, 0.1])


def test_a_line_whose_negatives_all_repeat_is_refused_where_it_needs_one(tmp_path):
    with pytest.raises(ValueError, match=r"'neg' must have a text .*got only texts that repeat the query or a"):
        load(tmp_path / "a.jsonl", [line(0, neg=["q0"], type="symmetric_sts"), line(1)])


@pytest.mark.parametrize(("scores", "companion"), [((2.5, 1.5), None), ((0.9, 0.8), {"scale": "logit"})])
def test_logits_at_a_cosines_temperature_are_a_warning(tmp_path, scores, companion):
    """Known by their range, or by the description that run_label.py writes beside its output."""
    if companion:
        (tmp_path / "a.json").write_text(json.dumps(companion))
    rows = [line(n, scores=scores) for n in range(4)]
    (warning,) = said(load(tmp_path / "a.jsonl", rows))
    assert warning.startswith("warning: the scores of a.jsonl are logits (up to ") and "temperature 1" in warning
    assert said(load(tmp_path / "a.jsonl", rows, teacher_temperature=1.0)) == []


def test_cosines_beside_logits_or_at_their_temperature_are_a_warning(tmp_path):
    """At temperature 1 the softmax of cosines is nearly uniform: such labels say nothing."""
    cosines, logits = [line(n) for n in range(4)], [line(n, scores=(2.5, 1.5)) for n in range(4)]
    for name, lines in (("cosines", cosines), ("logits", logits)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (warning,) = said(SoftLabelDataset([tmp_path / "cosines.jsonl"], TrainConfig(teacher_temperature=1.0)))
    assert "labels of cosines.jsonl are nearly equal for all texts at --teacher-temperature 1.0" in warning
    for temperature in (0.05, 1.0):
        both = SoftLabelDataset([tmp_path / "cosines.jsonl", tmp_path / "logits.jsonl"],
                                TrainConfig(teacher_temperature=temperature))
        (warning,) = said(both)
        assert "of logits.jsonl are logits (up to 2.5), those of cosines.jsonl cosines" in warning


def test_a_description_of_cosines_or_of_something_else_is_no_warning(tmp_path):
    too_large_for_a_description = f'{{"scale": "logit", "x": "{"x" * 10**6}"}}'
    for content in ('{"scale": "cosine"}', "[]", "{", "{}", too_large_for_a_description):
        (tmp_path / "a.json").write_text(content)
        assert said(load(tmp_path / "a.jsonl", [line(n) for n in range(4)])) == []


def test_fields_that_are_not_read_are_named(tmp_path):
    rows = [{**line(n), "negs": ["a"], "pos_score": [1.0]} for n in range(4)]
    (said_line,) = said(load(tmp_path / "a.jsonl", rows))
    assert said_line.startswith("fields not read: negs, pos_score (read: query, pos, neg, pos_scores,")


def test_the_field_mining_of_run_label_is_no_mistake(tmp_path):
    assert said(load(tmp_path / "a.jsonl", [{**line(n), "mining": {"candidates": 3}} for n in range(4)])) == []


def test_nearly_hard_labels_are_a_warning(tmp_path):
    rows = [line(n, scores=(1.0, 0.5)) for n in range(4)]
    (warning,) = said(load(tmp_path / "a.jsonl", rows))
    assert "entropy below 0.05 nats" in warning and "a higher --teacher-temperature" in warning
    assert said(load(tmp_path / "a.jsonl", rows, teacher_temperature=0.3)) == []


def test_entropy_equals_numpys():
    report, generator = DataReport(0.1), np.random.default_rng(0)
    scores = generator.normal(size=(5, 4))
    for row in scores:
        report.add("a", row.tolist(), 0)
    p = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum(1, keepdims=True)
    assert math.isclose(report.entropy["a"], -(p * np.log(p)).sum(), rel_tol=1e-9)


def test_an_instruction_for_each_line_is_a_warning_with_the_median_batch(tmp_path):
    data = load(tmp_path / "a.jsonl", [line(n, prompt=f"Find {n // 2}.") for n in range(40)])
    (warning,) = said(data)
    assert "20 different instructions" in warning and "the median batch has 2 queries instead of 512" in warning
    few = [line(n, prompt=("Find it.", "Find it. ", "Find it.\n")[n % 3]) for n in range(40)]
    assert len(load(tmp_path / "b.jsonl", few).tasks) == 1  # spaces at the end are no other instruction
    assert said(load(tmp_path / "d.jsonl", [line(n, task=f"t{n // 2}") for n in range(40)]), batch_size=64) == []
    (warning,) = said(load(tmp_path / "d.jsonl", [line(n, task=f"t{n // 2}") for n in range(40)]), batch_size=16)
    assert "the tasks have few lines" in warning and "has 2 queries instead of 16" in warning
    several = [line(n, task=f"t{n % 8}", prompt=f"Find {n % 8}.") for n in range(40)]
    assert said(load(tmp_path / "c.jsonl", several)) == []  # small data sets with one instruction each are no mistake
