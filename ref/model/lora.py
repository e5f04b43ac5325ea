"""LoRA: a frozen weight W is adapted by the product of two low-rank matrices.

    y = x W^T + (alpha / R) (x A^T) B^T          A: (R, in), random;  B: (out, R), zero

Initially B = 0 and the model equals the frozen one bit for bit. A and B are kept in fp32, because the optimiser's steps
are smaller than bf16 resolves, and multiplied in the dtype of x. `merge_lora` adds (alpha / R) B A to W, after which
the adapter costs nothing. Files in PEFT's format: adapter.py. Source: arXiv 2106.09685, equation 3.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ref.model.transformer import Mistral


class LoRALinear(nn.Linear):
    """A linear layer that shares the frozen weight of `base` and adds a trainable product of rank `rank`."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.weight = base.weight.requires_grad_(False)
        self.register_parameter("bias", None)
        device = base.weight.device
        # drawn on the CPU: draws on a GPU depend on its model, and all ranks must begin with the same weights
        drawn = nn.init.kaiming_uniform_(torch.empty(rank, self.in_features, dtype=torch.float32), a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """W x + (alpha / R) B A x, (T, in_features) -> (T, out_features)."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x  # at 0 it would copy
        down_TR = F.linear(dropped, self.lora_A.to(x.dtype))
        frozen = F.linear(x, self.weight)
        return frozen.addmm_(down_TR, self.lora_B.to(x.dtype).T, alpha=self.alpha / self.rank)

    def delta_weight(self) -> Tensor:
        """(alpha / R) B A in fp32, the shape of the weight."""
        return (self.lora_B @ self.lora_A) * (self.alpha / self.rank)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def apply_lora(model: Mistral, *, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> None:
    """Freeze the model and adapt every linear layer whose name, or last part of the name, is in `target_modules`.

    Raises ValueError for a target that is no layer of the model.
    """
    model.requires_grad_(False)
    linears = linear_layers(model)
    known = {part for name in linears for part in (name, name.rpartition(".")[2])}
    unknown = sorted(set(target_modules) - known)
    if unknown or not target_modules:
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"LoRA target modules must be some of {layers} (got {got})")
    for name, module in linears.items():
        if name in target_modules or name.rpartition(".")[2] in target_modules:
            _replace(model, name, LoRALinear(module, rank=rank, alpha=alpha, dropout=dropout))


def merge_lora(model: Mistral) -> None:
    """Add every adapter's product to its weight (in fp32, rounded once) and restore plain linear layers."""
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() + layer.delta_weight())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        _replace(model, name, plain)


def frozen_base(model: Mistral) -> Mistral:
    """The frozen model without its adapters, sharing the weights."""
    with torch.device("meta"):
        base = Mistral(model.config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    base.load_state_dict(state, assign=True)
    return base


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
