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

from ref.embedder import Embedder
from ref.overlap import different, fill_repeated, first_of_equal
from ref.prompts import Example
from ref.team import Team


class SharedEmbedder:
    """An embedder whose texts are spread over the team."""

    def __init__(self, embedder: Embedder, team: Team) -> None:
        self.embedder, self.team = embedder, team

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """`Embedder.encode` by all processes; called by the first alone."""
        if self.team.size == 1:
            return self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
        first = first_of_equal(texts)
        once = different(first)
        by_length = once[np.argsort([len(texts[n]) for n in once], kind="stable")]
        shares = [by_length[rank :: self.team.size] for rank in range(self.team.size)]
        orders: list[Any] = [([texts[n] for n in share], instruction, list(examples)) for share in shares]
        mine, errors = self._work(orders, progress)
        vectors = np.empty((len(texts), self.embedder.width), np.float32)
        for rank, share in enumerate(shares):
            if errors[rank] is not None or not len(share):
                continue
            if rank:
                part = torch.empty(len(share), self.embedder.width)
                dist.recv(part, rank)
                mine = part.numpy()
            vectors[share] = mine
        wrong = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        if wrong:
            raise RuntimeError("; ".join(wrong))
        fill_repeated(vectors, first)
        return vectors

    def serve(self) -> None:
        """What the other processes do: work until there is no more."""
        while (found := self._work(None, False)) is not None:
            vectors, _ = found
            if vectors is not None and len(vectors):
                dist.send(torch.from_numpy(vectors), 0)

    def dismiss(self) -> None:
        """Let the others go home."""
        if self.team.size > 1:
            dist.scatter_object_list([None], [None] * self.team.size, 0)

    def _work(self, orders: list[Any] | None, progress: bool) -> Any:
        """This process's vectors (None if it failed) and, on the first, the error of each process (None: it went well).

        An error of one is one failed task, not the end of all: everybody says how it went before vectors are sent.
        """
        order: list[Any] = [None]
        dist.scatter_object_list(order, orders, 0)
        if order[0] is None:
            return None
        texts, instruction, examples = order[0]
        vectors, error = None, None
        try:
            vectors = self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
        except Exception as problem:  # whatever it is, the first process tells
            error = f"{type(problem).__name__}: {problem}"
        errors: list[Any] = [None] * self.team.size
        dist.gather_object(error, errors if orders is not None else None, 0)
        return vectors, errors
