"""Checkpoints: safetensors in a folder or on the hub <-> a model, tensor by tensor, strictly.

The model is built on the meta device and each tensor goes from the file to its device and dtype, so that besides the
model the host holds at most one shard. Only JSON and safetensors are read: a pickle can execute code.

    name in the file                     name in the model
    layers.0.mlp.up_proj.weight          the same            MistralModel, LlamaModel
    model.layers.0.mlp.up_proj.weight    without "model."    MistralForCausalLM, LlamaForCausalLM
    lm_head.weight                       skipped             an embedder predicts no tokens; some exports store tied
                                                             embeddings under this name alone, then embed_tokens.weight
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ref.config import ModelConfig
from ref.model.transformer import Mistral
from ref.utils.device import DTYPES
from ref.utils.files import read_json

HUB_ID = r"(?!\.)[\w.-]+/[\w.-]+"  # OWNER/NAME
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "embedder.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
               "config_sentence_transformers.json", "llm2vec_config.json", "README.md", INDEX, ADAPTER_CONFIG,
               ADAPTER_WEIGHTS]


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint or adapter: a folder, the model in a run folder, or a hub id (downloaded).

    Of a hub repository only the small files and, with `weights`, the files that `shards` names are fetched. Raises
    ValueError if `name` is none of these, if a run has no model yet, or with the reason why the hub refuses.
    """
    if name and os.path.isdir(name):  # False for a name that is too long for a path
        return _model_in_run(Path(name))
    is_file = os.path.exists(name)
    if is_file or not re.fullmatch(HUB_ID, name):
        raise ValueError("model must be a folder with config.json or a hub id OWNER/NAME "
                         f"(got {name!r:.200}, {'which is a file' if is_file else 'no such folder'})")
    return _download(name, weights=weights)


def _model_in_run(folder: Path) -> Path:
    """model/ or adapter/ of a run folder; any other folder itself."""
    if not (folder / "run.json").exists() or any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        return folder
    for name in ("model", "adapter"):
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"{folder}: the run has no model yet; continue it: run_train.py --resume --output {folder}")


def _download(repository: str, *, weights: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    here = ", and is no local folder" if Path(repository).parent.is_dir() else ""
    try:
        folder = Path(snapshot_download(repository, allow_patterns=SMALL_FILES))
        if (folder / ADAPTER_CONFIG).exists() or not weights:
            return folder
        folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, SINGLE]))
        if (names := shards(folder, must_exist=False)) != [SINGLE]:
            folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, *names]))
        return folder
    except hub.GatedRepoError:
        raise ValueError(f"{repository}: the model is gated; accept its licence on the hub and set HF_TOKEN "
                         "(or run `hf auth login`)") from None
    except hub.RepositoryNotFoundError:
        raise ValueError(f"{repository}: does not exist on the hub, or is private{here}; for a private one set "
                         "HF_TOKEN") from None
    except (hub.HTTPError, OSError) as error:  # the hub, a proxy, the network, no local copy
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{repository}: cannot be downloaded ({reason:.200}){here}; check the network, "
                         "HF_HUB_OFFLINE, HF_TOKEN and the cache folder HF_HOME, or give a local folder") from None


def shards(folder: Path, *, must_exist: bool = True) -> list[str]:
    """Names of the weight files: the single one, as transformers prefers it, else those in the index.

    Raises ValueError if a name points outside the folder, a file is missing, or there are only pickles.
    """
    is_single = (folder / SINGLE).exists() or not (folder / INDEX).exists()
    names = [SINGLE] if is_single else _index_names(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and must_exist:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f"; pickles can execute code and are not read ({', '.join(pickles[:3])})" if pickles else ""
        raise ValueError(f"{folder}: {missing[0]} is missing{why}; the weights must be safetensors")
    return names


def _index_names(path: Path) -> list[str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: 'weight_map' must be an object of tensor name to file name (got {weight_map!r:.60})")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{path}: the file of tensor {tensor!r:.80} must be a .safetensors file in the same "
                             f"folder (got {name!r:.80})")
    return sorted(set(weight_map.values()))


def read_tensors(path: Path, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a safetensors file; on a CPU a view of the mapped file, which the caller copies.

    Raises ValueError that names the file if it is truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None


def model_name(stored: str) -> str | None:
    """The model's name for a stored tensor; None for those that an embedder does not have."""
    if stored == HEAD or stored.endswith("rotary_emb.inv_freq"):
        return None
    return stored.removeprefix("model.")


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> Mistral:
    """The model of a checkpoint folder on `device` in `dtype` (None: the one in config.json).

    Raises ValueError that names a tensor that is missing, unexpected, misshapen or not floating point.
    """
    config = ModelConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = Mistral(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    read = partial(_read_state, folder, expected=expected, device=device, dtype=dtype or DTYPES[config.dtype])
    state = read(model_name)
    if EMBEDDING not in state and read_json(folder / "config.json").get("tie_word_embeddings") is True:
        state |= read({HEAD: EMBEDDING}.get)
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _read_state(
    folder: Path, name_of: Callable[[str], str | None], *, expected: dict[str, tuple[int, ...]], device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The stored tensors that `name_of` gives a name in the model, checked."""
    state: dict[str, Tensor] = {}
    for shard in shards(folder):
        for stored, tensor in read_tensors(folder / shard, device=device):
            name = name_of(stored)
            if name is None:
                continue
            _check_tensor(folder / shard, stored, tensor, expected.get(name), seen=name in state)
            state[name] = tensor.to(dtype=dtype, copy=True)
    return state


def _check_tensor(path: Path, stored: str, tensor: Tensor, shape: tuple[int, ...] | None, *, seen: bool) -> None:
    if seen:
        raise ValueError(f"{path}: tensor {stored} is stored twice")
    if shape is None:
        raise ValueError(f"{path}: tensor {stored} is not part of a plain Mistral or Llama model")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: tensor {stored} must have shape {shape} by config.json (got {tuple(tensor.shape)})")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{path}: tensor {stored} must be float32, float16 or bfloat16 (got {tensor.dtype}); "
                         "quantised checkpoints are not supported")


def save_model(model: Mistral, folder: Path, *, dtype: torch.dtype, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights as transformers' MistralModel or LlamaModel reads them; adapters are merged.

    The index or single file of an older checkpoint in that folder is removed: it would be read instead.
    """
    for name in (INDEX, SINGLE):
        (folder / name).unlink(missing_ok=True)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > shard_bytes:
            parts.append({})
        parts[-1][name] = tensor
    files = [SINGLE] if len(parts) == 1 else [
        f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    config = {**model.config.to_json(), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
