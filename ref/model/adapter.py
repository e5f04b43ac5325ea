"""Adapter folders in PEFT's format, and the chain of bases that an adapter depends on.

adapter_config.json and adapter_model.safetensors, whose tensors are named
`base_model.model.layers.0.self_attn.q_proj.lora_A.weight` (written), or with one more `model.` (PEFT on
MistralForCausalLM; read too). An adapter names its base, a folder or hub id; the base may be an adapter again.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ref.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_model, read_tensors, resolve_checkpoint, shards
from ref.model.declared import check_declared
from ref.model.lora import LoRALinear, apply_lora, linear_layers, lora_layers, merge_lora
from ref.model.transformer import Mistral
from ref.utils.files import check_type, fingerprint, read_json

# What our forward pass computes: for each field of adapter_config.json its default, then other accepted values.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None, True),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "lora_bias": (False, None), "trainable_token_indices": (None,),
    "layer_replication": (None,), "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base
}

# Besides the weights, what a fingerprint is of; the second line and the middle of files only from version 2 on.
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "tokenizer.json")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VERSION_2 = "2-"  # begins a fingerprint; those of version 1 are plain


def load_model_chain(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None, base: str | None = None,
) -> tuple[Mistral, Path]:
    """The model of a checkpoint or adapter folder, adapters merged, and the folder of the model under them.

    `base`: folder or hub id to use instead of the one that the adapter names.
    """
    *adapters, root = chain = adapter_chain(folder, base=base)
    for number, adapter in enumerate(adapters):
        if number or base is None:  # --base is somebody's own choice
            _check_same_base(adapter, chain[number + 1 :])
    for part in chain:
        check_declared(part, is_adapter=part != root)
    model = load_model(root, device=device, dtype=dtype)
    for adapter in reversed(adapters):
        load_adapter(model, adapter)
        merge_lora(model)
    return model, root


def adapter_chain(folder: Path, *, base: str | None = None) -> list[Path]:
    """A checkpoint folder and, for an adapter, the folders of its bases: all that its embeddings depend on."""
    if base is not None and not (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"--base is for adapters, but {folder} has no {ADAPTER_CONFIG}")
    chain = [folder]
    under = adapter_base(folder) if base is None else resolve_checkpoint(base)
    while under is not None:
        if under.resolve() in [part.resolve() for part in chain]:
            raise ValueError(f"{chain[-1] / ADAPTER_CONFIG}: 'base_model_name_or_path' must be the model under the "
                             f"adapter (got {under}, whose base is this adapter)")
        chain.append(under)
        under = adapter_base(under)
    return chain


def _check_same_base(adapter: Path, chain: Sequence[Path]) -> None:
    """Raise ValueError if the result of a run lies on another base than at its training, by the run's run.json."""
    path = adapter.resolve().parent / "run.json"
    stored = read_json(path).get("model_files") if adapter.resolve().name == "adapter" and path.is_file() else None
    if isinstance(stored, str) and model_fingerprint(chain, like=stored) != stored:
        raise ValueError(f"{chain[0]}: must be as when {adapter} was trained on it (got other files than 'model_files' "
                         f"of {path}); restore them, or choose a base with --base of run_eval.py")


def model_fingerprint(chain: Sequence[Path], *, like: str = VERSION_2) -> str:
    """Fingerprint of the weights, configuration and tokenizer of `adapter_chain`'s folders, wherever they lie, of the
    version of the stored one that it will be compared with (`like`).
    """
    is_new = like.startswith(VERSION_2)
    names = MODEL_FILES + (TOKENIZER_FILES if is_new else ())
    digest = fingerprint((path for folder in chain for path in model_files(folder, names)), blocks=64 if is_new else 2)
    return VERSION_2 + digest if is_new else digest


def model_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The weights of a checkpoint or adapter folder and those of `names` that it has, by name."""
    weights = [ADAPTER_WEIGHTS] if (folder / ADAPTER_CONFIG).exists() else shards(folder)
    return [folder / name for name in sorted((*weights, *names)) if (folder / name).exists()]


def adapter_base(folder: Path) -> Path | None:
    """The folder of an adapter's base model; None if the folder holds no adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return None
    config = read_json(path)
    if (revision := config.get("revision")) not in (None, "main"):
        raise ValueError(f"{path}: 'revision' of the base must be null or \"main\" (got {revision!r:.80}); download it "
                         "and give its folder as --base to run_eval.py")
    named = config.get("base_model_name_or_path")
    name = check_type(named, str, f"{path}: 'base_model_name_or_path'", "a folder or hub id")
    beside = (folder / "../base").resolve()
    relative = (folder / name).resolve()
    is_run = (folder / "../run.json").is_file()  # its copy may name the base of another run in the old place
    if name.startswith("../") and relative.is_dir():
        base = relative
    elif Path(name).is_absolute() and Path(name).name == "base" and beside.is_dir() and (
            is_run or not Path(name).is_dir()):
        base = beside
    elif Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"{path}: 'base_model_name_or_path' must be a folder of this machine or a hub id (got "
                         f"{name!r:.200}); write there where the base is now, or give --base to run_eval.py")
    else:
        try:
            base = resolve_checkpoint(name)
        except ValueError as error:
            raise ValueError(f"{path}: 'base_model_name_or_path': {error}; run_eval.py --base names another") from None
    return base


def save_adapter(model: Mistral, folder: Path, *, base: str) -> None:
    """Write the adapters of `model` in PEFT's format; `base` is the folder or hub id they belong to."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    state = {f"base_model.model.{name}.lora_{m}.weight": getattr(layer, f"lora_{m}").detach().cpu().contiguous()
             for name, layer in layers.items() for m in "AB"}
    config = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base, "bias": "none",
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "inference_mode": True,
        "target_modules": sorted(_shortest_targets(model, set(layers))),
    }
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1))


def _shortest_targets(model: Mistral, adapted: set[str]) -> set[str]:
    """Last parts of the names where every layer of that name is adapted, else the full names."""
    linears = linear_layers(model)
    parts = {name.rpartition(".")[2] for name in adapted}
    whole = {part for part in parts if {n for n in linears if n.rpartition(".")[2] == part} <= adapted}
    return whole | {name for name in adapted if name.rpartition(".")[2] not in whole}


def load_adapter(model: Mistral, folder: Path) -> None:
    """Apply the adapter of a folder in PEFT's format, with its weights.

    Raises ValueError for an unsupported LoRA variant, and for a missing, unexpected or misshapen tensor, by name.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    rank, alpha, dropout = _plain_lora(config, folder / ADAPTER_CONFIG)
    targeted = _targeted_layers(model, config, folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder}: has no {ADAPTER_WEIGHTS} (pickles such as adapter_model.bin are not read)")
    state = _read_lora_tensors(path, model.norm.weight.device)
    found = {name.rpartition(".")[0] for name in state}
    unknown, missing = sorted(found - linear_layers(model).keys()), sorted(targeted - found)
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is no linear layer of the model; use the adapter's own base")
    if missing:
        raise ValueError(f"{path}: {missing[0]} has neither lora_A nor lora_B, but {ADAPTER_CONFIG} targets it")
    for name, tensor in state.items():  # before anything of that size is allocated
        if tensor.ndim != 2 or tensor.shape[0 if name.endswith("A") else 1] != rank:
            raise ValueError(f"{path}: {name} must be of rank {rank} by {ADAPTER_CONFIG} "
                             f"(got shape {tuple(tensor.shape)})")
    apply_lora(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=sorted(found))
    _fill(lora_layers(model), state, path)


def _read_lora_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """LAYER.lora_A and LAYER.lora_B in fp32 by the model's layer names."""
    state: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(path, device=device):
        match = re.fullmatch(r"base_model\.model\.(?:model\.)?(.+)\.(lora_[AB])\.weight", stored)
        if match is None and ("embed_tokens" in stored or "lm_head" in stored):
            raise ValueError(f"{path}: contains a trained embedding ({stored:.80}), which is not supported: merge the "
                             "adapter with PEFT (merge_and_unload) and save the whole model")
        if match is None:
            raise ValueError(f"{path}: tensor {stored!r:.120} must be named base_model.model.….lora_A.weight or lora_B")
        if match[1] == "lm_head":  # as the head itself: an embedding does not pass through it
            continue
        state[".".join(match.groups())] = tensor.float()
    return state


def _fill(layers: dict[str, LoRALinear], state: dict[str, Tensor], path: Path) -> None:
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            parameter, found = getattr(layer, matrix), state.get(f"{name}.{matrix}")
            if found is None:
                raise ValueError(f"{path}: {name}.{matrix} is missing")
            if found.shape != parameter.shape:
                raise ValueError(f"{path}: {name}.{matrix} must have shape {tuple(parameter.shape)} "
                                 f"(got {tuple(found.shape)}); use the adapter's own base")
            with torch.no_grad():
                parameter.copy_(found)


def _targeted_layers(model: Mistral, config: dict[str, Any], path: Path) -> set[str]:
    """The linear layers that target_modules selects, by PEFT's rules: a regular expression, or names and suffixes.

    Empty where PEFT narrows the selection by layers_to_transform or exclude_modules: then the weights decide.
    """
    targets = config.get("target_modules") or []
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    if isinstance(targets, str):
        try:
            pattern = re.compile(".*" if targets == "all-linear" else f"(?:{targets})")
        except re.error as error:
            raise ValueError(f"{path}: 'target_modules' must be a list of names or a regular expression "
                             f"(got {targets!r:.80}: {error})") from None
        return {name for name in linear_layers(model) if pattern.fullmatch(name) or pattern.fullmatch(f"model.{name}")}
    for target in check_type(targets, list, f"{path}: 'target_modules'", "a list of names"):
        check_type(target, str, f"{path}: 'target_modules'", "a list of names")
    return {name for name in linear_layers(model) for target in targets if f".model.{name}".endswith(f".{target}")}


def _plain_lora(config: dict[str, Any], path: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of an adapter config; ValueError for a variant our forward pass does not compute."""
    for key, plain in PLAIN_LORA.items():
        if config.get(key, plain[0]) not in plain:
            raise ValueError(f"{path}: {key!r} must be {plain[0]!r} (got {config[key]!r:.80}); only plain LoRA is "
                             "supported: merge the adapter with PEFT")
    rank = check_type(config.get("r"), int, f"{path}: 'r'", "an integer >= 1")
    alpha = check_type(config.get("lora_alpha"), (int, float), f"{path}: 'lora_alpha'", "a number")
    dropout = check_type(config.get("lora_dropout", 0.0), (int, float), f"{path}: 'lora_dropout'", "a number in [0, 1)")
    if rank < 1 or not 0 <= dropout < 1 or not math.isfinite(alpha):
        raise ValueError(f"{path}: 'r' must be >= 1, 'lora_alpha' finite and 'lora_dropout' in [0, 1) "
                         f"(got {rank}, {alpha}, {dropout})")
    if config.get("use_rslora"):  # alpha / sqrt(R) instead of alpha / R; arXiv 2312.03732
        alpha *= math.sqrt(rank)
    return rank, float(alpha), float(dropout)
