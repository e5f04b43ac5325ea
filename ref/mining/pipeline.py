"""From pairs to scored candidates, in three stages; the results of each are cached in blocks.

    encode      vectors of passages (PASSAGES_PER_BLOCK) and queries (QUERIES_PER_BLOCK)          retriever
    retrieve    the top k of each query by BM25 and by dense search over all passages             bm25.py, dense.py
    score       both lists fused by reciprocal rank; the best candidates and the positives        reranker, or cosine

labels.py turns the scores into labels. An interrupted stage continues after its last complete block. Under torchrun
each process computes its shard of the blocks, in dense search its shard of the passages. The processes exchange results
through the cache and wait for each other after each stage; the result is the same for any number of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ref.mining.bm25 import BM25Index, make_tokeniser, word_pattern
from ref.mining.dense import DenseTopK, on_device
from ref.mining.fusion import reciprocal_rank_fusion
from ref.mining.sources import Corpus, Pair, Pairs
from ref.mining.teachers import Reranker, Retriever, check_finite
from ref.utils.block_cache import Arrays, BlockCache, hash_key
from ref.utils.device import resolve_device
from ref.utils.distributed import Distributed
from ref.utils.files import atomic_write, hash_file, read_json, write_json
from ref.utils.progress import TokenRate, progress_bar

PASSAGES_PER_BLOCK, QUERIES_PER_BLOCK = 4096, 1024
BLOCKS_PER_SEARCH = 16  # blocks of queries in one pass over the passages
QUERIES_PER_RERANKING = 32  # a block of reranker scores: at most half a minute on a GPU, minutes on a CPU

Retrieval = Literal["hybrid", "bm25", "dense"]


@dataclass(frozen=True)
class RetrievalConfig:
    """How candidates are retrieved."""

    retrieval: Retrieval = "hybrid"  # both lists, fused
    top_k: int = 100  # passages per list
    num_candidates: int = 50  # passages of the fused list that are scored
    stemmer: str | None = None
    bm25_tokens: Literal["words", "subwords"] = "words"  # subwords: the retriever's own


class ScoredPair(NamedTuple):
    """A query with raw scores of its positives and candidates."""

    pair: Pair
    positives: list[tuple[str, str, float]]  # id, text, score
    candidates: list[tuple[str, str, float]]
    other_positives: list[tuple[str, str]]  # id, text of the query's positives on other lines


class LabellingPipeline:
    """Run `encode`, `retrieve` and `score`, in this order; then `scored_pairs` gives the result."""

    def __init__(
        self, corpus: Corpus, pairs: Pairs, retriever: Retriever, reranker: Reranker | None, *, config: RetrievalConfig,
        cache: BlockCache, distributed: Distributed, device: str | None = None, instruction: str | None = None,
    ) -> None:
        self.corpus, self.pairs, self.retriever, self.reranker = corpus, pairs, retriever, reranker
        self.config, self.cache, self.distributed, self.instruction = config, cache, distributed, instruction
        self.device = resolve_device(device)
        self.top_k = min(config.top_k, len(corpus))
        self.passage = lru_cache(maxsize=2**12)(corpus.read)
        self.candidate_block = lru_cache(maxsize=256)(self.fuse)  # used for scores, then for labels; 0.2 MB each
        self.query_blocks = _split(range(len(pairs)), QUERIES_PER_BLOCK)
        self.passage_blocks = corpus.blocks(PASSAGES_PER_BLOCK)
        if config.retrieval != "dense":
            make_tokeniser(config.stemmer, self._subwords)  # what is missing shows before the long work

    def print_changes(self) -> None:
        """Print which model or corpus differs from those of the last run with this cache."""
        path = self.cache.folder / "last.json"
        before = read_json(path) if path.exists() else {}
        if before and "retriever" not in before:
            raise ValueError(f"--cache: {path} exists and was not written by this command; give another folder")
        keys = {"retriever": self.retriever.key, "reranker": self.reranker and self.reranker.key,
                "corpus": self.corpus.sha256}
        for name, key in keys.items():
            if before.get(name) not in (None, key) and key is not None:
                print(f"cache: the {name} differs from the last run's; what depends on it is recomputed", flush=True)
        write_json(path, keys)

    # ---- encode --------------------------------------------------------------------------------------------

    def encode(self) -> None:
        """Embed passages and queries, if cosines are needed."""
        if self.config.retrieval != "bm25" or self.reranker is None:
            for rows in self._shard("encoding passages", self.passage_blocks, "passage"):
                self.passage_vectors(rows.start // PASSAGES_PER_BLOCK)
            for rows in self._shard("encoding queries", self.query_blocks):
                self.query_vectors(rows)
        self.distributed.barrier(while_alive=True)

    def passage_vectors(self, block: int) -> np.ndarray:
        """Unit vectors of a block of passages."""
        def compute() -> Arrays:
            texts = [self.passage(row)[1] for row in self.passage_blocks[block]]
            return {"vectors": check_finite(self.retriever.encode_passages(texts), texts, self.retriever.name)}
        return self.cache.block("vectors", self._passage_keys[block], compute)["vectors"]

    def query_vectors(self, rows: range) -> np.ndarray:
        """Unit vectors of a block of queries, each with its instruction."""
        def compute() -> Arrays:
            by_instruction: dict[str | None, list[int]] = {}
            for n, row in enumerate(rows):
                by_instruction.setdefault(self._instruction(row), []).append(n)
            vectors = None
            for instruction, places in by_instruction.items():
                texts = [self.pairs[rows[n]].query for n in places]
                part = self.retriever.encode_queries(texts, instruction)
                vectors = np.empty((len(rows), part.shape[1]), np.float32) if vectors is None else vectors
                vectors[places] = check_finite(part, texts, self.retriever.name)
            assert vectors is not None
            return {"vectors": vectors}
        key = hash_key(self.retriever.key, "queries", self._query_key(rows))
        return self.cache.block("vectors", key, compute)["vectors"]

    @cached_property
    def _passage_keys(self) -> list[str]:
        return [hash_key(self.retriever.key, "passages", *(self.passage(row)[1] for row in rows))
                for rows in self.passage_blocks]

    def _query_key(self, rows: Sequence[int]) -> str:
        return hash_key(*(part for row in rows for part in (self._instruction(row), self.pairs[row].query)))

    def _instruction(self, row: int) -> str | None:
        return self.pairs[row].prompt or self.instruction

    # ---- retrieve ------------------------------------------------------------------------------------------

    def retrieve(self) -> None:
        """Search with BM25, dense vectors, or both."""
        if self.config.retrieval != "dense":
            if self.distributed.world_size > 1 and self.distributed.rank == 0:
                _ = self.bm25_index  # rank 0 builds the index, the other ranks load it
            self.distributed.barrier(while_alive=True)
            for rows in self._shard("BM25 search", self.query_blocks):
                self.bm25_block(rows)
        if self.config.retrieval != "bm25":
            self._dense_search()
        self.distributed.barrier(while_alive=True)

    @cached_property
    def bm25_index(self) -> BM25Index:
        """The BM25 index, built or loaded from the cache."""
        folder = self.cache.folder / "index" / hash_key(self.corpus.sha256, *self._bm25_key)
        how: dict[str, Any] = {"stemmer": self.config.stemmer, "subwords": self._subwords}
        if folder.is_dir():
            try:
                return BM25Index.load(folder, **how)
            except (OSError, ValueError, KeyError, EOFError) as error:
                print(f"cache: {folder} is damaged ({error}) and will be built again", flush=True)
        index = BM25Index((self.passage(row)[1] for row in range(len(self.corpus))), **how)
        print(f"BM25 index: {index.num_bytes / len(self.corpus):,.0f} bytes per passage", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.distributed.rank == 0:
            atomic_write(folder, index.save)
        return index

    @cached_property
    def _subwords(self) -> Path | None:
        return None if self.config.bm25_tokens == "words" else self.retriever.tokenizer_file

    @cached_property
    def _bm25_key(self) -> list[str | None]:
        """What the search depends on besides the texts."""
        return [self.config.stemmer, word_pattern() if self._subwords is None else hash_file(self._subwords)]

    def num_unmatched(self) -> int:
        """Queries for which BM25 finds no passage; 0 if it is not used."""
        if self.config.retrieval == "dense":
            return 0
        return sum(int((self.bm25_block(rows)[:, 0] < 0).sum()) for rows in self.query_blocks)

    def bm25_block(self, rows: range) -> np.ndarray:
        """Rows of the passages that BM25 finds for a block of queries, (queries, top k), -1 where there are fewer."""
        queries = [self.pairs[row].query for row in rows]
        key = hash_key("bm25", self.corpus.sha256, *self._bm25_key, self.top_k, *queries)
        return self.cache.block("bm25", key, lambda: {
            "row": self.bm25_index.search(queries, self.top_k, self.corpus.id_order)})["row"]

    def dense_block(self, rows: range) -> np.ndarray:
        """Rows of the passages nearest to a block of queries, (queries, top k), from the cache."""
        def missing() -> Arrays:
            raise AssertionError("call retrieve() first")
        return self.cache.block("dense", self._dense_key(rows), missing)["row"]

    def _dense_search(self) -> None:
        """Search for all blocks of queries that are not in the cache, many in one pass over the passages."""
        left = [rows for rows in self.query_blocks
                if self.cache.read(self.cache.path("dense", self._dense_key(rows))) is None]
        mine = list(self.distributed.shard(range(len(self.passage_blocks))))
        searches = [left[start : start + BLOCKS_PER_SEARCH] for start in range(0, len(left), BLOCKS_PER_SEARCH)]
        with self._progress("dense search", len(searches) * len(mine), "block") as bar:
            for blocks in searches:
                query_QD = torch.from_numpy(np.concatenate([self.query_vectors(rows) for rows in blocks]))
                best = DenseTopK(query_QD.to(self.device), self.top_k)
                for block, passage_PD in zip(mine, on_device(self.passage_vectors, mine, self.device), strict=True):
                    rows = self.passage_blocks[block]
                    best.add(passage_PD, torch.from_numpy(self.corpus.id_order[rows.start : rows.stop]).to(self.device))
                    bar.update()
                self._merge_processes(best, blocks)
                row_QL = self._row_by_id_order[best.id_order_QL.cpu().numpy()]
                for rows in self.distributed.shard(blocks):
                    first = rows.start - blocks[0].start
                    self.cache.block("dense", self._dense_key(rows), partial(
                        dict, row=row_QL[first : first + len(rows)]))
                self.distributed.barrier(while_alive=True)

    def _merge_processes(self, best: DenseTopK, blocks: list[range]) -> None:
        """Merge what each process has found among its passages, exchanged through the cache."""
        if self.distributed.world_size == 1:
            return
        keys = [hash_key("part", *map(self._dense_key, blocks), rank, self.distributed.world_size)
                for rank in range(self.distributed.world_size)]
        found = {"score": best.score_QL.cpu().numpy(), "id_order": best.id_order_QL.cpu().numpy()}
        self.cache.block("part", keys[self.distributed.rank], lambda: found)
        self.distributed.barrier(while_alive=True)
        for key in set(keys) - {keys[self.distributed.rank]}:
            part = self.cache.read(self.cache.path("part", key))
            assert part is not None
            best.merge(*(torch.from_numpy(part[name]).to(self.device) for name in ("score", "id_order")))

    def _dense_key(self, rows: range) -> str:
        return hash_key("dense", self.retriever.key, self.corpus.sha256, self.top_k, self._query_key(rows))

    @cached_property
    def _row_by_id_order(self) -> np.ndarray:
        return self.corpus.id_order.argsort().astype(np.int32)

    def fuse(self, rows: range) -> np.ndarray:
        """Rows of the candidates of a block of queries, the best first, (queries, num_candidates); -1: none left."""
        lists = []
        if self.config.retrieval != "dense":
            lists.append(self.bm25_block(rows))
        if self.config.retrieval != "bm25":
            lists.append(self.dense_block(rows))
        candidates = np.full((len(rows), self.config.num_candidates), -1, np.int32)
        for n, row_of_candidate in enumerate(candidates):
            # ranks of the ids as strings: they sort as the ids do, which breaks ties
            ranked = [[f"{self.corpus.id_order[row]:010}" for row in found[n] if row >= 0] for found in lists]
            best = reciprocal_rank_fusion(ranked)[: self.config.num_candidates]
            row_of_candidate[: len(best)] = [self._row_by_id_order[int(order)] for order, _ in best]
        return candidates

    # ---- score ---------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Literal["cosine", "logit"]:
        """What a score is: the retriever's cosine or the reranker's logit."""
        return "cosine" if self.reranker is None else "logit"

    def score(self) -> None:
        """Score positives and candidates."""
        blocks = self.query_blocks if self.reranker is None else [
            part for rows in self.query_blocks for part in _split(rows, QUERIES_PER_RERANKING)]
        for rows in self._shard("scoring", blocks):
            self.score_block(rows)
        self.distributed.barrier(while_alive=True)

    def scored_pairs(self) -> Iterator[ScoredPair]:
        """Yield all queries, in the order of the pairs, with raw scores."""
        for block in self.query_blocks:
            for rows in _split(block, QUERIES_PER_BLOCK if self.reranker is None else QUERIES_PER_RERANKING):
                scores = iter(self.score_block(rows).tolist())
                for row in rows:
                    pair = self.pairs[row]
                    positives = [(name, text, next(scores)) for _, name, text in self.pairs.positives(pair)]
                    candidates = [(*self.passage(hit), next(scores)) for hit in self._candidates(row)]
                    others = [(name, text) for _, name, text in self.pairs.other_positives(pair)]
                    yield ScoredPair(pair, positives, candidates, others)

    def score_block(self, rows: range) -> np.ndarray:
        """Scores of some queries in one list: for each query its positives, then its candidates."""
        return self._cosines(rows) if self.reranker is None else self._logits(rows, self.reranker)

    def _candidates(self, row: int) -> list[int]:
        block = self.query_blocks[row // QUERIES_PER_BLOCK]
        return [int(hit) for hit in self.candidate_block(block)[row - block.start] if hit >= 0]

    def _logits(self, rows: range, reranker: Reranker) -> np.ndarray:
        texts = [(self.pairs[row].query, text) for row in rows for text in (
            *(text for _, _, text in self.pairs.positives(self.pairs[row])),
            *(self.passage(hit)[1] for hit in self._candidates(row)))]
        key = hash_key(reranker.key, *(part for pair in texts for part in pair))
        return self.cache.block("logits", key, lambda: {
            "score": check_finite(reranker.score_pairs(texts), texts, reranker.name)})["score"]

    def _cosines(self, rows: range) -> np.ndarray:
        known = (part for row in rows for part in (len(self.pairs[row].positives), *self.pairs[row].positives))
        key = hash_key("cosines", self.retriever.key, self.corpus.sha256, self._query_key(rows),
                       self.candidate_block(rows).tobytes(), *known)
        return self.cache.block("cosines", key, lambda: {"score": self._compute_cosines(rows)})["score"]

    def _compute_cosines(self, rows: range) -> np.ndarray:
        """Cosines of positives and candidates, read block by block; positives outside the corpus are embedded here."""
        query_of, passage_of, outside = [], [], []
        for n, row in enumerate(rows):
            positives = self.pairs.positives(self.pairs[row])
            outside += [text for place, _, text in positives if place is None]
            places = [-1 if place is None else place for place, _, _ in positives] + self._candidates(row)
            query_of += [n] * len(places)
            passage_of += places
        query, passage = np.array(query_of), np.array(passage_of)
        query_vectors, score = self.query_vectors(rows), np.empty(len(passage), np.float32)
        for block in np.unique(passage[passage >= 0] // PASSAGES_PER_BLOCK):
            here = np.flatnonzero((passage >= 0) & (passage // PASSAGES_PER_BLOCK == block))
            vectors = self.passage_vectors(int(block))[passage[here] - block * PASSAGES_PER_BLOCK]
            score[here] = _dot_products(query_vectors[query[here]], vectors)
        if outside:
            vectors = check_finite(self.retriever.encode_passages(outside), outside, self.retriever.name)
            score[passage < 0] = _dot_products(query_vectors[query[passage < 0]], vectors)
        return score

    # ---- progress ------------------------------------------------------------------------------------------

    def _shard(self, desc: str, blocks: list[range], unit: str = "query") -> Iterator[range]:
        """This process's blocks, with a progress bar."""
        mine = list(self.distributed.shard(blocks))
        with self._progress(desc, sum(map(len, mine)), unit) as bar:
            rate = TokenRate(bar)
            for rows in mine:
                before = self._num_tokens()
                yield rows
                rate.update(len(rows), self._num_tokens() - before)

    def _num_tokens(self) -> int:
        """Tokens that the teachers have computed so far."""
        return self.retriever.num_tokens + (self.reranker.num_tokens if self.reranker else 0)

    def _progress(self, desc: str, total: int, unit: str) -> Any:
        return progress_bar(desc=desc, total=total, unit=unit, enabled=self.distributed.rank == 0)


def _dot_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Row by row, in fp64 and rounded once: equal texts get equal scores wherever they are."""
    found: np.ndarray = np.einsum("nd,nd->n", one, other, dtype=np.float64).astype(np.float32)
    return found


def _split(rows: range, size: int) -> list[range]:
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
