"""The sections of a report as one HTML file: style sheet and charts inline, no scripts, no network access.

Readable on a phone (tables scroll, charts fill the width) and in the dark colour scheme.
"""

import re
from collections.abc import Sequence

from ref.evaluation.report.charts import Chart
from ref.evaluation.report.content import Charts, KeyFigures, Section, Table, Text
from ref.evaluation.report.escaping import escape_html
from ref.evaluation.report.leaderboard import BENCHMARK
from ref.evaluation.report.run_results import Report

# The policy forbids scripts and network access in case a text is not escaped.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""

STYLE = """
:root {
  color-scheme: light dark;
  --background: #ffffff; --card: #f5f7f9; --text: #1a2027; --muted: #56616d; --line: #d5dbe1;
  --evaluated: #0b5fa8; --other: #8a949f; --lower: #b4530f; --highlight: #e8f1fa;
  --notice: #fff6e0; --notice-line: #b98a1c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --background: #13171b; --card: #1b2127; --text: #e7eaed; --muted: #a7b0ba; --line: #343c45;
    --evaluated: #6db6ff; --other: #727d89; --lower: #f2a25c; --highlight: #1a2b3c;
    --notice: #2a2415; --notice-line: #b98a1c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 72rem; background: var(--background); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header p { margin: 0; color: var(--muted); }
h1 { margin: .1rem 0 .3rem; font-size: clamp(1.5rem, 5vw, 2.25rem); line-height: 1.2; }
h2 {
  margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem; line-height: 1.3;
}
h1, h2, p, dd, dt, caption, figcaption, tbody th, .long td { overflow-wrap: anywhere; }
p { margin: .75rem 0; max-width: 46rem; }
.notice {
  padding: .6rem .9rem; background: var(--notice); border-left: 3px solid var(--notice-line); border-radius: 3px;
}
.key-figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0;
}
.key-figures div { max-width: 22rem; padding: .8rem 1rem; background: var(--card); border-radius: 6px; }
.key-figures dt { font-size: .85rem; color: var(--muted); }
.key-figures dd { margin: 0; font-size: .8rem; line-height: 1.4; color: var(--muted); }
.key-figures dd.value { font-size: 1.9rem; line-height: 1.25; font-weight: 600; color: var(--text); }
.value, .number, td { font-variant-numeric: tabular-nums; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 2rem;
  margin: 1.25rem 0;
}
.charts.single { display: block; max-width: 60rem; }
.charts.single .small { max-width: 26rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .35rem; font-size: .9rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-size: 11px; }
svg text { fill: var(--text); }
svg text.muted { fill: var(--muted); }
svg text.evaluated { font-weight: 700; }
svg rect.evaluated, svg rect.higher, svg circle.evaluated { fill: var(--evaluated); }
svg rect.other, svg circle.other { fill: var(--other); }
svg rect.lower, svg circle.lower { fill: var(--lower); }
svg line.evaluated { stroke: var(--evaluated); }
svg line.lower { stroke: var(--lower); }
svg .axis { stroke: var(--muted); }
svg .grid { stroke: var(--line); }
svg text.halo { paint-order: stroke; stroke: var(--background); stroke-width: 3px; }
.wide { display: none; }
.scroll {
  overflow-x: auto; width: fit-content; max-width: 100%; margin: 1.25rem 0; border: 1px solid var(--line);
  border-radius: 6px;
}
.scroll:focus-visible { outline: 2px solid var(--evaluated); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4; }
caption { padding: .6rem .75rem; text-align: left; font-weight: 600; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th.n, td.n { text-align: right; }
td { white-space: nowrap; }
.long td { white-space: normal; }
thead th { font-weight: 600; color: var(--muted); vertical-align: bottom; min-width: 5rem; max-width: 9rem; }
tbody th {
  font-weight: 400; position: sticky; left: 0; background: var(--background); min-width: 12rem; max-width: 22rem;
}
tr.bold > * { background: var(--highlight); font-weight: 600; }
table.long td { min-width: 6rem; }
table.long td:nth-child(2) { min-width: 14rem; }
@media (max-width: 40rem) {
  table.long td:nth-child(2) { min-width: 10.5rem; }
  tbody th { min-width: 7.5rem; max-width: 8.5rem; font-size: .8rem; }
  th, td { padding: .4rem .5rem; }
  body { padding-top: 1.25rem; }
  .key-figures dd.value { font-size: 1.5rem; }
}
@media (min-width: 48rem) { .wide { display: block; } .narrow { display: none; } }
@media print { .scroll { overflow: visible; border: 0; } body { max-width: none; } }
"""

# Where a name may break: after a slash, before a word or a version. No match inside an HTML entity (no capitals there).
BREAK = re.compile(r"(?<=/)(?=\w)|(?<=[A-Za-z0-9])(?=[A-Z][a-z])|(?=\.v\d)")


def render_html(report: Report, sections: Sequence[Section]) -> str:
    """Return the whole file."""
    head = HEAD.format(title=escape_html(f"{report.model}, {BENCHMARK}"), style=STYLE)
    header = (f"<header>\n<p>{escape_html(BENCHMARK)}</p>\n<h1>{escape_html(report.model)}</h1>\n"
              f"<p>{escape_html(report.date)}</p>\n</header>\n")
    return f"{head}{header}<main>\n{''.join(map(_section, sections))}</main>\n</body>\n</html>\n"


def _section(section: Section) -> str:
    blocks = "".join(_block(block) for block in section.blocks)
    return f"<section>\n<h2>{escape_html(section.title)}</h2>\n{blocks}</section>\n"


def _block(block: Text | KeyFigures | Table | Charts) -> str:
    if isinstance(block, Text):
        notice = ' class="notice"' if block.notice else ""
        return f"<p{notice}>{escape_html(block.text)}</p>\n"
    if isinstance(block, KeyFigures):
        return f'<dl class="key-figures">\n{"".join(_key_figure(*row) for row in block.rows)}</dl>\n'
    if isinstance(block, Charts):
        single = " single" if len(block.charts) == 1 else ""
        return f'<div class="charts{single}">\n{"".join(map(_chart, block.charts))}</div>\n'
    return _table(block)


def _key_figure(name: str, value: str, remark: str) -> str:
    return (f'<div><dt>{escape_html(name)}</dt><dd class="value">{escape_html(value)}</dd>'
            f"<dd>{escape_html(remark)}</dd></div>\n")


def _chart(chart: Chart) -> str:
    drawing = f'<div class="small">{chart.narrow}</div>'
    if chart.wide:
        drawing = f'<div class="narrow">{chart.narrow}</div><div class="wide">{chart.wide}</div>'
    return f"<figure><figcaption>{escape_html(chart.title)}</figcaption>{drawing}</figure>\n"


def _table(table: Table) -> str:
    """A table in a container that scrolls, also with the keyboard."""
    kind = ' class="long"' if table.long_texts else ""
    head = "".join(f'<th scope="col"{_alignment(table, column)}>{escape_html(name)}</th>'
                   for column, name in enumerate(table.header))
    body = "".join(_row(table, index, row) for index, row in enumerate(table.rows))
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape_html(table.caption)}">'
            f"<table{kind}><caption>{escape_html(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}</tbody></table></div>\n")


def _row(table: Table, index: int, row: Sequence[str]) -> str:
    cells = "".join(f"<td{_alignment(table, column)}>{escape_html(cell)}</td>"
                    for column, cell in enumerate(row) if column)
    bold = ' class="bold"' if index in table.bold_rows else ""
    return f'<tr{bold}><th scope="row">{BREAK.sub("<wbr>", escape_html(row[0]))}</th>{cells}</tr>\n'


def _alignment(table: Table, column: int) -> str:
    return "" if column in table.text_columns else ' class="n"'
