"""Attention on CUDA through FlexAttention: the mask of attention.py as a function, and a table of the blocks it visits.

FlexAttention computes only the blocks of BLOCK_SIZE queries by BLOCK_SIZE keys that the table names. The table is built
on the host from the text lengths, T / BLOCK_SIZE entries a side, never T x T.
Source: torch.nn.attention.flex_attention.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ref.model.packing import PackedBatch, to_device
from ref.utils.compile import compile_once

BLOCK_SIZE = 128  # queries and keys of a block
NO_WINDOW = 2**30  # keys: longer than any text, and within the kernel's 32-bit integers


def flex_attention(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, block_mask: Any, prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attention` by FlexAttention, (N, H, K); the keys of the prefix precede those of the packed batch."""
    from torch.nn.attention import flex_attention as flex

    if prefix is not None:
        k_TGK, v_TGK = (torch.cat(pair) for pair in zip(prefix, (k_TGK, v_TGK), strict=True))
    kernel: Any = flex.flex_attention
    if q_NHK.device.type == "cuda":  # not the kernel for few queries: it has no configuration for 33 to 127 of them
        kernel = partial(compile_once(flex.flex_attention), kernel_options={"BACKEND": "TRITON"})
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHK, k_TGK, v_TGK))
    return kernel(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)


def build_block_mask(batch: PackedBatch, query_rows: Tensor | None, sliding_window: int | None) -> Any:
    """FlexAttention's BlockMask of a packed batch; `query_rows` (B,): the query positions, None for all tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = block_table(batch, last_token_only=query_rows is not None, sliding_window=sliding_window)
    tokens, device = len(batch.input_ids_T), batch.input_ids_T.device
    partial_blocks, full_blocks = (
        [to_device(x, device) for x in _counts_and_columns(table)] for table in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        partial_blocks[0], partial_blocks[1], full_blocks[0], full_blocks[1], BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod(batch, query_rows, sliding_window),
        seq_lengths=(tokens if query_rows is None else len(query_rows), batch.prefix_length + tokens))


def mask_mod(
    batch: PackedBatch, query_rows: Tensor | None, sliding_window: int | None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of attention.py as FlexAttention's mask function of (batch, head, query index, key index)."""
    prefix_length = batch.prefix_length
    document_T, position_T = batch.document_ids_T, batch.position_ids_T
    document_N, position_N = (x if query_rows is None else x[query_rows] for x in (document_T, position_T))
    key_position = torch.cat((torch.arange(prefix_length, device=position_T.device), position_T))
    key_document = torch.cat((document_T.new_full((prefix_length,), -1), document_T))
    window = sliding_window or NO_WINDOW

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position_N[query] - key_position[key]
        same_text = (key_document[key] == document_N[query]) | (key < prefix_length)
        return same_text & (distance >= 0) & (distance < window)  # exactly W keys: distances 0 to W - 1

    return allowed


def block_table(
    batch: PackedBatch, *, last_token_only: bool, sliding_window: int | None, block_size: int = BLOCK_SIZE,
) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of queries by keys hold an allowed pair, and which hold nothing else: two boolean arrays.

    The first may name a block too many (the mask function still decides inside it), the second never does. Two texts of
    3 tokens, blocks of 2, no window:

                     keys 0-1  2-3  4-5
        queries 0-1        x    o    .      o: named, though no pair in it is allowed
        queries 2-3        x    x    o      query 2 ends the first text, query 3 begins the second
        queries 4-5        .    x    x
    """
    prefix, window = batch.prefix_length, sliding_window or NO_WINDOW
    document_T, position_T = batch.host_ids
    query_N = batch.cu_seqlens[1:] - 1 if last_token_only else np.arange(len(document_T))
    key_document = np.concatenate((np.full(prefix, -1), document_T))
    key_position = np.concatenate((np.arange(prefix), position_T))

    def ranges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, len(values), block_size)
        return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)

    (q_document_min, q_document_max), (q_min, q_max) = (
        [x[:, None] for x in ranges(values[query_N])] for values in (document_T, position_T))
    (k_document_min, k_document_max), (k_min, k_max) = ranges(key_document), ranges(key_position)
    holds_prefix = k_document_min < 0
    shares_text = holds_prefix | (q_document_min <= k_document_max) & (k_document_min <= q_document_max)
    some = shares_text & (k_min <= q_max) & (q_min - k_max < window)
    one_text = (q_document_min == q_document_max) & (k_document_min == k_document_max) & (
        q_document_min == k_document_min)
    every = (one_text | (k_document_max < 0)) & (k_max <= q_min) & (q_max - k_min < window)
    every[len(query_N) // block_size :] = False  # an incomplete block holds positions that do not exist
    every[:, len(key_position) // block_size :] = False
    return some, every


def _counts_and_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of blocks in each row of the table, and their columns first: (1, 1, rows[, columns]) int32."""
    order = np.argsort(~table, axis=1, kind="stable").astype(np.int32)
    return table.sum(1, dtype=np.int32)[None, None], order[None, None]
