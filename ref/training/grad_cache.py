"""Gradient caching: the gradient of a batch of any size, in the memory of one mini-batch.

A contrastive loss needs all embeddings at once, but an embedding's backward pass needs only its own text. So:

    1  embed every mini-batch without a graph                        e = f(x)
    2  compute the loss and its gradient on the embeddings           g = dL/de
    3  embed each mini-batch again, with a graph, and backpropagate  dL/dw = sum over mini-batches of g . df/dw

A mini-batch is sized so that its activations fit; they are not recomputed inside it (unless --gradient-checkpointing),
and a batch that fits as a whole is embedded once. A shared prefix is computed once per pass: the mini-batches
accumulate the gradient of its keys and values, which is backpropagated through the prefix at the end. Dropout repeats,
because each mini-batch restores its random state. Source: Gao et al., arXiv 2101.06983, section 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ref.model.attention import KeyValue
from ref.model.packing import batch_by_tokens, pack_sequences, to_device
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.utils.device import Backend

PrefixKeyValues = list[KeyValue] | None


@dataclass
class PromptedTexts:
    """Texts that share a prefix: the prefix's ids (empty: none) and the ids of each text."""

    prefix: Sequence[int]
    texts: Sequence[Sequence[int]]
    mini_batches: list[list[int]] = field(default_factory=list)  # indices of texts, one list per forward pass

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return len(self.prefix) + sum(map(len, self.texts))


class GradientCache:
    """Embeddings of `groups` of texts in their order: call `embeddings()`, the loss on them, then `backward()`."""

    def __init__(
        self, model: Mistral, groups: Sequence[PromptedTexts], *, mini_batch_tokens: int, backend: Backend = "eager",
    ) -> None:
        self.model, self.groups, self.backend = model, [g for g in groups if g.texts], backend
        self.device = model.norm.weight.device
        counts = []
        for group in self.groups:
            copied = self._copied_tokens(group.prefix)
            counts.append([len(text) + copied for text in group.texts])
        memory_tokens = sum(len(group.prefix) + sum(each) for group, each in zip(self.groups, counts, strict=True))
        self.fits = memory_tokens <= mini_batch_tokens  # as a whole, so that each text is embedded once
        for group, each in zip(self.groups, counts, strict=True):
            # the prefix's graph stays beside each mini-batch; of a very long one a quarter is left for the texts
            room = max(mini_batch_tokens - len(group.prefix), mini_batch_tokens // 4)
            group.mini_batches = batch_by_tokens(each, tokens_per_batch=room)
        self.random_states: list[Callable[[], None]] = []  # restore the random state before each call of the model
        self.parts: list[Tensor] = []  # embeddings by mini-batch, with a graph if the batch fits as a whole

    def _copied_tokens(self, prefix: Sequence[int]) -> int:
        """Tokens that a text counts more: on a CPU attention copies the prefix's keys and values for each text.

        For backward a token keeps about four vectors of the hidden size and three of the intermediate size per layer.
        """
        if self.device.type != "cpu" or self.model.gradient_checkpointing:
            return 0
        config = self.model.config
        kept = 4 * config.hidden_size + 3 * config.intermediate_size
        return math.ceil(len(prefix) * 2 * config.num_kv_heads * config.head_dim / kept)

    def embeddings(self) -> Tensor:
        """All embeddings (texts, D) fp32, as a leaf whose .grad `backward` propagates."""
        self.parts = []
        with torch.set_grad_enabled(self.fits):
            for group in self.groups:
                prefix = self._first_call(self._prefix_key_values, group)
                self.parts += [self._first_call(self._embed, group, indices, prefix) for indices in group.mini_batches]
        order = np.fromiter(self._text_order(), np.int64)
        inverse, self.order = (to_device(index, self.device) for index in (order.argsort(), order))
        empty = [torch.empty(0, self.model.config.hidden_size, device=self.device)]  # a rank's shard may be empty
        self.leaf = torch.cat(self.parts or empty).detach()[inverse].requires_grad_()
        return self.leaf

    def backward(self) -> None:
        """Backpropagate the gradient of the embeddings to the parameters."""
        assert self.leaf.grad is not None, "call backward on the loss first"
        gradients = self.leaf.grad[self.order].split([len(part) for part in self.parts])
        if self.fits and self.parts:
            torch.autograd.backward(self.parts, gradients)
        if self.fits:
            return
        restore, gradient = iter(self.random_states), iter(gradients)
        for group in self.groups:
            next(restore)()
            prefix = self._prefix_key_values(group)
            leaves = prefix and [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prefix]
            for indices in group.mini_batches:
                next(restore)()
                self._embed(group, indices, leaves).backward(next(gradient))
            _backward_prefix(prefix, leaves)

    def _first_call(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Call the model in the first pass and remember the random state before it."""
        if not self.fits:
            self.random_states.append(_random_state(self.device))
        return call(*arguments)

    def _prefix_key_values(self, group: PromptedTexts) -> PrefixKeyValues:
        if not group.prefix:
            return None
        return self.model.prefix_key_values(pack_sequences([group.prefix], device=self.device))

    def _embed(self, group: PromptedTexts, indices: list[int], prefix: PrefixKeyValues) -> Tensor:
        packed = pack_sequences(
            [group.texts[i] for i in indices], device=self.device, prefix_length=len(group.prefix))
        return embed(self.model, packed, prefix=prefix, backend=self.backend)

    def _text_order(self) -> Iterator[int]:
        """Index among all texts of each embedding in `parts`."""
        before = 0
        for group in self.groups:
            yield from (before + i for indices in group.mini_batches for i in indices)
            before += len(group.texts)


def _backward_prefix(prefix: PrefixKeyValues, leaves: PrefixKeyValues) -> None:
    """Backpropagate the accumulated gradients of the prefix's keys and values through the prefix."""
    pairs = [(x, leaf.grad) for kv, kv_leaf in zip(prefix or [], leaves or [], strict=True)
             for x, leaf in zip(kv, kv_leaf, strict=True) if x.requires_grad and leaf.grad is not None]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _random_state(device: torch.device) -> Callable[[], None]:
    """A function that restores the current random state of the CPU and of `device`."""
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
    return restore
