"""LoRA: a frozen weight W learns through a product of two thin matrices.

    y = x W^T + (alpha / R) (x A^T) B^T          A: (R, in), random;  B: (out, R), zero

At the start B = 0 and the model is bit for bit the frozen one. A and B are kept in fp32 (they are what the
optimiser moves, in steps that bf16 would swallow) and multiplied in the dtype of x. `merge` adds
(alpha / R) B A to W, after which the adapter costs nothing.

Adapter files are PEFT's: adapter_config.json and adapter_model.safetensors with the names
`base_model.model.layers.0.self_attn.q_proj.lora_A.weight` (written), or with one more `model.` (read too).
Called by embedder.py, runs.py and export.py. Source: arXiv 2106.09685, section 4.1.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ref.checkpoint import read_tensors
from ref.config import checked, read_json
from ref.model import Mistral

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoRALinear(nn.Linear):
    """A linear layer that shares `base`'s weight, frozen, and adds a trainable product of rank `rank`."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.weight = base.weight.requires_grad_(False)
        self.register_parameter("bias", None)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x_TD: Tensor) -> Tensor:
        dropped_TD = F.dropout(x_TD, self.dropout, self.training) if self.dropout else x_TD  # at 0 it would be a copy
        down_TR = F.linear(dropped_TD, self.lora_A.to(x_TD.dtype))
        plain_TF = F.linear(x_TD, self.weight)  # the product of the thin matrices is added to it where it lies
        return plain_TF.addmm_(down_TR, self.lora_B.to(x_TD.dtype).T, alpha=self.alpha / self.rank)

    def product(self) -> Tensor:
        """(alpha / R) B A, fp32, the shape of the weight."""
        return (self.lora_B @ self.lora_A) * (self.alpha / self.rank)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that an adapter can sit on, by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: Mistral, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    """Freeze the model and put an adapter on every linear layer whose name, or name's last part, is in `targets`.

    Raises ValueError for a target that no layer bears.
    """
    model.requires_grad_(False)
    linears = linear_layers(model)
    known = {part for name in linears for part in (name, name.rpartition(".")[2])}
    unknown = sorted(set(targets) - known)
    if unknown or not targets:
        last_parts = sorted({name.rpartition(".")[2] for name in linears})
        what = f"target {unknown[0]} is no layer of the model" if unknown else "target list is empty"
        raise ValueError(f"LoRA {what}. Expected are some of {', '.join(last_parts)}.")
    for name, module in linears.items():
        if name in targets or name.rpartition(".")[2] in targets:
            _replace(model, name, LoRALinear(module, rank=rank, alpha=alpha, dropout=dropout))


def merge(model: Mistral) -> None:
    """Fold every adapter into its weight (in fp32, rounded once) and put plain linear layers back."""
    for name, layer in adapters(model).items():
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() + layer.product())
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = layer.weight
        _replace(model, name, plain)


def unmerge(model: Mistral, layers: dict[str, LoRALinear]) -> None:
    """Undo `merge`: subtract the products of `layers` (adapters(model) before merging) and put them back.

    Exact up to the rounding of the weights' dtype.
    """
    for name, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() - layer.product())
        _replace(model, name, layer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def save_adapter(model: Mistral, folder: Path, *, base: str) -> None:
    """Write the adapters of `model` as PEFT does; `base` is the folder or hub id they belong to."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    state = {f"base_model.model.{name}.lora_{m}.weight": getattr(layer, f"lora_{m}").detach().cpu().contiguous()
             for name, layer in layers.items() for m in "AB"}
    config = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base, "bias": "none",
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "inference_mode": True,
        "target_modules": sorted(_shortest_targets(model, set(layers))),
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def _shortest_targets(model: Mistral, adapted: set[str]) -> set[str]:
    """Last parts of the names where every layer of that name is adapted, else the full names."""
    linears = linear_layers(model)
    parts = {name.rpartition(".")[2] for name in adapted}
    whole = {part for part in parts if {n for n in linears if n.rpartition(".")[2] == part} <= adapted}
    return whole | {name for name in adapted if name.rpartition(".")[2] not in whole}


def load_adapter(model: Mistral, folder: Path) -> None:
    """Attach the adapter that a folder holds in PEFT's format, with its weights.

    Raises ValueError for a variant of LoRA that is not plain, and for a missing, unexpected or misshapen
    tensor, by name.
    """
    config = read_json(folder / CONFIG)
    rank, alpha, dropout = _plain_lora(config, folder / CONFIG)
    asked = _asked_for(model, config, folder / CONFIG)
    state: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(folder / WEIGHTS, device=model.norm.weight.device):
        match = re.fullmatch(r"base_model\.model\.(?:model\.)?(.+)\.(lora_[AB])\.weight", stored)
        if match is None:
            raise ValueError(f"{folder / WEIGHTS}: tensor {stored!r:.120} is no LoRA matrix. Expected are "
                             "base_model.model.….lora_A.weight and lora_B. Save the adapter with PEFT or with us.")
        state[".".join(match.groups())] = tensor.float()
    found = {name.rpartition(".")[0] for name in state}
    unknown, missing = sorted(found - linear_layers(model).keys()), sorted(asked - found)
    if unknown or missing:
        raise ValueError(f"{folder / WEIGHTS}: {unknown[0]} is no linear layer of the model. "
                         "Use the adapter with the model it was trained on." if unknown else
                         f"{folder / WEIGHTS}: {missing[0]} has neither lora_A nor lora_B. Expected are both, by "
                         f"target_modules in {CONFIG}. Fetch or save the adapter again.")
    for stored, tensor in state.items():  # before anything of that size is made
        if tensor.ndim != 2 or tensor.shape[0 if stored.endswith("A") else 1] != rank:
            raise ValueError(f"{folder / WEIGHTS}: {stored} is of shape {tuple(tensor.shape)}. Expected is rank {rank} "
                             f"by {CONFIG}. Use the adapter with the model it was trained on.")
    attach(model, rank=rank, alpha=alpha, dropout=dropout, targets=sorted(found))
    _fill(adapters(model), state, folder / WEIGHTS)


def _fill(layers: dict[str, LoRALinear], state: dict[str, Tensor], path: Path) -> None:
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            parameter = getattr(layer, matrix)
            found = state.get(f"{name}.{matrix}")
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(f"{path}: {name}.{matrix} is {shape}. Expected is {tuple(parameter.shape)}: rank by "
                                 "its config, width by the model. Use the adapter with the model it was trained on.")
            with torch.no_grad():
                parameter.copy_(found)


def _asked_for(model: Mistral, config: dict[str, Any], path: Path) -> set[str]:
    """The linear layers that target_modules names, as PEFT reads it: a regular expression, or names and their ends.

    Empty where PEFT narrows the choice by layers_to_transform or exclude_modules: then the file alone says.
    """
    targets = config.get("target_modules") or []
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    if isinstance(targets, str):
        try:
            pattern = re.compile(".*" if targets == "all-linear" else f"(?:{targets})")
        except re.error as error:
            raise ValueError(f"{path}: target_modules is {targets!r:.80}, no regular expression ({error}). Expected "
                             "are names of layers or a regular expression. Correct it there.") from None
        return {name for name in linear_layers(model) if pattern.fullmatch(name) or pattern.fullmatch(f"model.{name}")}
    for target in checked(targets, list, f"{path}: target_modules", "a list of names"):
        checked(target, str, f"{path}: target_modules", "a list of names")
    return {name for name in linear_layers(model) for target in targets if f".model.{name}".endswith(f".{target}")}


def _plain_lora(config: dict[str, Any], path: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of an adapter config; ValueError for what our forward pass does not compute."""
    defaults: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None),
        "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None), "lora_bias": (False, None), "trainable_token_indices": (None,),
        "layer_replication": (None,), "alora_invocation_tokens": (None,),
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base
    }
    for key, plain in defaults.items():
        if config.get(key, plain[0]) not in plain:
            raise ValueError(f"{path}: {key} is {config[key]!r:.80}. Expected is {plain[0]!r}: only plain LoRA is "
                             "computed. Merge that adapter with PEFT and load the merged model.")
    rank = checked(config.get("r"), int, f"{path}: r", "a whole number of at least 1")
    alpha = checked(config.get("lora_alpha"), (int, float), f"{path}: lora_alpha", "a number")
    dropout = checked(config.get("lora_dropout", 0.0), (int, float), f"{path}: lora_dropout", "a number from 0 to 1")
    if rank < 1 or not 0 <= dropout < 1 or not math.isfinite(alpha):
        raise ValueError(f"{path}: r {rank}, lora_alpha {alpha}, lora_dropout {dropout}. Expected are r >= 1, a "
                         "finite alpha, a dropout from 0 to below 1. Correct it there.")
    return rank, float(alpha), float(dropout)
