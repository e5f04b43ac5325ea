"""Last-token pooling in one launch: gather, final RMSNorm, unit length.

    x = h[last_b]        r = rsqrt(mean(x^2) + eps)        n = r x w        e = n / |n|

Eager code runs a chain of kernels over (B, D): gather, cast, square, mean, rsqrt, two products, square, sum, rsqrt,
product. Counted in elements that cross memory (bf16 in, fp32 out, D much larger than 1):

    eager     about 14 passes over (B, D)
    kernel    1 read of B rows in bf16, 1 read of w, 1 write of B rows in fp32      101 MB at B = D = 4096

One program owns one row, which fits into its registers up to D = 8192, so both sums are taken on the chip.

    hidden_TD   . . . . . . . .
                . . . . . . . .   <- last_b      program b  ->  out_BD[b]
                . . . . . . . .

Backward reads the row again and three numbers per row: r and 1/|n| from forward, e . g from its first kernel.

    dn = (g - e (e . g)) / |n|      dx = r (dn w - x r^2 mean(dn w x))      dw = sum_b dn r x

The sum over b is a second kernel over columns: no two programs write one number, and two runs agree bit for bit.
Plain version and oracle: ref/model/pooling.py, which calls this on CUDA. Source: RMSNorm, arXiv 1910.07467.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 8192


@triton.jit
def _forward(
    hidden_ptr,  # (T, D) rows `stride` apart
    last_ptr,  # (B,) int64
    weight_ptr,  # (D,)
    out_ptr,  # (B, D) fp32
    rms_ptr,  # (B,) r
    inv_norm_ptr,  # (B,) 1 / |n|, 0 for a zero row
    width, stride, eps,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    i_t = tl.load(last_ptr + i_b)
    b_x = tl.load(hidden_ptr + i_t * stride + o_d, mask=m_d, other=0.0).to(ACC)
    b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    r = 1.0 / tl.sqrt(tl.sum(b_x * b_x) / width + eps)
    b_n = b_x * r * b_w
    squared = tl.sum(b_n * b_n)
    zero = squared == 0.0
    inverse = tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, squared)))
    tl.store(out_ptr + i_b * width + o_d, b_n * inverse, mask=m_d)
    tl.store(rms_ptr + i_b, r)
    tl.store(inv_norm_ptr + i_b, inverse)


@triton.jit
def _backward_rows(
    hidden_ptr, last_ptr, weight_ptr,  # as in forward
    grad_ptr,  # (B, D) fp32: g
    rms_ptr, inv_norm_ptr,  # (B,) kept by forward
    dot_ptr,  # (B,) out: e . g
    out_ptr,  # (T, D) out: the rows `last`, in the dtype of hidden
    width, stride,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    i_t = tl.load(last_ptr + i_b)
    b_x = tl.load(hidden_ptr + i_t * stride + o_d, mask=m_d, other=0.0).to(ACC)
    b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    b_g = tl.load(grad_ptr + i_b * width + o_d, mask=m_d, other=0.0).to(ACC)
    r = tl.load(rms_ptr + i_b)
    inverse = tl.load(inv_norm_ptr + i_b)
    b_e = b_x * r * b_w * inverse
    dot = tl.sum(b_e * b_g)
    b_dn = (b_g - b_e * dot) * inverse * b_w
    b_dx = r * (b_dn - b_x * (r * r * tl.sum(b_dn * b_x) / width))
    tl.store(dot_ptr + i_b, dot)
    tl.store(out_ptr + i_t * width + o_d, b_dx.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _backward_weight(
    hidden_ptr, last_ptr, weight_ptr,  # as in forward
    grad_ptr, rms_ptr, inv_norm_ptr, dot_ptr,  # as in _backward_rows
    out_ptr,  # (D,) out: dw
    rows, width, stride,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    b_dw = tl.zeros((BLOCK_D,), ACC)
    p_g = grad_ptr + o_d
    for i_b in range(rows):
        i_t = tl.load(last_ptr + i_b)
        b_x = tl.load(hidden_ptr + i_t * stride + o_d, mask=m_d, other=0.0).to(ACC)
        b_g = tl.load(p_g, mask=m_d, other=0.0).to(ACC)
        r = tl.load(rms_ptr + i_b)
        inverse = tl.load(inv_norm_ptr + i_b)
        b_e = b_x * r * b_w * inverse
        p_g += width
        b_dw += (b_g - b_e * tl.load(dot_ptr + i_b)) * inverse * r * b_x
    tl.store(out_ptr + o_d, b_dw.to(out_ptr.dtype.element_ty), mask=m_d)


class _LastTokenPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, last_token_B, weight_D, eps):
        rows, width = len(last_token_B), hidden_TD.shape[1]
        dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        ctx.sizes = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32,
                     "BLOCK_D": triton.next_power_of_2(width), "num_warps": 8 if width > 2048 else 4}
        out_BD = hidden_TD.new_empty(rows, width, dtype=dtype)
        rms_B, inv_norm_B = (hidden_TD.new_empty(rows, dtype=dtype) for _ in range(2))
        if rows:
            _forward[(rows,)](hidden_TD, last_token_B, weight_D, out_BD, rms_B, inv_norm_B,
                              width, hidden_TD.stride(0), eps, **ctx.sizes)
        ctx.save_for_backward(hidden_TD, last_token_B, weight_D, rms_B, inv_norm_B)
        return out_BD

    @staticmethod
    def backward(ctx, grad_BD):
        hidden_TD, last_token_B, weight_D, rms_B, inv_norm_B = ctx.saved_tensors
        rows, width = grad_BD.shape
        grad_BD, dot_B = grad_BD.contiguous(), torch.empty_like(rms_B)
        empty = torch.empty_like if rows == len(hidden_TD) else torch.zeros_like  # else rows that were not pooled
        grad_TD, grad_D = empty(hidden_TD, memory_format=torch.contiguous_format), torch.zeros_like(weight_D)
        if rows:
            common = (grad_BD, rms_B, inv_norm_B, dot_B)
            _backward_rows[(rows,)](hidden_TD, last_token_B, weight_D, *common, grad_TD,
                                    width, hidden_TD.stride(0), **ctx.sizes)
            if ctx.needs_input_grad[2]:
                _backward_weight[(triton.cdiv(width, 128),)](
                    hidden_TD, last_token_B, weight_D, *common, grad_D, rows, width, hidden_TD.stride(0),
                    ACC=ctx.sizes["ACC"], BLOCK_D=128, num_warps=4)
        needs_hidden, _, needs_weight, _ = ctx.needs_input_grad
        return grad_TD if needs_hidden else None, None, grad_D if needs_weight else None, None


def last_token_pool(
    hidden_TD: Tensor, last_token_B: Tensor, norm_weight_D: Tensor, *, eps: float, check_values: bool = False,
) -> Tensor:
    """Unit vectors (B, D) fp32 of the rows `last_token_B` of hidden states (T, D) of any float type (fp64 gives fp64).

    `last_token_B` (B,) int64: rows in 0..T-1, rising, each once. Raises ValueError for a wrong dtype, shape or device,
    and for wrong rows if they lie on the host; on a GPU that check would wait for it, so only with `check_values`.
    """
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if (hidden_TD.ndim != 2 or hidden_TD.dtype not in floats or hidden_TD.stride(1) != 1
            or hidden_TD.shape[1] > MAX_WIDTH):
        raise ValueError(f"hidden states must be (T, D) of a float type, rows contiguous, D <= {MAX_WIDTH} "
                         f"(got {tuple(hidden_TD.shape)} {hidden_TD.dtype})")
    if last_token_B.ndim != 1 or last_token_B.dtype != torch.int64 or len(last_token_B) > len(hidden_TD):
        raise ValueError(f"last tokens must be (B,) int64 with B <= {len(hidden_TD)} "
                         f"(got {tuple(last_token_B.shape)} {last_token_B.dtype})")
    if norm_weight_D.shape != hidden_TD.shape[1:]:
        raise ValueError(f"the norm's weight must be ({hidden_TD.shape[1]},) (got {tuple(norm_weight_D.shape)})")
    if {last_token_B.device, norm_weight_D.device} != {hidden_TD.device}:
        raise ValueError(f"all tensors must be on one device (got {hidden_TD.device}, {last_token_B.device}, "
                         f"{norm_weight_D.device})")
    if check_values or last_token_B.device.type == "cpu":
        rows = last_token_B.tolist()
        if any(row >= after for row, after in pairwise([-1, *rows, len(hidden_TD)])):
            raise ValueError(f"last tokens must be rising rows in 0..{len(hidden_TD) - 1}, each once (got {rows[:8]})")
    return _LastTokenPool.apply(hidden_TD, last_token_B.contiguous(), norm_weight_D.contiguous(), eps)
