"""One encoder on several processes: `torchrun --nproc-per-node 8 run_eval.py …`.

The first process runs mteb and asks for vectors; the others wait for texts, embed their share and send it back:

    first     encode(texts) -> each text once, sorted by length, dealt out in turn -> all vectors, in the order given
    others    serve() until the first says that it is done

Every process holds the whole model and a share of the texts. Vectors travel over gloo as float32, so the transport is
the same with and without GPUs. Called by run_eval.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ref.held_out import TextEmbedder
from ref.overlap import first_of_equal
from ref.prompts import Example
from ref.team import Team


class SharedEmbedder:
    """An embedder whose texts are spread over the team."""

    def __init__(self, embedder: TextEmbedder, team: Team) -> None:
        self.embedder, self.team = embedder, team

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """`Embedder.encode` by all processes; called by the first alone."""
        if self.team.size == 1:
            return self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
        first = first_of_equal(texts)
        different = np.flatnonzero(first == np.arange(len(texts)))
        by_length = different[np.argsort([len(texts[n]) for n in different], kind="stable")]
        shares = [by_length[rank :: self.team.size] for rank in range(self.team.size)]
        orders: list[Any] = [([texts[n] for n in share], instruction, list(examples)) for share in shares]
        mine = self._work(orders, progress)
        vectors = np.empty((len(texts), mine.shape[1]), np.float32)
        vectors[shares[0]] = mine
        for rank in range(1, self.team.size):
            part = torch.empty(len(shares[rank]), mine.shape[1])
            if len(part):
                dist.recv(part, rank)
            vectors[shares[rank]] = part.numpy()
        return vectors[first]

    def serve(self) -> None:
        """What the other processes do: work until there is no more."""
        while (vectors := self._work(None, False)) is not None:
            if len(vectors):
                dist.send(torch.from_numpy(vectors), 0)

    def dismiss(self) -> None:
        """Let the others go home."""
        if self.team.size > 1:
            dist.scatter_object_list([None], [None] * self.team.size, 0)

    def _work(self, orders: list[Any] | None, progress: bool) -> Any:
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, orders, 0)
        if mine[0] is None:
            return None
        texts, instruction, examples = mine[0]
        return self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
