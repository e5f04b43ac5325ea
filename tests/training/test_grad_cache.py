"""Gradient caching: the gradient of a batch in mini-batches equals the gradient of the whole batch.

The oracle embeds every text alone, prefix and text as one string of ids, in one graph, and calls backward once.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from ref.model import lora
from ref.model.packing import pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral, init_weights
from ref.training.grad_cache import GradientCache, PromptedTexts

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


def groups(seed: int, *, prefixes: tuple[list[int], ...] = (PREFIX, [])) -> list[PromptedTexts]:
    """Queries behind one prefix, passages behind none (or behind another)."""
    generator = torch.Generator().manual_seed(seed)
    return [PromptedTexts(prefix, texts(generator, count)) for prefix, count in zip(prefixes, (7, 12), strict=True)]


def loss(embedding_BD: Tensor) -> Tensor:
    """Something that ties all vectors together, each in another way."""
    score = embedding_BD @ embedding_BD.T / 0.3
    weight = torch.arange(1.0, len(score) + 1)
    return (score.logsumexp(-1) * weight).sum() / weight.sum()


def gradients(model: Mistral) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cached(
    model: Mistral, parts: list[PromptedTexts], *, mini_batch_tokens: int, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    cache = GradientCache(model, parts, mini_batch_tokens=mini_batch_tokens)
    vectors = cache.embeddings()
    loss(vectors).backward()
    cache.backward()
    return vectors.detach(), gradients(model)


def one_graph(model: Mistral, parts: list[PromptedTexts]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    device = model.norm.weight.device
    vectors = torch.cat([embed(model, pack_sequences([[*group.prefix, *text]], device=device))
                         for group in parts for text in group.texts])
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
    built = small_model(sliding_window=None)
    if request.param == "lora":
        lora.apply_lora(built, rank=3, alpha=6.0, dropout=0.0, target_modules=TARGETS)
        for layer in lora.lora_layers(built).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
    return built.train()


@pytest.mark.parametrize("mini_batch_tokens", [1, 12, 40, 10**6])
@pytest.mark.parametrize(
    "prefixes", [(PREFIX, []), ([], []), (PREFIX, [1, 5, 6])], ids=["queries", "none", "both sides"]
)
def test_mini_batches_give_the_gradient_of_one_graph(model, seed, mini_batch_tokens, prefixes):
    parts = groups(seed, prefixes=prefixes)
    truth_vectors, truth = one_graph(model, parts)
    vectors, found = cached(model, parts, mini_batch_tokens=mini_batch_tokens)
    torch.testing.assert_close(vectors, truth_vectors, rtol=0, atol=2e-6)
    assert distance(truth, found) < 5e-6  # the prefix's gradient is added up in another order


@pytest.mark.parametrize("mini_batch_tokens", [1, 12, 40])
def test_mini_batches_equal_the_whole_batch_in_fp64(model, seed, mini_batch_tokens):
    parts = groups(seed)
    vectors, whole = cached(model.double(), parts, mini_batch_tokens=10**6)
    again, chunked = cached(model, parts, mini_batch_tokens=mini_batch_tokens)
    assert (vectors - again).abs().max() < 1e-6
    assert distance(whole, chunked) < 1e-7  # vectors are fp32


@pytest.mark.parametrize("mini_batch_tokens", [1, 12, 40])
def test_mini_batches_equal_the_whole_batch_in_fp32(seed, mini_batch_tokens):
    model = init_weights(Mistral(replace(SMALL, sliding_window=None)), seed=seed)
    parts = groups(seed)
    _, whole = cached(model, parts, mini_batch_tokens=10**6)
    assert distance(whole, cached(model, parts, mini_batch_tokens=mini_batch_tokens)[1]) < 1e-6


def test_the_window_reaches_through_the_prefix(small_model, seed):
    model = small_model(sliding_window=4)
    parts = groups(seed)
    assert distance(one_graph(model, parts)[1], cached(model, parts, mini_batch_tokens=12)[1]) < 5e-6


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.record)])
def test_dropout_is_replayed(small_model, seed, compiled):
    """With a fixed random state the whole thing is deterministic; both passes must see the same masks.

    Compiled without and with gradient, blocks round differently.
    """
    model = small_model(sliding_window=None)
    model.compile_on_cpu = compiled
    lora.apply_lora(model, rank=3, alpha=6.0, dropout=0.4, target_modules=TARGETS)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    model.train()
    parts = groups(seed)
    seen: list[list[Tensor]] = []

    class Watched(GradientCache):
        def _embed(self, *arguments):
            result = super()._embed(*arguments)
            seen.append(result.detach())
            return result
    cache = Watched(model, parts, mini_batch_tokens=12)
    loss(cache.embeddings()).backward()
    first, seen[:] = list(seen), []
    torch.rand(5)  # what happens between the passes must not matter
    cache.backward()
    assert len(seen) == len(first) > 3
    assert max((a - b).abs().max() for a, b in zip(first, seen, strict=True)) <= (1e-5 if compiled else 0)
    _, one = cached(model, parts, mini_batch_tokens=12, seed=1)
    _, same = cached(model, parts, mini_batch_tokens=12, seed=1)
    _, other = cached(model, parts, mini_batch_tokens=12, seed=2)
    assert distance(one, same) == 0
    assert distance(one, other) > 1e-3


def test_control_without_replay_the_gradient_is_wrong(small_model, seed, monkeypatch):
    model = small_model(sliding_window=None)
    lora.apply_lora(model, rank=3, alpha=6.0, dropout=0.4, target_modules=TARGETS)
    model.train()
    parts = groups(seed)
    _, right = cached(model, parts, mini_batch_tokens=12)
    monkeypatch.setattr("ref.training.grad_cache._random_state", lambda device: lambda: None)
    assert distance(right, cached(model, parts, mini_batch_tokens=12)[1]) > 1e-3


def test_control_a_prefix_without_gradient_is_noticed(small_model, seed, monkeypatch):
    model = small_model(sliding_window=None)
    parts = groups(seed)
    _, right = cached(model, parts, mini_batch_tokens=12)
    monkeypatch.setattr("ref.training.grad_cache._backward_prefix", lambda prefix, leaves: None)
    assert distance(right, cached(model, parts, mini_batch_tokens=12)[1]) > 1e-3


@pytest.mark.parametrize(("mini_batch_tokens", "passes"), [(10**6, 1), (12, 2)])
def test_a_batch_that_fits_is_embedded_once(small_model, seed, mini_batch_tokens, passes):
    model, counter = small_model(sliding_window=None), Counter()
    model.embed_tokens.register_forward_hook(counter)
    parts = groups(seed)
    cached(model, parts, mini_batch_tokens=mini_batch_tokens)
    mini_batches = sum(len(group.mini_batches) for group in parts)
    assert counter.calls == passes * (mini_batches + 1)  # and the prefix once a pass


def test_vectors_keep_the_order_of_the_texts(small_model):
    model = small_model(sliding_window=None)
    parts = [PromptedTexts([], [[1, 5, 2], [1, 5, 6, 7, 2], [1, 2]]), PromptedTexts([], [[1, 9, 2]])]
    vectors = GradientCache(model, parts, mini_batch_tokens=5).embeddings()
    alone = torch.cat([embed(model, pack_sequences([t], device=torch.device("cpu"))) for s in parts for t in s.texts])
    torch.testing.assert_close(vectors, alone, rtol=0, atol=1e-6)


def test_an_empty_group_is_left_out(small_model):
    model = small_model(sliding_window=None)
    parts = [PromptedTexts(PREFIX, []), PromptedTexts([], [[1, 5, 2], [1, 2]])]
    cache = GradientCache(model, parts, mini_batch_tokens=2)
    loss(cache.embeddings()).backward()
    cache.backward()
    assert gradients(model)


@pytest.mark.parametrize(("prefix", "most"), [(0, 100), (60, 40), (300, 25)])
def test_the_graph_of_the_prefix_counts_beside_each_mini_batch(small_model, prefix, most):
    model, group = small_model(), PromptedTexts([5] * prefix, [[7] * 5 for _ in range(80)])
    model.gradient_checkpointing = True  # otherwise a text on a CPU counts more
    assert not GradientCache(model, [group], mini_batch_tokens=100).fits
    assert max(5 * len(batch) for batch in group.mini_batches) == most
