"""What was computed, kept on disk by content: block by block, so that a stopped run goes on and a changed one reuses.

    cache/KIND/KEY.block      32 bytes of SHA-256, then tensors in the safetensors format

KEY is a hash of all that the block depends on: the texts, the model's files, the options. So nothing is ever out of
date: another model, corpus or depth has other keys. A block that is damaged (its hash says so) is computed again, and
that is said. A block appears whole or not at all. Several processes may share a folder.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ref.runs import write_whole

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


def key_of(*parts: object) -> str:
    """A hash of texts, numbers and names, each with its length, so that no two lists run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def fingerprint(folder: Path) -> str:
    """A hash of a model's files, names and content."""
    return key_of(*(part for path in sorted(_files(folder)) for part in (path.relative_to(folder), _sha256(path))))


def _files(folder: Path) -> Iterable[Path]:
    kinds = {".json", ".safetensors", ".txt", ".model", ".bin"}
    return (path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
