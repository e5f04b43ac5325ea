"""Computed arrays on disk, addressed by content: an interrupted run continues, and a changed one reuses what it can.

    FOLDER/KIND/KEY.block      32 bytes of SHA-256, then tensors in the safetensors format

KEY is a hash of all that the block depends on: texts, model files, options. So nothing is ever out of date: another
model, corpus or option has other keys. A damaged block (its hash differs) is reported and computed again. Blocks are
written atomically, and several processes may share a folder.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ref.utils.files import atomic_write, hash_files

Arrays = dict[str, np.ndarray]


class BlockCache:
    """Blocks of arrays in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_computed = self.num_found = 0
        self.verified: set[Path] = set()  # hashed by this process

    def block(self, kind: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of a key, computed and stored if they are missing."""
        path = self.path(kind, key)
        arrays = self.read(path)
        if arrays is None:
            arrays = compute()
            self.num_computed += 1
            content = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda draft: draft.write_bytes(hashlib.sha256(content).digest() + content))
            self.verified.add(path)
        else:
            self.num_found += 1
        return arrays

    def path(self, kind: str, key: str) -> Path:
        """The file of a block."""
        return self.folder / kind / f"{key}.block"

    def read(self, path: Path) -> Arrays | None:
        """The arrays of a block; None if it is missing or damaged."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        body = memoryview(content)[32:]
        if path not in self.verified and hashlib.sha256(body).digest() != content[:32]:
            print(f"cache: {path} is damaged and will be computed again", flush=True)
            return None
        self.verified.add(path)
        arrays: Arrays = load(bytes(body))
        return arrays


def hash_key(*parts: object) -> str:
    """A hash of strings, numbers and bytes, each with its length: different lists never collide by concatenation."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def model_hash(folder: Path) -> str:
    """A hash of the files of a model, names and contents."""
    kinds = {".json", ".safetensors", ".txt", ".model", ".bin"}
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds))[:40]
