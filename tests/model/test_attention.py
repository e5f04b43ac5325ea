"""Attention in buckets and by FlexAttention against fp64 loops; FlexAttention's table of blocks against the mask."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ref.model import attention as attention_module
from ref.model import flex
from ref.model.attention import AttentionMask, KeyValue, attention, attention_mask, bucketed_attention
from ref.model.flex import block_table, build_block_mask, flex_attention, mask_mod
from ref.model.packing import PackedBatch, pack_sequences

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")


def attention_by_loops(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """The rule in the docstring of ref/model/attention.py in fp64, one query position at a time."""
    q, k, v = q_NHK.double(), k_TGK.double(), v_TGK.double()
    ratio, window = q.shape[1] // k.shape[1], mask.sliding_window
    rows = []
    for start, stop in itertools.pairwise(mask.batch.cu_seqlens):
        keys, values = k[start:stop], v[start:stop]
        if prefix is not None:
            keys, values = torch.cat((prefix[0].double(), keys)), torch.cat((prefix[1].double(), values))
        for i in range(mask.batch.prefix_length if mask.query_rows is None else len(keys) - 1, len(keys)):
            query = q[len(rows)]
            first = 0 if window is None else max(0, i - window + 1)
            heads = []
            for h in range(q.shape[1]):
                score = keys[first : i + 1, h // ratio] @ query[h] / math.sqrt(q.shape[2])
                heads.append(score.softmax(0) @ values[first : i + 1, h // ratio])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def as_in_training(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """`attention` as a bf16 model in training mode computes it: by softmax_attention, in padded buckets."""
    return attention(q_NHK, k_TGK, v_TGK, replace(mask, use_softmax=True), prefix)


def by_flex_attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """`attention` as on CUDA: with a mask that holds FlexAttention's BlockMask."""
    block_mask = build_block_mask(mask.batch, mask.query_rows, mask.sliding_window)
    return attention(q_NHK, k_TGK, v_TGK, replace(mask, block_mask=block_mask), prefix)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [attention, as_in_training, by_flex_attention])


@IMPLEMENTATIONS
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 7, 9, 50])
@pytest.mark.parametrize(("prefix_length", "num_heads", "num_kv_heads"), [(0, 4, 4), (0, 4, 2), (6, 8, 1), (1, 6, 3)])
@pytest.mark.parametrize("last_token_only", [False, True])
def test_equals_loops(
    implementation: Callable[..., Tensor], sliding_window: int | None, prefix_length: int, num_heads: int,
    num_kv_heads: int, last_token_only: bool,
) -> None:
    """Texts of several lengths, two padded; last tokens alone, a prefix; gradients, which FlexAttention lacks here."""
    packed = pack_sequences([[0] * n for n in (5, 4, 1, 9, 7, 2)], device=CPU, prefix_length=prefix_length)
    mask = attention_mask(packed, sliding_window, last_token_only=last_token_only)
    queries, with_gradient = 6 if last_token_only else 28, implementation is not by_flex_attention
    shapes = [(queries, num_heads, 6), *[(28, num_kv_heads, 6)] * 2, *[(prefix_length, num_kv_heads, 6)] * 2]
    inputs = [torch.randn(shape, requires_grad=with_gradient) for shape in shapes]
    weight = torch.randn(queries, num_heads, 6)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v, *prefix = inputs
        out = function(q, k, v, mask, tuple(prefix) if prefix_length else None)
        used = inputs if prefix_length else inputs[:3]
        return out, *(torch.autograd.grad((out * weight).sum(), used) if with_gradient else ())

    for ours, truth in zip(run(implementation), run(attention_by_loops), strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=3e-6)


def test_training_uses_the_softmax_form_for_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to MAX_SCORES scores of a text; both forms agree, so that the choice is no other result."""
    used = []
    original = attention_module.softmax_attention
    monkeypatch.setattr(attention_module, "softmax_attention", lambda *given: used.append(1) or original(*given))
    monkeypatch.setattr(attention_module, "MAX_SCORES", 16)
    for length, training, expected in ((4, True, 1), (5, True, 0), (4, False, 0)):
        used.clear()
        q, k, v = (torch.randn(length, 2, 4) for _ in range(3))
        mask = attention_mask(pack_sequences([[0] * length], device=CPU), 3, use_softmax=training)
        assert (attention(q, k, v, mask).double() - attention_by_loops(q, k, v, mask)).abs().max() < 1e-6
        assert len(used) == expected


def test_control_padding_that_is_seen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Last tokens at the bucket's end instead of their own text's."""
    packed = pack_sequences([[0] * 4, [0] * 3], device=CPU)
    q, (k, v) = torch.randn(2, 2, 4), (torch.randn(7, 2, 4) for _ in range(2))
    mask = attention_mask(packed, None, last_token_only=True, use_softmax=True)
    truth = attention_by_loops(q, k, v, mask)
    assert (attention(q, k, v, mask).double() - truth).abs().max() < 1e-5
    monkeypatch.setattr(torch, "tensor", lambda lengths: torch.full((len(lengths),), max(lengths)))
    assert (attention(q, k, v, mask).double() - truth).abs().max() > 1e-3


def test_the_mask_selects_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask without a block mask is SDPA's, one with it FlexAttention's; a CPU's mask has none."""
    mask = attention_mask(pack_sequences([[0] * 4], device=CPU), None)
    assert mask.block_mask is None
    called = []
    for name in ("bucketed_attention", "flex_attention"):
        monkeypatch.setattr(f"ref.model.attention.{name}", lambda *_, name=name: called.append(name))
    q, k, v = (torch.randn(4, 2, 4) for _ in range(3))
    attention(q, k, v, mask)
    attention(q, k, v, replace(mask, block_mask=object()))
    assert called == ["bucketed_attention", "flex_attention"]


@IMPLEMENTATIONS
def test_one_packed_batch_with_several_windows(implementation: Callable[..., Tensor]) -> None:
    """Nothing cached on the batch depends on the window."""
    packed = pack_sequences([[0] * 8], device=CPU)
    q, k, v = (torch.randn(8, 2, 4) for _ in range(3))
    for sliding_window in (None, 2, 5):
        mask = attention_mask(packed, sliding_window)
        torch.testing.assert_close(implementation(q, k, v, mask).double(), attention_by_loops(q, k, v, mask),
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("last_token_only", "prefix_length"), [(False, 0), (True, 0), (True, 3)])
def test_query_positions(last_token_only: bool, prefix_length: int) -> None:
    packed = pack_sequences([[0] * 3, [0] * 2], device=CPU, prefix_length=prefix_length)
    mask = attention_mask(packed, 4, last_token_only=last_token_only)
    x_TD = torch.randn(5, 6)
    assert torch.equal(mask.queries(x_TD), x_TD[[2, 4]] if last_token_only else x_TD)


def test_control_a_window_off_by_one_is_noticed() -> None:
    packed = pack_sequences([[0] * 9], device=CPU)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    truth = attention_by_loops(q, k, v, attention_mask(packed, 4))
    for wrong in (3, 5):
        assert (bucketed_attention(q, k, v, attention_mask(packed, wrong)).double() - truth).abs().max() > 1e-3


# ---- FlexAttention's block table -----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.sampled_from((0, 1, 5, 9, 30)),
       st.sampled_from((None, 1, 3, 7, 20)), st.sampled_from((2, 3, 4, 8)), st.booleans())
def test_block_table_covers_the_mask(
    lengths: list[int], prefix_length: int, sliding_window: int | None, block_size: int, last_token_only: bool,
) -> None:
    """Every allowed pair lies in a named block; a block named as full is complete and holds allowed pairs only."""
    packed = pack_sequences([[0] * n for n in lengths], device=CPU, prefix_length=prefix_length)
    queries, keys = len(lengths) if last_token_only else sum(lengths), prefix_length + sum(lengths)
    allowed = mask_mod(packed, packed.last_token_B if last_token_only else None, sliding_window)(
        torch.zeros(()), torch.zeros(()), torch.arange(queries)[:, None], torch.arange(keys)[None])
    some, every = block_table(
        packed, last_token_only=last_token_only, sliding_window=sliding_window, block_size=block_size)
    for (i, j), named in np.ndenumerate(some):
        inside = allowed[i * block_size : (i + 1) * block_size, j * block_size : (j + 1) * block_size]
        assert named or not inside.any()
        assert not every[i, j] or (named and inside.all() and inside.shape == (block_size, block_size))


def test_block_table_example_of_the_docstring() -> None:
    packed = pack_sequences([[0] * 3] * 2, device=CPU)
    some, every = block_table(packed, last_token_only=False, sliding_window=None, block_size=2)
    assert some.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert not every.any()


def test_empty_blocks_are_skipped_and_full_blocks_are_known() -> None:
    """64 texts of 512 tokens: 10 of 4 x 4 blocks each hold an allowed pair, 6 of them nothing else."""
    packed: PackedBatch = pack_sequences([[0] * 512] * 64, device=CPU)
    some, every = block_table(packed, last_token_only=False, sliding_window=4096)
    assert (some.sum(), every.sum()) == (64 * 10, 64 * 6)
    some, _ = block_table(packed, last_token_only=True, sliding_window=4096)
    assert some.sum() == 64 * 4  # the last tokens alone: one block of queries, all blocks of keys


def test_the_substitute_for_no_window_fits_into_the_kernels_32_bit_integers() -> None:
    """And exceeds the positions of any supported model."""
    assert 2**20 < flex.NO_WINDOW <= torch.iinfo(torch.int32).max


def test_flex_attention_on_a_cpu_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compile_once", None)
    packed = pack_sequences([[0] * 3], device=CPU)
    q = torch.randn(3, 2, 4)
    assert flex_attention(q, q, q, build_block_mask(packed, None, None)).shape == (3, 2, 4)
