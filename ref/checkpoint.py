"""Checkpoints: a folder or a hub id of safetensors <-> a model, tensor by tensor, strictly.

The model is built without memory (meta device) and each tensor goes straight from the file to its device and
dtype, so that beyond the model itself the host holds at most one shard. Nothing but JSON and safetensors is
ever read: a pickle can run code.

    names in the file            names in the model
    layers.0.mlp.up_proj.weight          the same            MistralModel
    model.layers.0.mlp.up_proj.weight    without "model."    MistralForCausalLM
    lm_head.weight                       skipped             an embedder predicts no words

Called by embedder.py, lora.py, runs.py, export.py and labelling/.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ref.config import DTYPES, Architecture, read_json
from ref.model import Mistral

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ["config.json", "tokenizer.json", "embedder.json", INDEX, "adapter_config.json", "adapter_model.safetensors"]


def locate(name: str) -> Path:
    """The folder of a checkpoint: `name` itself if it is one, else the hub repository of that id, downloaded.

    Only the index, the files it names and the small files beside them are fetched. Raises ValueError if it is
    neither, or with what to do when the hub refuses (network, licence, token).
    """
    if name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"model {name!r} is no folder and no hub id. Expected is a folder with config.json, "
                         "or OWNER/NAME.")
    return _download(name)


def _download(repository: str) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    refused = f"{repository} could not be fetched from the hub"
    try:
        folder = Path(snapshot_download(repository, allow_patterns=BESIDE))
        if (folder / "adapter_config.json").exists():
            return folder
        return Path(snapshot_download(repository, allow_patterns=[*BESIDE, *shards(folder, must_exist=False)]))
    except hub.GatedRepoError:
        raise ValueError(f"{refused}: its licence must be accepted first. Accept it on the model's page, then set "
                         "HF_TOKEN to a token of that account (or run `hf auth login`).") from None
    except hub.RepositoryNotFoundError:
        raise ValueError(f"{refused}: it does not exist or is private. Check the id; "
                         "for a private one set HF_TOKEN.") from None
    except (hub.HTTPError, OSError) as error:  # refusals of the hub, of the proxy, of the network, no local copy
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{refused}: {reason:.200} Check the network, HF_HUB_OFFLINE and HF_TOKEN, "
                         "or give a folder that holds the model.") from None


def shards(folder: Path, *, must_exist: bool = True) -> list[str]:
    """Names of the weight files: those that the index names, else the single one.

    Raises ValueError if a name leaves the folder, a file is missing, or there are only pickles.
    """
    names = _index_names(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and must_exist:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f" It holds pickles ({', '.join(pickles[:3])}), which can run code and are never read." if pickles else ""
        raise ValueError(f"{folder}: {missing[0]} is missing.{why} Expected are {', '.join(names[:4])}. "
                         "Fetch the checkpoint again, as safetensors.")
    return names


def _index_names(path: Path) -> list[str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is missing or empty. Expected is an object of tensor name to file name.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{path}: tensor {tensor!r:.80} is said to be in {name!r:.80}. Expected is the name of a "
                             ".safetensors file in the same folder. Fetch the index again.")
    return sorted(set(weight_map.values()))


def read_tensors(path: Path, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file with its name, one at a time; on a CPU a view of the mapped file: copy it.

    Raises ValueError that names the file if it is truncated, mislabelled or malformed.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}). Fetch or write it again.") from None


def model_name(stored: str) -> str | None:
    """The model's name for a stored tensor; None for those an embedder does not have."""
    if stored == "lm_head.weight" or stored.endswith("rotary_emb.inv_freq"):
        return None
    return stored.removeprefix("model.")


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> Mistral:
    """The model of a checkpoint folder on `device` in `dtype` (None: the one that config.json names).

    Raises ValueError that names the tensor if one is missing, unexpected, misshapen or not floating point.
    """
    arch = Architecture.from_file(folder / "config.json")
    with torch.device("meta"):
        model = Mistral(arch)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for shard in shards(folder):
        for stored, tensor in read_tensors(folder / shard, device=device):
            name = model_name(stored)
            if name is None:
                continue
            _check_tensor(folder / shard, stored, tensor, expected.get(name), seen=name in state)
            state[name] = tensor.to(dtype=dtype or DTYPES[arch.dtype], copy=True)
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}. Expected are all "
                         f"{len(expected)} of config.json's {arch.layers} layers. Fetch the checkpoint again.")
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _check_tensor(path: Path, stored: str, tensor: Tensor, shape: tuple[int, ...] | None, *, seen: bool) -> None:
    if shape is None or seen:
        raise ValueError(f"{path}: tensor {stored} is {'there twice' if seen else 'unexpected'}. Expected are the "
                         "tensors of a plain MistralModel or MistralForCausalLM. Choose another checkpoint.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: tensor {stored} has shape {tuple(tensor.shape)}. Expected is {shape}, by "
                         "config.json. Fetch config.json and weights from one place.")
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(f"{path}: tensor {stored} is {tensor.dtype}. Expected is float32, float16 or bfloat16. "
                         "Choose a checkpoint that is not quantised.")


def save_model(model: Mistral, folder: Path, *, dtype: torch.dtype, shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights (adapters must be merged before) as transformers' MistralModel reads them.

    An older checkpoint's index or single file in that folder is removed: it would be read instead.
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
    config = {**model.arch.to_json(), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
