"""Device, dtype and backend of a run."""

import dataclasses
import os
import platform
import subprocess
import sys

import pytest
import torch

from ref.config import TINY, TrainConfig
from ref.embedder import Embedder
from ref.training.model_source import ModelSource, build_model
from ref.utils.device import LOCAL_RANK, bfloat16_rate, resolve_backend, resolve_device, resolve_dtype

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
    with pytest.raises(ValueError, match=r"^--device must be cpu, cuda or cuda:N \(got 'cpu:x'\)$"):
        resolve_device("cpu:x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^--device cuda:1: torch finds 1 CUDA GPUs, the first is cuda:0$"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"^--device {name}: torch finds no CUDA GPU; use --device cpu$"):
            resolve_device(name)


FASTER_IN_FP32 = "this processor's matrix products are 2.0 times as fast in float32"


@pytest.mark.parametrize(("name", "rate", "dtype", "why"), [
    ("auto", 4.0, "bfloat16", "this processor's matrix products are 4.0 times as fast in bfloat16"),
    ("auto", 0.5, "float32", FASTER_IN_FP32),
    ("auto", 1.1, "float32", "this processor's matrix products are 1.1 times as fast in bfloat16"),
    ("bfloat16", 4.0, "bfloat16", "as given"),
    ("bfloat16", 0.5, "bfloat16", f"as given; note: {FASTER_IN_FP32}"),
    ("float32", None, "float32", "as given"),
])
def test_dtype_on_a_cpu(name, rate, dtype, why, monkeypatch):
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", lambda: rate)
    assert resolve_dtype(name, CPU) == (dtype, why)


def test_dtype_on_a_gpu_and_for_several_processes(monkeypatch):
    """Nothing is measured: processes on different processors would choose differently."""
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert resolve_dtype("auto", CUDA) == ("bfloat16", "default on a GPU")
    assert resolve_dtype("bfloat16", CUDA) == ("bfloat16", "as given")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_dtype("auto", CPU) == ("float32", "default for several processes on a CPU")


def test_dtype_on_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert resolve_dtype("auto", CUDA) == ("float32", "the GPU has compute capability 7.5, bfloat16 needs 8.0")
    assert resolve_dtype("float32", CUDA) == ("float32", "as given")
    with pytest.raises(ValueError, match=r"^dtype bfloat16: the GPU must have compute capability 8\.0 \(got 7\.5\)"):
        resolve_dtype("bfloat16", CUDA)


@pytest.mark.parametrize("error", [
    RuntimeError("Failed to find C compiler."), subprocess.CalledProcessError(1, ["gcc", "main.c"])], ids=repr)
def test_cuda_without_a_c_compiler(error, monkeypatch, tmp_path):
    def fail(_):
        raise error

    monkeypatch.setattr(torch, "compile", lambda _: fail)
    monkeypatch.setattr(torch, "ones", lambda *_, device: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("ref.embedder.resolve_device", lambda _: CUDA)
    message = r"^--device cuda: needs a C compiler and Python's headers \((Failed to find C compiler|Command.*gcc)"
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(tmp_path)
    source = ModelSource("tiny", "built in", dataclasses.replace(TINY, vocab_size=99))
    monkeypatch.setattr("ref.training.model_source._all_texts", lambda _: ["a river"])
    monkeypatch.setattr("ref.training.model_source._random_model", lambda *_: torch.nn.Identity())
    with pytest.raises(ValueError, match=message):
        build_model(source, TrainConfig(dtype="float32"), None, device=CUDA)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=r"^dtype must be auto, bfloat16 or float32 \(got 'float16'\)$"):
        resolve_dtype("float16", CPU)


def test_the_measured_rate_is_that_of_this_process():
    """tests/conftest.py turns bf16 in hardware off, so that emulation is measured: much slower on any machine."""
    assert 0 < bfloat16_rate() < 0.8


RESIDENT_AFTER_FREEING = """
import sys
import torch
from ref.utils.device import keep_freed_memory
torch.ones(2**20)  # starts threads, whose memory would otherwise lie behind the blocks
if sys.argv[1] != "none":
    keep_freed_memory(torch.device(sys.argv[1]))
blocks = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each
del blocks
status = open("/proc/self/status").read()
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_scripts_keep_freed_memory_on_a_cpu():
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    resident = {name: int(subprocess.run([sys.executable, "-c", RESIDENT_AFTER_FREEING, name], capture_output=True,
                                         text=True, check=True, env=environment).stdout)
                for name in ("none", "cuda", "cpu")}
    assert abs(resident["cuda"] - resident["none"]) < 2**15  # KiB; the blocks have 2**17
    assert resident["cpu"] - resident["none"] > 120 * 2**10


@pytest.fixture
def four_gpus(monkeypatch):
    for name in LOCAL_RANK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def test_ranks_of_a_launcher_that_does_not_number_them_would_share_a_gpu(four_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in (None, "cuda"):
        with pytest.raises(ValueError, match=r"LOCAL_RANK must be set with several processes and 4 visible GPUs"):
            resolve_device(name)
    assert (resolve_device("cpu").type, resolve_device("cuda:2").index) == ("cpu", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees its own
    assert resolve_device().index == 0
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert resolve_device().index == 0


@pytest.mark.parametrize("launcher", LOCAL_RANK)
def test_a_process_without_a_gpu_of_its_own(four_gpus, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "4")
    for name in (None, "cuda"):
        with pytest.raises(ValueError, match=r"LOCAL_RANK must be below the number of visible GPUs \(got 4 of 4\)"):
            resolve_device(name)
    assert resolve_device("cpu").type == "cpu"
