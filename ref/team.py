"""Several processes, one result: who takes which share, and the two sums that training needs.

    gather          every process gets all passages' vectors; backward, each gets back the gradient of its own, summed
    sum_in_place    one flat all-reduce: the gradients of the weights, and a step's figures

Each process scores its own queries against all passages and divides by the counts of the whole batch. So the sum over
the processes of loss and gradients is that of one process with the whole batch, whatever the number of processes:
nothing is averaged, and both loss terms are treated alike. (Averaging, as usual wrappers do, makes the term over the
gathered passages W times too small.)

Started by torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without these the process
is alone and everything here does nothing. Called by the three run scripts, trainer.py, scoring/ and labelling/.
Source: arXiv 2101.06983, section 3.4 (gradient caching over devices); torch.distributed: gloo, and NCCL between GPUs.
"""

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep the group, and its threads, alive
from torch import Tensor

Item = TypeVar("Item")
HEARTBEAT_S = 1.0


class PeerError(RuntimeError):
    """Another process is dead or stuck: names it."""


class Team:
    """The processes of a start, or this one alone."""

    def __init__(self, *, patience: timedelta = timedelta(days=7)) -> None:
        """`patience`: how long one waits for another before it gives up."""
        self.size, self.rank = (int(os.environ.get(name, default)) for name, default in (
            ("WORLD_SIZE", "1"), ("RANK", "0")))
        self.patience = patience
        cuda = torch.cuda.is_available()
        if cuda and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
            self.store = dist.distributed_c10d._get_default_store()
            self.waits, self.beats = 0, 0
            self.store.set(f"at/{self.rank}", "0")
            self.leaving = threading.Event()
            self.pulse = threading.Thread(target=self._beat, daemon=True)
            self.pulse.start()
            atexit.register(self._hush)  # a thread inside the store's client would abort the interpreter's end

    def share(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items that are this process's: every size-th."""
        return (item for n, item in enumerate(items) if n % self.size == self.rank)

    def cuts(self, count: int) -> list[int]:
        """Where `count` things are cut into one run for each process: size + 1 places. Example: 7 for 3 -> 0 3 5 7."""
        each, more = divmod(count, self.size)
        return [rank * each + min(rank, more) for rank in range(self.size + 1)]

    def wait(self, *, while_alive: bool = False) -> None:
        """Until all have come here; PeerError that names who has not, once patience is over.

        `while_alive`: with patience for as long as whoever is late has a heartbeat, where one has long work of its own.
        """
        if self.size == 1:
            return
        self.waits += 1
        self.store.set(f"at/{self.rank}", str(self.waits))
        end_s, pause_s = time.monotonic() + self.patience.total_seconds(), 0.0005
        while behind := self._behind():
            if time.monotonic() > end_s:
                silent = self._without_heartbeat() if while_alive else behind
                late = sorted(set(silent) & set(self._behind()))
                if late:
                    raise PeerError(self._who(late, f"not heard of for {self.patience}"))
                end_s = time.monotonic() + self.patience.total_seconds()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def _behind(self) -> list[int]:
        try:
            return [rank for rank, value in enumerate(self._read("at")) if value < self.waits]
        except RuntimeError as error:  # it keeps the store, unless the launcher does
            raise PeerError(self._who([0], str(error).splitlines()[0][:200])) from None

    def watched(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call what needs all processes; PeerError that names who has no heartbeat, where it fails.

        Who notices late may name, besides the cause, one that has left because of it: the first to say so is right.
        """
        try:
            call(*arguments)
        except RuntimeError as error:
            raise PeerError(self._who(self._without_heartbeat(), str(error).splitlines()[0][:200])) from None

    def _who(self, ranks: list[int], why: str) -> str:
        return f"rank {', '.join(map(str, ranks)) or 'unknown'} of {self.size}, noticed by rank {self.rank} ({why})"

    def _beat(self) -> None:
        while not self.leaving.is_set():
            try:
                self.store.set(f"alive/{self.rank}", str(self.beats))
            except RuntimeError:  # whoever keeps the store has ended
                return
            self.beats += 1
            self.leaving.wait(HEARTBEAT_S)

    def _hush(self) -> None:
        self.leaving.set()
        self.pulse.join(timeout=5)

    def _without_heartbeat(self) -> list[int]:
        try:
            before = self._read("alive")
            time.sleep(3 * HEARTBEAT_S)
            after = self._read("alive")
        except RuntimeError:
            return [0]  # it keeps the store, unless the launcher does
        time.sleep(HEARTBEAT_S if self.rank == 0 else 0)  # the others may still ask its store
        return [rank for rank in range(self.size) if before[rank] == after[rank]]

    def _read(self, what: str) -> list[int]:
        return [int(value) for value in self.store.multi_get([f"{what}/{rank}" for rank in range(self.size)])]

    def gather(self, x_ND: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, `sizes` of each, in their order, (sum of sizes, D); with gradient."""
        return x_ND if self.size == 1 else _Gather.apply(x_ND, list(sizes), self)

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (fp32) by its sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.watched(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        """Part."""
        if self.size > 1:
            self._hush()
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sizes: list[int], team: Team) -> Tensor:
        ctx.sizes, ctx.team = sizes, team
        padded = x_ND.new_zeros(max(sizes), x_ND.shape[1])  # every process sends as many rows
        padded[: len(x_ND)] = x_ND
        received = [torch.empty_like(padded) for _ in sizes]
        team.watched(dist.all_gather, received, padded)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        total_PD = grad_PD.contiguous()
        ctx.team.watched(dist.all_reduce, total_PD)
        return total_PD.split(ctx.sizes)[ctx.team.rank], None, None
