"""Rotary position embedding (RoPE): rotates queries and keys by angles proportional to their position.

A head's vector is read as J = K/2 pairs (x_c, x_{c+J}), the "rotate-half" layout of Mistral's published checkpoints.
Pair c of the token at position t is rotated by the angle t * theta^(-2c/K):

    x_c'     = x_c cos - x_{c+J} sin
    x_{c+J}' = x_{c+J} cos + x_c sin

The dot product of a rotated query and key then depends only on their relative position.
Source: Su et al., RoFormer, arXiv 2104.09864, equation 34.
"""

import torch
from torch import Tensor

from ref.model.fused import RotaryFunction
from ref.utils.fused_by import fused_by


def rotary_cos_sin(position_ids_T: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, (T, J) fp32 each: bf16 cannot represent the angles of large positions."""
    exponent_J = torch.arange(0, head_dim, 2, device=position_ids_T.device, dtype=torch.float32) / head_dim
    angle_TJ = position_ids_T.float()[:, None] * (1.0 / theta**exponent_J)
    return angle_TJ.cos(), angle_TJ.sin()


@fused_by(RotaryFunction)
def apply_rotary(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotate the pairs of every head: (T, H, K) -> (T, H, K) in the dtype of x, computed in fp32."""
    first, second = x_THK.float().chunk(2, dim=-1)
    cos, sin = cos_TJ[:, None], sin_TJ[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THK.dtype)
