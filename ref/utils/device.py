"""Device, dtype and backend of a run: the only place that asks what the machine has."""

import os
from types import MappingProxyType
from typing import Literal

import torch

DTYPES = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32})
Backend = Literal["eager", "chunked", "triton"]  # of pooling and loss: see ref/loss/training_loss.py


def resolve_backend(name: Backend | None, device: torch.device) -> Backend:
    """The named backend, by default triton on CUDA and chunked on a CPU. Raises ValueError where it cannot run."""
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--backend triton needs an NVIDIA GPU (or TRITON_INTERPRET=1); use --backend chunked")
    return name or ("triton" if device.type == "cuda" else "chunked")


def resolve_device(name: str | None = None) -> torch.device:
    """The named device, by default CUDA where available, else the CPU. Raises ValueError for other devices."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"  # each rank has its own
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda (got {name!r:.40})")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA GPU; use --device cpu")
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    return device
