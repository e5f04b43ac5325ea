"""The charts of a report as inline SVG, in the colours of the page's style sheet: bar chart and difference chart.

A chart fills the width of its container. `narrow` is for phones; a chart with `wide` shows that one on larger screens,
so that the font size stays the same. All texts are escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ref.evaluation.report.escaping import escape_html

NARROW, WIDE = 340, 720  # width of a viewBox, about one pixel a unit on the intended screen
LABEL_CHARS, BOLD_LABEL_CHARS, TASK_CHARS = 22, 20, 40  # longest labels; the description has the whole name
TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Chart:
    """A chart as SVG, and its values in words."""

    title: str
    description: str
    narrow: str
    wide: str = ""


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
