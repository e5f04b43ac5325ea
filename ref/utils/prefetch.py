"""Work side by side: prefetching in a thread, one item for each core of a CPU, copies from the device to the host."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
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


def map_on_cores(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """Yield function(item) in order; on a CPU as many items at a time as torch has threads, with one thread each.

    Threads that share one item wait for each other in every operation. Fewer items than threads, and those of a GPU,
    are computed one after the other; so is everything if the system refuses a thread.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < threads:
        yield from map(function, items)
        return
    all_started = Barrier(threads)

    def use_one_thread(_: int) -> None:
        torch.get_num_threads()  # a thread that has asked once keeps its own number
        torch.set_num_threads(1)
        all_started.wait()

    with ThreadPoolExecutor(threads) as pool:
        mapped: Callable[..., Iterator[Result]] = pool.map
        try:
            list(pool.map(use_one_thread, range(threads)))
        except RuntimeError:  # "can't start new thread"; those that have started wait
            all_started.abort()
            mapped = map
        except BaseException:  # Ctrl-C
            all_started.abort()
            raise
        torch.set_num_threads(threads)  # what threads inherit that begin later
        yield from mapped(function, items)


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
