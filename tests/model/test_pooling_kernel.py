"""The Triton kernel of last-token pooling against the plain form, by Triton's interpreter or on a GPU.

Three levels: fp64, eager code, kernel. Uninitialised memory and bands around the inputs are NaN, so that memory read
before it is written, or written outside a tensor, is noticed.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ref.model.pooling import last_token_pool as plain_pool

last_token_pool = pytest.importorskip("ref.kernels.last_token_pool").last_token_pool  # needs triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("nan_in_uninitialised_memory"),
    pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
                       reason="no GPU, and TRITON_INTERPRET=1 is not set")]


def pool_case(rows: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, rows to pool, norm weight, upstream gradient; rows that are not pooled are NaN."""
    last_token_B = torch.randperm(tokens)[:rows].sort().values
    hidden_TD = torch.full((tokens, width), torch.nan)
    hidden_TD[last_token_B] = torch.randn(rows, width) * torch.rand(rows, 1).mul(6).exp()
    weight_D = 1 + 0.3 * torch.randn(width)
    grad_BD = torch.randn(rows, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    hidden_TD, weight_D = (guarded(x.to(DEVICE, dtype)) for x in (hidden_TD, weight_D))
    return hidden_TD, last_token_B.to(DEVICE), weight_D, grad_BD.to(DEVICE)


def pooled(
    function, hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor, grad_BD: Tensor, dtype: torch.dtype,
) -> list[Tensor]:
    """Embeddings, gradient of the pooled rows, gradient of the weight, computed in `dtype`."""
    hidden_TD, weight_D = (x.detach().to(dtype).requires_grad_() for x in (hidden_TD, weight_D))
    out = function(hidden_TD, last_token_B, weight_D, eps=1e-5)
    out.backward(grad_BD.to(out.dtype))
    return [out.detach().double(), hidden_TD.grad[last_token_B].double(), weight_D.grad.double()]


def exact_pool(hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """The formula in fp64."""
    x = hidden_TD[last_token_B]
    return F.normalize(x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D, dim=-1, eps=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens", "width"), [
    (1, 1, 2), (3, 9, 5), (4, 4, 128), (7, 30, 100), (5, 6, 4096), (2, 3, 8192),
])
def test_pool_is_as_close_to_fp64_as_eager_code(rows, tokens, width, dtype):
    case = pool_case(rows, tokens, width, dtype)
    truth = pooled(exact_pool, *case, torch.float64)
    by_kernel, by_eager = pooled(last_token_pool, *case, dtype), pooled(plain_pool, *case, dtype)
    for kernel, eager, exact, stored in zip(by_kernel, by_eager, truth, (torch.float32, dtype, dtype), strict=True):
        # embeddings are fp32 for every input; gradients are stored in its dtype
        floor = 8 * torch.finfo(stored).eps * pool_scale(exact, case)
        assert (kernel - exact).abs().max() <= (eager - exact).abs().max() + floor


def pool_scale(exact: Tensor, case: tuple[Tensor, ...]) -> float:
    """The size of the terms of the result's sums: where they cancel, larger than the result."""
    hidden_TD, last_token_B, _, grad_BD = case
    size = max(1.0, 1 / hidden_TD[last_token_B].abs().max().item())
    return max(exact.abs().max().item(), grad_BD.abs().max().item() * size)


@settings(max_examples=25)
@given(rows=st.integers(1, 9), spare=st.integers(0, 9), width=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_pool_at_any_shape(rows, spare, width, seed):
    torch.manual_seed(seed)
    case = pool_case(rows, rows + spare, width, torch.float32)
    truth, by_kernel = pooled(exact_pool, *case, torch.float64), pooled(last_token_pool, *case, torch.float32)
    for kernel, exact in zip(by_kernel, truth, strict=True):
        assert (kernel - exact).abs().max() <= 2e-5 * pool_scale(exact, case)


def test_pool_gradcheck():
    hidden_TD, last_token_B, weight_D, _ = pool_case(3, 5, 6, torch.float64)
    inputs = hidden_TD.nan_to_num(0.5).requires_grad_(), weight_D.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: last_token_pool(h, last_token_B, w, eps=1e-3), inputs)


def test_pool_of_a_zero_row_is_zero_with_zero_gradient():
    hidden_TD = torch.zeros(2, 12, device=DEVICE).requires_grad_()
    out = last_token_pool(hidden_TD, torch.tensor([1], device=DEVICE), torch.ones(12, device=DEVICE), eps=1e-5)
    out.sum().backward()
    assert not out.any() and not hidden_TD.grad.any()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_pool_returns_only_requested_gradients(needs):
    hidden_TD, last_token_B, weight_D, grad_BD = pool_case(3, 8, 20, torch.float32)
    hidden_TD.requires_grad_(needs[0])
    weight_D.requires_grad_(needs[1])
    out = last_token_pool(hidden_TD, last_token_B, weight_D, eps=1e-5)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad_BD)
    assert (hidden_TD.grad is not None, weight_D.grad is not None) == needs
    if needs[0]:
        not_pooled = torch.ones(8, dtype=torch.bool).index_fill(0, last_token_B.cpu(), False)
        assert not hidden_TD.grad[not_pooled.to(DEVICE)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pool_writes_nothing_outside_its_tensors(dtype, bands_intact):
    pooled(last_token_pool, *pool_case(3, 9, 37, dtype), dtype)
    assert bands_intact()


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_TD": torch.zeros(4, 6, 2)}, r"hidden states must be .T, D. .*got .4, 6, 2. torch.float32"),
    ({"hidden_TD": torch.zeros(4, 6, dtype=torch.int32)}, "hidden states must be .* of a float type.*int32"),
    ({"hidden_TD": torch.zeros(4, 9000)}, "D <= 8192 .got .4, 9000."),
    ({"hidden_TD": torch.zeros(6, 4).T}, "rows contiguous"),
    ({"last_token_B": torch.tensor([1.0])}, r"last tokens must be .B,. int64 .*torch.float32"),
    ({"last_token_B": torch.arange(5)}, "last tokens must be .* with B <= 4 .got .5,."),
    ({"last_token_B": torch.tensor([2, 1])}, r"rising rows in 0..3, each once .got \[2, 1\]"),
    ({"last_token_B": torch.tensor([1, 1])}, r"each once .got \[1, 1\]"),
    ({"last_token_B": torch.tensor([-1, 1])}, r"rows in 0..3, .*got \[-1, 1\]"),
    ({"last_token_B": torch.tensor([1, 4])}, r"rows in 0..3, .*got \[1, 4\]"),
    ({"norm_weight_D": torch.ones(5)}, r"weight must be .6,. .got .5,."),
    ({"norm_weight_D": torch.ones(6, device="meta")}, "one device .got .*meta"),
])
def test_pool_rejects_bad_input(change, message):
    good = {"hidden_TD": torch.zeros(4, 6), "last_token_B": torch.tensor([1]), "norm_weight_D": torch.ones(6)}
    tensors = {name: x if x.is_meta else x.to(DEVICE) for name, x in {**good, **change}.items()}
    with pytest.raises(ValueError, match=message):
        last_token_pool(**tensors, eps=1e-5, check_values=True)


def test_control_another_norm_is_noticed():
    """Without the norm's weight the budget of the first test does not hold."""
    hidden_TD, last_token_B, weight_D, _ = pool_case(4, 9, 100, torch.float32)
    truth = exact_pool(hidden_TD.double(), last_token_B, weight_D.double(), eps=1e-5)
    other = last_token_pool(hidden_TD, last_token_B, torch.ones_like(weight_D), eps=1e-5).double()
    assert (other - truth).abs().max() > 1e-3
