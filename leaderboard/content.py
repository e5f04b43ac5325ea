"""What the report of a run says, as blocks that page.py and markdown.py both write, so that their figures agree.

Texts in the blocks are as they came; each writer escapes. Called by report.py.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from leaderboard.compare import BENCHMARK, Comparison, Scores, read_public_scores
from leaderboard.pictures import Picture, bars, differences
from leaderboard.results import Findings, Report

NEIGHBOURS = 3  # models above and below, in the table of the place among all
NO_FIGURE = "–"
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where PairClassification becomes two words


# ---- blocks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A paragraph; `notice` if it limits what the figures mean."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Figures:
    """The few figures to see first: (what, figure, remark)."""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """texts: the columns that are text, the others are figures. marked: the rows of our model. prose: long texts."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    marked: frozenset[int] = frozenset()
    prose: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures of figures that a table of the same section holds too; Markdown leaves them out."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Text | Figures | Table | Pictures]


def number(value: float | None) -> str:
    """Two decimals, or a dash where there is no figure."""
    return NO_FIGURE if value is None or math.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    """Two decimals with a sign, which zero has not."""
    text = f"{value:+.2f}"
    return NO_FIGURE if math.isnan(value) else text[1:] if float(text) == 0 else text.replace("-", "−")


def count(how_many: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 task, 2 tasks."""
    return f"{how_many} {one if how_many == 1 else many or one + 's'}"


def contents(report: Report, public: Scores | None = None) -> list[Section]:
    """The sections of a report; those without content are left out.

    public: by default the project's table. Raises: ValueError as `Findings` and `compare`.
    """
    found = Findings(report, public or read_public_scores())
    sections = [_summary(found)]
    if found.comparison is not None:
        sections += [_beside(found, found.comparison), _place(found, found.comparison)]
        sections += [_by_task(found, found.comparison)]
    sections += [_not_comparable(found), _gaps(found), _prompts(report), _costs(report), _origin(found)]
    return [section for section in sections if section.blocks]


# ---- sections ------------------------------------------------------------------------------------------------


def _summary(found: Findings) -> Section:
    blocks: list[Text | Figures] = [Text(found.report.note, notice=True)] if found.report.note else []
    rows, comparison = _stand_in_figures(found), found.comparison
    if comparison is not None:
        rows = [*_headline(found, comparison), *rows]
    blocks += [Figures(rows)] if rows else [Text("No task has a score.", notice=True)]
    blocks += [Text(text, notice=True) for text in _limits(found)]
    return Section("Summary", blocks)


def _headline(found: Findings, comparison: Comparison) -> list[tuple[str, str, str]]:
    whole, done = not comparison.missing, len(comparison.scores.tasks)
    total = len(found.public.tasks)
    over = f"over all {total} tasks" if whole else f"over the {count(done, 'task')} run"
    kinds = count(len(comparison.by_category), "category", "categories")
    place = f"among {comparison.ranked - 1} public models and this one, " + ("all tasks" if whole else "the tasks run")
    return [
        ("Mean (Task)" if whole else "Mean of the tasks run", number(comparison.mean_M[0]), over),
        ("Mean (TaskType)" if whole else "Mean of their categories", number(comparison.category_mean_M[0]),
         f"of {kinds}"),
        ("Borda rank" if whole else "Borda rank, partial", str(comparison.rank_M[0]), place),
        ("Tasks", f"{done} of {total}", f"of {BENCHMARK}, official data"),
    ]


def _stand_in_figures(found: Findings) -> list[tuple[str, str, str]]:
    if not found.others:
        return []
    mean = math.fsum(row.score for row in found.others) / len(found.others)
    return [("Mean without counterpart", number(mean), f"{count(len(found.others), 'task')}, not comparable")]


def _limits(found: Findings) -> list[str]:
    """What the figures cannot say."""
    texts, comparison, report = [], found.comparison, found.report
    if comparison is not None and comparison.missing:
        texts.append(f"Partial run: {len(comparison.missing)} of the {len(found.public.tasks)} tasks of {BENCHMARK} "
                     "have no score here. All models are compared on the tasks of this run alone, so no mean and no "
                     "rank below is one of the public leaderboard's.")
    if comparison is None and report.tasks:
        texts.append("Nothing here can be compared with public scores: no task ran on data that are known to "
                     f"be the official ones of {BENCHMARK}.")
    stand_ins = [row for row in report.tasks if not row.official]
    if stand_ins and comparison is not None:
        texts.append(f"Not comparable: {count(len(stand_ins), 'task')} ran on other data. They count in no mean and "
                     "no rank, and have a section of their own.")
    absent = [name for name in dict.fromkeys([*report.chosen, report.against]) if not found.has(name)]
    if absent and comparison is not None:
        texts.append(f"Not in the public table, so left out: {', '.join(absent)}.")
    return texts


def _beside(found: Findings, comparison: Comparison) -> Section:
    labels = {"mean": _mean_label(found, comparison), "kinds": _kinds_label(comparison)}
    columns = {labels["mean"]: comparison.mean_M, labels["kinds"]: comparison.category_mean_M}
    columns |= {_category_label(found, comparison, name): means for name, means in comparison.by_category.items()}
    shown = sorted(found.shown, key=lambda row: (comparison.rank_M[row] or math.inf, row))
    rows = [[_name(comparison, row), _rank(comparison, row), *(number(means[row]) for means in columns.values())]
            for row in shown]
    marked = frozenset({shown.index(0)})
    pictures = [bars(title, [(_name(comparison, row), float(means[row])) for row in found.shown])
                for title, means in columns.items()]
    text = Text(f"Scores in percent; “{comparison.scores.models[0]}” is this run. A dash: the model lacks a task that "
                "the mean needs.")
    table = Table("Means and Borda rank", ["Model", "Borda rank", *columns], rows, marked=marked)
    return Section("Beside public models, by category", [text, Pictures(pictures), table])


def _name(comparison: Comparison, row: int) -> str:
    """A model's name in tables and pictures; ours is told apart from a public one of the same name."""
    return comparison.scores.models[row] + (" (this run)" if row == 0 else "")


def _rank(comparison: Comparison, row: int) -> str:
    return str(comparison.rank_M[row] or NO_FIGURE)


def _mean_label(found: Findings, comparison: Comparison) -> str:
    done, total = len(comparison.scores.tasks), len(found.public.tasks)
    return "Mean (Task)" if done == total else f"Mean, {done} of {total} tasks"


def _kinds_label(comparison: Comparison) -> str:
    return "Mean (TaskType)" if not comparison.missing else "Mean of categories"


def _category_label(found: Findings, comparison: Comparison, category: str) -> str:
    """STS; or, where ours lacks tasks: STS, 3 of 9."""
    title = CAPITAL.sub(" ", category)
    ran, needed = comparison.scores.categories.count(category), found.public.categories.count(category)
    return title if ran == needed else f"{title}, {ran} of {needed}"


def _place(found: Findings, comparison: Comparison) -> Section:
    visible = [row for row in np.lexsort((np.arange(len(comparison.rank_M)), comparison.rank_M)).tolist()
               if comparison.rank_M[row] and comparison.scores.registered_M[row]]
    at = visible.index(0)
    near = visible[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
    rows = [[_name(comparison, row), _rank(comparison, row), number(comparison.mean_M[row])] for row in near]
    hidden = int(np.count_nonzero(~comparison.scores.registered_M))
    text = Text(f"In each task a model gets n − rank points, n = {comparison.ranked} models with this one, and none "
                "where it has no score; the sum ranks. As this run takes part, a public model may stand a rank lower "
                f"than on the leaderboard. {count(hidden, 'model')} that mteb's registry does not know count, but are "
                "not shown.")
    header = ["Model", "Borda rank", _mean_label(found, comparison)]
    table = Table("The nearest by Borda rank", header, rows, marked=frozenset({near.index(0)}))
    return Section("Place among all", [text, table])


def _by_task(found: Findings, comparison: Comparison) -> Section:
    rival_N = comparison.scores.score_MN[found.against] if found.against is not None else None
    rows, gaps = [], []
    results = {row.task: row for row in found.comparable}
    for index, task in enumerate(comparison.scores.tasks):
        score = comparison.scores.score_MN[0, index]
        cells = [task, number(score)]
        if rival_N is not None:
            cells += [number(rival_N[index]), signed(score - rival_N[index])]
            gaps += [(task, float(score - rival_N[index]))]
        among = np.count_nonzero(~np.isnan(comparison.scores.score_MN[:, index]))
        place = f"{comparison.task_rank_MN[0, index]:g} of {among}"
        rows.append([*cells, place, comparison.scores.categories[index], results[task].metric])
    rival = [found.report.against, "Difference"] if rival_N is not None else []
    header = ["Task", found.report.model, *rival, "Rank in task", "Category", "Metric"]
    table = Table("Scores by task", header, rows, texts=frozenset({0, len(header) - 2, len(header) - 1}))
    return Section("By task", [*_difference_picture(found.report, gaps), table])


def _difference_picture(report: Report, gaps: Sequence[tuple[str, float]]) -> list[Text | Pictures]:
    known = sorted(((task, gap) for task, gap in gaps if not math.isnan(gap)), key=lambda pair: -pair[1])
    if not known:
        return []
    ahead, behind = sum(gap > 0 for _, gap in known), sum(gap < 0 for _, gap in known)
    unknown = f"; {len(gaps) - len(known)} without a score of {report.against}" if len(gaps) > len(known) else ""
    text = (f"{report.model} minus {report.against}, in points: ahead in {count(ahead, 'task')}, behind in {behind}, "
            f"equal in {len(known) - ahead - behind}{unknown}.")
    title = f"{report.model} minus {report.against}, by task"
    return [Text(text), Pictures([differences(title, [(task, gap, signed(gap)) for task, gap in known])])]


def _not_comparable(found: Findings) -> Section:
    rows = [[row.task, number(row.score), found.why_not(row), row.category, row.metric] for row in found.others]
    if not rows:
        return Section("Not comparable", [])
    picture = bars(f"{found.report.model}, not comparable", [(row.task, row.score) for row in found.others], ours=None)
    table = Table("Scores without a public counterpart", ["Task", "Score", "Data", "Category", "Metric"], rows,
                  texts=frozenset({0, 2, 3, 4}))
    text = Text("These figures measure something, but not what the public scores measure: set them beside runs on the "
                "same data alone.")
    return Section("Not comparable", [text, Pictures([picture]), table])


def _gaps(found: Findings) -> Section:
    report = found.report
    rows = [[task, f"failed: {error}"] for task, error in report.failed.items()]
    rows += [[task, "selected, but there are no data here"] for task in report.missing]
    blocks: list[Text | Table] = []
    if rows:
        blocks.append(Table("Tasks without a score", ["Task", "Why"], rows, texts=frozenset({0, 1}), prose=True))
    seen = {*report.failed, *report.missing, *(row.task for row in report.tasks)}
    rest = [task for task in found.public.tasks if task not in seen]
    if rest and found.comparison is not None:
        blocks.append(Text(f"Not run ({len(rest)}): {', '.join(rest)}."))
    return Section("Without a score", blocks)


def _prompts(report: Report) -> Section:
    rows = [[row.task, row.instruction or "none", str(row.examples), row.examples_source or NO_FIGURE]
            for row in report.tasks]
    header = ["Task", "Instruction", "Examples", "Where the examples came from"]
    table = Table("Prompt of each task", header, rows, texts=frozenset({0, 1, 3}), prose=True)
    return Section("Prompts", [table] if rows else [])


def _costs(report: Report) -> Section:
    rows = [[row.task, _seconds(row.seconds), _tokens(row.tokens), _speed(row.seconds, row.tokens)]
            for row in report.tasks]
    timed = [row for row in report.tasks if row.seconds is not None and row.tokens is not None]
    seconds = [row.seconds for row in report.tasks if row.seconds is not None]
    tokens = [row.tokens for row in report.tasks if row.tokens is not None]
    if not seconds and not tokens:
        return Section("Time", [])
    rows.append(["All with a figure", _seconds(math.fsum(seconds) if seconds else None),
                 _tokens(sum(tokens) if tokens else None),
                 _speed(_sum(row.seconds for row in timed), int(_sum(row.tokens for row in timed)) or None)])
    header = ["Task", "Seconds", "Tokens", "Tokens a second"]
    table = Table("Seconds and tokens by task", header, rows, marked=frozenset({len(rows) - 1}))
    return Section("Time and tokens", [Text("A dash: not measured, as for a result read from the cache."), table])


def _sum(values: Iterable[float | None]) -> float:
    return math.fsum(value for value in values if value is not None)


def _seconds(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:,.1f}"


def _tokens(value: int | None) -> str:
    return NO_FIGURE if value is None else f"{value:,}"


def _speed(seconds: float | None, tokens: int | None) -> str:
    return f"{tokens / seconds:,.0f}" if seconds and tokens is not None else NO_FIGURE


def _origin(found: Findings) -> Section:
    blocks: list[Text | Table] = []
    if found.report.versions:
        rows = [[name, version] for name, version in found.report.versions.items()]
        blocks.append(Table("Versions", ["What", "Version"], rows, texts=frozenset({0, 1})))
    if found.comparison is not None:
        blocks.append(Text(f"Public scores: {found.public.source or 'a table without a source'}; "
                           f"{len(found.public.models)} models. Means and ranks by the rule of mteb's leaderboard."))
    return Section("Versions and sources", blocks)
