"""Prefetching in a thread, and copies to the host."""

import threading

import numpy as np
import pytest
import torch

from ref.utils.prefetch import AsyncCopies, prefetch


def test_results_come_in_order_and_from_one_thread():
    threads = set()

    def square(item: int) -> int:
        threads.add(threading.get_ident())
        return item * item
    assert list(prefetch(square, range(9))) == [n * n for n in range(9)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_the_next_result_is_computed_while_the_current_one_is_used():
    """Item n + 1 is begun before result n is taken, item n + 2 not: at most two results exist."""
    begun = [threading.Event() for _ in range(5)]
    for n, _ in enumerate(prefetch(lambda n: begun[n].set(), range(5))):
        assert n == 4 or begun[n + 1].wait(timeout=30)
        assert not any(event.is_set() for event in begun[n + 2:])


def test_an_error_in_the_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda n: 1 // n, [1, 0, 1]))


def test_copies_complete_one_batch_later():
    vectors = np.zeros((4, 2), np.float32)
    copies = AsyncCopies(vectors)
    copies.add(np.array([2, 0]), torch.ones(2, 2))
    assert not vectors.any()
    copies.add(np.array([1]), torch.full((1, 2), 2.0))
    assert vectors[:, 0].tolist() == [1, 0, 1, 0]
    copies.finish()
    assert vectors[:, 0].tolist() == [1, 2, 1, 0]
