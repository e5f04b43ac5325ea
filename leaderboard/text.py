"""Texts from outside, made harmless: what no file should hold, and Markdown's own signs."""

import re
import unicodedata

SPACES = re.compile(r"\s+")
MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is no sign
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def clean(text: str) -> str:
    """One line; characters that cannot be written, or that turn the writing direction, become a replacement sign."""
    line = SPACES.sub(" ", text).strip()
    return "".join("\ufffd" if _is_odd(character) else character for character in line)


def _is_odd(character: str) -> bool:
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(character) in ("Cc", "Cs")


def markdown_text(text: str) -> str:
    """The text as Markdown shows it, also in a table's cell: no mark-up, no HTML."""
    plain = "".join(ENTITIES.get(character, character) for character in clean(text))
    return MARKDOWN.sub(lambda match: "\\" + match.group(), plain)
