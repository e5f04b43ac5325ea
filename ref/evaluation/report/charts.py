"""The charts of a report as inline SVG, in the colours of the page's style sheet: a model among many, bars,
differences.

A chart fills the width of its container. `narrow` is for phones; a chart with `wide` shows that one on larger screens,
so that the font size stays the same. All texts are escaped here.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ref.evaluation.report.escaping import escape_html

NARROW, WIDE = 340, 720  # width of a viewBox, about one pixel a unit on the intended screen
LABEL_CHARS, BOLD_LABEL_CHARS, TASK_CHARS = 22, 20, 40  # longest labels; the description has the whole name
DOT = 5  # diameter of a dot and distance between two
TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Chart:
    """A chart as SVG, and its values in words."""

    title: str
    description: str
    narrow: str
    wide: str = ""


@dataclass(frozen=True)
class Axis:
    """A linear axis: the values low..high are drawn at start..end."""

    low: float
    high: float
    start: float
    end: float

    def position(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most six round values."""
        step = next((step for step in TICK_STEPS if (self.high - self.low) / step <= 5), 200)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [step * index for index in range(first, last + 1)]


def position_chart(
    title: str, own: tuple[str, float], named: tuple[str, float] | None, others: Sequence[float],
) -> Chart:
    """Draw each model as a dot at its score, dots of nearly equal scores above each other.

    own: the evaluated model's name and score; named: those of a model to compare it with; others: scores without names.
    """
    ordered = sorted(others)
    above = sum(value > own[1] for value in others) + bool(named and named[1] > own[1])
    total = len(others) + (named is not None) + 1
    description = (f"{own[0]}: {_score(own[1])}, position {above + 1} of {total} by the mean. "
                   + (f"{named[0]}: {_score(named[1])}. " if named else "")
                   + (f"Other models: {_score(ordered[0])} to {_score(ordered[-1])}, median "
                      f"{_score(statistics.median(ordered))}." if ordered else ""))
    drawings = []
    for width in (NARROW, WIDE):
        scores = [*others, own[1], *([named[1]] if named else [])]
        low, high = min(scores), max(scores)
        pad = 1.0 if low == high else 0.0
        parts, height = _dots(Axis(low - pad, high + pad, 8, width - 8), width, own, named, others)
        drawings.append(_svg(width, height, title, description, parts))
    return Chart(title, description, *drawings)


def _dots(
    axis: Axis, width: int, own: tuple[str, float], named: tuple[str, float] | None, others: Sequence[float],
) -> tuple[list[str], int]:
    """The drawing of `position_chart`, and its height: two lines of names, the dots, the ticks."""
    columns: dict[int, int] = {}  # dots in each column so far
    places = []
    for score, kind in [*((score, "other") for score in others), *([(named[1], "lower")] if named else []),
                        (own[1], "evaluated")]:
        column = round(axis.position(score) / DOT)
        columns[column] = columns.get(column, 0) + 1
        places.append((column * DOT, columns[column], kind))
    bottom = 40 + DOT * max(columns.values())
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{bottom + 1}" y2="{bottom + 1}"/>']
    for tick in axis.ticks():
        x = min(max(axis.position(tick), 12), width - 12)
        parts.append(f'<text class="muted number" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    for x, count, kind in places:
        y = bottom - DOT * (count - 0.5)
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y:g}" r="{DOT / 2 - 0.25 + (kind != "other")}"/>')
    labels = [(own, places[-1]), *([(named, places[-2])] if named else [])]
    # so that the upper name's line does not cross the lower name, which runs to the left at the right of the chart
    labels.sort(key=lambda label: label[1][0], reverse=places[-1][0] > width / 2)
    lines, names = [], []
    for ((name, score), (x, count, kind)), y in zip(labels, (11, 27), strict=False):
        anchor = "start" if x < width / 3 else "end" if x > 2 * width / 3 else "middle"
        text = escape_html(f"{_shorten(name.rpartition('/')[2], LABEL_CHARS)} {_score(score)}")
        lines.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{y + 3}" y2="{bottom - DOT * count:g}"/>')
        names.append(f'<text class="halo {kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')
    return [*parts, *lines, *names], bottom + 20


def bar_chart(title: str, rows: Sequence[tuple[str, float]], *, highlighted: int | None = 0) -> Chart:
    """Draw horizontal bars from 0 to 100 for (name, score) rows, the best first, NaN last as a dash.

    highlighted: index of the row in the evaluated model's colour. A negative score has a number, but no bar.
    """
    order = sorted(range(len(rows)), key=lambda row: (math.isnan(rows[row][1]), -rows[row][1], row))
    description = ". ".join(f"{rows[row][0]}: {_score(rows[row][1])}" for row in order) + "."
    left, right, step = 148, 296, 20  # the bars are between `left` and `right`
    parts = [f'<line class="axis" x1="{left}" x2="{left}" y1="2" y2="{step * len(rows)}"/>']
    for position, row in enumerate(order):
        name, score = rows[row]
        y, kind = step * position, "evaluated" if row == highlighted else "other"
        # The label has no organisation: it is the part of the name after the slash.
        label = _shorten(name.rpartition("/")[2], BOLD_LABEL_CHARS if row == highlighted else LABEL_CHARS)
        length = 0.0 if math.isnan(score) else max(0.0, min(100.0, score)) / 100 * (right - left)
        parts += [
            f'<text class="{kind}" x="{left - 6}" y="{y + 14}" text-anchor="end">{escape_html(label)}</text>',
            f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{length:.1f}" height="12"/>',
            f'<text class="{kind} number" x="{NARROW}" y="{y + 14}" text-anchor="end">{_score(score)}</text>',
        ]
    return Chart(title, description, _svg(NARROW, step * len(rows) + 2, title, description, parts))


def difference_chart(title: str, rows: Sequence[tuple[str, float, str]]) -> Chart:
    """Draw bars to the left and right of zero for (name, difference, its text) rows, in the given order; no NaN."""
    description = ". ".join(f"{name}: {text}" for name, _, text in rows) + "."
    low, high = min(0.0, *(value for _, value, _ in rows)), max(0.0, *(value for _, value, _ in rows))
    if low == high:
        low, high = -1.0, 1.0
    narrow = _difference_bars(rows, Axis(low, high, 8, NARROW - 8), NARROW, step=29, names_beside=False)
    wide = _difference_bars(rows, Axis(low, high, 260, WIDE - 64), WIDE, step=18, names_beside=True)
    narrow_height, wide_height = 24 + 29 * len(rows), 24 + 18 * len(rows)
    return Chart(title, description, _svg(NARROW, narrow_height, title, description, narrow),
                 _svg(WIDE, wide_height, title, description, wide))


def _difference_bars(
    rows: Sequence[tuple[str, float, str]], axis: Axis, width: int, *, step: int, names_beside: bool,
) -> list[str]:
    """names_beside: names to the left of the bars, else above them."""
    bottom = 24 + step * len(rows)
    parts = []
    for tick in axis.ticks():
        x, kind = axis.position(tick), "axis" if tick == 0 else "grid"
        label_x = min(max(x, 12), width - 12)  # the label stays inside the viewBox
        parts += [f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}"/>',
                  f'<text class="muted number" x="{label_x:.1f}" y="11" text-anchor="middle">{_tick(tick)}</text>']
    for index, (name, value, text) in enumerate(rows):
        y, kind = 24 + step * index, "higher" if value > 0 else "lower"
        left, right = sorted((axis.position(0), axis.position(value)))
        text_y, bar_y = (y + 12, y + 2) if names_beside else (y + 10, y + 14)
        name_at = f'x="{axis.start - 12:.0f}" text-anchor="end"' if names_beside else 'x="0"'
        size = f'width="{right - left:.1f}" height="{12 if names_beside else 8}"'
        parts += [f'<rect class="{kind}" x="{left:.1f}" y="{bar_y}" {size}/>',
                  f'<text class="halo" {name_at} y="{text_y}">{escape_html(_shorten(name, TASK_CHARS))}</text>',
                  f'<text class="halo number" x="{width}" y="{text_y}" text-anchor="end">{escape_html(text)}</text>']
    return parts


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape_html(f"{title}. {description}")}">'
            f'{"".join(parts)}</svg>')


def _shorten(name: str, max_chars: int) -> str:
    return name if len(name) <= max_chars else name[: max_chars - 1] + "…"


def _score(score: float) -> str:
    return "–" if math.isnan(score) else f"{score:.2f}"


def _tick(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"
