"""Means and Borda ranks against the published values, against mteb's own computation, and on small tables by hand."""

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.evaluation.report.leaderboard import (
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

ROOT = Path(__file__).parents[2]
NAN = np.nan
# 3 models x 4 tasks, as in the docstring of leaderboard.py
SMALL_LE = np.array([[90, 80, NAN, 70], [80, 80, 60, 75], [70, NAN, 50, 80]], dtype=float)
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


@pytest.fixture(scope="module")
def script():
    """data/make_public_scores.py as a module."""
    spec = importlib.util.spec_from_file_location("make_public_scores", ROOT / "data" / "make_public_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores_of(public, model):
    """Task -> score of a public model."""
    return dict(zip(public.tasks, public.score_ME[public.row(model)].tolist(), strict=True))


# ---- the public table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "mean", "category", "rank"), [
    ("annamodels/LGAI-Embedding-Preview", 74.12, 68.40, 6),
    ("Qwen/Qwen3-Embedding-8B", 75.23, None, 4),
    ("google/gemini-embedding-001", 73.30, None, 9),
    ("intfloat/e5-mistral-7b-instruct", 67.97, None, 37),
])
def test_published_values(public, model, mean, category, rank):
    """Values of the public leaderboard, to its two decimals."""
    row = public.row(model)
    assert public.score_ME.shape == (324, 41)
    assert round(task_mean(public.score_ME)[row], 2) == mean
    assert category is None or round(category_mean(public.score_ME, public.categories)[row], 2) == category
    assert borda_ranks(public.score_ME)[row] == rank


@pytest.fixture(scope="module")
def long_table(public):
    """The public table in mteb's form: one row per score."""
    import polars

    rows = [(model, task, "default", "test", float(score))
            for model, scores in zip(public.models, public.score_ME, strict=True)
            for task, score in zip(public.tasks, scores, strict=True) if not np.isnan(score)]
    return polars.DataFrame(rows, schema=["model_name", "task_name", "subset", "split", "score"], orient="row")


def test_means_and_ranks_equal_mtebs_for_all_models(public, long_table):
    """mteb's own functions for all models, and its summary table, which has the registered ones only."""
    from mteb.benchmarks import _create_table as mteb_table

    pivot, tasks = mteb_table._build_per_task_pivot(long_table)
    expressions, _ = mteb_table._get_means_per_types(tasks)
    values = pivot.select("model_name", *expressions, mteb_table._skipna_false_mean(tasks).alias("Mean (Task)"))
    ranks = mteb_table._borda_rank_from_long(long_table, n_models=pivot.height)
    _assert_equal(public, values.join(ranks, on="model_name"), models=324)
    summary = mteb_table._create_summary_table(long_table).df.rename({"Model": "model_name"})
    _assert_equal(public, summary, models=int(public.registered_M.sum()))
    changed_ME = public.score_ME.copy()
    changed_ME[public.row("Qwen/Qwen3-Embedding-8B"), 0] -= 1e-6  # the comparison must detect it
    with pytest.raises(AssertionError):
        _assert_equal(dataclasses.replace(public, score_ME=changed_ME), summary, models=summary.height)


def _assert_equal(public, values, *, models):
    own = {"Mean (Task)": task_mean(public.score_ME), **category_means(public.score_ME, public.categories),
            "Mean (TaskType)": category_mean(public.score_ME, public.categories),
            "Rank (Borda)": borda_ranks(public.score_ME)}
    assert values.height == models
    order = [public.row(name) for name in values["model_name"].str.split("](").list.first().str.strip_chars("[")]
    columns = [name for name in own if name in values.columns]
    assert {"Mean (Task)", "Rank (Borda)", "STS", "Retrieval"} <= set(columns)
    for name in columns:
        expected = values[name].cast(float).fill_null(NAN).to_numpy()
        np.testing.assert_allclose(own[name][order], expected, rtol=0, atol=1e-9, err_msg=name)


def test_the_file_equals_the_scripts_output(public, script, tmp_path):
    """Written again from its own table: the same lines, and each task has mteb's category."""
    from ref.evaluation.tasks import benchmark_tasks

    categories = {name: str(task.metadata.type) for name, task in benchmark_tasks().items()}
    long = tmp_path / "long.csv"
    cells = [f"{model},{task},{'' if np.isnan(score) else score}" for model in public.models
             for task, score in scores_of(public, model).items()]
    long.write_text("\n".join(["model,task,score", *reversed(cells)]))  # in another order
    registered = {model for model, known in zip(public.models, public.registered_M, strict=True) if known}
    text = script.format_table(script.read_scores(long), categories, registered)
    assert text.splitlines()[1:] == PUBLIC_SCORES.read_text().splitlines()[1:]  # the first line has mteb's version


def test_the_script_rejects_bad_input(script, tmp_path):
    """Files without valid scores, and rounding that makes a tie."""
    long = tmp_path / "long.csv"
    for text, message in [
        ("model,task,score\nx,A,no", "long.csv:2: .*'no'"),
        ("model,task,score\nx,A,1\nx,A,1", "long.csv:3: task 'A' of 'x' must occur once"),
        ("model,task\nx,A", "long.csv:1: must have the columns"), ("model,task,score\nx,A", "long.csv:2: must have 3"),
        ("model,task,score\nx,A,101", "long.csv:2: score of task 'A' must be .*got 101"),
    ]:
        long.write_text(text)
        with pytest.raises(ValueError, match=message):
            script.read_scores(long)
    with pytest.raises(ValueError, match="must not change the Borda points"):
        script.format_table({"x": {"A": 1 + 1e-10}, "y": {"A": 1.0}}, {"A": "STS"}, set())
    with pytest.raises(ValueError, match="must be tasks of"):
        script.format_table({"x": {"B": 1.0}}, {"A": "STS"}, set())


def test_the_script_runs_from_the_project_root(tmp_path):
    """As a command; it writes the file, or prints one line for bad input and writes nothing."""
    long, output = tmp_path / "long.csv", tmp_path / "scores.csv"
    command = [sys.executable, "data/make_public_scores.py", str(long), "--output", str(output)]
    long.write_text("model,task,score\nx/y,STS12,no")
    call = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert call.returncode == 2 and call.stderr.splitlines()[-1].startswith("error: long.csv:2: ")
    assert not output.exists()
    long.write_text("model,task,score\nx/y,STS12,81.5")
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = read_public_scores(output)
    assert table.models == ("x/y",) and table.score_ME[0, table.tasks.index("STS12")] == 81.5


# ---- by hand -------------------------------------------------------------------------------------------------


def test_ranks_points_and_means_by_hand():
    """Ties share a rank; a missing task gives no points and no mean."""
    np.testing.assert_array_equal(task_ranks(SMALL_LE), [[1, 1.5, NAN, 3], [2, 1.5, 1, 2], [3, NAN, 2, 1]])
    np.testing.assert_array_equal(borda_points(SMALL_LE), [3.5, 5.5, 3])
    np.testing.assert_array_equal(borda_ranks(SMALL_LE), [2, 1, 3])
    np.testing.assert_array_equal(task_mean(SMALL_LE), [NAN, 73.75, NAN])
    means = category_means(SMALL_LE, ["Fruit", "Fruit", "Nut", "Nut"])
    np.testing.assert_array_equal(means["Fruit"], [85, 80, NAN])
    np.testing.assert_array_equal(means["Nut"], [NAN, 67.5, 65])
    both = category_mean(SMALL_LE, ["Fruit", "Nut", "Nut", "Nut"])
    np.testing.assert_allclose(both, [NAN, (80 + 215 / 3) / 2, NAN], rtol=1e-15)


def test_ties_of_points_get_the_smaller_rank():
    """Ranks 1, 1, 3; a model without any score is not ranked."""
    score_ME = np.array([[90, 80], [80, 90], [70, 70], [NAN, NAN]], dtype=float)
    np.testing.assert_array_equal(borda_points(score_ME), [3, 3, 0, 0])  # n = 3
    np.testing.assert_array_equal(borda_ranks(score_ME), [1, 1, 3, 0])


def test_a_partial_run_is_compared_on_its_tasks(small):
    """Scores for C and D: all models are compared on these two, by hand."""
    comparison = compare(small(), {"D": 75, "C": 60}, name="new")
    assert comparison.table.tasks == ("C", "D") and comparison.table.categories == ("Nut", "Nut")
    assert comparison.table.models == ("new", "one", "two", "three")
    assert comparison.missing == ("A", "B") and comparison.num_ranked == 4
    # C: 60, -, 60, 50 -> ranks 1.5, -, 1.5, 3; D: 75, 70, 75, 80 -> 2.5, 4, 2.5, 1; n = 4
    np.testing.assert_array_equal(borda_points(comparison.table.score_ME), [4, 0, 4, 4])
    np.testing.assert_array_equal(comparison.rank_M, [1, 4, 1, 1])
    np.testing.assert_array_equal(comparison.mean_M, [67.5, NAN, 67.5, 65])
    np.testing.assert_array_equal(comparison.category_means["Nut"], comparison.mean_M)


def test_models_without_the_tasks_are_not_ranked(small):
    """Scores for B only, which one model lacks: n is 3."""
    comparison = compare(small(), {"B": 70})
    assert comparison.num_ranked == 3
    np.testing.assert_array_equal(comparison.rank_M, [3, 1, 1, 0])


def test_equal_scores_get_equal_ranks(public):
    """A public model's own scores with the rounding error of 100 x score tie with it in every task."""
    for model in ("annamodels/LGAI-Embedding-Preview", "Qwen/Qwen3-Embedding-8B"):
        noisy = {task: 100 * (score / 100) * (1 + 1e-15) for task, score in scores_of(public, model).items()}
        comparison = compare(public, noisy, name=model)
        row = 1 + public.row(model)
        assert not comparison.missing and comparison.num_ranked == 325
        assert comparison.rank_M[0] == comparison.rank_M[row] == borda_ranks(public.score_ME)[row - 1]
        np.testing.assert_array_equal(comparison.task_rank_ME[0], comparison.task_rank_ME[row])


ROW = st.lists(st.sampled_from([NAN, -3.0, 10.0, 20.0, 20.5]), min_size=3, max_size=3)


@given(st.lists(ROW, min_size=1, max_size=7))
def test_ranks_against_loops(rows):
    """The rule as loops; and points do not depend on the order of the models."""
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
    (("model,registered,", "name,registered,"), " must begin with the lines"),
    (("category,,Fruit", "kind,,Fruit"), " must begin with the lines"),
    (("Nut,Nut", "Nut,"), "3: each task must have a category"),
    (("A,B,C,D", "A,B,C,A"), " each task must occur once.*A,B,C,A"),
    (("80,80,60,75", "80,80,60"), "5: must have 6 entries.*got 5"),
    (("two,0", "two,yes"), "5: 'registered' must be 0 or 1.*'yes'"),
    (("three,1", "one,1"), "6: the model must have a name of its own.*'one'"),
    (("three,1", ",1"), "6: the model must have a name of its own.*''"),
    (("60", "sixty"), "5: C must be .*'sixty'"),
    (("60", "nan"), "5: C must be .*'nan'"),
    (("60", "160"), "5: C must be .*'160'"),
    ((FILE[FILE.index("one") :], ""), " must have a line for at least one model"),
    ((FILE, ""), " must begin with the lines"),
])
def test_malformed_files(small, change, message):
    """The error names file and line, and says how to make the file again."""
    assert change[0] in FILE
    with pytest.raises(ValueError, match=rf"scores\.csv:{message}.*make_public_scores"):
        small(FILE.replace(*change, 1))


@pytest.mark.parametrize(("scores", "message"), [
    ({}, "got none"), ({"A": 1, "E": 2}, "got 'E'"), ({"A": 101}, "task 'A' must be .*got 101"),
    ({"A": NAN}, "task 'A' must be .*got nan"),
])
def test_scores_that_cannot_be_compared(small, scores, message):
    with pytest.raises(ValueError, match=message):
        compare(small(), scores)


def test_unknown_model(small):
    with pytest.raises(ValueError, match=r"model 'four' must be in the public table.*'one'"):
        small().row("four")
    assert small().source == "a table by hand" and DECIMALS >= 5


def test_imports():
    """leaderboard.py needs numpy only; nothing in ref outside the evaluation imports the report."""
    path = ROOT / "ref/evaluation/report/leaderboard.py"
    assert _imported(path) - set(sys.stdlib_module_names) == {"numpy"}
    heavy = ("pandas", "polars", "mteb", "datasets")
    code = f"import sys, ref.evaluation.report.leaderboard; print([name for name in {heavy} if name in sys.modules])"
    call = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert call.stdout.strip() == "[]"
    for path in ROOT.glob("ref/**/*.py"):
        if ROOT / "ref/evaluation" not in path.parents:
            assert "ref.evaluation.report" not in path.read_text(), path


def _imported(path):
    """The top-level packages of the import statements in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
