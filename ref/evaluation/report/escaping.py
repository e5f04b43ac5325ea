"""Texts from outside (names, instructions, error messages) escaped for HTML and Markdown."""

import re
import unicodedata
from html import escape

WHITESPACE = re.compile(r"\s+")
MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word has no meaning
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
DIRECTION_MARKS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def clean(text: str) -> str:
    """Return the text as one line; control characters, surrogates and direction marks are replaced by U+FFFD."""
    line = WHITESPACE.sub(" ", text).strip()
    return "".join("\ufffd" if _is_unsafe(character) else character for character in line)


def _is_unsafe(character: str) -> bool:
    is_direction_mark = unicodedata.bidirectional(character) in DIRECTION_MARKS
    return is_direction_mark or unicodedata.category(character) in ("Cc", "Cs")


def escape_html(text: str) -> str:
    """Return the cleaned text for an HTML element or a quoted attribute."""
    return escape(clean(text))


def escape_markdown(text: str) -> str:
    """Return the cleaned text for a Markdown paragraph or table cell: no markup, no HTML."""
    plain = "".join(ENTITIES.get(character, character) for character in clean(text))
    return MARKDOWN.sub(lambda match: "\\" + match.group(), plain)
