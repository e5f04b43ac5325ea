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

On a CPU, consecutive texts of equal length form a batch without padding, and scaled_dot_product_attention runs once for
each such group. On CUDA, FlexAttention evaluates the rule itself (flex.py). Tests check that both agree.

N counts the query positions: all T tokens, or in the last layer only the B last tokens.
Source: Mistral 7B, arXiv 2310.06825, section 2; grouped queries: arXiv 2305.13245.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ref.model.flex import build_block_mask, flex_attention
from ref.model.packing import PackedBatch

KeyValue = tuple[Tensor, Tensor]  # of one layer, keys rotated: (T, G, K) of a packed batch, (S, G, K) of a prefix


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one packed batch, built once per forward pass and shared by the layers (the last has its own)."""

    batch: PackedBatch
    sliding_window: int | None  # keys that a query attends to, its own included; None: all before it
    query_rows: Tensor | None = None  # (B,) the query positions; None: all tokens
    block_mask: Any = None  # FlexAttention's BlockMask, on CUDA

    def queries(self, x_TD: Tensor) -> Tensor:
        """The rows of `x_TD` that are query positions, (N, D)."""
        return x_TD if self.query_rows is None else x_TD[self.query_rows]


def attention_mask(
    batch: PackedBatch, sliding_window: int | None, *, last_token_only: bool = False,
) -> AttentionMask:
    """Build the mask; with `last_token_only` the query positions are the last tokens of the texts."""
    rows = batch.last_token_B if last_token_only else None
    on_cuda = batch.input_ids_T.device.type == "cuda"
    return AttentionMask(
        batch, sliding_window, rows, build_block_mask(batch, rows, sliding_window) if on_cuda else None)


def attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `mask` allows, (N, H, K). Queries and keys come rotated."""
    if mask.block_mask is not None:
        return flex_attention(q_NHK, k_TGK, v_TGK, mask.block_mask, prefix)
    return sdpa_attention(q_NHK, k_TGK, v_TGK, mask, prefix)


def sdpa_attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """`attention` as one scaled_dot_product_attention for each group of consecutive texts of equal length."""
    groups = mask.batch.equal_length_groups()
    q_groups = q_NHK.split([count * length if mask.query_rows is None else count for count, length in groups])
    k_groups, v_groups = (x_TGK.split([count * length for count, length in groups]) for x_TGK in (k_TGK, v_TGK))
    outputs = []
    for (count, _), *qkv in zip(groups, q_groups, k_groups, v_groups, strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in qkv)  # (texts, heads, tokens, K)
        if prefix is not None:
            k, v = (torch.cat((p_SGK.transpose(0, 1).expand(count, -1, -1, -1), x), dim=2)
                    for p_SGK, x in zip(prefix, (k, v), strict=True))
        outputs.append(_equal_length_attention(q, k, v, mask.sliding_window).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _equal_length_attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    """Attention of (texts, H, queries, K) to (texts, G, keys, K), both ending at the same token."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:  # the last token attends to the last W keys: no mask is needed
        start = max(0, keys - sliding_window) if sliding_window else 0
        return F.scaled_dot_product_attention(q, k[:, :, start:], v[:, :, start:], enable_gqa=True)
    if queries == keys and (sliding_window is None or sliding_window >= keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    allowed = distance >= 0
    if sliding_window is not None:
        allowed &= distance < sliding_window  # exactly W keys: distances 0 to W - 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
