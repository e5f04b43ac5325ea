"""The in-batch loss of loss.py, a block of passages at a time: the whole score matrix never exists.

    forward     for each block of passages    cosines Q P_b^T, s = cosines / tau; running maximum m, sum of exp(s - m)
                                              lse = m + log sum      kept: lse, one number a query
    backward    for each block again          s, then g = (exp(s - lse) - y) dL / tau      over the allowed columns
                                              dQ += g P_b            dP_b = g^T Q

The products are the library's; what happens to a block of cosines between them is the epilogue: two functions,
here in torch (`TorchEpilogue`), on CUDA one Triton kernel each (kernels/soft_contrastive.py). Memory beyond inputs and
gradients is a few blocks and dQ in fp32. The running maximum is needed: with a fixed one of 1/tau, exp(s - m)
underflows to zero where all scores of a row lie near -1/tau and tau is below 0.023.
Called by loss.py and the kernel. Source: the online softmax of arXiv 1805.02867; blocks of columns, arXiv 2411.09009.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PASSAGES_PER_BLOCK = {"cpu": 1024, "cuda": 2048}  # scores of some thousand queries stay in the device's cache


@dataclass(frozen=True)
class Groups:
    """Which passages belong to which query, and which texts are the same. Columns count the passages of the batch."""

    column_QC: Tensor  # int64: the positive's column, then the hard negatives'; -1 where a query has fewer
    text_P: Tensor  # int64, below 2^31: equal numbers for equal texts
    known_QX: Tensor  # int64: numbers of the query's own text and of all its known positives; -1 where fewer


@dataclass(frozen=True)
class Rule:
    """What decides over a score: its group, its label, and the cosine above which it counts as a false negative."""

    groups: Groups
    label_QC: Tensor  # fp32, sums to one by row, or zeros: row ignored
    limit_Q: Tensor  # fp32; inf: no limit
    temperature: float

    def label_block(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Labels, and who is a candidate, for the columns first..first+count-1: two (Q, count), fp32 and bool."""
        column_QC = self.groups.column_QC
        inside_QC = (column_QC >= first) & (column_QC < first + count)
        local_QC = (column_QC - first).where(inside_QC, count)  # all others fall into a spare column
        label = self.label_QC.new_zeros(len(column_QC), count + 1).scatter_add_(1, local_QC, self.label_QC)
        own = torch.zeros_like(label, dtype=torch.bool).scatter_(1, local_QC, True)
        return label[:, :count], own[:, :count]

    def candidates(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same as a list: row, local column and label of each candidate in the block. Waits for the device."""
        column_QC = self.groups.column_QC
        row, slot = ((column_QC >= first) & (column_QC < first + count)).nonzero(as_tuple=True)
        return row, column_QC[row, slot] - first, self.label_QC[row, slot]

    def leaves(self, cosine: Tensor, first: int) -> Tensor:
        """Who is not in the set, (Q, count) bool, unless it is a candidate: too close to be wrong, or known right."""
        text_P = self.groups.text_P[first : first + cosine.shape[1]].int()  # half the traffic of int64
        leaves = cosine > self.limit_Q[:, None]
        for known_Q in self.groups.known_QX.T.int():
            leaves |= text_P == known_Q[:, None]
        return leaves


@dataclass
class RowState:
    """What forward keeps of the columns seen so far, each (Q,): maximum, sum of exp, label . score, masked columns."""

    maximum: Tensor
    total: Tensor
    target: Tensor
    masked: Tensor

    @classmethod
    def empty(cls, query_QD: Tensor) -> "RowState":
        """No column seen yet."""
        dtype = torch.promote_types(query_QD.dtype, torch.float32)
        zero = query_QD.new_zeros(len(query_QD), dtype=dtype)
        return cls(torch.full_like(zero, -torch.inf), zero.clone(), zero.clone(), zero.to(torch.int64))


class Epilogue(Protocol):
    """What happens to a block of cosines (Q, count), fp32, which it may overwrite."""

    rule: Rule

    def reduce(self, cosine: Tensor, first: int, state: RowState) -> None:
        """Add a block to the row statistics."""

    def gradient(self, cosine: Tensor, first: int, lse_Q: Tensor, grad_Q: Tensor) -> Tensor:
        """(exp(cosine / temperature - lse) - label) * grad / temperature, zero for columns outside the set."""


@dataclass
class TorchEpilogue:
    """The epilogue in plain torch."""

    rule: Rule

    def reduce(self, cosine: Tensor, first: int, state: RowState) -> None:
        row, column, label = self.rule.candidates(first, cosine.shape[1])
        masked = self.rule.leaves(cosine, first)
        masked[row, column] = False
        score = cosine.div_(self.rule.temperature)
        state.target.index_add_(0, row, label * score[row, column])
        state.masked += masked.sum(1)
        score.masked_fill_(masked, -torch.inf)
        maximum = torch.maximum(state.maximum, score.amax(1))
        safe = maximum.masked_fill(maximum == -torch.inf, 0.0)  # a block may be masked as a whole
        state.total.mul_((state.maximum - safe).exp_()).add_(score.sub_(safe[:, None]).exp_().sum(1))
        state.maximum = maximum

    def gradient(self, cosine: Tensor, first: int, lse_Q: Tensor, grad_Q: Tensor) -> Tensor:
        row, column, label = self.rule.candidates(first, cosine.shape[1])
        masked = self.rule.leaves(cosine, first)
        masked[row, column] = False
        probability = cosine.div_(self.rule.temperature).sub_(lse_Q[:, None]).exp_().masked_fill_(masked, 0.0)
        probability.index_put_((row, column), -label.to(probability.dtype), accumulate=True)
        return probability.mul_((grad_Q / self.rule.temperature)[:, None])


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QD: Tensor, passage_PD: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        state = RowState.empty(query_QD)
        for block in blocks(passage_PD):
            epilogue.reduce(product(query_QD, passage_PD[block].T), block.start, state)
        lse_Q = state.maximum + state.total.log()
        ctx.save_for_backward(query_QD, passage_PD, lse_Q)
        ctx.epilogue = epilogue
        ctx.mark_non_differentiable(state.masked)
        return (lse_Q - state.target) * epilogue.rule.label_QC.any(1), state.masked

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_QD, passage_PD, lse_Q = ctx.saved_tensors
        needs_query, needs_passage = ctx.needs_input_grad[:2]
        query_grad = torch.zeros_like(query_QD, dtype=lse_Q.dtype) if needs_query else None
        passage_grad = torch.empty_like(passage_PD) if needs_passage else None
        grad_Q = grad_Q * ctx.epilogue.rule.label_QC.any(1)
        for block in blocks(passage_PD):
            cosine = product(query_QD, passage_PD[block].T)
            coefficient = ctx.epilogue.gradient(cosine, block.start, lse_Q, grad_Q).to(passage_PD.dtype)
            if query_grad is not None:
                add_product(query_grad, coefficient, passage_PD[block])
            if passage_grad is not None:
                torch.mm(coefficient.T, query_QD, out=passage_grad[block])
            del cosine, coefficient  # before the next block, and the last cast, ask for theirs
        return None if query_grad is None else query_grad.to(query_QD.dtype), passage_grad, None


def blocks(passage_PD: Tensor) -> list[slice]:
    """The rows of each block."""
    size = PASSAGES_PER_BLOCK[passage_PD.device.type]
    return [slice(first, first + size) for first in range(0, len(passage_PD), size)]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with an fp32 result; on CUDA the library writes it from bf16 factors without a cast."""
    if left.dtype.itemsize >= 4:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place, `total` fp32 (or the factors' fp64): no second matrix of its size."""
    if left.dtype.itemsize < 4 and left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def blocked_loss(query_QD: Tensor, passage_PD: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    """Loss of each query (Q,) fp32, zero for ignored rows, and how many columns left its set (Q,) int64.

    `query_QD` and `passage_PD` are unit vectors of one dtype. Equals `loss.eager_loss`, with its gradient.
    """
    return _Blocked.apply(query_QD, passage_PD, epilogue)
