"""Reading and writing files: JSON with errors that name file and line, atomic writes, SHA-256.

All writers of a run go through `atomic_write`: the target appears complete or not at all.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

MAX_TEXT_CHARS = 1_000_000
BLOCK_BYTES = 2**16  # of a fingerprint
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file


class JsonLine(NamedTuple):
    """One non-blank line of a JSONL file."""

    where: str  # "FILE:LINE", for error messages
    offset: int  # of its first byte
    raw: bytes
    value: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises ValueError that names the file, and the line of a syntax error."""
    return parse_json_object(_read(path), str(path))


def read_json_list(path: Path) -> list[Any]:
    """Read one JSON list. Raises ValueError as `read_json` does."""
    value: list[Any] = _parse_json(_read(path), str(path), list, "a JSON list")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: file does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def read_jsonl(path: Path) -> Iterator[JsonLine]:
    """Yield the non-blank lines of a JSONL file. Raises ValueError with file and line for anything but an object."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: must be a file, which is read more than once (got a folder or a pipe); save the "
                             "data to a file first")
        file = path.open("rb")
    except FileNotFoundError:
        raise ValueError(f"{path}: file does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        if file.peek(2)[:2] == GZIP:
            raise ValueError(f"{path}: is compressed; unpack it first: gunzip -k {path}")
        offset = 0
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                where = f"{path}:{number}"
                yield JsonLine(where, offset, raw, parse_json_object(raw, where))
            offset += len(raw)


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON, with or without a BOM, that must be an object. Raises ValueError that starts with `where`."""
    value: dict[str, Any] = _parse_json(raw, where, dict, "a JSON object")
    return value


def _parse_json(raw: bytes, where: str, kind: type, expected: str) -> Any:
    try:
        value = json.loads(raw.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        hint = "; wanted: a JSON object, no list" if kind is dict and raw.lstrip()[:1] == b"[" else ""
        raise ValueError(f"{where}: invalid JSON ({error.msg}, {line}column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: must be {expected} (got {type(value).__name__})")
    return value


def check_type(value: Any, kind: type | tuple[type, ...], what: str, expected: str) -> Any:
    """Return `value` if it is an instance of `kind` (a bool is not a number).

    Raises ValueError "`what` must be `expected` (got …)" otherwise.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{what} must be {expected} (got {value!r:.80})")
    return value


def check_text(value: Any, what: str) -> str:
    """Return `value` if it is a non-empty string of valid Unicode; raises ValueError that starts with `what`."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a non-empty string (got {value!r:.60})")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{what} must have at most {MAX_TEXT_CHARS:,} characters (got {len(value):,})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has an unpaired surrogate at character {error.start}") from None
    return value


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file or folder under a temporary name beside `path`, then rename it to `path`.

    The temporary file is removed if `write` raises. An existing folder at `path` is replaced. Raises ValueError with
    one line if the file system refuses: full, read-only, gone.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # another process may write the same path
    try:
        remove_path(draft)
        write(draft)
    except BaseException as error:
        with suppress(OSError):
            remove_path(draft)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"{path}: cannot be written ({reason:.200}); what was written before is intact; free "
                             "space or fix the permissions, then continue") from None
        raise
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    remove_path(old)
    if path.is_dir():
        path.rename(old)
    os.replace(draft, path)
    remove_path(old)


def remove_drafts(folder: Path) -> None:
    """Delete what `atomic_write` left in a folder and below when its process was killed."""
    for path in list(folder.rglob(".*")):
        match = re.fullmatch(r"\.(.+)\.\d+\.(draft|old)", path.name)
        if match and (match[2] == "draft" or path.with_name(match[1]).exists()):  # else the old one is the only copy
            remove_path(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    atomic_write(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def remove_path(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths: Iterable[Path], *, blocks: int) -> str:
    """SHA-256 over names, sizes and `blocks` (>= 2) evenly spaced blocks of files in order, the first and the last at
    both ends: tells weights apart without reading gigabytes.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(blocks):
                file.seek(max(0, size - BLOCK_BYTES) * block // (blocks - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over the names (relative to `folder`) and contents of files, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(hash_file(path)))
    return digest.hexdigest()
