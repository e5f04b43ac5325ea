"""Grouped-query attention over packed texts: causal, within a window, behind an optional shared prefix.

One rule says which keys a query sees. With absolute positions i (query) and j (key):

    same text, or a key of the shared prefix;      j <= i  (causal);      i - j < W  (window, self included)

Here is W = 3 for one text behind a prefix of two tokens (rows ask, columns are seen):

              prefix  text
              0 1     2 3 4
        i=2   x x     x . .
        i=3   . x     x x .
        i=4   . .     x x x

On the CPU the rule is cut into pieces: neighbours of equal length form a rectangle without padding, and
scaled_dot_product_attention runs once for each. On CUDA FlexAttention takes the rule itself and skips the
blocks where nothing is seen. `attend` picks by device; the tests hold both against each other.

The rows that ask are all T tokens, or (in the last layer) only the B last tokens: `q` has that many rows.
Source: Mistral 7B, arXiv 2310.06825, section 2; grouped queries: arXiv 2305.13245.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ref.packing import Packed, to_device

BLOCK = 128  # rows and keys of a block that FlexAttention visits or skips
NO_WINDOW = 2**30  # keys: more than any text has, and FlexAttention's kernel counts in 32 bits
KeyValue = tuple[Tensor, Tensor]  # of a layer, the keys rotated: (T, G, K) of a stream, (S, G, K) of a prefix


def attend(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packed: Packed, *,
    window_keys: int | None, prefix: KeyValue | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the visible keys, (N, H, K); N is T (every token asks) or B (the last ones).

    Keys come rotated. `window_keys` counts the query's own key; None sees everything before.
    """
    by_device = attend_flex if q_NHK.device.type == "cuda" else attend_by_length
    return by_device(q_NHK, k_TGK, v_TGK, packed, window_keys=window_keys, prefix=prefix)


def attend_by_length(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packed: Packed, *,
    window_keys: int | None, prefix: KeyValue | None = None,
) -> Tensor:
    """`attend` as one scaled_dot_product_attention for each run of texts of equal length."""
    runs = packed.runs_of_equal_length()
    every_token_asks = len(q_NHK) == len(k_TGK)
    q_runs = q_NHK.split([count * length if every_token_asks else count for count, length in runs])
    k_runs, v_runs = (x_TGK.split([count * length for count, length in runs]) for x_TGK in (k_TGK, v_TGK))
    outputs = []
    for (count, _), *qkv in zip(runs, q_runs, k_runs, v_runs, strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in qkv)  # (texts, heads, tokens, K)
        if prefix is not None:
            k, v = (
                torch.cat((p_SGK.transpose(0, 1).expand(count, -1, -1, -1), x), dim=2)
                for p_SGK, x in zip(prefix, (k, v), strict=True)
            )
        outputs.append(rectangle(q, k, v, window_keys).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rectangle(q: Tensor, k: Tensor, v: Tensor, window_keys: int | None) -> Tensor:
    """Attention of (texts, H, asking, K) over (texts, G, seen, K), both ending at the same token."""
    asking, seen = q.shape[2], k.shape[2]
    if asking == 1:  # the last token sees the last W keys: no mask is needed
        start = max(0, seen - window_keys) if window_keys else 0
        return F.scaled_dot_product_attention(q, k[:, :, start:], v[:, :, start:], enable_gqa=True)
    if asking == seen and (window_keys is None or window_keys >= seen):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    query = torch.arange(seen - asking, seen, device=q.device)[:, None]
    key = torch.arange(seen, device=q.device)
    visible = key <= query
    if window_keys is not None:
        visible &= query - key < window_keys
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)


def attend_flex(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packed: Packed, *,
    window_keys: int | None, prefix: KeyValue | None = None,
) -> Tensor:
    """`attend` through FlexAttention: the prefix's keys stand before the stream, and the rule is a mask function."""
    from torch.nn.attention.flex_attention import flex_attention

    if prefix is not None:
        k_TGK, v_TGK = (torch.cat(pair) for pair in zip(prefix, (k_TGK, v_TGK), strict=True))
    attention: Any = flex_attention
    if q_NHK.device.type == "cuda":  # never the kernel for few rows: it has no configuration for 33 to 127 of them
        attention = partial(compiled(flex_attention), kernel_options={"BACKEND": "TRITON"})
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHK, k_TGK, v_TGK))
    mask = _block_mask(packed, len(q_NHK), window_keys)
    return attention(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def visible_rule(
    packed: Packed, rows: int, window_keys: int | None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule at the top of this file as FlexAttention's mask function of (batch, head, query row, key row)."""
    prefix_tokens = packed.prefix_tokens
    text_T, position_T = packed.text_T, packed.position_T
    text_N, position_N = (text_T, position_T) if rows == len(text_T) else (
        text_T[packed.last_B], position_T[packed.last_B])
    key_position = torch.cat((torch.arange(prefix_tokens, device=position_T.device), position_T))
    key_text = torch.cat((text_T.new_full((prefix_tokens,), -1), text_T))
    window = window_keys or NO_WINDOW

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position_N[query] - key_position[key]
        same_text = (key_text[key] == text_N[query]) | (key < prefix_tokens)
        return same_text & (distance >= 0) & (distance < window)

    return visible


def block_table(
    packed: Packed, rows: int, window_keys: int | None, *, block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of `block` query rows by `block` keys hold something visible, and which nothing else: bool arrays.

    From the offsets, on the host: T / block numbers a side, never T x T. The first may name a block too many (the
    mask function still decides inside it), the second never. Two texts of 3 tokens, blocks of 2, no window:

                  keys 0-1  2-3  4-5
        rows 0-1        x    o    .      o: named, though the mask function finds nothing in it
        rows 2-3        x    x    o      row 2 ends the first text, row 3 begins the second
        rows 4-5        .    x    x
    """
    prefix, window = packed.prefix_tokens, window_keys or NO_WINDOW
    text_T, position_T = packed.on_host
    row_N = np.arange(len(text_T)) if rows == len(text_T) else packed.offsets[1:] - 1
    text_of_key = np.concatenate((np.full(prefix, -1), text_T))
    place_of_key = np.concatenate((np.arange(prefix), position_T))

    def ranges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, len(values), block)
        return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)

    (q_text_low, q_text_high), (q_low, q_high) = ranges(text_T[row_N]), ranges(position_T[row_N])
    (k_text_low, k_text_high), (k_low, k_high) = ranges(text_of_key), ranges(place_of_key)
    by_row = lambda x: x[:, None]  # noqa: E731
    holds_prefix = k_text_low < 0
    shares_text = holds_prefix | (by_row(q_text_low) <= k_text_high) & (k_text_low <= by_row(q_text_high))
    some = shares_text & (k_low <= by_row(q_high)) & (by_row(q_low) - k_high < window)
    one_text = (q_text_low == q_text_high)[:, None] & (k_text_low == k_text_high) & (by_row(q_text_low) == k_text_low)
    every = (one_text | (k_text_high < 0)) & (k_high <= by_row(q_low)) & (by_row(q_high) - k_low < window)
    every[len(row_N) // block :] = False  # a block that is cut off holds what is not there
    every[:, len(place_of_key) // block :] = False
    return some, every


def _block_mask(packed: Packed, rows: int, window_keys: int | None) -> Any:
    """Rule and table for FlexAttention; all layers of a forward pass ask for the same, so they stay on `packed`."""
    from torch.nn.attention.flex_attention import BlockMask

    key = f"_block_mask_{rows}_{window_keys}"
    if key not in packed.__dict__:
        some, every = block_table(packed, rows, window_keys)
        partly, full = ([to_device(x, packed.ids_T.device) for x in _listed(table)] for table in (some & ~every, every))
        packed.__dict__[key] = BlockMask.from_kv_blocks(
            partly[0], partly[1], full[0], full[1], BLOCK_SIZE=BLOCK, mask_mod=visible_rule(packed, rows, window_keys),
            seq_lengths=(rows, packed.prefix_tokens + len(packed.ids_T)))
    return packed.__dict__[key]


def _listed(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks a row of blocks has, and their numbers, the others after them: (1, 1, rows[, columns]) int32."""
    order = np.argsort(~table, axis=1, kind="stable").astype(np.int32)
    return table.sum(1, dtype=np.int32)[None, None], order[None, None]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, one version for all token counts; an error where it cannot be one graph.

    What backward can have again by elementwise work (normed states, silu(gate) * up) is computed again, not kept.
    """
    torch._dynamo.config.recompile_limit = 64  # by gradient or not, prefix or not, all rows or the last ones
    torch._functorch.config.ban_recompute_materialized_backward = False
    return torch.compile(function, dynamic=True, fullgraph=True)
