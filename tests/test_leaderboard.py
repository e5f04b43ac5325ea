"""Our scores among the public ones: the published figures, mteb's own computation, and small tables by hand."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaderboard.compare import (
    DECIMALS,
    PUBLIC_SCORES,
    borda_points,
    borda_ranks,
    category_mean,
    category_means,
    compare,
    read_public_scores,
    task_mean,
    task_ranks,
)

ROOT = Path(__file__).parent.parent
NAN = np.nan
# 3 models x 4 tasks, as in compare.py's docstring
SMALL_MN = np.array([[90, 80, NAN, 70], [80, 80, 60, 75], [70, NAN, 50, 80]], dtype=float)
FILE = """# Source: a table by hand
model,registered,A,B,C,D
category,,Fruit,Fruit,Nut,Nut
one,1,90,80,,70
two,0,80,80,60,75
three,1,70,,50,80
"""


@pytest.fixture(scope="module")
def public():
    return read_public_scores()


@pytest.fixture
def small(tmp_path):
    """`small(text)`: the table of a file with this text."""
    def read(text=FILE):
        (tmp_path / "scores.csv").write_text(text)
        return read_public_scores(tmp_path / "scores.csv")
    return read


def named(public, model):
    """A public model's scores as a run hands them in."""
    return dict(zip(public.tasks, public.score_MN[public.row(model)].tolist(), strict=True))


# ---- the public table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "mean", "kinds", "rank"), [
    ("annamodels/LGAI-Embedding-Preview", 74.12, 68.40, 6),
    ("Qwen/Qwen3-Embedding-8B", 75.23, None, 4),
    ("google/gemini-embedding-001", 73.30, None, 9),
    ("intfloat/e5-mistral-7b-instruct", 67.97, None, 37),
])
def test_the_published_figures(public, model, mean, kinds, rank):
    """Figures of the public leaderboard, to its two decimals."""
    row = public.row(model)
    assert public.score_MN.shape == (324, 41)
    assert round(task_mean(public.score_MN)[row], 2) == mean
    assert kinds is None or round(category_mean(public.score_MN, public.categories)[row], 2) == kinds
    assert borda_ranks(public.score_MN)[row] == rank


@pytest.fixture(scope="module")
def long_table(public):
    """The public table as mteb wants it: a row a score."""
    import polars

    rows = [(model, task, "default", "test", float(score))
            for model, scores in zip(public.models, public.score_MN, strict=True)
            for task, score in zip(public.tasks, scores, strict=True) if not np.isnan(score)]
    return polars.DataFrame(rows, schema=["model_name", "task_name", "subset", "split", "score"], orient="row")


def test_means_and_ranks_are_mtebs_for_all_models(public, long_table):
    """Also of models that mteb leaves out of its summary; there, of all that it shows."""
    from mteb.benchmarks import _create_table as theirs

    pivot, tasks = theirs._build_per_task_pivot(long_table)
    expressions, _ = theirs._get_means_per_types(tasks)
    figures = pivot.select("model_name", *expressions, theirs._skipna_false_mean(tasks).alias("Mean (Task)"))
    ranks = theirs._borda_rank_from_long(long_table, n_models=pivot.height)
    _assert_equal(public, figures.join(ranks, on="model_name"), models=324)
    summary = theirs._create_summary_table(long_table).df.rename({"Model": "model_name"})
    _assert_equal(public, summary, models=int(public.registered_M.sum()))
    changed_MN = public.score_MN.copy()
    changed_MN[public.row("Qwen/Qwen3-Embedding-8B"), 0] -= 1e-6  # the comparison would see it
    with pytest.raises(AssertionError):
        _assert_equal(dataclasses.replace(public, score_MN=changed_MN), summary, models=summary.height)


def _assert_equal(public, figures, *, models):
    ours = {"Mean (Task)": task_mean(public.score_MN), **category_means(public.score_MN, public.categories),
            "Mean (TaskType)": category_mean(public.score_MN, public.categories),
            "Rank (Borda)": borda_ranks(public.score_MN)}
    assert figures.height == models
    order = [public.row(name) for name in figures["model_name"].str.split("](").list.first().str.strip_chars("[")]
    columns = [name for name in ours if name in figures.columns]
    assert {"Mean (Task)", "Rank (Borda)", "STS", "Retrieval"} <= set(columns)
    for name in columns:
        expected = figures[name].cast(float).fill_null(NAN).to_numpy()
        np.testing.assert_allclose(ours[name][order], expected, rtol=0, atol=1e-9, err_msg=name)


def test_the_file_is_what_its_generator_makes(public, tmp_path):
    """Made again from its own table: the same lines; and each task has mteb's category."""
    from leaderboard import make_public_scores as make
    from scoring.tasks import benchmark_tasks

    categories = {name: str(task.metadata.type) for name, task in benchmark_tasks().items()}
    long = tmp_path / "long.csv"
    cells = [f"{model},{task},{'' if np.isnan(score) else score}" for model in public.models
             for task, score in named(public, model).items()]
    long.write_text("\n".join(["model,task,score", *reversed(cells)]))  # in no order
    registered = {model for model, known in zip(public.models, public.registered_M, strict=True) if known}
    text = make.wide(make.read_long(long), categories, registered)
    assert text.splitlines()[1:] == PUBLIC_SCORES.read_text().splitlines()[1:]  # the first line has mteb's version


def test_the_generator_refuses(tmp_path):
    """What is no table of scores, and rounding that makes a tie."""
    from leaderboard import make_public_scores as make

    long = tmp_path / "long.csv"
    for text, message in [
        ("model,task,score\nx,A,no", "line 2"), ("model,task,score\nx,A,1\nx,A,1", "line 3: A of x comes twice"),
        ("model,task\nx,A", "line 2"), ("model,task,score\nx,A,101", "line 2: 'A': score 101"),
    ]:
        long.write_text(text)
        with pytest.raises(ValueError, match=message):
            make.read_long(long)
    with pytest.raises(ValueError, match="decimals change the points"):
        make.wide({"x": {"A": 1 + 1e-10}, "y": {"A": 1.0}}, {"A": "STS"}, set())
    with pytest.raises(ValueError, match="Expected: tasks of"):
        make.wide({"x": {"B": 1.0}}, {"A": "STS"}, set())


# ---- by hand -------------------------------------------------------------------------------------------------


def test_ranks_points_and_means_by_hand():
    """Ties share a rank, a missing task gives no points and no mean."""
    np.testing.assert_array_equal(task_ranks(SMALL_MN), [[1, 1.5, NAN, 3], [2, 1.5, 1, 2], [3, NAN, 2, 1]])
    np.testing.assert_array_equal(borda_points(SMALL_MN), [3.5, 5.5, 3])
    np.testing.assert_array_equal(borda_ranks(SMALL_MN), [2, 1, 3])
    np.testing.assert_array_equal(task_mean(SMALL_MN), [NAN, 73.75, NAN])
    means = category_means(SMALL_MN, ["Fruit", "Fruit", "Nut", "Nut"])
    np.testing.assert_array_equal(means["Fruit"], [85, 80, NAN])
    np.testing.assert_array_equal(means["Nut"], [NAN, 67.5, 65])
    both = category_mean(SMALL_MN, ["Fruit", "Nut", "Nut", "Nut"])
    np.testing.assert_allclose(both, [NAN, (80 + 215 / 3) / 2, NAN], rtol=1e-15)


def test_final_ties_take_the_smaller_number():
    """Two first, then the third; a model without any score counts nowhere."""
    score_MN = np.array([[90, 80], [80, 90], [70, 70], [NAN, NAN]], dtype=float)
    np.testing.assert_array_equal(borda_points(score_MN), [3, 3, 0, 0])  # n = 3
    np.testing.assert_array_equal(borda_ranks(score_MN), [1, 1, 3, 0])


def test_a_partial_run_is_compared_on_its_tasks(small):
    """Ours has C and D: all models on C and D alone, by hand."""
    comparison = compare(small(), {"D": 75, "C": 60}, name="ours")
    assert comparison.scores.tasks == ("C", "D") and comparison.scores.categories == ("Nut", "Nut")
    assert comparison.scores.models == ("ours", "one", "two", "three")
    assert comparison.missing == ("A", "B") and comparison.ranked == 4
    # C: 60, -, 60, 50 -> ranks 1.5, -, 1.5, 3; D: 75, 70, 75, 80 -> 2.5, 4, 2.5, 1; n = 4
    np.testing.assert_array_equal(borda_points(comparison.scores.score_MN), [4, 0, 4, 4])
    np.testing.assert_array_equal(comparison.rank_M, [1, 4, 1, 1])
    np.testing.assert_array_equal(comparison.mean_M, [67.5, NAN, 67.5, 65])
    np.testing.assert_array_equal(comparison.by_category["Nut"], comparison.mean_M)


def test_models_without_the_tasks_are_not_ranked(small):
    """Ours has B alone, which one model lacks: n is 3."""
    comparison = compare(small(), {"B": 70})
    assert comparison.ranked == 3
    np.testing.assert_array_equal(comparison.rank_M, [3, 1, 1, 0])


def test_the_same_scores_share_the_place(public):
    """A public model's own scores, with the noise of 100 x score: the ranks of both, and nothing missing."""
    for model in ("annamodels/LGAI-Embedding-Preview", "Qwen/Qwen3-Embedding-8B"):
        noisy = {task: 100 * (score / 100) * (1 + 1e-15) for task, score in named(public, model).items()}
        comparison = compare(public, noisy, name=model)
        row = 1 + public.row(model)
        assert not comparison.missing and comparison.ranked == 325
        assert comparison.rank_M[0] == comparison.rank_M[row] == borda_ranks(public.score_MN)[row - 1]
        np.testing.assert_array_equal(comparison.task_rank_MN[0], comparison.task_rank_MN[row])


ROW = st.lists(st.sampled_from([NAN, -3.0, 10.0, 20.0, 20.5]), min_size=3, max_size=3)


@given(st.lists(ROW, min_size=1, max_size=7))
def test_ranks_against_loops(rows):
    """The rule, in loops; and points do not depend on the order of models."""
    table = np.array(rows)
    n = sum(not all(np.isnan(x) for x in row) for row in rows)
    expected = []
    for row in rows:
        points = 0.0
        for task, x in enumerate(row):
            others = [other[task] for other in rows if not np.isnan(other[task])]
            if not np.isnan(x):
                points += n - (sum(y > x for y in others) + (sum(y == x for y in others) + 1) / 2)
        expected.append(points)
    np.testing.assert_array_equal(borda_points(table), expected)
    np.testing.assert_array_equal(borda_points(table[::-1]), expected[::-1])


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    (("model,registered,", "name,registered,"), "other first lines"),
    (("category,,Fruit", "kind,,Fruit"), "other first lines"),
    (("Nut,Nut", "Nut,"), "line 3: a task has no category"),
    (("A,B,C,D", "A,B,C,A"), "line 3: 6 entries.*no task twice"),
    (("80,80,60,75", "80,80,60"), "line 5: 5 entries"),
    (("two,0", "two,yes"), "line 5: 'two', 'yes'"),
    (("three,1", "one,1"), "line 6: 'one'.*a new name"),
    (("60", "sixty"), "line 5: C has 'sixty'"),
    (("60", "nan"), "line 5: C has 'nan'"),
    (("60", "160"), "line 5: C has '160'"),
    ((FILE[FILE.index("one") :], ""), "no model"),
    ((FILE, ""), "other first lines"),
])
def test_malformed_files(small, change, message):
    """The error names the line, and says what to do."""
    assert change[0] in FILE
    with pytest.raises(ValueError, match=rf"scores\.csv .*{message}.*make_public_scores"):
        small(FILE.replace(*change, 1))


@pytest.mark.parametrize(("ours", "message"), [
    ({}, "none"), ({"A": 1, "E": 2}, "'E'"), ({"A": 101}, "'A': score 101"), ({"A": NAN}, "'A': score nan"),
])
def test_scores_that_cannot_be_compared(small, ours, message):
    with pytest.raises(ValueError, match=message):
        compare(small(), ours)


def test_unknown_model(small):
    with pytest.raises(ValueError, match=r"'four': not in the public table.*Correct the name"):
        small().row("four")
    assert small().source == "a table by hand" and DECIMALS >= 5


def test_who_imports_whom():
    """compare.py needs numpy alone; ref/ knows nothing of leaderboard/."""
    heavy = ("pandas", "polars", "mteb", "torch")
    code = f"import sys, leaderboard.compare; print([name for name in {heavy} if name in sys.modules])"
    call = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert call.stdout.strip() == "[]"
    for path in ROOT.glob("ref/*.py"):
        assert not re.search(r"^\s*(from|import) leaderboard\b", path.read_text(), re.MULTILINE), path
