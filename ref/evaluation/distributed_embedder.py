"""One embedder on several processes: `torchrun --nproc-per-node 8 run_eval.py …`.

Rank 0 runs mteb; the other ranks wait for texts, embed their shard and send it back:

    rank 0         encode(texts): deduplicate, sort by length, scatter every n-th text to rank n, receive all vectors
    other ranks    worker_loop() until rank 0 calls shutdown()

Each rank holds the whole model. Vectors are sent over gloo as float32, with and without GPUs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ref.embedder import Embedder
from ref.text.prompts import InContextExample
from ref.utils.dedup import first_occurrence, scatter_to_duplicates, unique_index
from ref.utils.distributed import Distributed


class DistributedEmbedder:
    """An embedder that shards its texts over all ranks."""

    def __init__(self, embedder: Embedder, distributed: Distributed) -> None:
        self.embedder, self.distributed = embedder, distributed

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """`Embedder.encode` on all ranks; call it on rank 0 only.

        Raises RuntimeError that names ranks with an error, torch.cuda.OutOfMemoryError if the memory of one ran out,
        RankFailure if one has died.
        """
        world_size = self.distributed.world_size
        if world_size == 1:
            return self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
        first = first_occurrence(texts)
        unique = unique_index(first)
        by_length = unique[np.argsort([len(texts[n]) for n in unique], kind="stable")]
        shards = [by_length[rank::world_size] for rank in range(world_size)]
        calls: list[Any] = [([texts[n] for n in shard], instruction, list(examples)) for shard in shards]
        own, errors = self._encode_shard(calls, progress)
        vectors = np.empty((len(texts), self.embedder.embedding_dim), np.float32)
        for rank, shard in enumerate(shards):
            if errors[rank] is not None or not len(shard):
                continue
            if rank == 0:
                vectors[shard] = own
            else:
                received = torch.empty(len(shard), self.embedder.embedding_dim)
                self.distributed.collective(dist.recv, received, rank)
                vectors[shard] = received.numpy()
        failures = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        if failures:
            out_of_memory = any(error is not None and error.startswith("OutOfMemoryError") for error in errors)
            raise (torch.cuda.OutOfMemoryError if out_of_memory else RuntimeError)("; ".join(failures))
        scatter_to_duplicates(vectors, first)
        return vectors

    def worker_loop(self) -> None:
        """Encode shards for rank 0 until it calls `shutdown`; call it on all other ranks."""
        while (result := self._encode_shard(None, False)) is not None:
            vectors, _ = result
            if vectors is not None and len(vectors):
                self.distributed.collective(dist.send, torch.from_numpy(vectors), 0)

    def shutdown(self) -> None:
        """End `worker_loop` on the other ranks."""
        if self.distributed.world_size > 1:
            dist.scatter_object_list([None], [None] * self.distributed.world_size, 0)

    def _encode_shard(self, calls: list[Any] | None, progress: bool) -> Any:
        """Scatter `calls` from rank 0 and encode this rank's shard; None after `shutdown`.

        Returns its vectors (None if it failed) and, on rank 0, each rank's error (None: success). Errors are gathered
        before vectors are sent, so that an error on one rank fails this call only.
        """
        call: list[Any] = [None]
        self.distributed.collective(dist.scatter_object_list, call, calls, 0)
        if call[0] is None:
            return None
        texts, instruction, examples = call[0]
        vectors, error = None, None
        try:
            vectors = self.embedder.encode(texts, instruction=instruction, examples=examples, progress=progress)
        except Exception as caught:  # any error: rank 0 reports it
            error = f"{type(caught).__name__}: {caught}"
        errors: list[Any] = [None] * self.distributed.world_size
        self.distributed.collective(dist.gather_object, error, errors if calls is not None else None, 0)
        return vectors, errors
