"""Packing and batching by tokens."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from ref.model.packing import batch_by_tokens, pack_sequences


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 40))
def test_batch_by_tokens(lengths: list[int], budget: int) -> None:
    batches = batch_by_tokens(lengths, tokens_per_batch=budget)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)


def test_batch_by_tokens_example_of_the_docstring() -> None:
    assert batch_by_tokens([2, 5, 3], tokens_per_batch=5) == [[1], [2, 0]]


def test_packed_batch_fields() -> None:
    packed = pack_sequences([[5, 6, 7], [8, 9]], device=torch.device("cpu"), prefix_length=4)
    assert packed.input_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert packed.cu_seqlens.tolist() == [0, 3, 5] and packed.last_token_B.tolist() == [2, 4]
    assert packed.document_ids_T.tolist() == [0, 0, 0, 1, 1] and packed.position_ids_T.tolist() == [4, 5, 6, 4, 5]
    assert packed.length_buckets(least=0.75) == [[3], [2]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 3))
def test_buckets_hold_consecutive_texts_of_similar_length(lengths: list[int], prefix_length: int) -> None:
    packed = pack_sequences([[0] * n for n in lengths], device=torch.device("cpu"), prefix_length=prefix_length)
    buckets = packed.length_buckets(least=0.75)
    found = packed.padded_row_T(buckets)
    assert [length for bucket in buckets for length in bucket] == lengths
    assert all(4 * min(bucket) >= 3 * max(bucket) for bucket in buckets)
    assert all(4 * min(*one, two[0]) < 3 * max(*one, two[0]) for one, two in itertools.pairwise(buckets))
    rows, start = [], 0
    for bucket in buckets:
        for length in bucket:
            rows += range(start, start + length)
            start += max(bucket)
    if start == sum(lengths):
        assert found is None
    else:
        assert found is not None and found.tolist() == rows


def test_buckets_example_of_the_docstring() -> None:
    packed = pack_sequences([[0] * n for n in (8, 7, 6, 5, 2)], device=torch.device("cpu"))
    assert packed.length_buckets(least=0.75) == [[8, 7, 6], [5], [2]]
    assert packed.length_buckets(least=1.0) == [[8], [7], [6], [5], [2]]
