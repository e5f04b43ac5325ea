"""What a report says, as blocks that page.py and markdown.py both render, so that the values agree.

Texts in the blocks are not escaped; each renderer does that.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ref.evaluation.report.charts import Chart, bar_chart, difference_chart, position_chart
from ref.evaluation.report.leaderboard import BENCHMARK, Comparison, ScoreTable, read_public_scores
from ref.evaluation.report.run_results import Analysis, Report, TaskResult

NUM_NEIGHBOURS = 3  # models above and below, in the table of ranks
NO_VALUE = "–"
IN_TRAINING = "†"  # behind the name of a task whose data the model was trained on
WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")  # PairClassification -> Pair Classification


# ---- blocks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A paragraph; `notice`: it limits what the values mean, and is highlighted."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class KeyFigures:
    """The main values: (name, value, remark)."""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset({0})  # the others are numbers
    bold_rows: frozenset[int] = frozenset()  # of the evaluated model, or a total
    long_texts: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts of values that the tables or key figures have too; omitted in Markdown."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Text | KeyFigures | Table | Charts]


def format_number(value: float | None) -> str:
    """Format with two decimals; None and NaN as a dash."""
    return NO_VALUE if value is None or math.isnan(value) else f"{value:.2f}"


def format_signed(value: float) -> str:
    """Format with a sign and two decimals; zero has no sign."""
    text = f"{value:+.2f}"
    return NO_VALUE if math.isnan(value) else text[1:] if float(text) == 0 else text.replace("-", "−")


def count(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun: 1 task, 2 tasks."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def report_sections(report: Report, public: ScoreTable | None = None) -> list[Section]:
    """Return the sections of a report that have content.

    public: public_scores.csv by default. Raises ValueError as `Analysis` and `compare`.
    """
    analysis = Analysis(report, public or read_public_scores())
    sections = [_summary(analysis)]
    if analysis.comparison is not None:
        sections += [_by_category(analysis, analysis.comparison), _ranking(analysis, analysis.comparison)]
        sections += [_by_task(analysis, analysis.comparison)]
    sections += [_not_compared(analysis), _without_score(analysis), _prompts(report), _time(report), _sources(analysis)]
    return [section for section in sections if section.blocks]


# ---- sections ------------------------------------------------------------------------------------------------


def _summary(analysis: Analysis) -> Section:
    note, comparison = analysis.report.note, analysis.comparison
    rows = _key_figures(analysis, comparison) if comparison is not None else []
    if analysis.not_compared:
        mean = math.fsum(result.score for result in analysis.not_compared) / len(analysis.not_compared)
        remark = f"{count(len(analysis.not_compared), 'task')}, not compared with public scores"
        rows.append(("Mean of other tasks", format_number(mean), remark))
    blocks: list[Text | KeyFigures | Charts] = [Text(note, notice=True)] if note else []
    blocks += [_position(analysis, comparison)] if comparison is not None else []
    blocks += [KeyFigures(rows)] if rows else [Text("No task has a score.", notice=True)]
    blocks += [Text(text, notice=True) for text in [*_notices(analysis), *_training_notice(analysis.report)]]
    return Section("Summary", blocks)


def _position(analysis: Analysis, comparison: Comparison) -> Charts:
    """The model among all public ones, by the mean over the same tasks."""
    own, *public = zip(comparison.table.models, comparison.mean_M.tolist(), strict=True)
    known = [(model, mean) for model, mean in public if not math.isnan(mean)]
    named = next((each for each in known if each[0] == analysis.report.reference_model), None)
    title = f"{_mean_label(analysis, comparison)}, {count(len(known), 'public model')} and this one"
    return Charts([position_chart(title, own, named, [mean for model, mean in known if (model, mean) != named])])


def _key_figures(analysis: Analysis, comparison: Comparison) -> list[tuple[str, str, str]]:
    is_complete, num_tasks, total = not comparison.missing, len(comparison.table.tasks), len(analysis.public.tasks)
    num_categories = count(len(comparison.category_means), "category", "categories")
    known_M = comparison.mean_M[~np.isnan(comparison.mean_M)]
    among = f"among {comparison.num_ranked - 1} public models and this one"
    return [
        ("Mean (Task)" if is_complete else "Mean of evaluated tasks", format_number(comparison.mean_M[0]),
         f"over all {total} tasks" if is_complete else f"over {count(num_tasks, 'task')}"),
        ("Mean (TaskType)" if is_complete else "Mean of categories", format_number(comparison.category_mean_M[0]),
         f"over {num_categories}"),
        ("Borda rank" if is_complete else "Borda rank (partial)", str(comparison.rank_M[0]),
         among + (", on all tasks" if is_complete else ", on the evaluated tasks")),
        ("Position by the mean", f"{1 + int((known_M[1:] > known_M[0]).sum())} of {len(known_M)}",
         "among the models with all these tasks"),
        ("Tasks", f"{num_tasks} of {total}", f"of {BENCHMARK}, official data"),
    ]


def _notices(analysis: Analysis) -> list[str]:
    """The limits of the comparison."""
    comparison, report = analysis.comparison, analysis.report
    if not report.tasks:
        return []
    if comparison is None:
        return [f"Not compared with public scores: no task was evaluated on official data of {BENCHMARK}."]
    texts = []
    if comparison.missing:
        texts.append(f"Partial run: {len(comparison.missing)} of the {len(analysis.public.tasks)} tasks of {BENCHMARK} "
                     "have no score on official data. Means and ranks of all models are computed on the evaluated "
                     "tasks only, so they differ from the public leaderboard.")
    num_unofficial = sum(not result.official for result in report.tasks)
    if num_unofficial:
        texts.append(f"Data of unofficial origin ({count(num_unofficial, 'task')}): not compared with public scores, "
                     "and not part of the means and ranks.")
    models = dict.fromkeys([*report.compared_models, report.reference_model])
    absent = [model for model in models if not analysis.is_public(model)]
    if absent:
        texts.append(f"Not in the table of public scores, therefore not shown: {', '.join(absent)}.")
    return texts


def _training_notice(report: Report) -> list[str]:
    """The tasks whose data the model was trained on."""
    found = [result for result in report.tasks if result.training_data]
    names = ", ".join(f"{result.task} ({result.training_data})" for result in found)
    return [f"{IN_TRAINING} Trained on data of {count(len(found), 'task')}, judged by name: {names}. The training "
            "split, or more, was seen in training."] if found else []


def _by_category(analysis: Analysis, comparison: Comparison) -> Section:
    columns = {_mean_label(analysis, comparison): comparison.mean_M,
               "Mean of categories" if comparison.missing else "Mean (TaskType)": comparison.category_mean_M}
    for category, means in comparison.category_means.items():
        columns[_category_label(analysis, comparison, category)] = means
    order = sorted(analysis.shown, key=lambda row: (comparison.rank_M[row] or math.inf, row))
    rows = [[_name(comparison, row), _rank(comparison, row), *(format_number(means[row]) for means in columns.values())]
            for row in order]
    charts = [bar_chart(title, [(_name(comparison, row), float(means[row])) for row in analysis.shown])
              for title, means in columns.items()]
    text = Text("Scores in percent. A dash: the model has no score in at least one of the tasks.")
    table = Table("Means and Borda rank", ["Model", "Borda rank", *columns], rows,
                  bold_rows=frozenset({order.index(0)}))
    return Section("Comparison with public models by category", [text, Charts(charts), table])


def _name(comparison: Comparison, row: int) -> str:
    """A model's name in tables and charts; the evaluated model may have the name of a public one."""
    return comparison.table.models[row] + (" (this run)" if row == 0 else "")


def _rank(comparison: Comparison, row: int) -> str:
    return str(comparison.rank_M[row] or NO_VALUE)


def _mean_label(analysis: Analysis, comparison: Comparison) -> str:
    num_tasks, total = len(comparison.table.tasks), len(analysis.public.tasks)
    return "Mean (Task)" if num_tasks == total else f"Mean, {num_tasks} of {total} tasks"


def _category_label(analysis: Analysis, comparison: Comparison, category: str) -> str:
    """STS, or in a partial run: STS, 3 of 9."""
    label = WORD_BOUNDARY.sub(" ", category)
    num_tasks, total = comparison.table.categories.count(category), analysis.public.categories.count(category)
    return label if num_tasks == total else f"{label}, {num_tasks} of {total}"


def _ranking(analysis: Analysis, comparison: Comparison) -> Section:
    rank_M, is_listed_M = comparison.rank_M, comparison.table.registered_M & (comparison.rank_M > 0)
    listed = [row for row in np.lexsort((np.arange(len(rank_M)), rank_M)).tolist() if is_listed_M[row]]
    own = listed.index(0)
    nearest = listed[max(0, own - NUM_NEIGHBOURS) : own + NUM_NEIGHBOURS + 1]
    rows = [[_name(comparison, row), _rank(comparison, row), format_number(comparison.mean_M[row])] for row in nearest]
    num_unlisted = int(np.count_nonzero(~comparison.table.registered_M & (rank_M > 0)))
    text = Text(f"Borda count: in each task a model gets n − rank points (n = {comparison.num_ranked} models, this one "
                "included), and 0 points without a score; models are ranked by the sum. Because this run is included, "
                "a public model can rank lower than on the leaderboard. Included but not listed: "
                f"{count(num_unlisted, 'model')} unknown to mteb's registry.")
    header = ["Model", "Borda rank", _mean_label(analysis, comparison)]
    table = Table("Nearest models by Borda rank", header, rows, bold_rows=frozenset({nearest.index(0)}))
    return Section("Rank among all public models", [text, table])


def _by_task(analysis: Analysis, comparison: Comparison) -> Section:
    score_ME, reference_row = comparison.table.score_ME, analysis.reference_row
    rows, differences = [], []
    results = {result.task: result for result in analysis.compared}
    for index, task in enumerate(comparison.table.tasks):
        score = score_ME[0, index]
        cells = [_task_name(results[task]), format_number(score)]
        if reference_row is not None:
            difference = float(score - score_ME[reference_row, index])
            cells += [format_number(score_ME[reference_row, index]), format_signed(difference)]
            differences.append((task, difference))
        num_models = np.count_nonzero(~np.isnan(score_ME[:, index]))
        rank = f"{comparison.task_rank_ME[0, index]:g} of {num_models}"
        rows.append([*cells, rank, comparison.table.categories[index], results[task].metric])
    reference = [] if reference_row is None else [analysis.report.reference_model, "Difference"]
    header = ["Task", analysis.report.model, *reference, "Rank in task", "Category", "Metric"]
    table = Table("Scores by task", header, rows, frozenset({0, len(header) - 2, len(header) - 1}))
    return Section("Scores by task", [*_difference_blocks(analysis.report, differences), table])


def _task_name(result: TaskResult) -> str:
    return f"{result.task} {IN_TRAINING}" if result.training_data else result.task


def _difference_blocks(report: Report, differences: Sequence[tuple[str, float]]) -> list[Text | Charts]:
    known = sorted(((task, value) for task, value in differences if not math.isnan(value)), key=lambda pair: -pair[1])
    if not known:
        return []
    num_higher, num_lower = sum(value > 0 for _, value in known), sum(value < 0 for _, value in known)
    num_unknown, title = len(differences) - len(known), f"{report.model} minus {report.reference_model}"
    unknown = f"; {num_unknown} without a score of {report.reference_model}" if num_unknown else ""
    text = (f"{title}, in percentage points: higher in {count(num_higher, 'task')}, lower in {num_lower}, "
            f"equal in {len(known) - num_higher - num_lower}{unknown}.")
    chart = difference_chart(f"{title}, by task", [(task, value, format_signed(value)) for task, value in known])
    return [Text(text), Charts([chart])]


def _not_compared(analysis: Analysis) -> Section:
    results, title = analysis.not_compared, "Not compared with public scores"
    if not results:
        return Section(title, [])
    rows = [[_task_name(result), format_number(result.score), analysis.data_status(result), result.category,
             result.metric] for result in results]
    chart = bar_chart(f"{analysis.report.model}, not compared with public scores",
                      [(result.task, result.score) for result in results], highlighted=None)
    table = Table("Scores of other tasks", ["Task", "Score", "Data", "Category", "Metric"], rows,
                  text_columns=frozenset({0, 2, 3, 4}))
    text = Text("These tasks or their data are not the benchmark's: compare them only with runs on the same data.")
    return Section(title, [text, Charts([chart]), table])


def _without_score(analysis: Analysis) -> Section:
    report = analysis.report
    rows = [[task, f"failed: {error}"] for task, error in report.failed.items()]
    rows += [[task, "selected, but no data found"] for task in report.missing]
    blocks: list[Text | Table] = []
    if rows:
        blocks.append(Table("Failed tasks and tasks without data", ["Task", "Reason"], rows, frozenset({0, 1}),
                            long_texts=True))
    known = {*report.failed, *report.missing, *(result.task for result in report.tasks)}
    rest = [task for task in analysis.public.tasks if task not in known]
    if rest and analysis.comparison is not None:
        blocks.append(Text(f"Not evaluated ({len(rest)}): {', '.join(rest)}."))
    return Section("Tasks without a score", blocks)


def _prompts(report: Report) -> Section:
    rows = [[result.task, result.instruction or "none", str(result.examples), result.examples_source or NO_VALUE]
            for result in report.tasks]
    header = ["Task", "Instruction", "Examples", "Source of the examples"]
    table = Table("Instruction and in-context examples of each task", header, rows, frozenset({0, 1, 3}),
                  long_texts=True)
    return Section("Prompts", [table] if rows else [])


def _time(report: Report) -> Section:
    rows = [[result.task, _seconds(result.seconds), _tokens(result.tokens), _speed(result.seconds, result.tokens)]
            for result in report.tasks]
    if all(result.seconds is None and result.tokens is None for result in report.tasks):
        return Section("Time and tokens", [])
    measured = [result for result in report.tasks if result.seconds is not None and result.tokens is not None]
    seconds, tokens = _sum(result.seconds for result in measured), int(_sum(result.tokens for result in measured))
    rows.append(["Total of tasks with time and tokens", _seconds(seconds), _tokens(tokens),
                 _speed(seconds, tokens or None)])
    header = ["Task", "Seconds", "Tokens", "Tokens per second"]
    table = Table("Seconds and tokens by task", header, rows, bold_rows=frozenset({len(rows) - 1}))
    return Section("Time and tokens", [Text("A dash: not measured, e.g. for a cached result."), table])


def _sum(values: Iterable[float | None]) -> float:
    return math.fsum(value for value in values if value is not None)


def _seconds(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:,.1f}"


def _tokens(value: int | None) -> str:
    return NO_VALUE if value is None else f"{value:,}"


def _speed(seconds: float | None, tokens: int | None) -> str:
    return f"{tokens / seconds:,.0f}" if seconds and tokens is not None else NO_VALUE


def _sources(analysis: Analysis) -> Section:
    blocks: list[Text | Table] = []
    if analysis.report.versions:
        rows = [[name, version] for name, version in analysis.report.versions.items()]
        blocks.append(Table("Versions", ["Software", "Version"], rows, frozenset({0, 1})))
    if analysis.comparison is not None:
        blocks.append(Text(f"Public scores: {analysis.public.source or 'source unknown'}; "
                           f"{len(analysis.public.models)} models. Means and ranks are computed as on mteb's "
                           "leaderboard."))
    return Section("Versions and sources", blocks)
