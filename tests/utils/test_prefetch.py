"""Prefetching in a thread, one item for each core, and copies to the host."""

import threading
import time

import numpy as np
import pytest
import torch

from ref.utils.prefetch import AsyncCopies, map_on_cores, prefetch

CPU = torch.device("cpu")


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


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_on_a_cpu_each_of_torchs_threads_takes_its_own_item(three_threads):
    """The first three items wait for each other, so that they can only end side by side."""
    together = threading.Barrier(3)

    def threads(item: int) -> tuple[int, int]:
        if item < 3:
            together.wait(timeout=30)
        return item, torch.get_num_threads()
    assert list(map_on_cores(threads, range(8), CPU)) == [(n, 1) for n in range(8)]
    assert torch.get_num_threads() == 3
    begun_later: list[int] = []
    thread = threading.Thread(target=lambda: begun_later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert begun_later == [3]


@pytest.mark.parametrize(("items", "device"), [(2, "cpu"), (9, "cuda")], ids=["fewer items than threads", "a GPU"])
def test_items_that_are_computed_one_after_the_other_by_the_caller(three_threads, items: int, device: str):
    """The next item is not begun before it is asked for."""
    begun: list[int] = []

    def compute(item: int) -> int:
        begun.append(item)
        return threading.get_ident()
    for n, thread in enumerate(map_on_cores(compute, range(items), torch.device(device))):
        assert thread == threading.get_ident() and begun == list(range(n + 1))
    assert len(begun) == items


def test_an_error_on_a_core_reaches_the_caller_and_ends_the_work(three_threads):
    computed = []

    def fail(item: int) -> None:
        if item == 1:
            raise ZeroDivisionError
        time.sleep(0.01)
        computed.append(item)
    with pytest.raises(ZeroDivisionError):
        list(map_on_cores(fail, range(1000), CPU))
    assert len(computed) < 500 and torch.get_num_threads() == 3


def test_copies_complete_one_batch_later():
    vectors = np.zeros((4, 2), np.float32)
    copies = AsyncCopies(vectors)
    copies.add(np.array([2, 0]), torch.ones(2, 2))
    assert not vectors.any()
    copies.add(np.array([1]), torch.full((1, 2), 2.0))
    assert vectors[:, 0].tolist() == [1, 0, 1, 0]
    copies.finish()
    assert vectors[:, 0].tolist() == [1, 2, 1, 0]


def test_a_thread_that_cannot_start_is_no_end(three_threads, monkeypatch):
    """A limit of processes: the two that have started would wait for the third for ever."""
    started = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(map_on_cores(lambda item: 2 * item, range(8), CPU)) == list(range(0, 16, 2))
    assert torch.get_num_threads() == 3 and len(started) == 2


def test_ctrl_c_while_threads_start_ends_them(three_threads, monkeypatch):
    """The two that have started would wait for the third, and the pool for them."""
    started = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(thread)
        original(thread)
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    ended = threading.Event()

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            list(map_on_cores(lambda item: item, range(8), CPU))
        ended.set()
    original(threading.Thread(target=run, daemon=True))
    assert ended.wait(timeout=30) and len(started) == 2
