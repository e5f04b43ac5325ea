"""What a command may write: never over a file of the user's, and never beside another process that writes the same.

All three commands claim their output before any work, with `claim_output`: a folder of their own, or a file with
companions beside it.
"""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


@contextmanager
def claim_output(
    output: Path, *, inputs: Sequence[Path], is_ours: Callable[[], bool], companions: Sequence[Path] | None = None,
    numbered: bool = False,
) -> Iterator[Path]:
    """Hold `output` for this process: a folder, or with `companions` a file and the files written beside it.

    Missing folders are created, and removed again if they stay empty. With `numbered`, for default names, a folder that
    exists is left alone and the first free of OUTPUT-2, OUTPUT-3, … is taken; yields the output that was claimed.
    Raises ValueError with one line if the output is an input or lies in one (a folder), holds anything that the command
    did not write itself (`is_ours`), is being written by another process, or cannot be written.
    """
    for target in (output, *(companions or [])):
        check_outside(target, inputs, f"--output {output}")
    is_file = companions is not None
    try:
        folder, created = _make_folder(output.parent if is_file else output, numbered=numbered)
        _check_writable(folder)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from None
    lock_path = output.with_name(f".{output.name}.lock") if is_file else folder
    lock = _lock(lock_path)
    try:
        found = sorted(folder.iterdir()) if not is_file else [
            path for path in (output, *(companions or [])) if path.exists()]
        if found and not is_ours():
            raise ValueError(f"--output {output}: {found[0]} exists and was not written by this command; give a new "
                             "name")
        yield output if is_file else folder
    finally:
        if is_file:
            lock_path.unlink(missing_ok=True)
        os.close(lock)
        for path in created:
            with suppress(OSError):  # it is not empty, or gone
                path.rmdir()


def check_outside(path: Path, inputs: Sequence[Path], what: str) -> None:
    """Raise ValueError that starts with `what` if `path` is an input, or lies in one."""
    for source in inputs:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{what}: must not be an input or lie in one (got {source}); give another place")


def check_cache(variable: str, default: str) -> None:
    """Raise ValueError if a library's cache cannot be written: the folder in `variable`, or `default` in the home."""
    folder = Path(os.environ.get(variable) or Path("~").expanduser() / default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_writable(folder)
    except OSError as error:
        raise ValueError(f"{folder}: the cache cannot be written ({error.strerror}); set {variable} to a folder that "
                         "can be") from None


def _make_folder(path: Path, *, numbered: bool) -> tuple[Path, list[Path]]:
    """Create a folder, or the first free numbered one; returns it and what is new: itself, then its parents."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    folder, missing = path, [parent for parent in path.parents if not parent.exists()]
    while True:
        try:
            folder.mkdir(parents=True)
            return folder, [folder, *missing]
        except FileExistsError:
            if not numbered:
                if not folder.is_dir():
                    raise
                return folder, []
            folder = next(names)


def _lock(path: Path) -> int:
    """The descriptor of a folder or empty lock file that no other process holds; the system releases it at its end."""
    if path.is_file() and path.stat().st_size:
        raise ValueError(f"{path} exists and was not written by this command; move it, or give a new name")
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks no O_RDONLY
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"--output {path}: another process is writing it; wait for it, or give a new name") from None
    except OSError as error:  # a network file system without locks
        print(f"{path}: cannot be locked ({error.strerror}); start no other process with this output", file=sys.stderr)
    return descriptor


def _check_writable(folder: Path) -> None:
    probe = folder / f".{os.getpid()}.probe"
    probe.touch()
    probe.unlink()
