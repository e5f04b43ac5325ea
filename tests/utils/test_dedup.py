"""Deduplication of texts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.utils.dedup import first_occurrence, scatter_to_duplicates, unique_index


class OneHash(str):
    """Texts that all have the same hash."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7


@given(st.lists(st.text("abc", max_size=3)))
def test_equal_texts_are_found(texts):
    assert first_occurrence(texts).tolist() == [texts.index(text) for text in texts]


@given(st.lists(st.text("ab", max_size=2)))
def test_different_texts_with_equal_hashes_stay_distinct(texts):
    """Such a text may count as its own first occurrence although it is not; another text never does."""
    same_hash = [OneHash(text) for text in texts]
    for n, first in enumerate(first_occurrence(same_hash)):
        assert first <= n and texts[first] == texts[n]


@given(st.lists(st.text("ab", max_size=2)), st.integers(1, 5))
def test_vectors_of_duplicates_are_copied(texts, rows_at_a_time):
    first = first_occurrence(texts)
    unique = unique_index(first)
    assert [texts[n] for n in unique] == list(dict.fromkeys(texts))
    vectors = np.full((len(texts), 2), np.nan, np.float32)
    vectors[unique] = unique[:, None]
    scatter_to_duplicates(vectors, first, rows_at_a_time=rows_at_a_time)
    assert vectors[:, 0].tolist() == [texts.index(text) for text in texts]
