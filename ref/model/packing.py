"""Packing: texts are concatenated into one stream of tokens without padding, and offsets mark their ends.

    texts           [a b c] [d e]
    input_ids_T      a b c   d e             position_ids_T   0 1 2 0 1   (plus the length of a shared prefix)
    cu_seqlens       0 3 5                   document_ids_T   0 0 0 1 1
                                             last_token_B     2 4         (the tokens that are pooled)

Batches are formed from texts sorted by token count, so that a batch holds texts of similar length: on a CPU attention
then runs over few buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B texts as one stream of T tokens. `lengths` stays on the host, so that no step waits for the device."""

    input_ids_T: Tensor  # int64, on the model's device
    lengths: tuple[int, ...]
    prefix_length: int = 0  # tokens S of the prefix that all texts share

    @property
    def cu_seqlens(self) -> np.ndarray:
        """Start of each text, then T: cumulative lengths, (B + 1,) int64 on the host."""
        return np.cumsum((0, *self.lengths))

    @cached_property
    def host_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """`document_ids_T` and `position_ids_T` on the host."""
        document_ids_T = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return document_ids_T, np.arange(len(document_ids_T)) - self.cu_seqlens[document_ids_T] + self.prefix_length

    @cached_property
    def document_ids_T(self) -> Tensor:
        """Index of the text that each token belongs to, (T,) int64."""
        return to_device(self.host_ids[0], self.input_ids_T.device)

    @cached_property
    def position_ids_T(self) -> Tensor:
        """Position of each token in its text, after the shared prefix, (T,) int64."""
        return to_device(self.host_ids[1], self.input_ids_T.device)

    @cached_property
    def last_token_B(self) -> Tensor:
        """Index of each text's last token in the stream, (B,) int64."""
        return to_device(self.cu_seqlens[1:] - 1, self.input_ids_T.device)

    def length_buckets(self, *, least: float) -> list[list[int]]:
        """Lengths of consecutive texts in buckets, of which the shortest has at least `least` of the longest's tokens.

        Example: lengths (8, 7, 6, 5, 2), least 0.75 -> [[8, 7, 6], [5], [2]].
        """
        buckets: list[list[int]] = []
        shortest = longest = 0
        for length in self.lengths:
            shortest, longest = min(shortest, length), max(longest, length)
            if not buckets or shortest < least * longest:
                buckets.append([])
                shortest = longest = length
            buckets[-1].append(length)
        return buckets

    def padded_row_T(self, buckets: list[list[int]]) -> Tensor | None:
        """Row of each token when every text is padded to the longest of its bucket; None if no text is padded."""
        if all(min(lengths) == max(lengths) for lengths in buckets):
            return None
        width_B = np.concatenate([np.full(len(lengths), max(lengths)) for lengths in buckets])
        start_B = np.cumsum(width_B) - width_B
        document_ids_T, position_ids_T = self.host_ids
        return to_device(start_B[document_ids_T] + position_ids_T - self.prefix_length, self.input_ids_T.device)


def pack_sequences(
    texts: Sequence[Sequence[int] | np.ndarray], *, device: torch.device, prefix_length: int = 0,
) -> PackedBatch:
    """Concatenate lists of token ids, each with at least one. `prefix_length`: tokens of a prefix before every text."""
    ids_T = np.concatenate(texts, dtype=np.int64)
    return PackedBatch(to_device(ids_T, device), tuple(map(len, texts)), prefix_length)


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy an array or tensor from the host to the device, on CUDA asynchronously from pinned memory."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def batch_by_tokens(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Group text indices, longest first, into batches of at most `tokens_per_batch` tokens.

    A text longer than that is a batch of its own. Equal lengths keep their order.
    Example: lengths [2, 5, 3], 5 tokens a batch -> [[1], [2, 0]].
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[index] > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(index)
        room -= lengths[index]
    return batches
