"""Mistral: token ids to hidden states. RMSNorm, grouped-query attention, SwiGLU, and the block that combines them.

    h = x + Attention(RMSNorm(x))          y = h + SwiGLU(RMSNorm(h))          num_layers times

Llama without biases and with default RoPE (SmolLM2, TinyLlama, Llama 2) has the same forward pass, without a window.
Module attributes are named as the checkpoint's tensors, so that loading is one strict load_state_dict. Two computations
an embedder does not need are skipped:

- The last block computes keys and values of all tokens, everything else only for the last token of each text, which is
  the one that is pooled.
- A prefix that all texts share (instruction, in-context examples) is computed once: `prefix_key_values` returns its
  keys and values, and `forward` lets every text attend to them. Its gradient is the sum over the texts (grad_cache.py).

A function under `@fused_by(Fused)` is the plain form; a call runs `Fused` instead, which keeps less for backward.

Source: Mistral 7B, arXiv 2310.06825; RMSNorm, arXiv 1910.07467, equation 4; SwiGLU, arXiv 2002.05202, equation 6.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ref.config import ModelConfig
from ref.model.attention import AttentionMask, KeyValue, attention, attention_mask
from ref.model.compiled_block import compiled_block
from ref.model.fused import RMSNormFunction, SwiGLUFunction
from ref.model.packing import PackedBatch
from ref.model.rope import apply_rotary, rotary_cos_sin
from ref.utils.fused_by import fused_by


@fused_by(RMSNormFunction)
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean in fp32, because bf16 loses digits of the sum."""
    x32_TD = x_TD.float()
    normed_TD = x32_TD * torch.rsqrt(x32_TD.square().mean(-1, keepdim=True) + eps)
    return normed_TD.to(x_TD.dtype) * weight_D.to(x_TD.dtype)


@fused_by(SwiGLUFunction)
def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x sigmoid(x)."""
    return F.silu(gate_TI) * up_TI


class RMSNorm(nn.Module):
    """RMS normalisation with a learned weight per channel."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, prefix: KeyValue | None = None,
    ) -> Tensor:
        """Attention output (N, D) at the query positions of `mask`, over the keys of all tokens and of the prefix."""
        cos_TJ, sin_TJ = rotary
        q_NHK = self.query(mask.queries(x_TD), (mask.queries(cos_TJ), mask.queries(sin_TJ)))
        k_TGK, v_TGK = self.key_value(x_TD, rotary)
        return self.o_proj(attention(q_NHK, k_TGK, v_TGK, mask, prefix).flatten(-2))

    def query(self, x_ND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (N, H, K)."""
        return apply_rotary(self.q_proj(x_ND).unflatten(-1, (-1, self.head_dim)), *rotary)

    def key_value(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """Rotated keys and values, (T, G, K) each."""
        k_TGK, v_TGK = (f(x_TD).unflatten(-1, (-1, self.head_dim)) for f in (self.k_proj, self.v_proj))
        return apply_rotary(k_TGK, *rotary), v_TGK


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (T, D) -> (T, I) -> (T, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Block(nn.Module):
    """One layer: attention and SwiGLU, each applied to normalised states and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, prefix: KeyValue | None = None,
    ) -> Tensor:
        """The next hidden states (N, D) at the query positions of `mask`."""
        h_ND = mask.queries(x_TD) + self.self_attn(self.input_layernorm(x_TD), rotary, mask, prefix)
        return h_ND + self.mlp(self.post_attention_layernorm(h_ND))

    def key_value(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """This layer's rotated keys and values, (T, G, K) each."""
        return self.self_attn.key_value(self.input_layernorm(x_TD), rotary)


class Mistral(nn.Module):
    """The transformer without a language-model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False  # keep only the inputs of blocks and recompute them in backward
        self.compile_on_cpu = False  # in training; on CUDA blocks are always compiled

    def forward(
        self, batch: PackedBatch, *, prefix: Sequence[KeyValue] | None = None, every_token: bool = False,
    ) -> Tensor:
        """Hidden states before the final norm: (B, D) of each text's last token, or (T, D) with `every_token`.

        `prefix`: keys and values of the shared prefix, one pair for each layer, of `batch.prefix_length` tokens. The
        final norm is part of the pooling (pooling.py), which fuses it.
        """
        x_TD = self.embed_tokens(batch.input_ids_T)
        rotary = self._rotary(batch)
        build_mask = partial(attention_mask, batch, self.config.sliding_window, use_softmax=self._use_softmax)
        mask = build_mask()
        last_mask = mask if every_token else build_mask(last_token_only=True)
        *all_but_last, last = self._blocks()
        for number, block in enumerate(all_but_last):
            x_TD = self._run(block, x_TD, rotary, mask, prefix[number] if prefix else None)
        return self._run(last, x_TD, rotary, last_mask, prefix[-1] if prefix else None)

    def prefix_key_values(self, batch: PackedBatch) -> list[KeyValue]:
        """Keys and values of one text (the shared prefix) in each layer; the last layer computes only these."""
        x_TD = self.embed_tokens(batch.input_ids_T)
        rotary = self._rotary(batch)
        mask = attention_mask(batch, self.config.sliding_window, use_softmax=self._use_softmax)
        *all_but_last, last = self._blocks()
        key_values = []
        for block in all_but_last:
            key_values.append(block.key_value(x_TD, rotary))
            x_TD = self._run(block, x_TD, rotary, mask, None)
        return [*key_values, last.key_value(x_TD, rotary)]

    def _run(
        self, block: Block, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, prefix: KeyValue | None,
    ) -> Tensor:
        """One block: compiled on CUDA, and if asked on a CPU; with gradient checkpointing recomputed in backward."""
        inputs = (block, x_TD, rotary, mask, prefix)
        is_compiled = x_TD.device.type == "cuda" or (self.compile_on_cpu and self.training)
        forward = compiled_block if is_compiled else Block.__call__
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)

    @property
    def _use_softmax(self) -> bool:
        """Whether short texts may take softmax_attention: in training in bf16 (see MAX_SCORES in attention.py)."""
        return self.training and self.embed_tokens.weight.dtype == torch.bfloat16

    def _rotary(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return rotary_cos_sin(batch.position_ids_T, head_dim=self.config.head_dim, theta=self.config.rope_theta)

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))


def init_weights(model: Mistral, *, seed: int) -> Mistral:
    """Random initialisation in place: embeddings of standard deviation 0.02, matrices of 1/sqrt(inputs), norms at one.

    The usual 0.02 for all matrices is not used: it suits hidden sizes of a few thousand, but at 128 it would make the
    initial attention nearly uniform. Each block normalises the token embeddings, so their scale matters only relative
    to the block outputs added to them, and for their effective learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            deviation = 0.02 if parameter is model.embed_tokens.weight else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=deviation, generator=generator)
    return model
