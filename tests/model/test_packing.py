"""Packing and batching by tokens."""

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
    assert packed.equal_length_groups() == [(1, 3), (1, 2)]
