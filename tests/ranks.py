"""Processes of a run as torchrun starts them, forked from a server that has imported torch, mteb and the scripts.

These imports would take most of the time of the short runs in the tests, which start more than a hundred processes.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "mteb", "run_train", "run_label", "run_eval"])


class Rank:
    """A Python process with `arguments` (a script or -c CODE, then its own arguments), and torchrun's variables."""

    def __init__(self, arguments: Sequence[object], environment: dict[str, str]) -> None:
        self.output = tempfile.TemporaryDirectory()
        words = [str(argument) for argument in arguments]
        self.process = CONTEXT.Process(target=_run, args=(words, environment, self.output.name), daemon=True)
        self.process.start()

    def wait(self, timeout_s: float = 300) -> int:
        """The exit code, negative for a signal; AssertionError if the process has not ended after `timeout_s`."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"no end after {timeout_s} s: {self.stderr}"
        if self.process.exitcode:
            print(self.stdout, self.stderr, file=sys.stderr)  # shown if the test fails
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return Path(self.output.name, "1").read_text()

    @property
    def stderr(self) -> str:
        """What it has printed so far."""
        return Path(self.output.name, "2").read_text()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def kill(self) -> int:
        """Send SIGKILL; returns the exit code."""
        self.process.kill()
        return self.wait()


def start_ranks(world_size: int, arguments: Sequence[object]) -> list[Rank]:
    """`world_size` processes with these arguments, one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    return [Rank(arguments, {**environment, "RANK": str(rank)}) for rank in range(world_size)]


def exit_codes(ranks: Sequence[Rank]) -> list[int]:
    """The exit codes of all, when all have ended."""
    return [rank.wait() for rank in ranks]


def _run(words: list[str], environment: dict[str, str], output: str) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(os.open(Path(output, str(descriptor)), os.O_CREAT | os.O_WRONLY), descriptor)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
