"""Device, dtype and backend of a run."""

import ctypes
import os
import time
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch

LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # of torchrun, Slurm, Open MPI
DTYPES = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32})
Backend = Literal["eager", "chunked", "triton"]  # of pooling and loss: see ref/loss/training_loss.py

Dtype = Literal["auto", "bfloat16", "float32"]  # of the forward pass
FASTER = 1.25  # auto takes bfloat16 on a CPU from this ratio of the rates on
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt


def resolve_dtype(name: str, device: torch.device) -> tuple[Dtype, str]:
    """bfloat16 or float32, and why.

    `auto`: bfloat16 on CUDA from compute capability 8.0 on (before it neither hardware nor Triton has it), and on a CPU
    whose matrix products are faster in it (AMX, for example); with several processes on CPUs float32, because they may
    run on different ones. Raises ValueError for another name, and for bfloat16 on an older GPU.
    """
    if name not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16 or float32 (got {name!r:.60})")
    if name == "float32":
        return "float32", "as given"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bfloat16", "as given" if name == "bfloat16" else "default on a GPU"
        if name == "bfloat16":
            raise ValueError(f"dtype bfloat16: the GPU must have compute capability 8.0 (got {major}.{minor}); use "
                             "auto or float32")
        return "float32", f"the GPU has compute capability {major}.{minor}, bfloat16 needs 8.0"
    if name == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "float32", "default for several processes on a CPU"
    rate = bfloat16_rate()
    measured = f"this processor's matrix products are {max(rate, 1 / rate):.1f} times as fast in "
    measured += "bfloat16" if rate > 1 else "float32"
    if name == "auto":
        return ("bfloat16" if rate >= FASTER else "float32"), measured
    return "bfloat16", "as given" if rate > 1 else f"as given; note: {measured}"


@cache
def bfloat16_rate() -> float:
    """Speed of a matrix product in bfloat16 on this CPU, relative to float32; measured, about 0.1 s."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, times = torch.ones(512, 1024, dtype=dtype), []
        weight = torch.ones(1024, 1024, dtype=dtype)
        for _ in range(4):
            start = time.perf_counter()
            x @ weight.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def resolve_backend(name: Backend | None, device: torch.device) -> Backend:
    """The named backend, by default triton on CUDA and chunked on a CPU. Raises ValueError where it cannot run."""
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--backend triton needs an NVIDIA GPU (or TRITON_INTERPRET=1); use --backend chunked")
    return name or ("triton" if device.type == "cuda" else "chunked")


def resolve_device(name: str | None = None) -> torch.device:
    """The named device, by default CUDA where available, else the CPU. Raises ValueError for other devices."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        _check_local_rank(torch.cuda.device_count())
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"  # each rank has its own
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda (got {name!r:.40})")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA GPU; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N (got {name!r:.40})") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs, the first is cuda:0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    return device


def local_rank() -> int | None:
    """This process's number on its machine, by torchrun, Slurm or Open MPI; None if none of them says so."""
    found = [os.environ[name] for name in LOCAL_RANK if name in os.environ]
    return int(found[0]) if found else None


def _check_local_rank(num_gpus: int) -> None:
    """Raise ValueError where several processes would compute on one GPU. A launcher may show each one only its own."""
    rank = local_rank()
    if rank is None and num_gpus > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device cuda: LOCAL_RANK must be set with several processes and {num_gpus} visible GPUs "
                         "(got nothing): the number of the process on its machine, as torchrun sets it")
    if rank is not None and rank >= num_gpus > (0 if LOCAL_RANK[0] in os.environ else 1):
        raise ValueError(f"--device cuda: LOCAL_RANK must be below the number of visible GPUs (got {rank} of "
                         f"{num_gpus}); start as many processes as there are GPUs")


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc: keep freed blocks for the next allocation, as torch does on CUDA.

    By default glibc returns large blocks to the kernel, which clears each page when it is allocated again, in every
    layer. For the scripts: it holds for the whole process, whose memory then stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type == "cpu" and mallopt is not None:
        mallopt(MMAP_MAX, 0)  # no block is a mapping of its own
        mallopt(TRIM_THRESHOLD, -1)  # nothing is returned
