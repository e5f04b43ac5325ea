"""--mini-batch-tokens auto: as many tokens per forward and backward pass as the device has memory for.

    tokens = share x (free memory - gradients and AdamW's moments) / bytes that one token keeps for backward

rounded down to three significant bits. The bytes per token are measured on the model itself, so that they account for
its width, depth, adapters, dtype and gradient checkpointing. The number changes rounding, and how often the model runs,
but without LoRA dropout not the gradient (grad_cache.py).
"""

import os
from contextlib import suppress
from pathlib import Path

import torch

from ref.model.packing import PackedBatch, pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.training.run_dir import trainable_parameters
from ref.utils.device import Backend

PROBE_TOKENS = {"cpu": 128, "cuda": 1024}
SHARE = {"cpu": 0.25, "cuda": 0.8}  # of the free memory; a CPU's is shared with everything else on the machine
LEAST = 256  # tokens


def auto_mini_batch_tokens(model: Mistral, backend: Backend) -> tuple[int, str]:
    """Tokens per forward and backward pass, at least 256, and how they were computed."""
    device = model.norm.weight.device
    free, each = free_bytes(device), bytes_per_token(model, backend)
    optimiser = 3 * sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())
    room = SHARE[device.type] * (free - optimiser)
    tokens = max(LEAST, _round_down(int(max(1, room / each))))
    return tokens, (f"{each / 1e6:.2f} MB per token, {free / 1e9:.1f} GB free"
                    + ("; may be too many: add --gradient-checkpointing" if tokens * each > room else ""))


def _round_down(tokens: int) -> int:
    """To 4, 5, 6 or 7 times a power of two: a little more or less free memory gives the same number."""
    step = 2 ** max(0, tokens.bit_length() - 3)
    return tokens // step * step


def bytes_per_token(model: Mistral, backend: Backend) -> float:
    """Memory that a token of a mini-batch needs: on CUDA the peak of both passes, else what is kept for backward."""
    device = model.norm.weight.device
    count = PROBE_TOKENS[device.type]
    batch = pack_sequences([[0] * 128] * (count // 128), device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return (_peak if device.type == "cuda" else _kept)(model, batch, backend) / count


def _kept(model: Mistral, batch: PackedBatch, backend: Backend) -> int:
    """Bytes of all tensors that autograd keeps in a forward pass, weights excluded, each memory counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embedding_BD = embed(model, batch, backend=backend)  # lives until the end: no memory is counted twice
    del embedding_BD
    return sum(kept.values())


def _peak(model: Mistral, batch: PackedBatch, backend: Backend) -> int:
    """Bytes that a forward and backward pass allocates at its peak, on CUDA."""
    for _ in range(2):  # the first compiles
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.enable_grad():
            embed(model, batch, backend=backend).sum().backward()
        peak = torch.cuda.max_memory_allocated()
        model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return peak - before


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; of a CPU what the machine and this process's container have, per local process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free too
        return torch.cuda.mem_get_info(device)[0]
    sizes = [_machine_bytes(), *_container_bytes()]
    # without torchrun's LOCAL_WORLD_SIZE as if all processes ran here
    return min(sizes) // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def _machine_bytes() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: half of all memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_bytes(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each cgroup above this process leaves, of version 2 or 1; its cache of files counts as free."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return []
    sizes = []
    for _, controllers, path in lines:
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        group = root / ("memory" if version_1 else "") / path.lstrip("/")
        files = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
        cache = "total_inactive_file" if version_1 else "inactive_file"
        for folder in (group, *group.parents):
            with suppress(OSError, KeyError, ValueError):  # no limit here: the file is missing, or says max
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in files)
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())[cache]
                sizes.append(max(0, limit - used + int(cached)))
    return sizes
