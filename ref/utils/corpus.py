"""Lines of a corpus or of queries as in BEIR: {"_id": "d1", "title": "…", "text": "…"}; 'id' may replace '_id'.

And its judgements, a table in qrels/SPLIT.tsv.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ref.utils.files import check_type


class Judgement(NamedTuple):
    """One line of a table of judgements."""

    where: str  # "FILE:LINE"
    query: str
    passage: str
    score: float


def read_qrels(path: Path) -> Iterator[Judgement]:
    """The lines of BEIR's table query-id, corpus-id, score, separated by tabs, with or without its header.

    Raises ValueError that names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the splits are the files of {path.parent}") from None
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if (number == 1 and cells[-1].strip().lower() == "score") or not line.strip():
            continue
        try:
            query, *_, passage, score = (*cells[:-1], float(cells[-1]))
        except ValueError:
            raise ValueError(f"{path}:{number}: must be query-id, corpus-id and score, separated by tabs "
                             f"(got {line!r:.80})") from None
        if not math.isfinite(score):
            raise ValueError(f"{path}:{number}: the score must be a finite number (got {cells[-1]!r:.40})")
        yield Judgement(f"{path}:{number}", query, passage, score)


def passage_id(value: dict[str, Any], where: str) -> str | None:
    """The id of a line, from '_id' or 'id', as a string; None if it has neither."""
    key = "_id" if "_id" in value else "id"
    return None if value.get(key) is None else check_id(value[key], f"{where}: {key!r}")


def passage_text(value: dict[str, Any], where: str) -> str:
    """Title (optional) and text of a line, joined by a space and stripped; may be empty. Raises ValueError that starts
    with `where` if one is not a string.
    """
    text = check_type(value.get("text"), str, f"{where}: 'text'", "a string")
    title = check_type(value.get("title") or "", str, f"{where}: 'title'", "a string")
    return f"{title} {text}".strip()


def check_id(value: Any, what: str) -> str:
    """An id as a string. Raises ValueError that starts with `what` for all but a non-empty string or an integer."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{what} must be a non-empty string or an integer (got {value!r:.60})")
    return str(value)
