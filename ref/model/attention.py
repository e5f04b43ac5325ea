"""Grouped-query attention over packed texts: causal, with a sliding window and an optional shared prefix.

Query position i attends to key position j if

    (i and j belong to the same text, or j is in the shared prefix)    and    0 <= i - j < W

that is, to W keys, its own included.

For W = 3 and one text behind a prefix of two tokens (rows are queries, columns are keys):

              prefix  text
              0 1     2 3 4
        i=2   x x     x . .
        i=3   . x     x x .
        i=4   . .     x x x

On a CPU, scaled_dot_product_attention runs once for each bucket of consecutive texts of equal length. Its backward is
slow in bf16, so LoRA training with bf16 weights takes `softmax_attention`, on buckets of similar length, padded on the
right: a causal query never looks right, so padding needs no mask of its own. On CUDA, FlexAttention evaluates the rule
(flex.py). Tests hold all equal.

N counts the query positions: all T tokens, or in the last layer only the B last tokens.
Source: Mistral 7B, arXiv 2310.06825, section 2; grouped queries: arXiv 2305.13245.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ref.model.flex import build_block_mask, flex_attention
from ref.model.packing import PackedBatch

# Scores of a head and text (queries x keys) up to which softmax_attention is used on a CPU. In bf16 its backward is 6
# times as fast as that of scaled_dot_product_attention at 40 tokens, twice at 128. It keeps all scores, too many above.
MAX_SCORES = 256**2
MIN_LENGTH_RATIO = 0.75  # shortest to longest text of a padded bucket; lower: fewer, larger products, more padding

KeyValue = tuple[Tensor, Tensor]  # of one layer, keys rotated: (T, G, K) of a packed batch, (S, G, K) of a prefix


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one packed batch, built once per forward pass and shared by the layers (the last has its own)."""

    batch: PackedBatch
    sliding_window: int | None  # keys that a query attends to, its own included; None: all before it
    query_rows: Tensor | None = None  # (B,) the query positions; None: all tokens
    use_softmax: bool = False  # compute it by softmax_attention, in training with bf16 weights on a CPU
    block_mask: Any = None  # FlexAttention's BlockMask, on CUDA

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Lengths of the texts that are computed together, on a CPU."""
        return self.batch.length_buckets(least=MIN_LENGTH_RATIO if self.use_softmax else 1.0)

    @cached_property
    def bucket_rows(self) -> list[int]:
        """Rows of each bucket, padding included."""
        return [len(lengths) * max(lengths) for lengths in self.buckets]

    @cached_property
    def padded_row_T(self) -> Tensor | None:
        """Row of each token in the padded buckets; None without padding."""
        return self.batch.padded_row_T(self.buckets)

    def queries(self, x_TD: Tensor) -> Tensor:
        """The rows of `x_TD` that are query positions, (N, D)."""
        return x_TD if self.query_rows is None else x_TD[self.query_rows]


def attention_mask(
    batch: PackedBatch, sliding_window: int | None, *, last_token_only: bool = False, use_softmax: bool = False,
) -> AttentionMask:
    """Build the mask; with `last_token_only` the query positions are the last tokens of the texts."""
    rows = batch.last_token_B if last_token_only else None
    on_cuda = batch.input_ids_T.device.type == "cuda"
    return AttentionMask(
        batch, sliding_window, rows, use_softmax, build_block_mask(batch, rows, sliding_window) if on_cuda else None)


def attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` allows, (N, H, K). Queries and keys come rotated."""
    if mask.block_mask is not None:
        return flex_attention(q_NHK, k_TGK, v_TGK, mask.block_mask, prefix)
    return bucketed_attention(q_NHK, k_TGK, v_TGK, mask, prefix)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v where `allowed`: (B, H, queries, K) to (B, G, keys, K); the softmax in fp32 at least.

    The H / G query heads of a group lie below each other, so that one product with the group's keys serves them all.
    """
    texts, heads, queries, head_dim = q.shape
    groups = k.shape[1]
    q = (q * head_dim**-0.5).reshape(texts * groups, -1, head_dim)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)).view(texts, heads, queries, -1)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights.to(v.dtype).view(texts * groups, heads // groups * queries, -1) @ v).view(
        texts, heads, queries, head_dim)


def bucketed_attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """`attention` once for each bucket of the batch."""
    buckets, last_token_only = mask.buckets, mask.query_rows is not None
    rows = mask.bucket_rows
    q_parts = q_NHK.split(list(map(len, buckets))) if last_token_only else _pad(q_NHK, mask).split(rows)
    k_parts, v_parts = (_pad(x_TGK, mask).split(rows) for x_TGK in (k_TGK, v_TGK))
    outputs = []
    for lengths, *qkv in zip(buckets, q_parts, k_parts, v_parts, strict=True):
        q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in qkv)  # (texts, heads, tokens, K)
        if prefix is not None:
            k, v = (torch.cat((p_SGK.transpose(0, 1).expand(len(lengths), -1, -1, -1), x), dim=2)
                    for p_SGK, x in zip(prefix, (k, v), strict=True))
        position = torch.tensor(lengths)[:, None, None] - 1 if last_token_only else torch.arange(max(lengths))
        output = _bucket_attention(q, k, v, mask.batch.prefix_length + position, mask)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if last_token_only or mask.padded_row_T is None else output.index_select(0, mask.padded_row_T)


def _pad(x_TGK: Tensor, mask: AttentionMask) -> Tensor:
    """The rows of a packed batch at their places in the padded buckets, zeros between them."""
    if mask.padded_row_T is None:
        return x_TGK
    zeros = x_TGK.new_zeros(sum(mask.bucket_rows), x_TGK[0].numel())
    return zeros.index_copy(0, mask.padded_row_T, x_TGK.flatten(1)).unflatten(1, x_TGK.shape[1:])


def _bucket_attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, mask: AttentionMask) -> Tensor:
    """Attention of queries at `position`, (queries,) for all texts or (texts, 1, 1), to the keys 0, 1, 2, …

    A model in training uses one form with and without gradient: both passes of gradient caching must round equally.
    """
    sliding_window, (queries, keys) = mask.sliding_window, (q.shape[2], k.shape[2])
    use_softmax = mask.use_softmax and queries * keys <= MAX_SCORES
    if not use_softmax and queries == keys and (sliding_window is None or sliding_window >= keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    distance = position[..., None] - torch.arange(keys)
    allowed = distance >= 0
    if sliding_window is not None:
        allowed &= distance < sliding_window  # exactly W keys: distances 0 to W - 1
    if use_softmax:
        return softmax_attention(q, k, v, allowed)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
