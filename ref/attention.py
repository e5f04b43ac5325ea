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
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ref.packing import Packed

KeyValue = tuple[Tensor, Tensor]  # rotated keys (S, G, K) and values (S, G, K) of a shared prefix, one layer


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
    return torch.cat(outputs)


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
    block_mask = _block_mask(packed, len(q_NHK), window_keys)
    attention: Any = flex_attention
    if q_NHK.device.type == "cuda":
        attention = _compiled(flex_attention)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHK, k_TGK, v_TGK))
    return attention(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)


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
    window = window_keys or 2**62

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position_N[query] - key_position[key]
        same_text = (key_text[key] == text_N[query]) | (key < prefix_tokens)
        return same_text & (distance >= 0) & (distance < window)

    return visible


def _block_mask(packed: Packed, rows: int, window_keys: int | None) -> Any:
    """The rule as a table of blocks; all layers of a forward pass ask for the same one, so it is kept on `packed`."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = f"_block_mask_{rows}_{window_keys}"
    if key not in packed.__dict__:
        device = packed.ids_T.device
        build: Callable[..., Any] = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        keys = packed.prefix_tokens + len(packed.ids_T)
        packed.__dict__[key] = build(
            visible_rule(packed, rows, window_keys), B=None, H=None, Q_LEN=rows, KV_LEN=keys, device=device)
    return packed.__dict__[key]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled version for all token counts."""
    return torch.compile(function, dynamic=True)
