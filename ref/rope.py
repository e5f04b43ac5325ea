"""Rotary position embedding: a query and a key meet at an angle that depends on their distance alone.

Each head's vector is read as K/2 pairs (x_c, x_{c+K/2}), the "rotate-half" layout of Mistral's published
checkpoints. Pair c of the token at position t is turned by the angle t * base^(-2c/K):

    x_c'       = x_c cos - x_{c+K/2} sin
    x_{c+K/2}' = x_{c+K/2} cos + x_c sin

so that q_i' . k_j' is a function of i - j. Called once a forward pass (tables) and twice a layer (rotate).
Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
"""

import torch
from torch import Tensor


def rotary_tables(position_T: Tensor, *, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, (T, K/2) fp32 each: at position 4096 bf16 would be off by whole turns."""
    exponent = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width
    angle_TK = position_T.float()[:, None] * (1.0 / base**exponent)
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn the pairs of every head by their token's angles: (T, H, K) -> (T, H, K), computed in fp32."""
    first, second = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THK.dtype)
