"""The three figures of docs/walkthrough.md as SVG, readable on light and dark pages."""

from collections.abc import Sequence
from html import escape

STYLE = """<style>
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.small { font-size: 12px }
.mono { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px }
.panel { fill: #ffffff; stroke: #d0d7de } .cell { stroke: #d0d7de } .none { fill: #f6f8fa }
.prefix { fill: #9ec5fe } .own { fill: #2f6fde }
.positive { fill: #2c7a3f } .negative { fill: #2f6db3 } .in-batch { fill: #b6cde6 }
.masked { fill: #ffffff; stroke: #bf3a21; stroke-dasharray: 4 2 }
.light { fill: #ffffff }
</style>"""
ROLES = {"positive": "positive", "negative": "hard negative", "in-batch": "in-batch negative",
         "masked": "masked (known positive)"}


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
            f"<title>{escape(title)}</title>\n{STYLE}\n"
            f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(x: int, y: int, entries: Sequence[tuple[str, str]]) -> list[str]:
    parts = []
    for kind, label in entries:
        parts += [f'<rect class="{kind} cell" x="{x}" y="{y - 11}" width="13" height="13"/>', _text(x + 19, y, label)]
        x += 34 + 7 * len(label)
    return parts


def mask_figure(tokens: Sequence[str], allowed: Sequence[Sequence[bool]], prefix_length: int) -> str:
    """Rows: tokens of the packed queries; columns: the shared prefix, narrow, then the same tokens."""
    cell, narrow, left, top = 24, 8, 120, 64
    width = left + narrow * prefix_length + cell * len(tokens) + 24
    start = left + narrow * prefix_length
    parts = [_text(left, 24, f"shared prefix, {prefix_length} tokens"), _text(start + 4, 24, "tokens of the batch")]
    for row, (token, keys) in enumerate(zip(tokens, allowed, strict=True)):
        y = top + cell * row
        parts.append(_text(left - 8, y + 16, token, "mono", "end"))
        for column, seen in enumerate(keys):
            in_prefix = column < prefix_length
            x = left + narrow * column if in_prefix else start + cell * (column - prefix_length)
            kind = ("prefix" if in_prefix else "own") if seen else "none"
            parts.append(f'<rect class="cell {kind}" x="{x}" y="{y}" width="{narrow if in_prefix else cell}" '
                         f'height="{cell}"/>')
    for column in range(len(tokens)):
        parts.append(_text(start + cell * column + cell / 2, top - 8, str(column), "small", "middle"))
    height = top + cell * len(tokens) + 44
    parts += _legend(
        left, height - 16, [("prefix", "attends, prefix"), ("own", "attends, own text"), ("none", "masked")])
    return _svg(max(width, left + 440), height, "Attention mask of the packed queries", parts)


def score_figure(
    queries: Sequence[str], passages: Sequence[str], score_QP: Sequence[Sequence[float]],
    roles: Sequence[Sequence[str]],
) -> str:
    """A table of scores, coloured by the role of the passage for the query."""
    left, top, cell, row_height = 240, 72, 200, 34
    parts = [_text(left + cell * q + cell / 2, 32, f"query {q}: {query}", "", "middle")
             for q, query in enumerate(queries)]
    for p, passage in enumerate(passages):
        y = top + row_height * p
        parts.append(_text(20, y + 20, f"{p}  {passage}"))
        for q in range(len(queries)):
            x = left + cell * q
            parts += [f'<rect class="{roles[q][p]}" x="{x + 8}" y="{y}" width="{cell - 16}" height="{row_height - 4}" '
                      'rx="4"/>', _text(x + cell / 2, y + 20, f"{score_QP[q][p]:.2f}",
                                    "light" if roles[q][p] in ("positive", "negative") else "", "middle")]
    height = top + row_height * len(passages) + 44
    parts += _legend(20, height - 16, list(ROLES.items()))
    return _svg(left + cell * len(queries) + 20, height, "Scores of both queries", parts)


def gradient_figure(
    queries: Sequence[str], passages: Sequence[str], gradient_QP: Sequence[Sequence[float]],
    roles: Sequence[Sequence[str]],
) -> str:
    """Bars of dL/ds around zero, one panel per query."""
    left, top, panel, row_height = 240, 72, 260, 30
    largest = max(abs(value) for row in gradient_QP for value in row)
    parts = []
    for q, query in enumerate(queries):
        zero = left + panel * q + panel / 2
        parts.append(_text(zero, 32, f"query {q}: {query}", "", "middle"))
        parts.append(f'<line x1="{zero}" x2="{zero}" y1="{top - 16}" y2="{top + row_height * len(passages)}" '
                     'stroke="#6e7781"/>')
        for p in range(len(passages)):
            value, y = gradient_QP[q][p], top + row_height * p
            length = (panel / 2 - 62) * abs(value) / largest
            x = zero - length if value < 0 else zero
            parts.append(f'<rect class="{roles[q][p]}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="18"/>')
            label = f"{value:+.3f}" if abs(value) >= 0.0005 else "0"
            parts.append(_text(x - 6 if value < 0 else x + length + 6, y + 14, label, "small",
                               "end" if value < 0 else "start"))
    for p, passage in enumerate(passages):
        parts.append(_text(20, top + row_height * p + 14, f"{p}  {passage}"))
    height = top + row_height * len(passages) + 44
    parts += _legend(20, height - 16, list(ROLES.items()))
    return _svg(left + panel * len(queries) + 20, height, "Gradient of the loss by each score", parts)
