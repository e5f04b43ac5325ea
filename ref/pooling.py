"""Pooling: a text's vector is its last token's hidden state, normed and scaled to unit length.

The last token is `</s>`, which the tokenizer appends by id: the only position of a causal model that has
seen the whole text, and always the same token, so that the vector says what was read and not what it ended with.

    e_b = n_b / |n_b|,      n_b = RMSNorm(h[last_b])

Called by embedder.py and gradcache.py. Source: arXiv 2506.07438; the end token as the text's vector: arXiv 2401.00368.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ref.attention import KeyValue
from ref.config import Kernels
from ref.model import Mistral
from ref.packing import Packed


def last_token_pool(
    hidden_TD: Tensor, last_B: Tensor, norm_weight_D: Tensor, *, eps: float, kernels: Kernels = "eager",
) -> Tensor:
    """Unit vectors (B, D) fp32 from hidden states (T, D) of any float type at the rows `last_B` (B,) int64.

    Norms are taken in fp32, since cosine similarities near one differ in digits that bf16 does not have.
    A zero hidden state gives a zero vector, and a zero gradient. `kernels` "triton" does the same in one launch.
    """
    if kernels == "triton":
        from ref.kernels.last_token_pool import last_token_pool as fused

        return fused(hidden_TD, last_B, norm_weight_D, eps=eps)
    hidden_BD = hidden_TD[last_B].float()
    normed_BD = hidden_BD * torch.rsqrt(hidden_BD.square().mean(-1, keepdim=True) + eps) * norm_weight_D.float()
    squared_B1 = normed_BD.square().sum(-1, keepdim=True)
    zero_B1 = squared_B1 == 0
    return normed_BD * torch.rsqrt(squared_B1 + zero_B1).masked_fill(zero_B1, 0.0)


def embed(
    model: Mistral, packed: Packed, *, prefix: Sequence[KeyValue] | None = None, kernels: Kernels = "eager",
) -> Tensor:
    """Unit vectors (B, D) fp32 of packed texts: the forward pass and the pooling of its last tokens."""
    hidden_BD = model(packed, prefix=prefix)  # of each text the last block computes the last token alone
    every_B = torch.arange(len(hidden_BD), device=hidden_BD.device)
    return last_token_pool(hidden_BD, every_B, model.norm.weight, eps=model.norm.eps, kernels=kernels)
