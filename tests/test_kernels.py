"""The Triton kernels against the plain pages of ref/: on the CPU through Triton's interpreter, or on a GPU itself.

Three rungs: fp64 -> eager -> kernel. Uninitialised memory and the bands around inputs are NaN, so that what is read
without being written, or written outside, shows. Compilation for sm_80 and sm_90 runs in a process of its own, since
the interpreter must not be on there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ref.blocked import PASSAGES_PER_BLOCK
from ref.loss import Groups, Rule, TorchEpilogue, blocked_loss, eager_loss
from ref.pooling import last_token_pool as plain_pool

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

import triton
import triton.language as tl

from ref.kernels import soft_contrastive as kernels
from ref.kernels.last_token_pool import last_token_pool

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "blocked": lambda q, p, rule: blocked_loss(q, p, TorchEpilogue(rule)),
    "triton": kernels.triton_loss,
    "small": kernels.small_loss,
}


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """torch.empty gives NaN, as long as a test runs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def guarded(x: Tensor, band: int = 8) -> Tensor:
    """`x` in the middle of a larger tensor of NaN (integers: of a number far outside)."""
    fill = torch.nan if x.is_floating_point() else 2**40
    around = x.new_full((x.numel() + 2 * band,), fill)
    around[band:-band] = x.flatten()
    return around[band:-band].view(x.shape)


# ------------------------------------------------------------------------------------------------- pooling


def pool_case(rows: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, rows to pool, norm weight, incoming gradient; rows that are not pooled are NaN."""
    last_B = torch.randperm(tokens)[:rows].sort().values
    hidden_TD = torch.full((tokens, width), torch.nan)
    hidden_TD[last_B] = torch.randn(rows, width) * torch.rand(rows, 1).mul(6).exp()
    weight_D = 1 + 0.3 * torch.randn(width)
    grad = torch.randn(rows, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return guarded(hidden_TD.to(DEVICE, dtype)), last_B.to(DEVICE), guarded(weight_D.to(DEVICE, dtype)), grad.to(DEVICE)


def pooled(
    function, hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor, grad_BD: Tensor, dtype: torch.dtype,
) -> list[Tensor]:
    """Vectors, gradient of the pooled rows, gradient of the weight: computed in `dtype`."""
    hidden_TD, weight_D = (x.detach().to(dtype).requires_grad_() for x in (hidden_TD, weight_D))
    out = function(hidden_TD, last_B, weight_D, eps=1e-5)
    out.backward(grad_BD.to(out.dtype))
    return [out.detach().double(), hidden_TD.grad[last_B].double(), weight_D.grad.double()]


def exact_pool(hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """The formula in fp64."""
    x = hidden_TD[last_B]
    return F.normalize(x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D, dim=-1, eps=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "tokens", "width"), [
    (1, 1, 2), (3, 9, 5), (4, 4, 128), (7, 30, 100), (5, 6, 4096), (2, 3, 8192),
])  # fmt: skip
def test_pool_is_as_near_the_truth_as_eager(rows, tokens, width, dtype):
    case = pool_case(rows, tokens, width, dtype)
    truth = pooled(exact_pool, *case, torch.float64)
    by_kernel, by_eager = pooled(last_token_pool, *case, dtype), pooled(plain_pool, *case, dtype)
    for kernel, eager, exact, written in zip(by_kernel, by_eager, truth, (torch.float32, dtype, dtype), strict=True):
        # vectors are fp32 whatever the input is; gradients are written in its dtype
        floor = 8 * torch.finfo(written).eps * pool_scale(exact, case)
        assert (kernel - exact).abs().max() <= (eager - exact).abs().max() + floor


def pool_scale(exact: Tensor, case: tuple[Tensor, ...]) -> float:
    """The size of the numbers that were added up to the result: where they cancel, more than the result's own."""
    hidden_TD, last_B, _, grad_BD = case
    size = max(1.0, 1 / hidden_TD[last_B].abs().max().item())
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
    hidden_TD, last_B, weight_D, _ = pool_case(3, 5, 6, torch.float64)
    inputs = hidden_TD.nan_to_num(0.5).requires_grad_(), weight_D.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: last_token_pool(h, last_B, w, eps=1e-3), inputs)


def test_pool_of_a_zero_row_is_zero_with_zero_gradient():
    hidden_TD = torch.zeros(2, 12, device=DEVICE).requires_grad_()
    out = last_token_pool(hidden_TD, torch.tensor([1], device=DEVICE), torch.ones(12, device=DEVICE), eps=1e-5)
    out.sum().backward()
    assert not out.any() and not hidden_TD.grad.any()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_pool_gives_the_gradients_that_are_asked_for(needs):
    hidden_TD, last_B, weight_D, grad_BD = pool_case(3, 8, 20, torch.float32)
    hidden_TD.requires_grad_(needs[0])
    weight_D.requires_grad_(needs[1])
    out = last_token_pool(hidden_TD, last_B, weight_D, eps=1e-5)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(grad_BD)
    assert (hidden_TD.grad is not None, weight_D.grad is not None) == needs
    if needs[0]:
        left_out = torch.ones(8, dtype=torch.bool).index_fill(0, last_B.cpu(), False)
        assert not hidden_TD.grad[left_out.to(DEVICE)].any()  # packed gradient: zero where nothing was pooled


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_TD": torch.zeros(4, 6, 2)}, "hidden"),
    ({"hidden_TD": torch.zeros(4, 6, dtype=torch.int32)}, "hidden"),
    ({"hidden_TD": torch.zeros(4, 9000)}, "8192"),
    ({"hidden_TD": torch.zeros(6, 4).T}, "contiguous"),
    ({"last_B": torch.tensor([1.0])}, "last"),
    ({"last_B": torch.arange(5)}, "last"),
    ({"last_B": torch.tensor([2, 1])}, "rising"),
    ({"last_B": torch.tensor([1, 1])}, "each once"),
    ({"last_B": torch.tensor([-1, 1])}, "from 0"),
    ({"last_B": torch.tensor([1, 4])}, "to 3"),
    ({"norm_weight_D": torch.ones(5)}, "weight"),
    ({"norm_weight_D": torch.ones(6, device="meta")}, "one device"),
])
def test_pool_refuses_bad_input(change, message):
    good = {"hidden_TD": torch.zeros(4, 6), "last_B": torch.tensor([1]), "norm_weight_D": torch.ones(6)}
    with pytest.raises(ValueError, match=message):
        last_token_pool(**{name: x if x.is_meta else x.to(DEVICE) for name, x in {**good, **change}.items()}, eps=1e-5,
                        check_values=True)


def test_control_another_norm_is_told_apart():
    """Were the norm's weight left out, the budget of the first test would not hold."""
    hidden_TD, last_B, weight_D, _ = pool_case(4, 9, 100, torch.float32)
    truth = exact_pool(hidden_TD.double(), last_B, weight_D.double(), eps=1e-5)
    other = last_token_pool(hidden_TD, last_B, torch.ones_like(weight_D), eps=1e-5).double()
    assert (other - truth).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- loss


def loss_case(
    queries: int, candidates: int, width: int, *,
    extra: int = 0, temperature: float = 0.02, margin: float | None = 0.1, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Rule, Tensor]:
    """Unit vectors, a rule with ragged groups, ignored rows, repeated texts and planted near-duplicates; a gradient."""
    passages = queries * candidates + extra
    query_QD, passage_PD = (F.normalize(torch.randn(n, width, dtype=torch.float64), dim=1) for n in (queries, passages))
    column_QC = torch.arange(queries * candidates).view(queries, candidates)
    ragged = torch.rand(queries, candidates) < 0.2
    ragged[:, 0] = False
    column_QC[ragged] = -1
    passage_PD[column_QC[:, 0]] = F.normalize(query_QD + passage_PD[column_QC[:, 0]], dim=1)
    if extra:
        passage_PD[-1] = query_QD[0]  # cosine one: a false negative by the margin
    label_QC = torch.rand(queries, candidates).masked_fill(ragged, 0.0)
    label_QC /= label_QC.sum(1, keepdim=True)
    label_QC[torch.rand(queries) < 0.2] = 0.0
    text_P, known_QX = torch.randint(0, passages, (passages,)), torch.randint(-1, passages, (queries, 3))
    positive_Q = (query_QD * passage_PD[column_QC[:, 0]]).sum(1)
    limit_Q = torch.full_like(positive_Q, torch.inf) if margin is None else positive_Q + margin
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    put = lambda x, kind=None: guarded(x.to(DEVICE, kind))  # noqa: E731
    groups = Groups(put(column_QC), put(text_P), put(known_QX))
    rule = Rule(groups, put(label_QC, exact), put(limit_Q, exact), temperature)
    return put(query_QD, dtype), put(passage_PD, dtype), rule, torch.randn(queries, dtype=exact, device=DEVICE)


def run(function, query_QD: Tensor, passage_PD: Tensor, rule: Rule, grad_Q: Tensor) -> list[Tensor]:
    """Loss, masked columns, both gradients."""
    query_QD, passage_PD = (x.detach().requires_grad_() for x in (query_QD, passage_PD))
    loss_Q, masked_Q = function(query_QD, passage_PD, rule)
    loss_Q.backward(grad_Q)
    return [loss_Q.detach(), masked_Q, query_QD.grad, passage_PD.grad]


def assert_within_budget(variant: str, case: tuple[Tensor, Tensor, Rule, Tensor]) -> None:
    """|kernel - truth| <= |eager in the same dtype - truth| + floor, truth in fp64.

    The loss is fp32 whatever the vectors are: a score of up to 1 / tau is rounded, so is the loss; the probability
    then errs by that share, and a gradient by that over tau once more, beside the rounding of its own dtype.
    """
    query_QD, passage_PD, rule, grad_Q = case
    wide = Rule(rule.groups, rule.label_QC.double(), rule.limit_Q.double(), rule.temperature)
    truth = run(exact_loss, query_QD.double(), passage_PD.double(), wide, grad_Q.double())
    eager, kernel = run(eager_loss, *case), run(VARIANTS[variant], *case)
    assert torch.equal(kernel[1], truth[1])
    push = grad_Q.abs().max().item() / rule.temperature
    for k, e, t in zip(kernel[::2] + kernel[3:], eager[::2] + eager[3:], truth[::2] + truth[3:], strict=True):
        of_score = 2 * torch.finfo(kernel[0].dtype).eps / rule.temperature * (1 if t.ndim == 1 else push)
        floor = 2 * torch.finfo(k.dtype).eps * t.abs().max() + of_score
        assert (k.double() - t).abs().max() <= (e.double() - t).abs().max() + floor + 1e-12


def exact_loss(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Loops over queries in fp64, straight from the definition."""
    losses, counts = [], []
    for i, query_D in enumerate(query_QD):
        label = dict(zip(rule.groups.column_QC[i].tolist(), rule.label_QC[i].tolist(), strict=True))
        label.pop(-1, None)
        known = set(rule.groups.known_QX[i].tolist())
        cosine_P = passage_PD @ query_D
        near = (cosine_P > rule.limit_Q[i]).tolist()
        out = [j for j, text in enumerate(rule.groups.text_P.tolist())
               if j not in label and (text in known or near[j])]
        seen = torch.ones(len(passage_PD), dtype=torch.bool).index_fill(0, torch.tensor(out, dtype=torch.int64), False)
        target = sum(weight * cosine_P[j] for j, weight in label.items())
        loss = (cosine_P[seen.to(DEVICE)] / rule.temperature).logsumexp(0) - target / rule.temperature
        losses.append(loss if rule.label_QC[i].any() else loss * 0)
        counts.append(len(out))
    return torch.stack(losses), torch.tensor(counts, device=DEVICE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("queries", "candidates", "width", "extra"), [
    (1, 1, 7, 0), (1, 3, 16, 2), (5, 8, 40, 1), (33, 4, 65, 3), (40, 2, 512, 9),
])  # fmt: skip
def test_loss_is_as_near_the_truth_as_eager(variant, queries, candidates, width, extra):
    assert_within_budget(variant, loss_case(queries, candidates, width, extra=extra))


@pytest.mark.parametrize("variant", ["blocked", "triton"])
@pytest.mark.parametrize("block", [1, 16, 50])
def test_candidates_in_any_block_of_passages(variant, block, monkeypatch):
    """Passages in any order, so that a query's candidates lie in several of the blocks."""
    monkeypatch.setitem(PASSAGES_PER_BLOCK, DEVICE, block)
    query_QD, passage_PD, rule, grad_Q = loss_case(9, 4, 24, extra=13)
    order = torch.randperm(len(passage_PD), device=DEVICE)
    groups, place = rule.groups, order.argsort()
    column_QC = torch.where(groups.column_QC < 0, -1, place[groups.column_QC])
    shuffled = Rule(Groups(column_QC, groups.text_P[order], groups.known_QX), rule.label_QC, rule.limit_Q,
                    rule.temperature)
    assert_within_budget(variant, (query_QD, passage_PD[order], shuffled, grad_Q))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [
    {"temperature": 0.005}, {"temperature": 1.0}, {"margin": None}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
], ids=str)  # fmt: skip
def test_loss_over_its_range(variant, options):
    assert_within_budget(variant, loss_case(9, 4, 48, extra=5, **options))


@pytest.mark.parametrize("variant", ["triton", "small"])
@settings(max_examples=12)
@given(queries=st.integers(1, 40), candidates=st.integers(1, 9), width=st.integers(1, 70), extra=st.integers(0, 40))
def test_loss_at_any_shape(variant, queries, candidates, width, extra):
    assert_within_budget(variant, loss_case(queries, candidates, width, extra=extra))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradcheck(variant):
    query_QD, passage_PD, rule, _ = loss_case(4, 3, 5, extra=2, temperature=0.5, dtype=torch.float64)
    inputs = query_QD.requires_grad_(), passage_PD.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: VARIANTS[variant](q, p, rule)[0], inputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_loss_gives_the_gradients_that_are_asked_for(variant, needs):
    query_QD, passage_PD, rule, grad_Q = loss_case(6, 3, 20)
    query_QD.requires_grad_(needs[0])
    passage_PD.requires_grad_(needs[1])
    loss_Q, _ = VARIANTS[variant](query_QD, passage_PD, rule)
    assert loss_Q.requires_grad == any(needs)
    if any(needs):
        loss_Q.backward(grad_Q)
    assert (query_QD.grad is not None, passage_PD.grad is not None) == needs


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_sees_its_positive_alone_has_no_loss(variant):
    """Every other passage is a known text."""
    vector_QD = F.normalize(torch.randn(2, 8), dim=1).to(DEVICE)
    groups = Groups(torch.tensor([[0], [1]]), torch.tensor([0, 1]), torch.tensor([[1], [0]]))
    rule = Rule(Groups(*(x.to(DEVICE) for x in vars(groups).values())), torch.ones(2, 1, device=DEVICE),
                torch.full((2,), torch.inf, device=DEVICE), 0.02)
    loss_Q, masked_Q, query_grad, passage_grad = run(
        VARIANTS[variant], vector_QD, vector_QD.clone(), rule, torch.ones(2, device=DEVICE))
    assert masked_Q.tolist() == [1, 1]
    for value in (loss_Q, query_grad, passage_grad):
        assert value.abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_logit_that_dominates_and_duplicates_of_the_query(variant):
    query_QD = F.normalize(torch.randn(3, 16), dim=1)
    passage_PD = torch.cat((query_QD, query_QD, -query_QD))
    groups = Groups(torch.tensor([[0, 6], [1, 7], [2, 8]]), torch.arange(9), torch.full((3, 1), -1))
    rule = Rule(Groups(*(x.to(DEVICE) for x in vars(groups).values())), torch.tensor([[1.0, 0.0]] * 3, device=DEVICE),
                torch.full((3,), torch.inf, device=DEVICE), 0.005)
    assert_within_budget(variant, (query_QD.to(DEVICE), passage_PD.to(DEVICE), rule, torch.ones(3, device=DEVICE)))


def test_a_quarter_of_a_million_passages():
    assert_within_budget("triton", loss_case(2, 3, 8, extra=262_144 - 6))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_agree_bit_for_bit(variant):
    case = loss_case(20, 4, 33, extra=3)
    first, second = (run(VARIANTS[variant], *case) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def bits(x: Tensor) -> np.ndarray:
    """A copy of the bytes of each number, (numbers, bytes)."""
    return x.detach().cpu().view(torch.uint8).numpy().reshape(x.numel(), -1).copy()


@pytest.fixture
def bands(monkeypatch) -> Callable[[], bool]:
    """Every tensor that a launcher allocates lies between bands of NaN; the call says whether all are intact."""
    around = []

    def between_bands(allocate):
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.numel() == 0 or not x.is_contiguous():
                return x
            inside = guarded(x)
            around.append((inside._base, bits(inside._base)))
            return inside
        return call
    allocators = [(torch, name) for name in ("empty", "empty_like", "zeros_like", "full_like")]
    for place, name in [*allocators, (Tensor, "new_empty"), (Tensor, "clone")]:
        monkeypatch.setattr(place, name, between_bands(getattr(place, name)))

    def intact(band: int = 8) -> bool:
        assert around
        return all(np.array_equal(bits(now)[part], then[part])
                   for now, then in around for part in (slice(band), slice(-band, None)))
    return intact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["triton", "small"])
def test_loss_writes_nothing_outside_its_tensors(variant, dtype, bands):
    run(VARIANTS[variant], *loss_case(21, 3, 37, extra=6, dtype=dtype))
    assert bands()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pool_writes_nothing_outside_its_tensors(dtype, bands):
    pooled(last_token_pool, *pool_case(3, 9, 37, dtype), dtype)
    assert bands()


@triton.jit
def _one_too_far(out_ptr, count, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, 1.0, mask=o <= count)


def test_control_a_write_outside_is_seen(bands):
    _one_too_far[(1,)](torch.empty(5, device=DEVICE), 5, BLOCK=8)
    assert not bands()


@pytest.mark.parametrize("variant", VARIANTS)
def test_control_another_rule_is_told_apart(variant):
    """Were the margin ignored, the budget would not hold."""
    query_QD, passage_PD, rule, grad_Q = loss_case(6, 3, 24, extra=4)
    rule.groups.text_P[-1] = 10**6  # the near-duplicate of query 0: known by its cosine alone
    blind = Rule(rule.groups, rule.label_QC, torch.full_like(rule.limit_Q, torch.inf), rule.temperature)
    kernel = run(VARIANTS[variant], query_QD, passage_PD, blind, grad_Q)
    other = run(eager_loss, query_QD, passage_PD, rule, grad_Q)
    assert kernel[1].sum() < other[1].sum()


@pytest.mark.parametrize(("change", "message"), [
    ({"passage": torch.zeros(6, 5)}, "passages"),
    ({"query": torch.zeros(2, 4, dtype=torch.int32)}, "queries"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"label": torch.ones(3, 3)}, "labels"),
    ({"column": torch.zeros(2, 3)}, "columns"),
    ({"text": torch.zeros(5, dtype=torch.int64)}, "texts"),
    ({"text": torch.zeros(6, dtype=torch.int64, device="meta")}, "one device"),
    ({"column": torch.tensor([[0, 1, 6], [3, 4, 5]])}, "outside"),
    ({"text": torch.arange(6) + 2**32}, "32 bits"),
    ({"column": torch.tensor([[-1, 1, 2], [3, 4, 5]])}, "positive"),
    ({"column": torch.tensor([[0, 1, 1], [3, 4, 5]])}, "twice"),
    ({"label": torch.tensor([[1.5, -0.5, 0.0], [1.0, 0, 0]])}, "negative"),
    ({"label": torch.tensor([[torch.nan, 0.5, 0.0], [1.0, 0, 0]])}, "NaN"),
    ({"label": torch.tensor([[1, 0, 0], [1, 0, 0]])}, "labels torch.int64"),
    ({"text": torch.zeros(6, dtype=torch.int32)}, "int64"),
    ({"limit": torch.ones(1)}, "limits are"),
    ({"label": torch.tensor([[0.5, 0.2, 0.0], [1.0, 0, 0]])}, "sum"),
    ({"label": torch.tensor([[0.5, 0.2, 0.3], [1, 0, 0]]), "column": torch.tensor([[0, 1, -1], [3, 4, 5]])}, "weight"),
])
@pytest.mark.parametrize("variant", ["triton", "small"])
def test_loss_refuses_bad_input(variant, change, message):
    good = {"query": torch.zeros(2, 4), "passage": torch.zeros(6, 4), "column": torch.arange(6).view(2, 3),
            "label": torch.tensor([[1.0, 0, 0]] * 2), "text": torch.arange(6), "limit": torch.ones(2),
            "temperature": 0.1}
    case = {name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x
            for name, x in {**good, **change}.items()}
    groups = Groups(case["column"], case["text"], torch.full((2, 1), -1, device=DEVICE))
    rule = Rule(groups, case["label"], case["limit"], case["temperature"])
    with pytest.raises(ValueError, match=message):
        VARIANTS[variant](case["query"], case["passage"], rule, check_values=True)


# ------------------------------------------------------------------------------------------------- machinery


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, UPCAST: tl.constexpr):
    o = tl.arange(0, 16)
    a = tl.load(a_ptr + o[:, None] * 16 + o[None, :])
    b = tl.load(b_ptr + o[:, None] * 16 + o[None, :])
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(out_ptr + o[:, None] * 16 + o[None, :], tl.dot(a, b, out_dtype=tl.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="a fault of the interpreter, which runs without a GPU only")
def test_the_interpreters_bf16_trap_is_guarded():
    """tl.dot on bf16 is silently wrong there; the kernels cast first, and say so by UPCAST."""
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = {}
    for upcast in (True, False):
        out[upcast] = torch.empty(16, 16)
        _dot[(1,)](a, b, out[upcast], UPCAST=upcast)
    truth = a.float() @ b.float()
    assert (out[True] - truth).abs().max() < 1e-3
    assert not (out[False] - truth).abs().max() < 1.0, "the interpreter is right now: the guard may go"
    assert kernels.interpreted()


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spilling(capability):
    """In a process of its own: registers, stack and local bytes of each kernel, by the toolkit that Triton brings."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    call = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_kernels", str(capability)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300, check=False)
    assert call.returncode == 0, call.stderr[-2000:]
    report = json.loads(call.stdout)
    assert len(report) >= 3 * 8
    allowed = 0 if version("triton") >= "3.9" else 16  # 3.6 keeps one or two values of some kernels on the stack
    for name, usage in report.items():
        assert usage["stack"] + usage["local"] <= allowed, f"{name} spills: {usage}"
