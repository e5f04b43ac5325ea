"""The two shapes of the model benchmarks, the same weights for us and for transformers, and texts of a given length.

    cpu     width 512, 8 layers, 8 heads over 2, feed-forward 1792, fp32
    cuda    Mistral-7B: width 4096, 32 layers, 32 heads over 8, feed-forward 14336, bf16

Weights are random. A text of n tokens is n words of a vocabulary in which every word is a token, so that lengths are
exact for everyone.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import models, pre_tokenizers
from torch import Tensor

from ref.config import Architecture
from ref.model import Mistral
from ref.tokenizer import BEGIN, END, UNKNOWN, TextTokenizer

CPU = Architecture(vocab_size=8000, width=512, layers=8, heads=8, kv_heads=2, head_width=64, ffn_width=1792,
                   dtype="float32")
SEVEN_B = Architecture()
WORDS = 7000  # of the vocabulary; the rest of it stays unused


def architecture(device: torch.device, *, quick: bool) -> Architecture:
    """The shape of a device; with `quick` a small one, on CUDA the true one with two layers of its 32."""
    if device.type == "cuda":
        return replace(SEVEN_B, layers=2) if quick else SEVEN_B
    return replace(CPU, width=64, layers=2, heads=4, head_width=16, ffn_width=224) if quick else CPU


def random_model(arch: Architecture, device: torch.device) -> Mistral:
    """Our model with random weights, frozen."""
    with torch.device("meta"):
        model = Mistral(arch)
    dtype = getattr(torch, arch.dtype)
    draw = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31)
    state = {}
    for name, weight in model.state_dict().items():
        state[name] = torch.ones(weight.shape, device=device, dtype=dtype)
        if weight.ndim == 2:
            state[name].normal_(std=0.02 if "embed" in name else weight.shape[1] ** -0.5, generator=draw)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def tokenizer(arch: Architecture) -> TextTokenizer:
    """A vocabulary of words w0, w1, …, each a token."""
    words = {UNKNOWN: 0, BEGIN: 1, END: 2, **{f"w{n}": n + 3 for n in range(min(WORDS, arch.vocab_size - 3))}}
    words |= {piece: len(words) + n for n, piece in enumerate(("Instruct:", "Query:", "Response:"))}
    library = tokenizers.Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([UNKNOWN, BEGIN, END])
    return TextTokenizer(library)


def transformers_twin(ours: Mistral) -> Any:
    """transformers' MistralModel that shares our weights, attention by SDPA; a text, why not, if it is missing."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed"
    config = transformers.MistralConfig(**{k: v for k, v in ours.arch.to_json().items() if k != "torch_dtype"})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        twin = transformers.MistralModel(config)
    twin.load_state_dict(ours.state_dict(), assign=True)
    device = ours.norm.weight.device
    twin.rotary_emb = type(twin.rotary_emb)(config).to(device)  # its buffers are not in the state
    return twin.eval()


def last_token(twin: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Unit vectors by transformers: padding on the right, the last real token, (B, D) fp32."""
    state = twin(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
    if mask_BT is None:
        return F.normalize(state[:, -1].float(), dim=-1)
    row_B = torch.arange(len(state), device=state.device)
    return F.normalize(state[row_B, mask_BT.sum(1) - 1].float(), dim=-1)


def padded(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and attention mask of lists of different lengths, padded on the right."""
    longest = max(map(len, ids))
    ids_BT = torch.tensor([row + [2] * (longest - len(row)) for row in ids], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    return ids_BT, mask_BT


def text(tokens: int, draw: random.Random) -> str:
    """A text of that many words, so tokens."""
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(tokens))


def mixed_texts(count: int, *, mean: float, cap: int, draw: random.Random) -> list[str]:
    """Texts of lognormal lengths with that mean before the cap, at least 4 tokens."""
    spread = 0.8
    lengths = np.random.default_rng(draw.randrange(2**32)).lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return [text(int(np.clip(length, 4, cap)), draw) for length in lengths]


def by_batch(texts: list[str], size: int) -> Iterator[list[str]]:
    """Texts in their order, `size` at a time."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
