"""What was computed, kept on disk by content: block by block, so that a stopped run goes on and a changed one reuses.

    cache/KIND/KEY.block      32 bytes of SHA-256, then tensors in the safetensors format

KEY is a hash of all that the block depends on: the texts, the model's files, the options. So nothing is ever out of
date: another model, corpus or depth has other keys. A block that is damaged (its hash says so) is computed again, and
that is said. A block appears whole or not at all. Several processes may share a folder.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ref.held_out import TextEmbedder
from ref.overlap import different, fill_repeated, first_of_equal
from ref.prompts import Example
from ref.runs import hash_files, write_whole

TEXTS_PER_BLOCK = 8192
Arrays = dict[str, np.ndarray]


class Cache:
    """Blocks of arrays in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed = self.found = 0
        self.intact: set[Path] = set()  # hashed once, by this process

    def block(self, kind: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of that key, computed where they are not there."""
        path = self.path(kind, key)
        arrays = self.read(path)
        if arrays is None:
            arrays = compute()
            self.computed += 1
            content = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda draft: draft.write_bytes(hashlib.sha256(content).digest() + content))
            self.intact.add(path)
        else:
            self.found += 1
        return arrays

    def path(self, kind: str, key: str) -> Path:
        """Where a block lies."""
        return self.folder / kind / f"{key}.block"

    def read(self, path: Path) -> Arrays | None:
        """The arrays of a block; None if it is not there or damaged."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        body = memoryview(content)[32:]
        if path not in self.intact and hashlib.sha256(body).digest() != content[:32]:
            print(f"cache: {path} is damaged; it is computed again", flush=True)
            return None
        self.intact.add(path)
        arrays: Arrays = load(bytes(body))
        return arrays


class CachedEmbedder:
    """An embedder that keeps its vectors on disk, at most `max_bytes` of them: a run that stops inside a task goes on.

    Different texts in blocks of TEXTS_PER_BLOCK, in their order; the oldest blocks make room.
    """

    def __init__(self, embedder: TextEmbedder, cache: Cache, *, key: str, max_bytes: float) -> None:
        self.embedder, self.cache, self.key, self.max_bytes = embedder, cache, key, max_bytes

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """`Embedder.encode`, from the cache where a block is there."""
        first = first_of_equal(texts)
        once = different(first)
        prompt = [instruction, *(part for e in examples for part in (e.query, e.response))]
        vectors: np.ndarray | None = None
        for start in range(0, len(once), TEXTS_PER_BLOCK):
            rows = once[start : start + TEXTS_PER_BLOCK]
            block = [texts[n] for n in rows]
            key = key_of(self.key, len(prompt), *prompt, *block)
            part = self.cache.block("texts", key, lambda block=block: {  # type: ignore[misc]
                "vectors": self.embedder.encode(block, instruction=instruction, examples=examples, progress=progress)
            })["vectors"]
            self._make_room()
            vectors = np.empty((len(texts), part.shape[1]), np.float32) if vectors is None else vectors
            vectors[rows] = part
        if vectors is None:
            return self.embedder.encode(texts, instruction=instruction, examples=examples)
        fill_repeated(vectors, first)
        return vectors

    def _make_room(self) -> None:
        blocks = []
        for path in (self.cache.folder / "texts").glob("*.block"):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                blocks.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= self.max_bytes:
                break
            total -= size
            path.unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """A hash of texts, numbers and names, each with its length, so that no two lists run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def fingerprint(folder: Path) -> str:
    """A hash of a model's files, names and content."""
    kinds = {".json", ".safetensors", ".txt", ".model", ".bin"}
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds))[:40]
