"""What an embedder of many texts need not do: a text twice, and wait.

    first_of_equal    a text that came before has its vector already: `different` names the others, and
                      `fill_repeated` gives it that vector
    one_ahead         a thread makes the next item (ids of texts, vectors read from disk) during work on this one
    to_host           a copy to the host that is waited for only when its numbers are read
    LateCopies        vectors travel to the host one batch late, while the device works on the next

Called by embedder.py, scoring/, runs.py, run_train.py, labelling/cache.py and labelling/candidates.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")


def first_of_equal(texts: Sequence[str]) -> np.ndarray:
    """For each text the index of the first one equal to it, (texts,) int32: its own where it is the first.

    Example: a b a -> 0 1 0. Sorting hashes takes at most 32 bytes a text, whatever the texts; two different texts
    of one hash are told apart by comparison and stand for themselves.
    """
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = hashes.argsort(kind="stable").astype(np.int32)
    hashes = hashes[order]
    is_first = np.ones(len(texts), np.bool_)
    np.not_equal(hashes[1:], hashes[:-1], out=is_first[1:])
    del hashes
    run = np.flatnonzero(is_first).astype(np.int32)
    first = np.empty(len(texts), np.int32)
    first[order] = np.repeat(order[run], np.diff(run, append=np.int32(len(texts))))
    for n in np.flatnonzero(first != np.arange(len(texts), dtype=np.int32)):
        if texts[n] != texts[first[n]]:
            first[n] = n
    return first


def different(first: np.ndarray) -> np.ndarray:
    """Rows of the texts that come for the first time, from what `first_of_equal` gives."""
    return np.flatnonzero(first == np.arange(len(first)))


def fill_repeated(vectors: np.ndarray, first: np.ndarray, *, rows_at_a_time: int = 50_000) -> None:
    """Give each repeated text the vector of its first, in place; a part at a time: a copy of all would double them."""
    for start in range(0, len(first), rows_at_a_time):
        rows = np.arange(start, min(start + rows_at_a_time, len(first)))
        repeated = rows[first[rows] != rows]
        vectors[repeated] = vectors[first[repeated]]


def one_ahead(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """function(item) for each item in order, computed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def to_host(numbers: Tensor) -> Callable[[], np.ndarray]:
    """Start a copy to the host; the call it returns waits for the copy and gives the numbers."""
    if numbers.device.type != "cuda":
        return numbers.numpy
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()
    return wait


class LateCopies:
    """Vectors from the device to their rows of `vectors` on the host, one batch late."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.waiting: list[tuple[np.ndarray, Callable[[], np.ndarray]]] = []

    def add(self, rows: np.ndarray, vector_BD: Tensor) -> None:
        """Start a copy; end the one before it."""
        self.waiting.append((rows, to_host(vector_BD)))
        if len(self.waiting) > 1:
            self._end()

    def finish(self) -> None:
        """End all copies."""
        while self.waiting:
            self._end()

    def _end(self) -> None:
        rows, arrived = self.waiting.pop(0)
        self.vectors[rows] = arrived()
