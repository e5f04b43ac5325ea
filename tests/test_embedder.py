"""Texts to vectors: equal texts once, results in their order, ids a window ahead, a bound on what the host holds."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

from ref import embedder as module
from ref.embedder import Embedder
from ref.model.transformer import init_weights
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import train_tokenizer
from ref.utils.dedup import first_occurrence
from ref.utils.prefetch import prefetch


class OneHash(str):
    """Texts that all have the same hash."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7


@given(st.lists(st.text("abc", max_size=3)))
def test_equal_texts_are_found(texts):
    assert first_occurrence(texts).tolist() == [texts.index(text) for text in texts]


@given(st.lists(st.text("ab", max_size=2)))
def test_texts_of_one_hash_are_told_apart(texts):
    """A text may then stand for itself although it came before; never for another one."""
    alike = [OneHash(text) for text in texts]
    for n, first in enumerate(first_occurrence(alike)):
        assert first <= n and texts[first] == texts[n]


def test_what_is_made_ahead_comes_in_order_and_from_one_thread():
    threads = set()

    def make(item: int) -> int:
        threads.add(threading.get_ident())
        return item * item
    assert list(prefetch(make, range(9))) == [n * n for n in range(9)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_an_error_in_the_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda n: 1 // n, [1, 0, 1]))


@pytest.fixture
def small_embedder() -> Embedder:
    words = train_tokenizer(["tea and cake", "cake and ale"] * 5, vocab_size=SMALL.vocab_size, lowercase=True)
    return Embedder(init_weights(SMALL, seed=0), PromptEncoder(words), tokens_per_batch=64)


def test_windows_change_nothing(small_embedder, monkeypatch):
    draw = np.random.default_rng(torch.initial_seed() % 2**32)
    texts = [" ".join(draw.choice(["tea", "and", "cake", "ale"], draw.integers(0, 9))) for _ in range(60)]
    whole = small_embedder.encode(texts, instruction="cake")
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 7)
    np.testing.assert_allclose(small_embedder.encode(texts, instruction="cake"), whole, atol=2e-6)
    for n, text in enumerate(texts):
        np.testing.assert_array_equal(whole[n], whole[texts.index(text)])


def test_beyond_the_vectors_32_bytes_a_text_and_two_windows(small_embedder, monkeypatch):
    """200,000 short texts, a third of them repeated; the model is replaced, since it is not what is measured."""
    monkeypatch.setattr(module, "embed", lambda model, packed, **_: torch.ones(len(packed.lengths), SMALL.width))
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 2000)
    texts = [f"tea {n % 130_000}" for n in range(200_000)]
    tracemalloc.start()
    vectors = small_embedder.encode(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    two_windows = 2 * 2000 * 400
    assert vectors.nbytes < peak <= vectors.nbytes + 32 * len(texts) + two_windows


def test_control_a_list_of_ids_a_text_would_be_seen(small_embedder, monkeypatch):
    """The bound bites: with all texts in one window it does not hold."""
    monkeypatch.setattr(module, "embed", lambda model, packed, **_: torch.ones(len(packed.lengths), SMALL.width))
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 10**9)
    texts = [f"tea {n}" for n in range(20_000)]
    tracemalloc.start()
    vectors = small_embedder.encode(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > vectors.nbytes + 32 * len(texts) + 2 * 2000 * 400
