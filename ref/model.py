"""Mistral: token ids in, hidden states out. RMSNorm, attention, SwiGLU, and the block that joins them.

    h = x + Attention(RMSNorm(x))          y = h + SwiGLU(RMSNorm(h))          32 times

Attributes bear the names of the checkpoint's tensors, so that loading is one strict load_state_dict.
Two things an embedder may leave out are left out here:

- The last block is needed at pooled tokens only: keys and values for all tokens, everything else for the last
  token of each text. 32 layers cost little more than 31.
- A prefix that all texts share (instruction, few-shot examples) passes once: `prefix` returns its keys and
  values, and `forward` lets every text see them. Backward adds up its gradient over the texts by itself.

Source: Mistral 7B, arXiv 2310.06825; RMSNorm, arXiv 1910.07467; SwiGLU, arXiv 2002.05202.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ref.attention import KeyValue, attend, compiled
from ref.config import Architecture
from ref.packing import Packed
from ref.rope import rotary_tables, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in fp32: in bf16 the squares lose the sum."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return Normed.apply(x_TD, self.weight, self.eps)


class Normed(torch.autograd.Function):
    """RMSNorm's arithmetic, with n = x r and r = 1 / sqrt(mean(x^2) + eps). Backward needs x and one number a token:

        dx = r (g w - n mean(g w n))          dw = sum over tokens of g n

    autograd would keep x twice and n, and pass over them a dozen times. (A result made in place is returned through
    detach(), here and below: torch 2.11 compiles it to one without a gradient otherwise.)
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = x_TD.float()
        r_T1 = torch.rsqrt(torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True).square() / x_TD.shape[-1] + eps)
        ctx.save_for_backward(x_TD, weight_D, r_T1)
        return (wide_TD * r_T1).to(x_TD.dtype).mul_(weight_D.to(x_TD.dtype)).detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_TD, weight_D, r_T1 = ctx.saved_tensors
        n_TD, scaled_TD = x_TD.float() * r_T1, grad_TD.float() * weight_D.float()
        x_grad_TD = scaled_TD.addcmul(n_TD, (scaled_TD * n_TD).mean(-1, keepdim=True), value=-1).mul_(r_T1)
        weight_grad_D = (grad_TD.float() * n_TD).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return x_grad_TD.to(x_TD.dtype), weight_grad_D, None


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, heads * head_width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=False)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)

    def key_value(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """Rotated keys and values, (T, G, K) each."""
        k_TGK, v_TGK = (f(x_TD).unflatten(-1, (-1, self.head_width)) for f in (self.k_proj, self.v_proj))
        return rotate(k_TGK, *rotary), v_TGK

    def query(self, x_ND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (N, H, K) of the tokens that ask."""
        return rotate(self.q_proj(x_ND).unflatten(-1, (-1, self.head_width)), *rotary)


class SiluTimes(torch.autograd.Function):
    """silu(gate) * up, keeping gate and up alone for backward: autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return F.silu(gate_TF).mul_(up_TF).detach()

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF), F.silu(gate_TF).mul_(grad_TF)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (T, D) -> (T, F) -> (T, D)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(SiluTimes.apply(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Block(nn.Module):
    """One layer: attention and SwiGLU, each on a normalised copy, added to the residual stream.

    All but the attention itself is two halves, before and after it. On CUDA each is compiled, once for all layers.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(arch.width, arch.norm_eps)
        self.self_attn = Attention(arch.width, arch.heads, arch.kv_heads, arch.head_width)
        self.window_keys = arch.window_keys
        self.post_attention_layernorm = RMSNorm(arch.width, arch.norm_eps)
        self.mlp = SwiGLU(arch.width, arch.ffn_width)

    def forward(
        self, x_TD: Tensor, packed: Packed, rotary: tuple[Tensor, Tensor], *,
        prefix: KeyValue | None = None, rows: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """The next hidden states of all tokens, or of those that `rows` names; and this layer's keys and values."""
        before, after = Block.before, Block.after
        if x_TD.device.type == "cuda":
            before, after = compiled(before), compiled(after)
        q_NHK, own = before(self, x_TD, rotary, rows)
        mixed_NHK = attend(q_NHK, *own, packed, window_keys=self.window_keys, prefix=prefix)
        return after(self, x_TD, mixed_NHK, rows), own

    def before(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor | None) -> tuple[Tensor, KeyValue]:
        """Queries (N, H, K) of the tokens that ask, keys and values (T, G, K) of all."""
        normed_TD = self.input_layernorm(x_TD)
        own = self.self_attn.key_value(normed_TD, rotary)
        if rows is not None:
            cos_TK, sin_TK = rotary
            normed_TD, rotary = normed_TD[rows], (cos_TK[rows], sin_TK[rows])
        return self.self_attn.query(normed_TD, rotary), own

    def after(self, x_TD: Tensor, mixed_NHK: Tensor, rows: Tensor | None) -> Tensor:
        """The next hidden states (N, D), from the values that attention has mixed."""
        x_ND = (x_TD if rows is None else x_TD[rows]) + self.self_attn.o_proj(mixed_NHK.flatten(-2))
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class Mistral(nn.Module):
    """The transformer without a language-model head."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.width)
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.layers))
        self.norm = RMSNorm(arch.width, arch.norm_eps)
        self.checkpointing = False  # keep a block's input alone and compute the block again in backward

    def forward(
        self, packed: Packed, *, prefix: Sequence[KeyValue] | None = None, every_token: bool = False,
    ) -> Tensor:
        """Hidden states before the final norm: (B, D) at each text's last token; (T, D) with `every_token`.

        `prefix` holds one pair for each layer and has `packed.prefix_tokens` rows. The final norm belongs to
        the pooling (pooling.py), which fuses it.
        """
        x_TD = self.embed_tokens(packed.ids_T)
        rotary = self._rotary(packed.position_T)
        for number, block in enumerate(self.layers):
            last = number == len(self.layers) - 1 and not every_token
            x_TD, _ = self._through(
                block, x_TD, packed, rotary,
                prefix=prefix[number] if prefix else None, rows=packed.last_B if last else None)
        return x_TD

    def prefix_key_values(self, packed: Packed) -> list[KeyValue]:
        """Keys and values of one text (the shared prefix) for every layer; the last layer stops after them."""
        x_TD = self.embed_tokens(packed.ids_T)
        rotary = self._rotary(packed.position_T)
        *all_but_last, last = cast(list[Block], list(self.layers))
        pairs = []
        for block in all_but_last:
            x_TD, own = self._through(block, x_TD, packed, rotary)
            pairs.append(own)
        return [*pairs, last.self_attn.key_value(last.input_layernorm(x_TD), rotary)]

    def _through(self, block: nn.Module, *inputs: Any, **more: Any) -> tuple[Tensor, KeyValue]:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, **more)
        return block(*inputs, **more)

    def _rotary(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(position_T, head_width=self.arch.head_width, base=self.arch.rope_base)


def fresh(arch: Architecture, *, seed: int) -> Mistral:
    """A model with random weights: embeddings of deviation 0.02, matrices of 1/sqrt(inputs), norms at one.

    The usual 0.02 for all fits a width of a few thousand; matrices of that size at width 128 start with attention that
    sees nothing. Embeddings are normed before they are read, so their size sets only how fast they turn: AdamW moves
    a weight by its rate, whatever its size.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Mistral(arch)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            deviation = 0.02 if parameter is model.embed_tokens.weight else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=deviation, generator=generator)
    return model
