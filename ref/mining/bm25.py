"""Lexical search with BM25: the bm25s library's Lucene variant, k1 1.5, b 0.75.

Texts are split into words (two or more letters, digits or combining marks, English stop words removed, optional
stemming), or into the subwords of a tokenizer.json, which also work for languages without spaces between words.

The index holds 8 bytes for each distinct word of each passage. Ties are broken by the order of the passages' ids.
"""

import sys
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ref.utils.files import hash_files

HASH_FILE = "sha256"


class BM25Index:
    """A BM25 index of a corpus."""

    def __init__(self, texts: Iterable[str], *, stemmer: str | None, subwords: Path | None = None) -> None:
        """`subwords`: the tokenizer.json to split texts with, instead of into words."""
        import bm25s

        self.tokenise: Any = make_tokeniser(stemmer, subwords)
        self.index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        words = self.tokenise(list(texts), return_ids=False)
        if not any(words):
            raise ValueError("corpus: BM25 needs a passage with words other than stop words; use --retrieval dense")
        self.index.index(words, show_progress=False)

    @property
    def num_bytes(self) -> int:
        """Size of the index without the vocabulary."""
        return sum(self.index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def save(self, folder: Path) -> None:
        """Write the index and a hash of its files."""
        self.index.save(str(folder), show_progress=False)
        (folder / HASH_FILE).write_text(_hash_index(folder))

    @classmethod
    def load(cls, folder: Path, *, stemmer: str | None, subwords: Path | None = None) -> "BM25Index":
        """Read a saved index. Raises ValueError if a file is damaged."""
        import bm25s

        if (folder / HASH_FILE).read_text() != _hash_index(folder):
            raise ValueError("its hash differs")
        loaded = cls.__new__(cls)
        loaded.tokenise, loaded.index = make_tokeniser(stemmer, subwords), bm25s.BM25.load(str(folder))
        return loaded

    def search(self, queries: list[str], k: int, id_order: np.ndarray) -> np.ndarray:
        """Rows of the k best passages that share a word with each query, (queries, k) int32, -1 where there are fewer.

        `id_order` is each passage's position in the order of ids.
        """
        found = np.full((len(queries), k), -1, np.int32)
        for hits, words in zip(found, self.tokenise(queries, return_ids=False), strict=True):
            known = [word for word in words if word in self.index.vocab_dict]
            if known:
                score = self.index.get_scores(known)
                sharing = np.flatnonzero(score > 0)
                best = sharing[top_k(score[sharing], k, id_order[sharing])]
                hits[: len(best)] = best
        return found


def top_k(score: np.ndarray, k: int, id_order: np.ndarray) -> np.ndarray:
    """Indices of the k largest scores in descending order, ties by `id_order`; all if there are fewer."""
    if k < len(score):
        cutoff = np.partition(score, len(score) - k)[len(score) - k]
        indices = np.flatnonzero(score >= cutoff)
    else:
        indices = np.arange(len(score))
    return indices[np.lexsort((id_order[indices], -score[indices]))][:k]


def _hash_index(folder: Path) -> str:
    return hash_files(folder, (path for path in folder.iterdir() if path.name != HASH_FILE))


def make_tokeniser(stemmer: str | None, subwords: Path | None) -> Any:
    """A function from texts to their words or subwords. Raises ValueError if a package or the stemmer is missing."""
    try:
        import bm25s
    except ImportError:
        raise ValueError("BM25 needs the package bm25s; pip install -e .[teacher], or use --retrieval dense") from None

    if subwords is not None:
        library = tokenizers.Tokenizer.from_file(str(subwords))
        library.no_truncation()
        library.no_padding()

        def split(texts: list[str], *, return_ids: bool) -> Any:
            return [encoded.tokens for encoded in library.encode_batch(texts, add_special_tokens=False)]
        return split
    stem = None
    if stemmer is not None:
        try:
            import Stemmer
        except ImportError:
            raise ValueError("--stemmer needs the package PyStemmer; pip install PyStemmer") from None
        if stemmer not in Stemmer.algorithms():
            raise ValueError(f"--stemmer must be one of {', '.join(Stemmer.algorithms())} (got {stemmer!r:.40})")
        stem = Stemmer.Stemmer(stemmer)

    def tokenise(texts: list[str], *, return_ids: bool) -> Any:
        return bm25s.tokenize(texts, token_pattern=word_pattern(), stemmer=stem, return_ids=return_ids,
                              show_progress=False)
    return tokenise


@cache
def word_pattern() -> str:
    """A regular expression of a word. Python's \\w leaves out combining marks, such as the vowel signs of Hindi."""
    marks = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] == "M")
    joiners = "\u200c\u200d"  # inside words of Persian and of Indian languages
    return rf"\w[\w{marks}{joiners}]+"
