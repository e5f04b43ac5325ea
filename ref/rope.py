"""Rotary position embedding: a query and a key meet at an angle that depends on their distance alone.

Each head's vector is read as K/2 pairs (x_c, x_{c+K/2}), the "rotate-half" layout of Mistral's published
checkpoints. Pair c of the token at position t is turned by the angle t * base^(-2c/K):

    x_c'       = x_c cos - x_{c+K/2} sin
    x_{c+K/2}' = x_{c+K/2} cos + x_c sin

so that q_i' . k_j' is a function of i - j. Called once a forward pass (tables) and twice a layer (rotate).
Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_tables(position_T: Tensor, *, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, (T, K/2) fp32 each: at position 4096 bf16 would be off by whole turns."""
    exponent = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width
    angle_TK = position_T.float()[:, None] * (1.0 / base**exponent)
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn the pairs of every head by their token's angles: (T, H, K) -> (T, H, K), computed in fp32."""
    return Rotated.apply(x_THK, cos_TK, sin_TK)


class Rotated(torch.autograd.Function):
    """Backward turns the gradient back by the same angles: nothing is kept but the tables, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        return turn(x_THK, cos_TK, sin_TK).detach()  # see model.Normed

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors
        return turn(grad_THK, cos_TK, -sin_TK), None, None


def turn(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """The turn itself: every number times its cosine, then the sine's share of its partner added where it lies."""
    wide_THK, sin = x_THK.float(), sin_TK[:, None]
    turned_THK = wide_THK * torch.cat((cos_TK, cos_TK), dim=-1)[:, None]
    (first, second), (x_first, x_second) = turned_THK.chunk(2, dim=-1), wide_THK.chunk(2, dim=-1)
    first.addcmul_(x_second, sin, value=-1)
    second.addcmul_(x_first, sin)
    return turned_THK.to(x_THK.dtype)
