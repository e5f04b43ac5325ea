"""The report of a run beside the public scores: report.html and report.md, with the same figures.

    write_report(Report(model="ours", date="2026-09-01", tasks=[TaskResult(...), ...]), Path("runs/ours/mteb"))

Called by run_eval.py.
"""

from pathlib import Path

from leaderboard.compare import Scores
from leaderboard.content import contents
from leaderboard.markdown import markdown
from leaderboard.page import page
from leaderboard.results import AGAINST, CHOSEN, Report, TaskResult
from ref.runs import write_whole

__all__ = ["AGAINST", "CHOSEN", "Report", "TaskResult", "write_report"]


def write_report(report: Report, folder: Path, *, public: Scores | None = None) -> list[Path]:
    """Write report.html and report.md into a folder, made if it is new; each appears whole. Returns their paths.

    public: by default the project's table of public scores. Raises: ValueError for a task twice or a score out of
    range, before anything is written; OSError.
    """
    sections = contents(report, public)
    texts = {"report.html": page(report, sections), "report.md": markdown(report, sections)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        _write(folder / name, text)
    return [folder / name for name in texts]


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))
