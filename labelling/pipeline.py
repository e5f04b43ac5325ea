"""The stages from pairs to scored candidates, each kept in the cache block by block.

    1  vectors of the passages, PASSAGES of them a block; of the queries, QUERIES a block         retriever
    2  hits of each query: by words (BM25) and by vectors (exact, over all passages)               candidates.py
    3  both lists fused by reciprocal ranks; the best of them and the positives are scored         reranker, or cosine

Mining comes after, from what these leave (run_label.py). Of a stage that was stopped, the blocks that were done are
there. Under torchrun every process takes its share of the blocks, and of the passages in dense search; all wait for
each other between stages, through the cache, and the result is the same for any number of them.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from labelling.cache import Arrays, Cache, key_of
from labelling.candidates import TopK, WordSearch, on_device, ranks_of, smallest
from labelling.models import Reranker, Retriever, finite
from labelling.sources import Corpus, Pair, Pairs
from ref.config import pick_device
from ref.mining import reciprocal_rank_fusion
from ref.runs import write_whole
from ref.team import Team

PASSAGES, QUERIES = 4096, 1024  # of a block
BLOCKS_PER_SEARCH = 16  # blocks of queries for which the passages are read once
QUERIES_PER_RERANKING = 32  # a block of reranker scores: half a minute's work at most on a GPU, minutes on a CPU

Lists = Literal["fused", "words", "vectors"]


@dataclass(frozen=True)
class Search:
    """What the candidates depend on."""

    lists: Lists = "fused"
    depth: int = 100  # passages of each list
    candidates: int = 50  # of the fused list, that are scored
    stemmer: str | None = None


class Scored(NamedTuple):
    """A query with raw scores of its positives and candidates."""

    pair: Pair
    positives: list[tuple[str, str, float]]  # id, text, score
    candidates: list[tuple[str, str, float]]
    elsewhere: list[tuple[str, str]]  # id, text of the query's positives on other lines


class Pipeline:
    """Everything up to the scores."""

    def __init__(
        self, corpus: Corpus, pairs: Pairs, retriever: Retriever, reranker: Reranker | None, *, search: Search,
        cache: Cache, team: Team, device: str | None = None, instruction: str | None = None,
    ) -> None:
        self.corpus, self.pairs, self.retriever, self.reranker = corpus, pairs, retriever, reranker
        self.search, self.cache, self.team, self.instruction = search, cache, team, instruction
        self.device = pick_device(device)
        self.passage = lru_cache(maxsize=2**16)(corpus.read)
        self.fused_block = lru_cache(maxsize=256)(self.fused)  # scored, then mined: 0.2 MB each
        self.query_blocks = [range(start, min(start + QUERIES, len(pairs))) for start in range(0, len(pairs), QUERIES)]
        self.passage_blocks = list(corpus.blocks(PASSAGES))

    # ------------------------------------------------------------------------------------------------ vectors

    @cached_property
    def needs_vectors(self) -> bool:
        """Whether anything asks for cosines."""
        return self.search.lists != "words" or self.reranker is None

    @cached_property
    def passage_keys(self) -> list[str]:
        """The key of each block of passages."""
        return [key_of(self.retriever.key, "passages", *(self.passage(row)[1] for row in rows))
                for rows in self.passage_blocks]

    def passage_vectors(self, block: int) -> np.ndarray:
        """Unit vectors of a block of passages."""
        def compute() -> Arrays:
            texts = [self.passage(row)[1] for row in self.passage_blocks[block]]
            return {"vectors": finite(self.retriever.passages(texts), texts, self.retriever.name)}
        return self.cache.block("vectors", self.passage_keys[block], compute)["vectors"]

    def query_key(self, rows: Sequence[int]) -> str:
        """What a block of queries is told apart by."""
        return key_of(*(part for row in rows for part in (self._instruction(row), self.pairs[row].query)))

    def query_vectors(self, rows: range) -> np.ndarray:
        """Unit vectors of a block of queries, each with its instruction."""
        def compute() -> Arrays:
            found: dict[str | None, list[int]] = {}
            for n, row in enumerate(rows):
                found.setdefault(self._instruction(row), []).append(n)
            vectors: np.ndarray | None = None
            for instruction, places in found.items():
                texts = [self.pairs[rows[n]].query for n in places]
                part = finite(self.retriever.queries(texts, instruction), texts, self.retriever.name)
                vectors = np.empty((len(rows), part.shape[1]), np.float32) if vectors is None else vectors
                vectors[places] = part
            assert vectors is not None
            return {"vectors": vectors}
        return self.cache.block("vectors", key_of(self.retriever.key, "queries", self.query_key(rows)),
                                compute)["vectors"]

    def _instruction(self, row: int) -> str | None:
        return self.pairs[row].prompt or self.instruction

    def encode(self) -> None:
        """Stage 1."""
        if self.needs_vectors:
            for block in self.team.share(Steps("passages", len(self.passage_blocks), PASSAGES, total=len(self.corpus))):
                self.passage_vectors(block)
            for rows in self.team.share(Steps.over("queries", self.query_blocks)):
                self.query_vectors(rows)
        self.team.wait()

    # ------------------------------------------------------------------------------------------------ hits

    def word_hits(self, rows: range) -> np.ndarray:
        """Rows of the passages that BM25 finds for a block of queries, (queries, depth), -1 where there are no more."""
        key = key_of("words", self.corpus.sha256, self.search.stemmer, self.search.depth,
                     *(self.pairs[row].query for row in rows))

        def compute() -> Arrays:
            queries = [self.pairs[row].query for row in rows]
            return {"row": self.words.top(queries, min(self.search.depth, len(self.corpus)), self.corpus.rank)}
        return self.cache.block("words", key, compute)["row"]

    @cached_property
    def words(self) -> WordSearch:
        """The BM25 index, built or read."""
        folder = self.cache.folder / "index" / key_of(self.corpus.sha256, self.search.stemmer)
        if folder.is_dir():
            try:
                return WordSearch.load(folder, stemmer=self.search.stemmer)
            except (OSError, ValueError, KeyError, EOFError) as error:
                print(f"cache: {folder} is damaged ({error}); it is built again", flush=True)
        index = WordSearch((self.passage(row)[1] for row in range(len(self.corpus))), stemmer=self.search.stemmer)
        print(f"BM25 index: {index.bytes_held / len(self.corpus):,.0f} bytes a passage", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.team.rank == 0:
            write_whole(folder, index.save)
        return index

    def vector_hits(self, rows: range) -> np.ndarray:
        """Rows of the passages nearest to a block of queries, (queries, depth)."""
        def missing() -> Arrays:
            raise AssertionError("find_nearest comes first")
        return self.cache.block("nearest", self._nearest_key(rows), missing)["row"]

    def find_nearest(self) -> None:
        """Dense search for all blocks of queries that have not been searched for: the passages go by once for many."""
        left = [rows for rows in self.query_blocks
                if self.cache.read(self.cache.path("nearest", self._nearest_key(rows))) is None]
        passes = -(-len(left) // BLOCKS_PER_SEARCH)
        steps = Steps("dense search, blocks of passages", passes * len(self.passage_blocks) // self.team.size)
        mine = list(self.team.share(range(len(self.passage_blocks))))
        for start in range(0, len(left), BLOCKS_PER_SEARCH):
            together = left[start : start + BLOCKS_PER_SEARCH]
            query_QD = torch.from_numpy(np.concatenate([self.query_vectors(rows) for rows in together]))
            best = TopK(query_QD.to(self.device), min(self.search.depth, len(self.corpus)))
            for block, vectors in zip(mine, on_device(self.passage_vectors, mine, self.device), strict=True):
                first = self.passage_blocks[block].start
                best.add(vectors, torch.from_numpy(self.corpus.rank[first : first + len(vectors)]).to(self.device))
                steps.step()
            self._merge(together, best)
        steps.close()

    def _merge(self, together: list[range], best: TopK) -> None:
        """Write the hits of some blocks of queries, out of what each process has found in its passages."""
        def part(rows: range, rank: int) -> str:
            return key_of("keys", self._nearest_key(rows), rank, self.team.size)

        found = list(zip(together, best.key_QK.split([len(rows) for rows in together]), strict=True))
        if self.team.size > 1:
            for rows, key_QK in found:
                self.cache.block("part", part(rows, self.team.rank),
                                 lambda key_QK=key_QK: {"key": key_QK.cpu().numpy()})  # type: ignore[misc]
            self.team.wait()
        for rows, key_QK in self.team.share(found):
            keys = [key_QK]
            for other in set(range(self.team.size)) - {self.team.rank}:
                theirs = self.cache.read(self.cache.path("part", part(rows, other)))
                assert theirs is not None
                keys.append(torch.from_numpy(theirs["key"]).to(self.device))
            rank_QK = ranks_of(smallest(torch.cat(keys, dim=1), best.count)).cpu().numpy()
            self.cache.block("nearest", self._nearest_key(rows),
                             lambda rank_QK=rank_QK: {"row": self._row_of_rank[rank_QK]})  # type: ignore[misc]
        self.team.wait()

    def _nearest_key(self, rows: range) -> str:
        return key_of("nearest", self.retriever.key, self.corpus.sha256, self.search.depth, self.query_key(rows))

    def find(self) -> None:
        """Stage 2."""
        if self.search.lists != "vectors":
            if self.team.size > 1 and self.team.rank == 0:
                _ = self.words  # the first builds the index, the others read it
            self.team.wait()
            for rows in self.team.share(Steps.over("BM25, queries", self.query_blocks)):
                self.word_hits(rows)
        if self.search.lists != "words":
            self.find_nearest()
        self.team.wait()

    def fused(self, rows: range) -> np.ndarray:
        """Rows of the best candidates of a block of queries, best first, (queries, candidates), -1 at the end."""
        lists = []
        if self.search.lists != "vectors":
            lists.append(self.word_hits(rows))
        if self.search.lists != "words":
            lists.append(self.vector_hits(rows))
        found = np.full((len(rows), self.search.candidates), -1, np.int32)
        rank = self.corpus.rank
        by_rank = self._row_of_rank
        for n, hits in enumerate(found):
            # the order of ids stands for the ids: equal sums are told apart by it
            ranked = [[f"{rank[row]:010}" for row in one[n] if row >= 0] for one in lists]
            best = reciprocal_rank_fusion(ranked)[: self.search.candidates]
            hits[: len(best)] = [by_rank[int(name)] for name, _ in best]
        return found

    @cached_property
    def _row_of_rank(self) -> np.ndarray:
        return self.corpus.rank.argsort().astype(np.int32)

    # ------------------------------------------------------------------------------------------------ scores

    def score(self) -> None:
        """Stage 3."""
        blocks = [part for rows in self.query_blocks for part in _cut(rows, QUERIES_PER_RERANKING)]
        if self.reranker is not None:
            for rows in self.team.share(Steps.over("reranker, queries", blocks)):
                self.logits(rows)
        else:
            for rows in self.team.share(Steps.over("cosines, queries", self.query_blocks)):
                self.cosines(rows)
        self.team.wait()

    def scored(self) -> Iterator[Scored]:
        """Every query, in the order of the pairs, with raw scores."""
        for block in self.query_blocks:
            candidates = self.fused_block(block)
            for rows in _cut(block, QUERIES_PER_RERANKING) if self.reranker else [block]:
                found = self.logits(rows) if self.reranker else self.cosines(rows)
                scores = iter(found.tolist())
                for row in rows:
                    pair = self.pairs[row]
                    positives = [(name, text, next(scores)) for _, name, text in self.pairs.positives(pair)]
                    hits = [int(hit) for hit in candidates[row - block.start] if hit >= 0]
                    yield Scored(pair, positives, [(*self.passage(hit), next(scores)) for hit in hits],
                                 [(name, text) for _, name, text in self.pairs.elsewhere(pair)])

    def logits(self, rows: range) -> np.ndarray:
        """The reranker's scores of positives, then candidates, query by query, in one list."""
        block = self.query_blocks[rows.start // QUERIES]
        fused = self.fused_block(block)
        assert self.reranker is not None
        asked = [(self.pairs[row].query, text) for row in rows for text in (
            *(text for _, _, text in self.pairs.positives(self.pairs[row])),
            *(self.passage(int(hit))[1] for hit in fused[row - block.start] if hit >= 0))]
        reranker = self.reranker
        return self.cache.block(
            "logits", key_of(reranker.key, *(part for pair in asked for part in pair)),
            lambda: {"score": finite(reranker.logits(asked), asked, reranker.name)})["score"]

    def cosines(self, rows: range) -> np.ndarray:
        """The retriever's scores of positives, then candidates, query by query, in one list."""
        fused = self.fused_block(rows)
        known = (part for row in rows for part in (len(self.pairs[row].positives), *self.pairs[row].positives))
        key = key_of("cosines", self.retriever.key, self.corpus.sha256, self.query_key(rows), fused.tobytes(), *known)

        def compute() -> Arrays:
            query_of, wanted, strangers = [], [], []
            for n, row in enumerate(rows):
                positives = self.pairs.positives(self.pairs[row])
                strangers += [text for place, _, text in positives if place is None]
                places = [-1 if place is None else place for place, _, _ in positives]
                places += [int(hit) for hit in fused[n] if hit >= 0]
                query_of += [n] * len(places)
                wanted += places
            query, place = np.array(query_of), np.array(wanted)
            queries, score = self.query_vectors(rows), np.empty(len(place), np.float32)
            for block in np.unique(place[place >= 0] // PASSAGES):
                here = np.flatnonzero((place >= 0) & (place // PASSAGES == block))
                vectors = self.passage_vectors(int(block))
                score[here] = _dots(queries[query[here]], vectors[place[here] - block * PASSAGES])
            if strangers:
                vectors = finite(self.retriever.passages(strangers), strangers, self.retriever.name)
                here = np.flatnonzero(place < 0)
                score[here] = _dots(queries[query[here]], vectors)
            return {"score": score}
        return self.cache.block("cosines", key, compute)["score"]


def _dots(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row by row, in fp64 and rounded once: equal texts get equal scores, wherever they stand."""
    found: np.ndarray = np.einsum("nd,nd->n", one, other, dtype=np.float64).astype(np.float32)
    return found


def _cut(rows: range, size: int) -> list[range]:
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


class Steps:
    """Numbers from 0, with a line of progress every ten seconds (on a terminal one that renews itself)."""

    def __init__(self, what: str, count: int, each: int = 1, *, total: int | None = None) -> None:
        self.what, self.count, self.each = what, count, each
        self.total = count * each if total is None else total  # the last block may be smaller
        self.start_s = self.shown_s = time.perf_counter()
        self.done = 0

    @classmethod
    def over(cls, what: str, blocks: Sequence[range]) -> Iterator[range]:
        """The blocks, with progress in what they hold."""
        return (blocks[n] for n in cls(what, len(blocks), len(blocks[0]), total=blocks[-1].stop))

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            yield number
            self.step()
        self.close()

    def step(self) -> None:
        """Count one as done."""
        self.done += 1
        now_s, terminal = time.perf_counter(), sys.stdout.isatty()
        if now_s - self.shown_s < (0.2 if terminal else 10):
            return
        self.shown_s = now_s
        left_s = int((now_s - self.start_s) / self.done * (self.count - self.done))
        done = min(self.done * self.each, self.total)
        line = f"{self.what} {done:,} of {self.total:,}  left {left_s // 60}:{left_s % 60:02}"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", flush=True)

    def close(self) -> None:
        """Say how long it took, if it took long."""
        elapsed_s = time.perf_counter() - self.start_s
        if elapsed_s >= 1 and self.count:
            end = "\r" if sys.stdout.isatty() else ""
            print(f"{end}{self.what}: {elapsed_s:.0f} s" + ("\033[K" if end else ""), flush=True)


def cache_folder(name: str) -> Path:
    """The cache's folder; ValueError if it cannot be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--cache {name} cannot be made ({error.strerror}). Give another folder.") from None
    return folder
