"""Pictures of a report as inline SVG, in colours that the page's style sheet names: bars, and differences.

A picture fills the width it is given; a page shows `narrow` on a phone and `wide`, where there is one, elsewhere, so
that letters keep their size. Every text is escaped here. Called by content.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from leaderboard.text import clean

NARROW, WIDE = 340, 720  # units of a viewBox, about a pixel each on the screen it is meant for
NAME_CHARACTERS, BOLD_CHARACTERS = 22, 20  # of a name beside a bar; the description has it whole
TASK_CHARACTERS = 40
TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Picture:
    """SVG texts, and the same in words."""

    title: str
    description: str
    narrow: str
    wide: str = ""


def bars(title: str, rows: Sequence[tuple[str, float]], *, ours: int | None = 0) -> Picture:
    """Horizontal bars from 0 to 100, best first; row `ours` in the colour of our model. NaN: a dash, and last.

    A negative score has no bar, its figure says it.
    """
    order = sorted(range(len(rows)), key=lambda row: (math.isnan(rows[row][1]), -rows[row][1], row))
    description = ". ".join(f"{rows[row][0]}: {_figure(rows[row][1])}" for row in order) + "."
    label, end, step = 148, 296, 20
    parts = [f'<line class="axis" x1="{label}" x2="{label}" y1="2" y2="{step * len(rows)}"/>']
    for place, row in enumerate(order):
        name, score = rows[row]
        y, kind = step * place, "ours" if row == ours else "other"
        short = _cut(name.rpartition("/")[2], BOLD_CHARACTERS if row == ours else NAME_CHARACTERS)  # without its owner
        length = 0.0 if math.isnan(score) else max(0.0, min(100.0, score)) / 100 * (end - label)
        parts += [
            f'<text class="{kind}" x="{label - 6}" y="{y + 14}" text-anchor="end">{_text(short)}</text>',
            f'<rect class="{kind}" x="{label}" y="{y + 4}" width="{length:.1f}" height="12"/>',
            f'<text class="{kind} figure" x="{NARROW}" y="{y + 14}" text-anchor="end">{_figure(score)}</text>',
        ]
    return Picture(title, description, _svg(NARROW, step * len(rows) + 2, title, description, parts))


def differences(title: str, rows: Sequence[tuple[str, float, str]]) -> Picture:
    """Bars left and right of zero, in the order given: (name, difference, its figure); no difference is NaN."""
    description = ". ".join(f"{name}: {figure}" for name, _, figure in rows) + "."
    low, high = min(0.0, *(gap for _, gap, _ in rows)), max(0.0, *(gap for _, gap, _ in rows))
    if low == high:
        low, high = -1.0, 1.0
    narrow = _differences(rows, Axis(low, high, 8, NARROW - 8), NARROW, step=29, beside=False)
    wide = _differences(rows, Axis(low, high, 260, WIDE - 64), WIDE, step=18, beside=True)
    heights = 24 + 29 * len(rows), 24 + 18 * len(rows)
    return Picture(title, description, _svg(NARROW, heights[0], title, description, narrow),
                   _svg(WIDE, heights[1], title, description, wide))


@dataclass(frozen=True)
class Axis:
    """From low..high to the units start..end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers, at most six."""
        step = next((step for step in TICK_STEPS if (self.high - self.low) / step <= 5), 200)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [step * place for place in range(first, last + 1)]


def _differences(
    rows: Sequence[tuple[str, float, str]], axis: Axis, width: int, *, step: int, beside: bool
) -> list[str]:
    """beside: names left of the bars; else above them."""
    bottom = 24 + step * len(rows)
    parts = []
    for tick in axis.ticks():
        x, kind = axis.at(tick), "axis" if tick == 0 else "grid"
        middle = min(max(x, 12), width - 12)  # of the letters, which stay inside
        parts += [f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}"/>',
                  f'<text class="muted figure" x="{middle:.1f}" y="11" text-anchor="middle">{_tick(tick)}</text>']
    for place, (name, gap, figure) in enumerate(rows):
        y, kind = 24 + step * place, "ahead" if gap > 0 else "behind"
        left, right = sorted((axis.at(0), axis.at(gap)))
        text_y, bar_y = (y + 12, y + 2) if beside else (y + 10, y + 14)
        name_at = f'x="{axis.start - 12:.0f}" text-anchor="end"' if beside else 'x="0"'
        size = f'width="{right - left:.1f}" height="{12 if beside else 8}"'
        parts += [f'<rect class="{kind}" x="{left:.1f}" y="{bar_y}" {size}/>',
                  f'<text class="halo" {name_at} y="{text_y}">{_text(_cut(name, TASK_CHARACTERS))}</text>',
                  f'<text class="halo figure" x="{width}" y="{text_y}" text-anchor="end">{_text(figure)}</text>']
    return parts


def _svg(width: int, height: int, title: str, description: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(f"{title}. {description}")}">'
            f'{"".join(parts)}</svg>')


def _text(text: str) -> str:
    return escape(clean(text))


def _cut(name: str, characters: int) -> str:
    """A name, cut where the room ends."""
    return name if len(name) <= characters else name[: characters - 1] + "…"


def _figure(score: float) -> str:
    return "–" if math.isnan(score) else f"{score:.2f}"


def _tick(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"
