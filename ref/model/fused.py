"""RMSNorm, SwiGLU and RoPE as autograd functions that need less memory or time than the plain forms.

The plain forms stand where they belong (transformer.py, rope.py), decorated with `fused_by`: calling them runs the
function of this file, and `.plain` is the form on the page. Tests hold values and gradients of both equal.

                 autograd keeps for backward             kept here
    rms_norm     x in fp32, x / rms, the product         x and one number per token
    swiglu       gate, up, silu(gate)                    gate, up
    apply_rotary cos and sin, shared by all layers       the same; fewer passes: the sine terms are added in place

A result that was computed in place is returned through detach(): torch 2.11 compiles it without a gradient otherwise.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNormFunction(torch.autograd.Function):
    """n * w with n = x r, r = 1 / sqrt(mean(x^2) + eps). Source: arXiv 1910.07467, equation 4.

        dx = r (g w - n mean(g w n))          dw = sum over tokens of g n
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_TD = x_TD.float()
        r_T1 = torch.rsqrt(torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).square() / x_TD.shape[-1] + eps)
        ctx.save_for_backward(x_TD, weight_D, r_T1)
        return (x32_TD * r_T1).to(x_TD.dtype).mul_(weight_D.to(x_TD.dtype)).detach()

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_TD, weight_D, r_T1 = ctx.saved_tensors
        n_TD, scaled_TD = x_TD.float() * r_T1, grad_TD.float() * weight_D.float()
        x_grad_TD = scaled_TD.addcmul(n_TD, (scaled_TD * n_TD).mean(-1, keepdim=True), value=-1).mul_(r_T1)
        weight_grad_D = (grad_TD.float() * n_TD).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return x_grad_TD.to(x_TD.dtype), weight_grad_D, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in backward. Source: arXiv 2002.05202, equation 6."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return F.silu(gate_TI).mul_(up_TI).detach()

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_TI * up_TI, gate_TI), F.silu(gate_TI).mul_(grad_TI)


class RotaryFunction(torch.autograd.Function):
    """A rotation; backward rotates the gradient by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TJ, sin_TJ)
        return _rotate(x_THK, cos_TJ, sin_TJ).detach()

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor, None, None]:
        cos_TJ, sin_TJ = ctx.saved_tensors
        return _rotate(grad_THK, cos_TJ, -sin_TJ), None, None


def _rotate(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """One product with the cosines, then the sine terms are added in place."""
    x32_THK, sin = x_THK.float(), sin_TJ[:, None]
    rotated_THK = x32_THK * torch.cat((cos_TJ, cos_TJ), dim=-1)[:, None]
    (first, second), (x_first, x_second) = rotated_THK.chunk(2, dim=-1), x32_THK.chunk(2, dim=-1)
    first.addcmul_(x_second, sin, value=-1)
    second.addcmul_(x_first, sin)
    return rotated_THK.to(x_THK.dtype)
