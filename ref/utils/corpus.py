"""Lines of a corpus or of queries as in BEIR: {"_id": "d1", "title": "…", "text": "…"}; 'id' may replace '_id'."""

from typing import Any

from ref.utils.files import check_type


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
