"""Candidates of a query: by words (BM25) and by meaning (vectors). pipeline.py fuses the two lists.

BM25 is the bm25s library's Lucene variant: k1 1.5, b 0.75, English stop words, stemming where it is asked for. The
index holds 8 bytes for each different word of a passage and grows with the corpus.

Dense search is exact: vectors come in blocks, each block's scores are looked at once, and only the best k of a query
stay. The score matrix never exists as a whole:

    block 1    q . p   ->  best k            block 2    q . p  ->  best k of (best so far, this block)        …

Once k have been seen, the worst of them is a bar, and groups of passages that do not reach it are passed over.

Ties go to the smaller passage id, in both. Here K counts the best passages of a query.
"""

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

SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**29}  # fp32: what stays in a CPU's cache; 2 GB on a GPU
HASH = "sha256"
GROUP = 16  # columns whose largest score stands for them while the best are searched


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
    """The best passages of some queries, over blocks that are given one after another."""

    def __init__(self, query_QD: Tensor, count: int) -> None:
        self.query_QD, self.count = query_QD, count
        self.score_QK = query_QD.new_empty(len(query_QD), 0, dtype=torch.float32)
        self.row_QK = torch.empty(len(query_QD), 0, dtype=torch.int32, device=query_QD.device)
        self.rank_QK = self.row_QK
        self.scratch = self.score_QK.flatten()  # for the scores of a block

    def add(self, passage_PD: Tensor, first_row: int, rank_P: Tensor) -> None:
        """Look at a block of passages, the rows from `first_row` on, with their places in the order of ids (int32)."""
        rows = min(len(self.query_QD), max(1, SCORES_AT_ONCE[passage_PD.device.type] // len(passage_PD)))
        if self.scratch.numel() < rows * len(passage_PD):
            self.scratch = self.score_QK.new_empty(rows * len(passage_PD))
        found = []
        for start in range(0, len(self.query_QD), rows):
            query_QD, so_far_QK = self.query_QD[start : start + rows], self.score_QK[start : start + rows]
            score_QP = self.scratch[: len(query_QD) * len(passage_PD)].view(len(query_QD), len(passage_PD))
            products(query_QD, passage_PD, out=score_QP)
            full = so_far_QK.shape[1] == self.count
            some = columns_above(score_QP, so_far_QK[:, -1], at_most=2 * self.count) if full else None
            found.append(some or best_columns(score_QP, self.count, rank_P))
        widest = max(score_QW.shape[1] for _, score_QW in found)
        column_QW = torch.cat([F.pad(column, (0, widest - column.shape[1])) for column, _ in found])
        score_QW = torch.cat([F.pad(score, (0, widest - score.shape[1]), value=-torch.inf) for _, score in found])
        self.merge(score_QW, (first_row + column_QW).int(), rank_P[column_QW])

    def merge(self, score_QK: Tensor, row_QK: Tensor, rank_QK: Tensor) -> None:
        """Keep the best of what is here and of what is given, best first."""
        score, row, rank = (torch.cat(pair, dim=1) for pair in (
            (self.score_QK, score_QK), (self.row_QK, row_QK), (self.rank_QK, rank_QK)))
        order = sorted_by_score(score, rank, self.count)
        self.score_QK, self.row_QK, self.rank_QK = (x.gather(1, order) for x in (score, row, rank))


def products(query_QD: Tensor, passage_PD: Tensor, *, out: Tensor) -> None:
    """q . p in fp32, whatever the vectors are kept in."""
    if query_QD.dtype != torch.float32 and query_QD.device.type == "cuda":
        torch.mm(query_QD, passage_PD.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(query_QD.float(), passage_PD.float().T, out=out)


def in_groups(score_QP: Tensor) -> Tensor:
    """Columns j, j + n, j + 2 n … as group j of n, (Q, GROUP, n): maxima of groups are elementwise maxima of long rows.

    The last columns, too few for one more to each group, are left out.
    """
    groups = score_QP.shape[1] // GROUP
    return score_QP[:, : groups * GROUP].view(len(score_QP), GROUP, groups)


def best_columns(score_QP: Tensor, count: int, rank_P: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` best columns of each row and their scores, in no order; equal scores by `rank_P`.

    The k largest numbers lie in the k groups of columns with the largest maxima: one pass finds the maxima, and sorting
    is left with k groups instead of all columns. Where the k-th and the next are equal, the row is sorted whole.
    """
    rows, columns = score_QP.shape
    if columns <= count:
        return torch.arange(columns, device=score_QP.device).expand(rows, -1), score_QP.clone()
    wanted = count + 1  # one more tells whether the bar falls between equals
    whole = in_groups(score_QP)
    groups = whole.shape[2]
    if groups <= 2 * wanted:
        score, column = score_QP.topk(wanted, dim=1)
    else:
        group_QG = whole.amax(1).topk(wanted, dim=1, sorted=False).indices
        first = torch.arange(GROUP, device=score_QP.device)[:, None] * groups
        rest = torch.arange(groups * GROUP, columns, device=score_QP.device).expand(rows, -1)
        inside = torch.cat(((group_QG[:, None] + first).flatten(1), rest), dim=1)
        score, place = score_QP.gather(1, inside).topk(wanted, dim=1)
        column = inside.gather(1, place)
    unclear = (score[:, count - 1] == score[:, count]).nonzero()[:, 0]
    score, column = score[:, :count], column[:, :count]
    if len(unclear):
        by_rank = rank_P.argsort()
        order = score_QP[unclear][:, by_rank].sort(dim=1, descending=True, stable=True).indices[:, :count]
        column[unclear] = by_rank[order]
        score[unclear] = score_QP[unclear].gather(1, column[unclear])
    return column, score


def columns_above(score_QP: Tensor, bar_Q: Tensor, *, at_most: int) -> tuple[Tensor, Tensor] | None:
    """The columns of each row with scores from its bar on, and these scores.

    Once some blocks have gone by, few reach the bar, most groups of columns are ruled out by their maxima, and nothing
    is sorted. Rows with fewer than others are filled up with column 0 at -inf; the columns after the last whole group
    come as they are. None if a row has over `at_most` columns from its bar on, or there is no group.
    N counts the groups that reach a bar, J the columns of a group, M the columns that reach it, W a row's at the most.
    """
    rows, columns = score_QP.shape
    whole = in_groups(score_QP)
    groups = whole.shape[2]
    if groups == 0:
        return None
    above_QG = whole.amax(1) >= bar_Q[:, None]
    if int(above_QG.sum(1).max()) > at_most:
        return None
    row_N, group_N = above_QG.nonzero(as_tuple=True)
    inside_NJ = whole[row_N, :, group_N]
    hit_M, member_M = (inside_NJ >= bar_Q[row_N, None]).nonzero(as_tuple=True)
    row_M = row_N[hit_M]  # in ascending order: the hits of a row are neighbours
    held_Q = row_M.bincount(minlength=rows)
    widest = int(held_Q.max())
    if widest > at_most:
        return None
    place_M = torch.arange(len(row_M), device=row_M.device) - (held_Q.cumsum(0) - held_Q)[row_M]
    column_QW = row_M.new_zeros(rows, widest)
    score_QW = score_QP.new_full(column_QW.shape, -torch.inf)
    column_QW[row_M, place_M] = group_N[hit_M] + groups * member_M
    score_QW[row_M, place_M] = inside_NJ[hit_M, member_M]
    rest = torch.arange(groups * GROUP, columns, device=row_M.device).expand(rows, -1)
    return torch.cat((column_QW, rest), dim=1), torch.cat((score_QW, score_QP[:, groups * GROUP :]), dim=1)


def sorted_by_score(score_QK: Tensor, rank_QK: Tensor, count: int) -> Tensor:
    """Where each row's `count` best stand: largest score first, equal ones by rank."""
    in_order, order = score_QK.sort(dim=1, descending=True)
    unclear = (in_order[:, 1 : count + 1] == in_order[:, :-1][:, :count]).any(1).nonzero()[:, 0]
    if len(unclear):
        by_rank = rank_QK[unclear].argsort(dim=1)
        by_score = score_QK[unclear].gather(1, by_rank).sort(dim=1, descending=True, stable=True).indices
        order[unclear] = by_rank.gather(1, by_score)
    return order[:, :count]
