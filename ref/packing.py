"""Packing: texts lie end to end in one stream of tokens, and offsets say where each one ends.

    texts     [a b c] [d e]            nothing is padded: 5 tokens cost 5 tokens
    ids_T      a b c   d e             position_T  0 1 2 0 1   (plus the length of a shared prefix)
    offsets    0 3 5                   last_B      2 4         (the token that is pooled)

Batches are cut from a list sorted by token count, so that a batch holds texts of nearly one length: the CPU's
attention then runs over few groups of equal length. Called by embedder.py, gradcache.py and trainer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """B texts as one stream of T tokens. `lengths` stays on the host, so that no step waits for the device."""

    ids_T: Tensor  # int64, on the model's device
    lengths: tuple[int, ...]
    prefix_tokens: int = 0  # length S of the prefix that all texts of the stream share

    @property
    def offsets(self) -> np.ndarray:
        """Where each text starts, and at the end T: (B + 1,) int64 token counts."""
        return np.cumsum((0, *self.lengths))

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """`text_T` and `position_T` where they are computed."""
        text_T = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return text_T, np.arange(len(text_T)) - self.offsets[text_T] + self.prefix_tokens

    @cached_property
    def text_T(self) -> Tensor:
        """Which text a token belongs to, (T,) int64."""
        return to_device(self.on_host[0], self.ids_T.device)

    @cached_property
    def position_T(self) -> Tensor:
        """Position of each token in its text, the shared prefix counted, (T,) int64."""
        return to_device(self.on_host[1], self.ids_T.device)

    @cached_property
    def last_B(self) -> Tensor:
        """Index of each text's last token in the stream, (B,) int64."""
        return to_device(self.offsets[1:] - 1, self.ids_T.device)

    def runs_of_equal_length(self) -> list[tuple[int, int]]:
        """(number of texts, tokens of each) for neighbours of one length."""
        return [(len(list(texts)), length) for length, texts in groupby(self.lengths)]


def pack(texts: Sequence[Sequence[int] | np.ndarray], *, device: torch.device, prefix_tokens: int = 0) -> Packed:
    """Lay token lists (each with at least one id) end to end."""
    ids_T = np.concatenate(texts, dtype=np.int64)
    return Packed(to_device(ids_T, device), tuple(map(len, texts)), prefix_tokens)


def to_device(numbers: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on the device; from pinned memory, so that neither waits for the other."""
    tensor = torch.as_tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def cut_by_tokens(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Indices of texts, longest first, cut into batches of at most `tokens_per_batch` tokens.

    A text longer than the budget gets a batch of its own. Equal lengths keep their order.
    Example: lengths [2, 5, 3], budget 5 -> [[1], [2, 0]].
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
