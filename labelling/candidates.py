"""Candidates of a query: by words (BM25) and by meaning (vectors). pipeline.py fuses the two lists.

BM25 is the bm25s library's Lucene variant: k1 1.5, b 0.75, English stop words, stemming where it is asked for. The
index holds 8 bytes for each different word of a passage and grows with the corpus.

Dense search is exact: vectors come in blocks, each block's scores are looked at once, and only the best k of a query
stay. The score matrix never exists as a whole:

    block 1    q . p   ->  best k            block 2    q . p  ->  best k of (best so far, this block)        …

Once k have been seen, the worst of them is a bar, and groups of passages that do not reach it are passed over.

Ties go to the smaller passage id, in both. Here K counts the best passages of a query.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ref.overlap import Item, one_ahead
from ref.runs import hash_files

SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**29}  # fp32: 17 MB, by measurement; 2 GB on a GPU
HASH = "sha256"
GROUP = 16  # columns whose largest score stands for them while the best are searched
LOW_31 = 2**31 - 1  # mask of a rank, and of a float's bits without its sign
WORST = 2**63 - 1  # a key after all others


class WordSearch:
    """A BM25 index over a corpus."""

    def __init__(self, texts: Iterable[str], *, stemmer: str | None) -> None:
        import bm25s

        self.tokenise: Any = _tokeniser(stemmer)
        self.index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        words = self.tokenise(list(texts), return_ids=False)
        if not any(words):
            raise ValueError("no passage has a word that BM25 counts: all are stop words or signs. Expected is text. "
                             "Use --lists vectors.")
        self.index.index(words, show_progress=False)

    @property
    def bytes_held(self) -> int:
        """Bytes of the index, the vocabulary left out."""
        return sum(self.index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def save(self, folder: Path) -> None:
        """Write the index, and a hash of its files."""
        self.index.save(str(folder), show_progress=False)
        (folder / HASH).write_text(_hash_of(folder))

    @classmethod
    def load(cls, folder: Path, *, stemmer: str | None) -> "WordSearch":
        """Read what `save` wrote; ValueError if a file is damaged."""
        import bm25s

        if (folder / HASH).read_text() != _hash_of(folder):
            raise ValueError("its hash is another")

        search = cls.__new__(cls)
        search.tokenise, search.index = _tokeniser(stemmer), bm25s.BM25.load(str(folder))
        return search

    def top(self, queries: list[str], count: int, rank: np.ndarray) -> np.ndarray:
        """Rows of the best passages that share a word with each query, (queries, count) int32, -1 where there are none.

        `rank` is each passage's place in the order of ids.
        """
        found = np.full((len(queries), count), -1, np.int32)
        for hits, words in zip(found, self.tokenise(queries, return_ids=False), strict=True):
            known = [word for word in words if word in self.index.vocab_dict]
            if known:
                score = self.index.get_scores(known)
                sharing = np.flatnonzero(score > 0)
                best = sharing[best_of(score[sharing], count, rank[sharing])]
                hits[: len(best)] = best
        return found


def _hash_of(folder: Path) -> str:
    return hash_files(folder, (path for path in folder.iterdir() if path.name != HASH))


def best_of(score: np.ndarray, count: int, rank: np.ndarray) -> np.ndarray:
    """Places of the `count` largest scores, largest first, equal ones by `rank`."""
    if count < len(score):
        bar = np.partition(score, len(score) - count)[len(score) - count]
        places = np.flatnonzero(score >= bar)
    else:
        places = np.arange(len(score))
    return places[np.lexsort((rank[places], -score[places]))][:count]


def _tokeniser(stemmer: str | None) -> Any:
    import bm25s

    stem = None
    if stemmer is not None:
        try:
            import Stemmer
        except ImportError:
            raise ValueError("--stemmer needs the package PyStemmer, which is not installed. Expected is "
                             "pip install PyStemmer. Install it, or leave --stemmer out.") from None
        if stemmer not in Stemmer.algorithms():
            raise ValueError(f"--stemmer {stemmer!r:.40} is unknown. Expected is one of "
                             f"{', '.join(Stemmer.algorithms())}. Choose one.")
        stem = Stemmer.Stemmer(stemmer)

    def tokenise(texts: list[str], *, return_ids: bool) -> Any:
        return bm25s.tokenize(texts, stemmer=stem, return_ids=return_ids, show_progress=False)
    return tokenise


def on_device(
    read: Callable[[Item], np.ndarray], blocks: Iterable[Item], device: torch.device,
) -> Iterator[Tensor]:
    """The vectors of each block on the device: on CUDA the next are read and copied while the caller works on these."""
    if device.type == "cpu":
        yield from map(torch.from_numpy, map(read, blocks))
        return
    side = copies(device)

    def put(block: Item) -> Tensor:
        with torch.cuda.stream(side):
            vectors = torch.from_numpy(read(block)).to(device)
        side.synchronize()
        return vectors

    for vectors in one_ahead(put, blocks):
        vectors.record_stream(torch.cuda.current_stream(device))  # else the next copy could take its place too soon
        yield vectors


@cache
def copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's blocks are copied: always the same, so that their memory is used again."""
    return torch.cuda.Stream(device)


class TopK:
    """The best passages of some queries, over blocks that are given one after another.

    What is kept of a passage is one number, its key: score and place in the order of ids, the smaller the better.
    """

    def __init__(self, query_QD: Tensor, count: int) -> None:
        self.query_QD, self.count = query_QD, count
        self.key_QK = torch.empty(len(query_QD), 0, dtype=torch.int64, device=query_QD.device)
        self.scratch = query_QD.new_empty(0, dtype=torch.float32)  # for the scores of a block

    def add(self, passage_PD: Tensor, rank_P: Tensor) -> None:
        """Look at a block of passages, with their places in the order of ids (int32)."""
        missing = -len(passage_PD) % GROUP
        if missing:
            passage_PD = F.pad(passage_PD, (0, 0, 0, missing))
        columns = len(passage_PD)
        queries = len(self.query_QD)
        parts = min(queries, math.ceil(queries * columns / SCORES_AT_ONCE[passage_PD.device.type]))
        full = self.key_QK.shape[1] == self.count
        found = []
        for query_QD, so_far_QK in zip(self.query_QD.tensor_split(parts), self.key_QK.tensor_split(parts), strict=True):
            if self.scratch.numel() < len(query_QD) * columns:  # of the first part: none is larger
                self.scratch = self.scratch.new_empty(len(query_QD) * columns)
            score_QP = self.scratch[: len(query_QD) * columns].view(len(query_QD), columns)
            products(query_QD, passage_PD, out=score_QP)
            if missing:
                score_QP[:, -missing:] = -torch.inf
            key_QW = keys_reaching(score_QP, rank_P, scores_of(so_far_QK[:, -1]) if full else None, self.count)
            found.append(smallest(torch.cat((so_far_QK, key_QW), dim=1), self.count))
        self.key_QK = torch.cat(found)


def products(query_QD: Tensor, passage_PD: Tensor, *, out: Tensor) -> None:
    """q . p in fp32, whatever the vectors are kept in."""
    if query_QD.dtype != torch.float32 and query_QD.device.type == "cuda":
        torch.mm(query_QD, passage_PD.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(query_QD.float(), passage_PD.float().T, out=out)


def keys_of(score: Tensor, rank: Tensor) -> Tensor:
    """Whole numbers (int64) in the order of falling scores (fp32), of equal scores in the order of ranks (int32)."""
    return in_order((0.0 - score).view(torch.int32)).long() << 32 | rank  # 0 - x: no -0


def scores_of(key: Tensor) -> Tensor:
    """The scores in keys, fp32."""
    return 0.0 - in_order((key >> 32).int()).view(torch.float32)


def ranks_of(key: Tensor) -> Tensor:
    """The ranks in keys, int32."""
    return (key & LOW_31).int()


def in_order(bits: Tensor) -> Tensor:
    """Bits of floats as whole numbers in the order of the floats, and back: only negative ones run the other way."""
    return bits ^ (bits >> 31 & LOW_31)


def keys_reaching(score_QP: Tensor, rank_P: Tensor, bar_Q: Tensor | None, count: int) -> Tensor:
    """Keys of the scores from each row's bar on, (Q, W), in no order, filled up with WORST: of those below none counts.

    Columns are a multiple of GROUP; those after the last rank are filling, -inf. One pass finds the maxima of groups of
    columns, and only groups that reach the bar are looked into. A row without a bar, or with one too low to rule most
    groups out, has a bar in its scores: the k groups with the k largest maxima hold k scores that are no smaller than
    the k-th maximum. Where many are equal to that, the row's best are selected by key.
    N counts the groups that reach a bar, J the columns of a group, M the columns that reach it.
    """
    rows = len(score_QP)
    whole = score_QP.view(rows, GROUP, -1)  # group n of G: columns n, n + G, n + 2 G …, so that maxima run along rows
    groups = whole.shape[2]
    if bar_Q is None and groups < count:
        return best_keys(score_QP, rank_P, count)
    max_QG = whole.amax(1)

    def above(bar_Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row_N, group_N = (max_QG >= bar_Q[:, None]).nonzero(as_tuple=True)
        return row_N, group_N, (row_N.bincount(minlength=rows) > 2 * count).nonzero()[:, 0]

    bar_Q = kth_largest(max_QG, count) if bar_Q is None else bar_Q
    row_N, group_N, crowded = above(bar_Q)
    if len(crowded):
        bar_Q = bar_Q.index_copy(0, crowded, kth_largest(max_QG[crowded], count))
        row_N, group_N, crowded = above(bar_Q)
    if len(crowded):
        bar_Q = bar_Q.index_fill(0, crowded, torch.inf)
        row_N, group_N, _ = above(bar_Q)
    inside_NJ = whole[row_N, :, group_N]
    hit_M, member_M = (inside_NJ >= bar_Q[row_N, None]).nonzero(as_tuple=True)
    key_M = keys_of(inside_NJ[hit_M, member_M], rank_P[group_N[hit_M] + groups * member_M])
    key_QW = in_rows(row_N[hit_M], key_M, rows)
    if len(crowded):
        more_QK = key_QW.new_full((rows, count), WORST)
        more_QK[crowded] = best_keys(score_QP[crowded], rank_P, count)
        key_QW = torch.cat((key_QW, more_QK), dim=1)
    return key_QW


def best_keys(score_QP: Tensor, rank_P: Tensor, count: int) -> Tensor:
    """The `count` smallest keys of each row, all if there are fewer, in no order: by looking at every one."""
    key_QP = keys_of(score_QP[:, : len(rank_P)], rank_P)
    return key_QP.topk(min(count, len(rank_P)), dim=1, largest=False, sorted=False).values


def in_rows(row_M: Tensor, key_M: Tensor, rows: int) -> Tensor:
    """The keys of each row, (rows, W), filled up with WORST; `row_M` ascends."""
    held_Q = row_M.bincount(minlength=rows)
    place_M = torch.arange(len(row_M), device=row_M.device) - (held_Q.cumsum(0) - held_Q)[row_M]
    key_QW = key_M.new_full((rows, int(held_Q.max())), WORST)
    key_QW[row_M, place_M] = key_M
    return key_QW


def kth_largest(x_QG: Tensor, k: int) -> Tensor:
    """Of each row, (Q,)."""
    if x_QG.device.type == "cpu":  # on one core, but by vector instructions, as the sort below
        return torch.from_numpy(np.partition(x_QG.numpy(), -k, axis=1)[:, -k])
    return x_QG.topk(k, dim=1, sorted=False).values.amin(1)


def smallest(key_QW: Tensor, count: int) -> Tensor:
    """The `count` smallest keys of each row, all if there are fewer, the smallest first."""
    if key_QW.device.type == "cpu":
        return torch.from_numpy(np.sort(key_QW.numpy(), axis=1)[:, :count])
    return key_QW.sort(dim=1).values[:, :count]
