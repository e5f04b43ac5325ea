"""Last-token pooling: a text's embedding is its last token's hidden state, normalised and scaled to unit length.

The last token is the checkpoint's end token, `</s>` in Mistral's, which the tokenizer appends by id. It is the only
position of a causal model that attends to the whole text, and the same token in every text.

    e_b = n_b / |n_b|,      n_b = RMSNorm(h[last_b])

Source: arXiv 2506.07438; the end token as the text's embedding: arXiv 2401.00368.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ref.model.attention import KeyValue
from ref.model.packing import PackedBatch
from ref.model.transformer import Mistral
from ref.utils.device import Backend


def last_token_pool(
    hidden_TD: Tensor, last_token_B: Tensor, norm_weight_D: Tensor, *, eps: float, backend: Backend = "eager",
) -> Tensor:
    """Unit vectors (B, D) fp32 from hidden states (T, D) of any float type at the rows `last_token_B` (B,) int64.

    Computed in fp32: cosine similarities close to one differ in digits that bf16 does not have. A zero hidden state
    gives a zero vector and a zero gradient. The backend "triton" computes the same in one kernel launch.
    """
    if backend == "triton":
        from ref.kernels.last_token_pool import last_token_pool as fused

        return fused(hidden_TD, last_token_B, norm_weight_D, eps=eps)
    hidden_BD = hidden_TD[last_token_B].float()
    normed_BD = hidden_BD * torch.rsqrt(hidden_BD.square().mean(-1, keepdim=True) + eps) * norm_weight_D.float()
    squared_B1 = normed_BD.square().sum(-1, keepdim=True)
    zero_B1 = squared_B1 == 0
    return normed_BD * torch.rsqrt(squared_B1 + zero_B1).masked_fill(zero_B1, 0.0)


def embed(
    model: Mistral, batch: PackedBatch, *, prefix: Sequence[KeyValue] | None = None, backend: Backend = "eager",
) -> Tensor:
    """Embeddings (B, D) fp32 of a packed batch: the forward pass and the pooling of the last tokens."""
    hidden_BD = model(batch, prefix=prefix)  # the last block computes the last tokens only
    all_B = torch.arange(len(hidden_BD), device=hidden_BD.device)
    return last_token_pool(hidden_BD, all_B, model.norm.weight, eps=model.norm.eps, backend=backend)
