"""Gradient caching: the gradient of a batch in chunks is the gradient of the whole batch.

The oracle embeds every text alone, prefix and text as one string of ids, in one graph, and calls backward once.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from ref import lora
from ref.gradcache import GradientCache, Segment
from ref.model import Mistral, fresh
from ref.packing import pack
from ref.pooling import embed

PREFIX = [1, 7, 8, 9, 10]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Counter:
    """Counts the forward passes of a model through a hook on its embedding."""

    calls: int = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1


def texts(generator: torch.Generator, count: int) -> list[list[int]]:
    """Ids of `count` texts of 2 to 11 tokens."""
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]


def segments(seed: int, *, prefixes: tuple[list[int], ...] = (PREFIX, [])) -> list[Segment]:
    """Queries behind one prefix, passages behind none (or behind another)."""
    generator = torch.Generator().manual_seed(seed)
    return [Segment(prefix, texts(generator, count)) for prefix, count in zip(prefixes, (7, 12), strict=True)]


def loss(vectors_ND: Tensor) -> Tensor:
    """Something that ties all vectors together, each in another way."""
    score = vectors_ND @ vectors_ND.T / 0.3
    weight = torch.arange(1.0, len(score) + 1)
    return (score.logsumexp(-1) * weight).sum() / weight.sum()


def gradients(model: Mistral) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cached(
    model: Mistral, parts: list[Segment], *, chunk_tokens: int, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    cache = GradientCache(model, parts, chunk_tokens=chunk_tokens)
    vectors = cache.vectors()
    loss(vectors).backward()
    cache.backward()
    return vectors.detach(), gradients(model)


def one_graph(model: Mistral, parts: list[Segment]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    device = model.norm.weight.device
    vectors = torch.cat([embed(model, pack([[*s.prefix, *text]], device=device)) for s in parts for text in s.texts])
    loss(vectors).backward()
    return vectors.detach(), gradients(model)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference of two gradients, all weights as one vector, relative to the gradient's length."""
    assert one.keys() == other.keys()
    difference = torch.stack([(one[name] - other[name]).norm() for name in one]).norm()
    return (difference / torch.stack([g.norm() for g in one.values()]).norm()).item()


@pytest.fixture(params=["all", "lora"])
def model(request, small_model) -> Mistral:
    """Every weight learns, or an adapter whose B is not zero."""
    built = small_model(window_keys=None)
    if request.param == "lora":
        lora.attach(built, rank=3, alpha=6.0, dropout=0.0, targets=TARGETS)
        for layer in lora.adapters(built).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
    return built.train()


@pytest.mark.parametrize("chunk_tokens", [1, 12, 40, 10**6])
@pytest.mark.parametrize(
    "prefixes", [(PREFIX, []), ([], []), (PREFIX, [1, 5, 6])], ids=["queries", "none", "both sides"]
)
def test_chunks_give_the_gradient_of_one_graph(model, seed, chunk_tokens, prefixes):
    parts = segments(seed, prefixes=prefixes)
    truth_vectors, truth = one_graph(model, parts)
    vectors, found = cached(model, parts, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(vectors, truth_vectors, rtol=0, atol=2e-6)
    assert distance(truth, found) < 5e-6  # the prefix's gradient is added up in another order


@pytest.mark.parametrize("chunk_tokens", [1, 12, 40])
def test_chunked_equals_unchunked_in_fp64(model, seed, chunk_tokens):
    parts = segments(seed)
    vectors, whole = cached(model.double(), parts, chunk_tokens=10**6)
    again, chunked = cached(model, parts, chunk_tokens=chunk_tokens)
    assert (vectors - again).abs().max() < 1e-6
    assert distance(whole, chunked) < 1e-7  # vectors are fp32


@pytest.mark.parametrize("chunk_tokens", [1, 12, 40])
def test_chunked_equals_unchunked_in_fp32(seed, chunk_tokens):
    model = fresh(replace(SMALL, window_keys=None), seed=seed)
    parts = segments(seed)
    _, whole = cached(model, parts, chunk_tokens=10**6)
    assert distance(whole, cached(model, parts, chunk_tokens=chunk_tokens)[1]) < 1e-6


def test_the_window_reaches_through_the_prefix(small_model, seed):
    model = small_model(window_keys=4)
    parts = segments(seed)
    assert distance(one_graph(model, parts)[1], cached(model, parts, chunk_tokens=12)[1]) < 5e-6


def test_dropout_is_replayed(small_model, seed):
    """With a fixed random state the whole thing is deterministic; both passes must see the same masks."""
    model = small_model(window_keys=None)
    lora.attach(model, rank=3, alpha=6.0, dropout=0.4, targets=TARGETS)
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    model.train()
    parts = segments(seed)
    seen: list[list[Tensor]] = []

    class Watched(GradientCache):
        def _chunk(self, *arguments):
            result = super()._chunk(*arguments)
            seen.append(result.detach())
            return result
    cache = Watched(model, parts, chunk_tokens=12)
    loss(cache.vectors()).backward()
    first, seen[:] = list(seen), []
    torch.rand(5)  # what happens between the passes must not matter
    cache.backward()
    assert len(seen) == len(first) > 3
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    _, one = cached(model, parts, chunk_tokens=12, seed=1)
    _, same = cached(model, parts, chunk_tokens=12, seed=1)
    _, other = cached(model, parts, chunk_tokens=12, seed=2)
    assert distance(one, same) == 0
    assert distance(one, other) > 1e-3


def test_control_without_replay_the_gradient_is_wrong(small_model, seed, monkeypatch):
    model = small_model(window_keys=None)
    lora.attach(model, rank=3, alpha=6.0, dropout=0.4, targets=TARGETS)
    model.train()
    parts = segments(seed)
    _, right = cached(model, parts, chunk_tokens=12)
    monkeypatch.setattr("ref.gradcache._random_state", lambda device: lambda: None)
    assert distance(right, cached(model, parts, chunk_tokens=12)[1]) > 1e-3


def test_control_a_prefix_without_gradient_is_noticed(small_model, seed, monkeypatch):
    model = small_model(window_keys=None)
    parts = segments(seed)
    _, right = cached(model, parts, chunk_tokens=12)
    monkeypatch.setattr("ref.gradcache._join", lambda prefix, leaves: None)
    assert distance(right, cached(model, parts, chunk_tokens=12)[1]) > 1e-3


@pytest.mark.parametrize(("chunk_tokens", "passes"), [(10**6, 1), (12, 2)])
def test_a_batch_that_fits_is_embedded_once(small_model, seed, chunk_tokens, passes):
    model, counter = small_model(window_keys=None), Counter()
    model.embed_tokens.register_forward_hook(counter)
    parts = segments(seed)
    cached(model, parts, chunk_tokens=chunk_tokens)
    chunks = sum(len(segment.chunks) for segment in parts)
    assert counter.calls == passes * (chunks + 1)  # and the prefix once a pass


def test_vectors_keep_the_order_of_the_texts(small_model):
    model = small_model(window_keys=None)
    parts = [Segment([], [[1, 5, 2], [1, 5, 6, 7, 2], [1, 2]]), Segment([], [[1, 9, 2]])]
    vectors = GradientCache(model, parts, chunk_tokens=5).vectors()
    alone = torch.cat([embed(model, pack([t], device=torch.device("cpu"))) for s in parts for t in s.texts])
    torch.testing.assert_close(vectors, alone, rtol=0, atol=1e-6)


def test_an_empty_segment_is_left_out(small_model):
    model = small_model(window_keys=None)
    cache = GradientCache(model, [Segment(PREFIX, []), Segment([], [[1, 5, 2], [1, 2]])], chunk_tokens=2)
    loss(cache.vectors()).backward()
    cache.backward()
    assert gradients(model)
