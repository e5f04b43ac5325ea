"""Scores of the candidates: the fused form equals the plain one, and no (Q, C, D) tensor is kept or allocated."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ref.loss.candidate_scores import CandidateScoresFunction
from ref.loss.contrastive import CandidateIndex, LossTargets, candidate_loss, candidate_scores, soft_labels

Q, C, D, P = 12, 5, 16, 40


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors and candidates: some missing, some passages of several queries, some of none."""
    candidate_idx_QC = torch.stack([torch.randperm(P - 3)[:C] for _ in range(Q)])
    candidate_idx_QC[torch.rand(Q, C) < 0.3] = -1
    return torch.randn(Q, D, dtype=dtype), torch.randn(P, D, dtype=dtype), candidate_idx_QC


def values_and_gradients(function: Callable[..., Tensor], query_QD, passage_PD, candidate_idx_QC) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (query_QD, passage_PD)]
    score_QC = function(*leaves, candidate_idx_QC)
    upstream_QC = torch.randn(Q, C, generator=torch.Generator().manual_seed(1), dtype=score_QC.dtype)
    upstream_QC[candidate_idx_QC < 0] = 0  # what a loss gives to missing candidates
    return [score_QC.masked_fill(candidate_idx_QC < 0, 0.0), *torch.autograd.grad(score_QC, leaves, upstream_QC)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_equals_plain(dtype, tolerance):
    case = inputs(dtype)
    fused, plain = (values_and_gradients(f, *case) for f in (candidate_scores, candidate_scores.plain))
    for ours, truth in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    query_QD, passage_PD, candidate_idx_QC = inputs(torch.float64)
    vectors = query_QD[:3, :4].clone().requires_grad_(), passage_PD[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: candidate_scores(q, p, candidate_idx_QC[:3]), vectors)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_requested_gradients(needs):
    query_QD, passage_PD, candidate_idx_QC = inputs()
    _, *every = values_and_gradients(candidate_scores, query_QD, passage_PD, candidate_idx_QC)
    vectors = [x.clone().requires_grad_(need) for x, need in zip((query_QD, passage_PD), needs, strict=True)]
    upstream_QC = torch.randn(Q, C, generator=torch.Generator().manual_seed(1)).masked_fill(candidate_idx_QC < 0, 0.0)
    candidate_scores(*vectors, candidate_idx_QC).backward(upstream_QC)
    for vector, need, truth in zip(vectors, needs, every, strict=True):
        assert torch.equal(vector.grad, truth) if need else vector.grad is None


def kept(call: Callable[[], object]) -> list[int]:
    """Numbers of elements of the tensors that autograd keeps for backward."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        call()
    return sizes


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def loss(query_QD: Tensor, passage_PD: Tensor, candidate_idx_QC: Tensor) -> Tensor:
    """Both terms of candidate_loss, summed."""
    candidate_idx_QC = candidate_idx_QC.clone()
    candidate_idx_QC[:, 0] = torch.arange(Q)
    index = CandidateIndex(candidate_idx_QC, torch.arange(P), torch.full((Q, 1), -1))
    label_QC = soft_labels(torch.randn(Q, C), candidate_idx_QC, 1.0)
    rows = candidate_loss(query_QD, passage_PD, LossTargets(index, label_QC, torch.full((Q,), torch.inf), 0.05))
    return (rows.contrastive_Q + rows.soft_label_Q).sum()


def test_candidate_loss_keeps_no_copy_of_the_candidates(monkeypatch):
    """Nothing of (Q, C, D) elements is kept for backward, and no operation of forward or backward returns it."""
    query_QD, passage_PD, candidate_idx_QC = inputs()
    vectors = [F.normalize(x, dim=1).requires_grad_() for x in (query_QD, passage_PD)]
    assert max(kept(lambda: loss(*vectors, candidate_idx_QC))) <= max(P * D, Q * D) < Q * C * D
    with LargestTensor() as fused:
        loss(*vectors, candidate_idx_QC).backward()
    assert fused.elements <= max(P * D, Q * D)
    # control: the plain form does both
    monkeypatch.setattr("ref.loss.contrastive.candidate_scores", candidate_scores.plain)
    assert max(kept(lambda: loss(*vectors, candidate_idx_QC))) == Q * C * D
    with LargestTensor() as plain:
        loss(*vectors, candidate_idx_QC).backward()
    assert plain.elements == Q * C * D


def test_control_a_wrong_backward_is_noticed(monkeypatch):
    """A passage that is a candidate of several queries needs the sum of their gradients."""
    def without_accumulation(ctx, grad_QC):
        query_QD, passage_PD, candidate_idx_QC = ctx.saved_tensors
        query_grad, passage_grad = torch.zeros_like(query_QD), torch.zeros_like(passage_PD)
        for idx_Q, grad_Q in zip(candidate_idx_QC.T, grad_QC.T, strict=True):
            query_grad += grad_Q[:, None] * passage_PD[idx_Q]
            passage_grad[idx_Q] = grad_Q[:, None] * query_QD
        return query_grad, passage_grad, None
    monkeypatch.setattr(CandidateScoresFunction, "backward", staticmethod(without_accumulation))
    with pytest.raises(AssertionError):
        test_fused_equals_plain(torch.float32, 1e-5)
