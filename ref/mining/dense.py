"""Exact dense search: the k passages with the largest dot products, for many queries, over blocks of passages.

    block 1    q . p   ->  top k            block 2    q . p  ->  top k, merged with the k best so far            …

The score matrix never exists as a whole. Ties are broken by the order of the passages' ids: the
result equals a full sort by (score descending, id ascending), for any block sizes and any number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ref.utils.prefetch import Item, prefetch

MAX_SCORES = {"cpu": 2**22, "cuda": 2**29}  # scores computed at once, fp32: the fastest sizes measured
MAX_ID_ORDER = 2**31 - 1


class DenseTopK:
    """The k best passages of each query so far: `score_QL` (fp32) and `id_order_QL` (int32), the best first."""

    def __init__(self, query_QD: Tensor, k: int) -> None:
        self.query_QD, self.k = query_QD, k
        self.score_QL = torch.empty(len(query_QD), 0, device=query_QD.device)
        self.id_order_QL = torch.empty(len(query_QD), 0, dtype=torch.int32, device=query_QD.device)

    def add(self, passage_PD: Tensor, id_order_P: Tensor) -> None:
        """Search a block of passages; `id_order_P` (int32) is different for each passage and below MAX_ID_ORDER."""
        max_queries = max(1, MAX_SCORES[passage_PD.device.type] // len(passage_PD))
        found = [top_k(dot_products(query_QD, passage_PD), id_order_P, self.k)
                 for query_QD in self.query_QD.split(max_queries)]
        score_QL, id_order_QL = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.merge(score_QL, id_order_QL)

    def merge(self, score_QL: Tensor, id_order_QL: Tensor) -> None:
        """Add the passages that a search of other blocks has found for the same queries."""
        score_QL, id_order_QL = torch.cat((self.score_QL, score_QL), 1), torch.cat((self.id_order_QL, id_order_QL), 1)
        id_order_QL, order_QL = id_order_QL.sort(dim=1)
        score_QL, by_score_QL = score_QL.gather(1, order_QL).sort(dim=1, descending=True, stable=True)
        self.score_QL, self.id_order_QL = score_QL[:, : self.k], id_order_QL.gather(1, by_score_QL[:, : self.k])


def top_k(score_QP: Tensor, id_order_P: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and ranks of the k best passages of each query, in no order; all passages if there are fewer."""
    score_QL, column_QL = score_QP.topk(min(k + 1, len(id_order_P)), dim=1)
    if len(id_order_P) > k and (tied_Q := score_QL[:, k - 1] == score_QL[:, k]).any():
        # topk chose arbitrarily between equal scores at the cut-off: choose the smaller ranks instead
        tied_QP, cutoff_Q = score_QP[tied_Q], score_QL[tied_Q, k][:, None]
        key_QP = id_order_P.where(tied_QP == cutoff_Q, MAX_ID_ORDER).masked_fill(tied_QP > cutoff_Q, -1)
        column_QL[tied_Q, :k] = key_QP.topk(k, dim=1, largest=False).indices
        score_QL[tied_Q, :k] = tied_QP.gather(1, column_QL[tied_Q, :k])
    return score_QL[:, :k] + 0.0, id_order_P[column_QL[:, :k]]  # + 0.0 makes -0.0 equal to 0.0 in CUDA's sort


def dot_products(query_QD: Tensor, passage_PD: Tensor) -> Tensor:
    """q . p, (Q, P) fp32 for vectors of any dtype."""
    if query_QD.dtype != torch.float32 and query_QD.device.type == "cuda":
        return torch.mm(query_QD, passage_PD.T, out_dtype=torch.float32)
    return query_QD.float() @ passage_PD.float().T


def on_device(read: Callable[[Item], np.ndarray], blocks: Iterable[Item], device: torch.device) -> Iterator[Tensor]:
    """Yield the vectors of each block on the device; on CUDA a thread reads and copies the next block meanwhile."""
    if device.type == "cpu":
        yield from map(torch.from_numpy, map(read, blocks))
        return

    def copy(block: Item) -> Tensor:
        with torch.cuda.device(device), torch.cuda.stream(copy_stream(device)):  # else a context on GPU 0 too
            vectors = torch.from_numpy(read(block)).to(device)
        copy_stream(device).synchronize()
        return vectors

    for vectors in prefetch(copy, blocks):
        vectors.record_stream(torch.cuda.current_stream(device))  # its memory must not be reused before the search ends
        yield vectors


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies; always the same, because memory is reused only within a stream."""
    return torch.cuda.Stream(device)
