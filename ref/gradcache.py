"""Gradient caching: a batch of any size, in the memory of one chunk, with the gradient of the whole batch.

A contrastive loss needs all vectors at once, but a vector's own backward pass needs only its text. So:

    1  embed every chunk without a graph                          v = f(x)
    2  loss on the vectors, backward to them alone                g = dL/dv
    3  embed each chunk again, with a graph, and push g through   dL/dw = sum over chunks of g . df/dw

A chunk is sized so that its activations fit; nothing is recomputed inside it (unless --checkpointing asks for it),
and a batch that fits as a whole is embedded once. A prefix that texts share is embedded once a pass; the chunks add up
the gradient of its keys and values, which goes through the prefix at the end. Dropout repeats: each chunk's random
state is put back.

Called by trainer.py. Source: Gao et al., arXiv 2101.06983, section 3.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ref.attention import KeyValue
from ref.config import Kernels
from ref.model import Mistral
from ref.packing import cut_by_tokens, pack, to_device
from ref.pooling import embed

KeyValues = list[KeyValue] | None


@dataclass
class Segment:
    """Texts that share a prefix: its ids (empty: none) and the ids of each text."""

    prefix: Sequence[int]
    texts: Sequence[Sequence[int]]
    chunks: list[list[int]] = field(default_factory=list)  # indices into `texts`, one list a forward pass

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model."""
        return len(self.prefix) + sum(map(len, self.texts))


class GradientCache:
    """The vectors of some segments, in their order: `vectors()`, then the loss on them, then `backward()`."""

    def __init__(
        self, model: Mistral, segments: Sequence[Segment], *, chunk_tokens: int, kernels: Kernels = "eager",
    ) -> None:
        self.model, self.segments, self.kernels = model, [s for s in segments if s.texts], kernels
        self.device = model.norm.weight.device
        self.fits = sum(s.tokens for s in segments) <= chunk_tokens
        for segment in self.segments:
            segment.chunks = cut_by_tokens([len(t) for t in segment.texts], tokens_per_batch=chunk_tokens)
        self.random: list[Callable[[], None]] = []  # puts the state back that stood before each call of the model
        self.positions = 0  # that passed through the model: more than the tokens if something were padded
        self.parts: list[Tensor] = []  # vectors chunk by chunk, with their graph if the batch fits as a whole

    @property
    def passes(self) -> int:
        """Forward passes of a step: two where chunks are embedded again."""
        return 1 if self.fits else 2

    def vectors(self) -> Tensor:
        """All vectors (texts, D) fp32, as a leaf whose .grad `backward` will push on."""
        self.parts, self.positions = [], 0
        with torch.set_grad_enabled(self.fits):
            for segment in self.segments:
                prefix = self._first(self._prefix_key_values, segment)
                self.parts += [self._first(self._chunk, segment, chunk, prefix) for chunk in segment.chunks]
        rows = np.fromiter(self._rows(), np.int64)
        back, self.rows = (to_device(order, self.device) for order in (rows.argsort(), rows))
        nothing = [torch.empty(0, self.model.arch.width, device=self.device)]  # a share of a batch may be empty
        self.leaf = torch.cat(self.parts or nothing).detach()[back].requires_grad_()
        return self.leaf

    def backward(self) -> None:
        """Push the gradient of the vectors into the weights."""
        assert self.leaf.grad is not None, "the loss must go backward first"
        gradients = self.leaf.grad[self.rows].split([len(part) for part in self.parts])
        if self.fits and self.parts:
            torch.autograd.backward(self.parts, gradients)
        if self.fits:
            return
        again, gradient = iter(self.random), iter(gradients)
        for segment in self.segments:
            next(again)()
            prefix = self._prefix_key_values(segment)
            leaves = prefix and [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prefix]
            for chunk in segment.chunks:
                next(again)()
                self._chunk(segment, chunk, leaves).backward(next(gradient))
            _join(prefix, leaves)

    def _first(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Call the model for the first time, the random state before it noted."""
        if not self.fits:
            self.random.append(_random_state(self.device))
        return call(*arguments)

    def _prefix_key_values(self, segment: Segment) -> KeyValues:
        if not segment.prefix:
            return None
        packed = pack([segment.prefix], device=self.device)
        self.positions += len(packed.ids_T)
        return self.model.prefix_key_values(packed)

    def _chunk(self, segment: Segment, chunk: list[int], prefix: KeyValues) -> Tensor:
        packed = pack([segment.texts[i] for i in chunk], device=self.device, prefix_tokens=len(segment.prefix))
        self.positions += len(packed.ids_T)
        return embed(self.model, packed, prefix=prefix, kernels=self.kernels)

    def _rows(self) -> Iterator[int]:
        """Where each vector of `parts` stands among all texts."""
        before = 0
        for segment in self.segments:
            yield from (before + i for chunk in segment.chunks for i in chunk)
            before += len(segment.texts)


def _join(prefix: KeyValues, leaves: KeyValues) -> None:
    """Push the gradients that the chunks left on the prefix's keys and values through the prefix."""
    pairs = [(x, leaf.grad) for kv, kv_leaf in zip(prefix or [], leaves or [], strict=True)
             for x, leaf in zip(kv, kv_leaf, strict=True) if x.requires_grad and leaf.grad is not None]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _random_state(device: torch.device) -> Callable[[], None]:
    """A call that puts the random state of now back, on the CPU and on `device`."""
    host = torch.get_rng_state()
    card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(host)
        if card is not None:
            torch.cuda.set_rng_state(card, device)
    return restore
