"""A report's sections as one HTML file: style and pictures inside, no script, nothing from the network.

Readable on a phone (tables scroll in their box, pictures take the width there is) and in the dark. Called by report.py.
"""

import re
from collections.abc import Sequence
from html import escape

from leaderboard.compare import BENCHMARK
from leaderboard.content import Figures, Pictures, Section, Table, Text
from leaderboard.pictures import Picture
from leaderboard.results import Report
from leaderboard.text import clean

# The policy forbids scripts and loads, should a text ever pass the escaping.
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
  --ground: #ffffff; --raised: #f5f7f9; --ink: #1a2027; --muted: #56616d; --line: #d5dbe1;
  --ours: #0b5fa8; --other: #8a949f; --behind: #b4530f; --mark: #e8f1fa; --notice: #fff6e0; --notice-line: #b98a1c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #13171b; --raised: #1b2127; --ink: #e7eaed; --muted: #a7b0ba; --line: #343c45;
    --ours: #6db6ff; --other: #727d89; --behind: #f2a25c; --mark: #1a2b3c; --notice: #2a2415; --notice-line: #b98a1c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header p { margin: 0; color: var(--muted); }
h1 { margin: .1rem 0 .3rem; font-size: clamp(1.5rem, 5vw, 2.25rem); line-height: 1.2; }
h2 {
  margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem; line-height: 1.3;
}
h1, h2, p, dd, dt, caption, figcaption, tbody th, .prose td { overflow-wrap: anywhere; }
p { margin: .75rem 0; max-width: 46rem; }
.notice {
  padding: .6rem .9rem; background: var(--notice); border-left: 3px solid var(--notice-line); border-radius: 3px;
}
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0;
}
.figures div { max-width: 22rem; padding: .8rem 1rem; background: var(--raised); border-radius: 6px; }
.figures dt { font-size: .85rem; color: var(--muted); }
.figures dd { margin: 0; font-size: .8rem; line-height: 1.4; color: var(--muted); }
.figures dd.figure { font-size: 1.9rem; line-height: 1.25; font-weight: 600; color: var(--ink); }
.figure, td { font-variant-numeric: tabular-nums; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 2rem;
  margin: 1.25rem 0;
}
.pictures.single { display: block; max-width: 60rem; }
.pictures.single .small { max-width: 26rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .35rem; font-size: .9rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-size: 11px; }
svg text { fill: var(--ink); }
svg text.muted { fill: var(--muted); }
svg text.ours { font-weight: 700; }
svg rect.ours, svg rect.ahead { fill: var(--ours); }
svg rect.other { fill: var(--other); }
svg rect.behind { fill: var(--behind); }
svg .axis { stroke: var(--muted); }
svg .grid { stroke: var(--line); }
svg text.halo { paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
.wide { display: none; }
.scroll {
  overflow-x: auto; width: fit-content; max-width: 100%; margin: 1.25rem 0; border: 1px solid var(--line);
  border-radius: 6px;
}
.scroll:focus-visible { outline: 2px solid var(--ours); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4; }
caption { padding: .6rem .75rem; text-align: left; font-weight: 600; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th.n, td.n { text-align: right; }
td { white-space: nowrap; }
.prose td { white-space: normal; }
thead th { font-weight: 600; color: var(--muted); vertical-align: bottom; min-width: 5rem; max-width: 9rem; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--ground); min-width: 12rem; max-width: 22rem; }
tr.marked > * { background: var(--mark); font-weight: 600; }
table.prose td { min-width: 6rem; }
table.prose td:nth-child(2) { min-width: 14rem; }
@media (max-width: 40rem) {
  table.prose td:nth-child(2) { min-width: 10.5rem; }
  tbody th { min-width: 7.5rem; max-width: 8.5rem; font-size: .8rem; }
  th, td { padding: .4rem .5rem; }
  body { padding-top: 1.25rem; }
  .figures dd.figure { font-size: 1.5rem; }
}
@media (min-width: 48rem) { .wide { display: block; } .narrow { display: none; } }
@media print { .scroll { overflow: visible; border: 0; } body { max-width: none; } }
"""

# never inside an entity: those have no capitals
BREAK = re.compile(r"(?<=/)(?=\w)|(?<=[A-Za-z0-9])(?=[A-Z][a-z])|(?=\.v\d)")
NOTICE = ' class="notice"'


def page(report: Report, sections: Sequence[Section]) -> str:
    """The whole file."""
    head = HEAD.format(title=_text(f"{report.model}, {BENCHMARK}"), style=STYLE)
    top = (f"<header>\n<p>{_text(BENCHMARK)}</p>\n<h1>{_text(report.model)}</h1>\n<p>{_text(report.date)}</p>\n"
           "</header>\n<main>\n")
    return head + top + "".join(map(_section, sections)) + "</main>\n</body>\n</html>\n"


def _section(section: Section) -> str:
    blocks = "".join(_block(block) for block in section.blocks)
    return f"<section>\n<h2>{_text(section.title)}</h2>\n{blocks}</section>\n"


def _block(block: Text | Figures | Table | Pictures) -> str:
    if isinstance(block, Text):
        return f"<p{NOTICE if block.notice else ''}>{_text(block.text)}</p>\n"
    if isinstance(block, Figures):
        return f'<dl class="figures">\n{"".join(_headline(*row) for row in block.rows)}</dl>\n'
    if isinstance(block, Pictures):
        single = " single" if len(block.pictures) == 1 else ""
        return f'<div class="pictures{single}">\n{"".join(map(_figure, block.pictures))}</div>\n'
    return _table(block)


def _headline(what: str, figure: str, remark: str) -> str:
    return f'<div><dt>{_text(what)}</dt><dd class="figure">{_text(figure)}</dd><dd>{_text(remark)}</dd></div>\n'


def _figure(picture: Picture) -> str:
    drawing = f'<div class="small">{picture.narrow}</div>'
    if picture.wide:
        drawing = f'<div class="narrow">{picture.narrow}</div><div class="wide">{picture.wide}</div>'
    return f"<figure><figcaption>{_text(picture.title)}</figcaption>{drawing}</figure>\n"


def _table(table: Table) -> str:
    """In a box that scrolls, also with the keyboard."""
    kind = ' class="prose"' if table.prose else ""
    names = enumerate(table.header)
    head = "".join(f'<th scope="col"{_kind(table, column)}>{_text(name)}</th>' for column, name in names)
    body = "".join(_row(table, place, row) for place, row in enumerate(table.rows))
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.caption)}">'
            f"<table{kind}><caption>{_text(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}</tbody></table></div>\n")


def _row(table: Table, place: int, row: Sequence[str]) -> str:
    cells = "".join(f"<td{_kind(table, column)}>{_text(cell)}</td>" for column, cell in enumerate(row) if column)
    marked = ' class="marked"' if place in table.marked else ""
    return f'<tr{marked}><th scope="row">{_name(row[0])}</th>{cells}</tr>\n'


def _kind(table: Table, column: int) -> str:
    return "" if column in table.texts else ' class="n"'


def _name(text: str) -> str:
    """A name that may break after a slash, and before a word or a version inside it."""
    return BREAK.sub("<wbr>", _text(text))


def _text(text: str) -> str:
    return escape(clean(text))
