"""write_report: the report of an evaluation as report.html and report.md, with the same values.

    write_report(Report(model="my-model", date="2026-09-01", tasks=[TaskResult(...), ...]), Path("runs/my-model/mteb"))
"""

from pathlib import Path

from ref.evaluation.report.content import report_sections
from ref.evaluation.report.leaderboard import ScoreTable
from ref.evaluation.report.markdown import render_markdown
from ref.evaluation.report.page import render_html
from ref.evaluation.report.run_results import COMPARED_MODELS, REFERENCE_MODEL, Report, TaskResult
from ref.utils.files import atomic_write

__all__ = ["COMPARED_MODELS", "REFERENCE_MODEL", "Report", "TaskResult", "write_report"]


def write_report(report: Report, folder: Path, stem: str = "report", *, public: ScoreTable | None = None) -> list[Path]:
    """Write report.html and report.md (with `stem`: these names) atomically into a folder, which is created; return
    their paths.

    public: public_scores.csv by default. Raises ValueError for a repeated task or a score out of range, before anything
    is written; OSError.
    """
    sections = report_sections(report, public)
    texts = {f"{stem}.html": render_html(report, sections), f"{stem}.md": render_markdown(report, sections)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        _write(folder / name, text)
    return [folder / name for name in texts]


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda draft: draft.write_text(text, encoding="utf-8"))
