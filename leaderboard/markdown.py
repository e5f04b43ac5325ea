"""A report's sections as Markdown (GitHub's tables). Called by report.py."""

from collections.abc import Sequence

from leaderboard.compare import BENCHMARK
from leaderboard.content import Figures, Pictures, Section, Table, Text
from leaderboard.results import Report
from leaderboard.text import markdown_text


def markdown(report: Report, sections: Sequence[Section]) -> str:
    """The whole file."""
    parts = [f"# {BENCHMARK}: {markdown_text(report.model)}", f"Date: {markdown_text(report.date)}"]
    for section in sections:
        blocks = [_block(block) for block in section.blocks if not isinstance(block, Pictures)]
        parts += [f"## {section.title}", *blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Text | Figures | Table) -> str:
    if isinstance(block, Text):
        text = markdown_text(block.text)
        return f"> {text}" if block.notice else text
    if isinstance(block, Figures):
        return _table(["", "", ""], block.rows, right={1})
    right = set(range(len(block.header))) - block.texts
    return f"{block.caption}:\n\n{_table(block.header, block.rows, right=right, bold=block.marked)}"


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int], bold: frozenset[int] = frozenset()
) -> str:
    lines = [_line([markdown_text(cell) for cell in header])]
    lines += [_line(["---:" if column in right else "---" for column in range(len(header))])]
    for place, row in enumerate(rows):
        cells = [markdown_text(cell) for cell in row]
        lines.append(_line([f"**{cell}**" if cell and place in bold else cell for cell in cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
