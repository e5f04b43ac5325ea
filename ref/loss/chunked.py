"""The loss of contrastive.py over chunks of passages with a running log-sum-exp: no (Q, P) matrix is ever allocated.

    forward     for each chunk of passages   cosine = Q P^T, s = cosine / temperature
                                             A_i: running maximum and sum of exp over the columns that are not masked
                                             C_i: the same over the candidate columns; s_pos and sum y s are added up
                                             saved, besides the inputs: two log-sum-exps per query
    backward    for each chunk again         s, then with a_i, b_i the gradients of the two terms of query i
                                             g = a (exp(s - lse_A) - onehot) + b (exp(s - lse_C) - y)
                                             dQ += g P / temperature          dP = g^T Q / temperature

The second part of g is zero outside the candidate columns. The products are those of cuBLAS or MKL. The elementwise
work on a chunk of cosines is behind the protocol `ChunkOps`: torch here, two Triton kernels on CUDA
(kernels/soft_contrastive.py).
Memory besides inputs and gradients is a few chunks and dQ in fp32.

The running maximum is needed: with a constant shift of 1 / temperature, exp underflows where all scores of a query are
near -1 / temperature and the temperature is below 0.023.
Source: the online softmax of arXiv 1805.02867; chunks of columns: arXiv 2411.09009.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ref.loss.contrastive import LossRows, LossTargets, at_least_fp32, columns_in_chunk, false_negative_mask

PASSAGES_PER_CHUNK = {"cpu": 1024, "cuda": 2048}  # the scores of a few thousand queries stay in the cache


@dataclass
class OnlineSoftmax:
    """A log-sum-exp over columns that arrive in chunks: running maximum and sum of exp(score - maximum), (Q,) each."""

    maximum_Q: Tensor
    sum_Q: Tensor

    def update(self, cosine_QP: Tensor, temperature: float) -> None:
        """Add the columns of some cosines; -inf adds nothing. Overwrites `cosine_QP`."""
        maximum_Q = torch.maximum(self.maximum_Q, cosine_QP.amax(1) / temperature)
        shift_Q = maximum_Q.masked_fill(maximum_Q == -torch.inf, 0.0)  # no column so far
        added_Q = scaled_sub_(cosine_QP, temperature, shift_Q).exp_().sum(1)
        self.sum_Q.mul_((self.maximum_Q - shift_Q).exp_()).add_(added_Q)
        self.maximum_Q = maximum_Q

    def log_sum_exp(self) -> Tensor:
        """(Q,)."""
        return self.maximum_Q + self.sum_Q.log()


@dataclass
class LossState:
    """What forward keeps of the columns seen so far, (Q,) each."""

    batch: OnlineSoftmax  # over A_i
    candidates: OnlineSoftmax  # over C_i
    positive_Q: Tensor  # score of the positive
    label_score_Q: Tensor  # sum of label * score
    num_masked_Q: Tensor

    @classmethod
    def empty(cls, query_QD: Tensor) -> "LossState":
        """No column seen yet; fp32, or fp64 for fp64 vectors."""
        zero_Q = query_QD.new_zeros(len(query_QD), dtype=torch.promote_types(query_QD.dtype, torch.float32))
        batch, candidates = (OnlineSoftmax(torch.full_like(zero_Q, -torch.inf), zero_Q.clone()) for _ in range(2))
        return cls(batch, candidates, zero_Q.clone(), zero_Q.clone(), zero_Q.to(torch.int64))


class ChunkOps(Protocol):
    """The elementwise work on a chunk of cosines (Q, columns), whose column 0 is passage `first` of the batch.

    Implementations may overwrite `cosine`.
    """

    def update(self, cosine: Tensor, first: int, state: LossState) -> None:
        """Add the chunk to the state."""

    def gradient(
        self, cosine: Tensor, first: int, lse_batch_Q: Tensor, lse_candidates_Q: Tensor, a_Q: Tensor, b_Q: Tensor,
    ) -> Tensor:
        """Gradient of the cosines: g / temperature, zero in masked columns."""


@dataclass
class TorchChunkOps:
    """The operations in torch."""

    targets: LossTargets

    def update(self, cosine: Tensor, first: int, state: LossState) -> None:
        temperature = self.targets.temperature
        masked = false_negative_mask(cosine, self.targets, first)
        column_QC, inside_QC = columns_in_chunk(self.targets.candidates.candidate_idx_QC, first, cosine.shape[1])
        cosine_QC = cosine.gather(1, column_QC)
        state.positive_Q += cosine_QC[:, 0] * inside_QC[:, 0] / temperature
        state.label_score_Q += (self.targets.label_QC * cosine_QC * inside_QC).sum(1) / temperature
        state.num_masked_Q += masked.sum(1)
        state.candidates.update(cosine_QC.masked_fill_(~inside_QC, -torch.inf), temperature)
        state.batch.update(cosine.masked_fill_(masked, -torch.inf), temperature)

    def gradient(
        self, cosine: Tensor, first: int, lse_batch_Q: Tensor, lse_candidates_Q: Tensor, a_Q: Tensor, b_Q: Tensor,
    ) -> Tensor:
        temperature = self.targets.temperature
        masked = false_negative_mask(cosine, self.targets, first)
        column_QC, inside_QC = columns_in_chunk(self.targets.candidates.candidate_idx_QC, first, cosine.shape[1])
        # a candidate outside the chunk has gathered column 0, whose exp may overflow
        cosine_QC = cosine.gather(1, column_QC).masked_fill_(~inside_QC, -torch.inf)
        grad_QC = (scaled_sub_(cosine_QC, temperature, lse_candidates_Q).exp_() - self.targets.label_QC) * b_Q[:, None]
        grad_QC[:, 0] -= a_Q
        probability = scaled_sub_(cosine, temperature, lse_batch_Q).exp_().masked_fill_(masked, 0.0)
        gradient = probability.mul_((a_Q / temperature)[:, None])
        return gradient.scatter_add_(1, column_QC, (grad_QC * inside_QC / temperature).to(gradient.dtype))


def scaled_sub_(cosine: Tensor, temperature: float, shift_Q: Tensor) -> Tensor:
    """cosine / temperature - shift in place: two passes, because one fused pass rounds the product differently."""
    return cosine.div_(temperature).sub_(shift_Q[:, None])


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QD: Tensor, passage_PD: Tensor, ops: ChunkOps) -> tuple[Tensor, Tensor, Tensor]:
        state = LossState.empty(query_QD)
        for chunk in passage_chunks(passage_PD):
            ops.update(matmul_fp32(query_QD, passage_PD[chunk].T), chunk.start, state)
        lse_batch_Q, lse_candidates_Q = state.batch.log_sum_exp(), state.candidates.log_sum_exp()
        ctx.save_for_backward(query_QD, passage_PD, lse_batch_Q, lse_candidates_Q)
        ctx.ops = ops
        ctx.mark_non_differentiable(state.num_masked_Q)
        return lse_batch_Q - state.positive_Q, lse_candidates_Q - state.label_score_Q, state.num_masked_Q

    @staticmethod
    def backward(ctx: Any, a_Q: Tensor, b_Q: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_QD, passage_PD, lse_batch_Q, lse_candidates_Q = ctx.saved_tensors
        needs_query, needs_passage = ctx.needs_input_grad[:2]
        query_grad = torch.zeros_like(query_QD, dtype=lse_batch_Q.dtype) if needs_query else None
        passage_grad = torch.empty_like(passage_PD) if needs_passage else None
        for chunk in passage_chunks(passage_PD):
            cosine = matmul_fp32(query_QD, passage_PD[chunk].T)
            gradient = ctx.ops.gradient(cosine, chunk.start, lse_batch_Q, lse_candidates_Q, a_Q, b_Q)
            gradient = gradient.to(passage_PD.dtype)
            if query_grad is not None:
                addmm_fp32_(query_grad, gradient, passage_PD[chunk])
            if passage_grad is not None:
                torch.mm(gradient.T, query_QD, out=passage_grad[chunk])
            del cosine, gradient  # the next chunk and the last cast need their memory
        return None if query_grad is None else query_grad.to(query_QD.dtype), passage_grad, None


def chunked_loss(
    query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, ops: ChunkOps | None = None,
) -> LossRows:
    """The terms of each query; values and gradients equal `eager_loss`. `ops`: by default TorchChunkOps."""
    return LossRows(*_ChunkedLoss.apply(query_QD, passage_PD, ops or TorchChunkOps(targets)))


def passage_chunks(passage_PD: Tensor) -> list[slice]:
    """The rows of each chunk."""
    size = PASSAGES_PER_CHUNK[passage_PD.device.type]
    return [slice(first, first + size) for first in range(0, len(passage_PD), size)]


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with an fp32 result; on CUDA bf16 factors need no cast."""
    if left.dtype.itemsize < 4 and left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return at_least_fp32(left) @ at_least_fp32(right)


def addmm_fp32_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place, `total` fp32 (or the factors' fp64): no second matrix of its size."""
    if left.dtype.itemsize < 4 and left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
