"""Several processes (ranks) with the result of one: sharding, barrier, all-gather with gradient, all-reduce.

Each rank scores its own queries against all passages and divides by the counts of the whole batch. So the sum over the
ranks of loss and gradients is that of one process with the whole batch, for any number of ranks: nothing is averaged,
and both loss terms are treated alike. (Averaging, as the usual wrappers do, makes the term over the gathered passages
world_size times too small.)

Started by torchrun, or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without these the process
is alone and everything here does nothing. Collectives run over gloo, and over NCCL between GPUs.
Source: arXiv 2101.06983, section 3.4 (gradient caching over devices).
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
import torch.distributed.nn  # imported later, its default arguments would keep the group and its threads alive
from torch import Tensor

from ref.utils.device import local_rank

Item = TypeVar("Item")
HEARTBEAT_S = 1.0
JOIN_TIMEOUT = timedelta(minutes=30)  # for all ranks to start: one may download a model first
CLOSE_S = 5.0  # rank 0 waits no longer for ranks that still read the store


class RankFailure(RuntimeError):  # noqa: N818
    """Another rank has died or hangs; the message names it."""


class Distributed:
    """The process group, or this process alone."""

    def __init__(self, *, timeout: timedelta = timedelta(days=7), device: str | None = None) -> None:
        """`timeout`: how long a rank waits for another, half an hour at most for all to join. `device`: None: a GPU if
        there is one.
        """
        self.world_size, self.rank = (int(os.environ.get(name, default)) for name, default in (
            ("WORLD_SIZE", "1"), ("RANK", "0")))
        started = max(int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        if started > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError(f"the launcher has started {started} processes: set RANK, WORLD_SIZE, MASTER_ADDR and "
                             "MASTER_PORT for one run, or WORLD_SIZE=1 for separate ones")
        self.timeout = timeout
        cuda, rank = torch.cuda.is_available() and not (device or "").startswith("cpu"), local_rank()
        if cuda and rank is not None and rank < torch.cuda.device_count():  # else resolve_device says so
            torch.cuda.set_device(rank)
        if self.world_size > 1:
            self._connect("cpu:gloo,cuda:nccl" if cuda else "gloo")
            self.store = dist.distributed_c10d._get_default_store()
            self.barriers, self.heartbeats = 0, 0
            self.store.set(f"barrier/{self.rank}", "0")
            self.stopping = threading.Event()
            self.heartbeat_thread = threading.Thread(target=self._send_heartbeats, daemon=True)
            self.heartbeat_thread.start()
            atexit.register(self._stop_heartbeats)  # a thread inside the store's client would abort the interpreter

    def _connect(self, backend: str) -> None:
        """Join the other ranks; RankFailure if rank 0 cannot be reached or its port is taken."""
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=min(JOIN_TIMEOUT, self.timeout)))
            store.set_timeout(self.timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=self.timeout)
        except (RuntimeError, ValueError) as error:
            address = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            hint = "; GLOO_SOCKET_IFNAME names the network interface" if "connectFullMesh" in str(error) else ""
            raise RankFailure(f"rank {self.rank} of {self.world_size} cannot join the others at {address} "
                              f"({str(error).splitlines()[0]:.200}){hint}") from None

    def shard(self, items: Iterable[Item]) -> Iterator[Item]:
        """This rank's items: every world_size-th."""
        return (item for n, item in enumerate(items) if n % self.world_size == self.rank)

    def split_bounds(self, count: int) -> list[int]:
        """Bounds that split `count` items into one contiguous part per rank. Example: 7 for 3 ranks -> 0 3 5 7."""
        each, more = divmod(count, self.world_size)
        return [rank * each + min(rank, more) for rank in range(self.world_size + 1)]

    def barrier(self, *, while_alive: bool = False) -> None:
        """Wait for all ranks; RankFailure names those that have not arrived when the timeout is over.

        `while_alive`: wait as long as the missing ranks send heartbeats, for a rank with long work of its own.
        """
        if self.world_size == 1:
            return
        self.barriers += 1
        self._arrive()
        end_s, pause_s = time.monotonic() + self.timeout.total_seconds(), 0.0005
        while missing := self._missing_ranks():
            if time.monotonic() > end_s:
                silent = self._without_heartbeat() if while_alive else missing
                failed = sorted(set(silent) & set(self._missing_ranks()))
                if failed:
                    raise RankFailure(self._describe(failed, f"no response for {self.timeout}"))
                end_s = time.monotonic() + self.timeout.total_seconds()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def all_gather(self, x_PD: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks in rank order, `sizes` of each, (sum of sizes, D); differentiable."""
        return x_PD if self.world_size == 1 else _AllGather.apply(x_PD, list(sizes), self)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (fp32) by its sum over the ranks, in one flat all-reduce."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.collective(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def collective(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a collective operation; if it fails, RankFailure names the ranks without heartbeat.

        A rank that notices late may also name ranks that failed as a consequence: the first message is right.
        """
        try:
            call(*arguments)
        except RuntimeError as error:
            raise RankFailure(self._describe(self._without_heartbeat(), str(error).splitlines()[0][:200])) from None

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            self._stop_heartbeats()
            self._leave_store()
            dist.destroy_process_group()

    def _leave_store(self) -> None:
        """Rank 0, which may hold the store, waits for the ranks that still read it, at most CLOSE_S."""
        try:
            self.store.set(f"closed/{self.rank}", "1")
            end_s = time.monotonic() + CLOSE_S
            closed = [f"closed/{rank}" for rank in range(self.world_size)]
            while self.rank == 0 and not self.store.check(closed) and time.monotonic() < end_s:
                time.sleep(0.005)
        except RuntimeError:  # the process that holds the store has ended
            return

    def _describe(self, ranks: list[int], why: str) -> str:
        failed = ", ".join(map(str, ranks)) or "unknown"
        return f"rank {failed} of {self.world_size} failed, noticed by rank {self.rank} ({why})"

    def _arrive(self) -> None:
        try:
            self.store.set(f"barrier/{self.rank}", str(self.barriers))
        except RuntimeError as error:
            raise self._lost_store(error) from None

    def _missing_ranks(self) -> list[int]:
        try:
            return [rank for rank, value in enumerate(self._read("barrier")) if value < self.barriers]
        except RuntimeError as error:
            raise self._lost_store(error) from None

    def _lost_store(self, error: RuntimeError) -> RankFailure:
        """Rank 0 holds the store, unless the launcher does."""
        return RankFailure(self._describe([0], str(error).splitlines()[0][:200]))

    def _send_heartbeats(self) -> None:
        while not self.stopping.is_set():
            try:
                self.store.set(f"heartbeat/{self.rank}", str(self.heartbeats))
            except RuntimeError:  # the process that holds the store has ended
                return
            self.heartbeats += 1
            self.stopping.wait(HEARTBEAT_S)

    def _stop_heartbeats(self) -> None:
        self.stopping.set()
        self.heartbeat_thread.join(timeout=5)

    def _without_heartbeat(self) -> list[int]:
        try:
            before = self._read("heartbeat")
            time.sleep(3 * HEARTBEAT_S)
            after = self._read("heartbeat")
        except RuntimeError:
            return [0]  # it holds the store, unless the launcher does
        time.sleep(HEARTBEAT_S if self.rank == 0 else 0)  # the other ranks may still read its store
        return [rank for rank in range(self.world_size) if before[rank] == after[rank]]

    def _read(self, key: str) -> list[int]:
        return [int(value) for value in self.store.multi_get([f"{key}/{rank}" for rank in range(self.world_size)])]


class _AllGather(torch.autograd.Function):
    """Backward sums the gradients of all ranks for the rows of each."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, sizes: list[int], distributed: Distributed) -> Tensor:
        ctx.sizes, ctx.distributed = sizes, distributed
        padded = x_PD.new_zeros(max(sizes), x_PD.shape[1])  # all_gather needs equal sizes
        padded[: len(x_PD)] = x_PD
        received = [torch.empty_like(padded) for _ in sizes]
        distributed.collective(dist.all_gather, received, padded)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        total_PD = grad_PD.contiguous()
        ctx.distributed.collective(dist.all_reduce, total_PD)
        return total_PD.split(ctx.sizes)[ctx.distributed.rank], None, None
