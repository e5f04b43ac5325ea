"""Overlapping host and device work: prefetching in a thread, and asynchronous copies from the device to the host."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) in order; a thread computes the next result while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def async_to_host(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host; calling the result waits for the copy and returns the array."""
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()
    return wait


class AsyncCopies:
    """Copies batches of vectors from the device into rows of a host array; each copy completes one batch later."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.pending: list[tuple[np.ndarray, Callable[[], np.ndarray]]] = []

    def add(self, rows: np.ndarray, vector_BD: Tensor) -> None:
        """Start the copy of one batch and complete the previous one."""
        self.pending.append((rows, async_to_host(vector_BD)))
        if len(self.pending) > 1:
            self._complete()

    def finish(self) -> None:
        """Complete all copies."""
        while self.pending:
            self._complete()

    def _complete(self) -> None:
        rows, wait = self.pending.pop(0)
        self.vectors[rows] = wait()
