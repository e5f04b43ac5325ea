"""`Block.forward` on CUDA: everything before and after the attention itself compiled, once for all layers.

FlexAttention is compiled on its own (flex.py), so a block is two compiled halves with the attention between them. Equal
to the plain `Block.forward` of transformer.py (tests/model/test_cuda.py). With `run_train.py --compile` training on a
CPU runs it too, with that device's attention.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from ref.model.attention import AttentionMask, KeyValue, attention
from ref.utils.compile import compile_once

if TYPE_CHECKING:
    from ref.model.transformer import Block


def compiled_block(
    block: "Block", x_TD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, prefix: KeyValue | None = None,
) -> Tensor:
    """The same arguments and result as `Block.forward`."""
    rows = mask.query_rows
    q_NHK, (k_TGK, v_TGK) = compile_once(before_attention)(block, x_TD, rotary, rows)
    value_NHK = attention(q_NHK, k_TGK, v_TGK, mask, prefix)
    return compile_once(after_attention)(block, x_TD, value_NHK, rows)


def before_attention(
    block: "Block", x_TD: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor | None,
) -> tuple[Tensor, KeyValue]:
    """Rotated queries (N, H, K) of the query positions, keys and values (T, G, K) of all tokens."""
    normed_TD = block.input_layernorm(x_TD)
    key_value = block.self_attn.key_value(normed_TD, rotary)
    if rows is not None:
        cos_TJ, sin_TJ = rotary
        normed_TD, rotary = normed_TD[rows], (cos_TJ[rows], sin_TJ[rows])
    return block.self_attn.query(normed_TD, rotary), key_value


def after_attention(block: "Block", x_TD: Tensor, value_NHK: Tensor, rows: Tensor | None) -> Tensor:
    """Output projection, residual and SwiGLU: the next hidden states (N, D)."""
    h_ND = (x_TD if rows is None else x_TD[rows]) + block.self_attn.o_proj(value_NHK.flatten(-2))
    return h_ND + block.mlp(block.post_attention_layernorm(h_ND))
