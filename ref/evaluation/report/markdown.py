"""The sections of a report as Markdown with GitHub's tables."""

from collections.abc import Sequence

from ref.evaluation.report.content import Charts, KeyFigures, Section, Table, Text
from ref.evaluation.report.escaping import escape_markdown
from ref.evaluation.report.leaderboard import BENCHMARK
from ref.evaluation.report.run_results import Report


def render_markdown(report: Report, sections: Sequence[Section]) -> str:
    """Return the whole file."""
    parts = [f"# {BENCHMARK}: {escape_markdown(report.model)}", f"Date: {escape_markdown(report.date)}"]
    for section in sections:
        blocks = [_block(block) for block in section.blocks if not isinstance(block, Charts)]
        parts += [f"## {section.title}", *blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Text | KeyFigures | Table) -> str:
    if isinstance(block, Text):
        text = escape_markdown(block.text)
        return f"> {text}" if block.notice else text
    if isinstance(block, KeyFigures):
        return _table(["", "", ""], block.rows, right={1})
    right = set(range(len(block.header))) - block.text_columns
    return f"{block.caption}:\n\n{_table(block.header, block.rows, right=right, bold=block.bold_rows)}"


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int], bold: frozenset[int] = frozenset(),
) -> str:
    """right: right-aligned columns. bold: indices of bold rows."""
    lines = [_line([escape_markdown(cell) for cell in header])]
    lines += [_line(["---:" if column in right else "---" for column in range(len(header))])]
    for index, row in enumerate(rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append(_line([f"**{cell}**" if cell and index in bold else cell for cell in cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
