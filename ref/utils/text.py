"""Text normalisation for comparing texts. Standard library only."""

from functools import lru_cache


@lru_cache(maxsize=2**12)  # the same passages recur across queries, and texts may be long
def normalize_whitespace(text: str) -> str:
    """Replace each run of white space by one space and strip the ends: two texts that agree after it count as equal."""
    return " ".join(text.split())
