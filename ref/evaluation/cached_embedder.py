"""Embeddings kept on disk: an evaluation that was interrupted inside a task continues there (--embedding-cache)."""

import contextlib
from collections.abc import Sequence

import numpy as np

from ref.evaluation.retrieval import TextEmbedder
from ref.text.prompts import InContextExample
from ref.utils.block_cache import BlockCache, hash_key
from ref.utils.dedup import first_occurrence, scatter_to_duplicates, unique_index

TEXTS_PER_BLOCK = 8192


class CachedEmbedder:
    """An embedder whose vectors are stored in blocks of TEXTS_PER_BLOCK distinct texts, at most `max_bytes` in total.

    The oldest blocks are removed to stay below `max_bytes`.
    """

    def __init__(self, embedder: TextEmbedder, cache: BlockCache, *, key: str, max_bytes: float) -> None:
        self.embedder, self.cache, self.key, self.max_bytes = embedder, cache, key, max_bytes

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """`Embedder.encode`, from the cache where possible."""
        first = first_occurrence(texts)
        unique = unique_index(first)
        prompt = [instruction, *(part for e in examples for part in (e.query, e.response, e.instruction))]
        vectors: np.ndarray | None = None
        for start in range(0, len(unique), TEXTS_PER_BLOCK):
            rows = unique[start : start + TEXTS_PER_BLOCK]
            block = [texts[n] for n in rows]
            key = hash_key(self.key, len(prompt), *prompt, *block)
            part = self.cache.block("texts", key, lambda block=block: {  # type: ignore[misc]
                "vectors": self.embedder.encode(block, instruction=instruction, examples=examples, progress=progress)
            })["vectors"]
            self._limit_size()
            vectors = np.empty((len(texts), part.shape[1]), np.float32) if vectors is None else vectors
            vectors[rows] = part
        if vectors is None:
            return self.embedder.encode(texts, instruction=instruction, examples=examples)
        scatter_to_duplicates(vectors, first)
        return vectors

    def _limit_size(self) -> None:
        blocks = []
        for path in (self.cache.folder / "texts").glob("*.block"):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                blocks.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= self.max_bytes:
                break
            total -= size
            path.unlink(missing_ok=True)
