"""Device and backend of a run."""

import pytest
import torch

from ref.utils.device import resolve_backend, resolve_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_default_backends(monkeypatch):
    assert resolve_backend(None, CPU) == "chunked" and resolve_backend(None, CUDA) == "triton"
    assert resolve_backend("eager", CUDA) == "eager"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="^--backend triton needs an NVIDIA GPU"):
        resolve_backend("triton", CPU)


def test_devices(monkeypatch):
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"^--device must be cpu or cuda \(got 'mps'\)$"):
        resolve_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"^--device {name}: torch finds no CUDA GPU; use --device cpu$"):
            resolve_device(name)
