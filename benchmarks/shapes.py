"""Model configurations, weights, tokenizer and texts of the model benchmarks.

    cpu     hidden size 512, 8 layers, 8 heads over 2, intermediate size 1792, fp32
    cuda    Mistral-7B: hidden size 4096, 32 layers, 32 heads over 8, intermediate size 14336, bf16

Weights are random, and transformers' model shares ours. In the vocabulary every word is one token, so a text of n words
has exactly n tokens for every library.
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

from ref.config import ModelConfig
from ref.model.transformer import Mistral
from ref.text.tokenizer import BOS, EOS, UNK, Tokenizer

CPU = ModelConfig(vocab_size=8000, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64,
                  intermediate_size=1792, dtype="float32")
MISTRAL_7B = ModelConfig()
NUM_WORDS = 7000  # of the vocabulary; its other ids are unused


def model_config(device: torch.device, *, quick: bool) -> ModelConfig:
    """The configuration for a device; with `quick` a small one, on CUDA the 7B model with 2 of its 32 layers."""
    if device.type == "cuda":
        return replace(MISTRAL_7B, num_layers=2) if quick else MISTRAL_7B
    small = replace(CPU, hidden_size=64, num_layers=2, num_heads=4, head_dim=16, intermediate_size=224)
    return small if quick else CPU


def random_model(config: ModelConfig, device: torch.device) -> Mistral:
    """Our model with random weights, frozen."""
    with torch.device("meta"):
        model = Mistral(config)
    dtype = getattr(torch, config.dtype)
    generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31)
    state = {}
    for name, weight in model.state_dict().items():
        state[name] = torch.ones(weight.shape, device=device, dtype=dtype)
        if weight.ndim == 2:
            state[name].normal_(std=0.02 if "embed" in name else weight.shape[1] ** -0.5, generator=generator)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def word_tokenizer(config: ModelConfig) -> Tokenizer:
    """A vocabulary of the words w0, w1, …, one token each."""
    words = {UNK: 0, BOS: 1, EOS: 2, **{f"w{n}": n + 3 for n in range(min(NUM_WORDS, config.vocab_size - 3))}}
    words |= {piece: len(words) + n for n, piece in enumerate(("Instruct:", "Query:", "Response:"))}
    library = tokenizers.Tokenizer(models.WordLevel(words, unk_token=UNK))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([UNK, BOS, EOS])
    return Tokenizer(library)


def transformers_model(ours: Mistral) -> Any:
    """transformers' model on our weights (shared), attention by SDPA; a string if it is not installed."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed"
    kind = ours.config.model_type.capitalize()  # Mistral or Llama
    values = {k: v for k, v in ours.config.to_json().items() if k != "torch_dtype"}
    config = getattr(transformers, f"{kind}Config")(**values)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    model.load_state_dict(ours.state_dict(), assign=True)
    device = ours.norm.weight.device
    model.rotary_emb = type(model.rotary_emb)(config).to(device)  # its buffers are not in the state
    return model.eval()


def transformers_embed(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Embeddings by transformers, (B, D) fp32: padding on the right, last-token pooling, unit length."""
    state = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    if attention_mask is None:
        return F.normalize(state[:, -1].float(), dim=-1)
    row_B = torch.arange(len(state), device=state.device)
    return F.normalize(state[row_B, attention_mask.sum(1) - 1].float(), dim=-1)


def pad(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask of texts of different lengths, padded on the right to the longest."""
    longest = max(map(len, ids))
    input_ids = torch.tensor([row + [2] * (longest - len(row)) for row in ids], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    return input_ids, attention_mask


def random_text(num_tokens: int, draw: random.Random) -> str:
    """A text of `num_tokens` words, hence tokens."""
    return " ".join(f"w{draw.randrange(NUM_WORDS)}" for _ in range(num_tokens))


def mixed_texts(count: int, *, mean: float, cap: int, draw: random.Random) -> list[str]:
    """Texts of lognormal lengths: `mean` tokens before they are cut to `cap`, at least 4."""
    sigma = 0.8
    lengths = np.random.default_rng(draw.randrange(2**32)).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [random_text(int(np.clip(length, 4, cap)), draw) for length in lengths]


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    """Texts in the given order, `size` at a time."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
