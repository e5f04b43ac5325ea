"""Deduplication of texts: each distinct text is embedded once, and its vector copied to the duplicates."""

from collections.abc import Sequence

import numpy as np


def first_occurrence(texts: Sequence[str]) -> np.ndarray:
    """For each text the index of the first text equal to it, (texts,) int32.

    Example: a b a -> 0 1 0. Texts are compared by hash (at most 32 bytes a text), then by content: two different texts
    with equal hashes stay distinct.
    """
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = hashes.argsort(kind="stable").astype(np.int32)
    hashes = hashes[order]
    is_first = np.ones(len(texts), np.bool_)
    np.not_equal(hashes[1:], hashes[:-1], out=is_first[1:])
    del hashes
    starts = np.flatnonzero(is_first).astype(np.int32)
    first = np.empty(len(texts), np.int32)
    first[order] = np.repeat(order[starts], np.diff(starts, append=np.int32(len(texts))))
    for n in np.flatnonzero(first != np.arange(len(texts), dtype=np.int32)):
        if texts[n] != texts[first[n]]:
            first[n] = n
    return first


def unique_index(first: np.ndarray) -> np.ndarray:
    """Indices of the distinct texts, in order, from the result of `first_occurrence`."""
    return np.flatnonzero(first == np.arange(len(first)))


def scatter_to_duplicates(vectors: np.ndarray, first: np.ndarray, *, rows_at_a_time: int = 50_000) -> None:
    """Copy the vector of each text's first occurrence to its duplicates, in place and in parts to bound memory."""
    for start in range(0, len(first), rows_at_a_time):
        rows = np.arange(start, min(start + rows_at_a_time, len(first)))
        duplicates = rows[first[rows] != rows]
        vectors[duplicates] = vectors[first[duplicates]]
