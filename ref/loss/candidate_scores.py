"""Scores of each query with its own candidates, without a (Q, C, D) copy of the candidates.

The plain form is `candidate_scores` in contrastive.py; tests hold values and gradients of both equal. One candidate
position c of all queries is gathered at a time: memory (Q, D), in forward and in backward.
"""

from typing import Any

import torch
from torch import Tensor


class CandidateScoresFunction(torch.autograd.Function):
    """s_qc = q . p_idx(q, c);   dq = sum_c g_qc p_idx(q, c);   dp_j = sum of g_qc q over all (q, c) with idx = j."""

    @staticmethod
    def forward(ctx: Any, query_QD: Tensor, passage_PD: Tensor, candidate_idx_QC: Tensor) -> Tensor:
        candidate_idx_QC = candidate_idx_QC.clamp(min=0)
        ctx.save_for_backward(query_QD, passage_PD, candidate_idx_QC)
        return torch.stack([(query_QD * passage_PD[idx_Q]).sum(1) for idx_Q in candidate_idx_QC.T], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_QC: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_QD, passage_PD, candidate_idx_QC = ctx.saved_tensors
        needs_query, needs_passage, _ = ctx.needs_input_grad
        query_grad = torch.zeros_like(query_QD) if needs_query else None
        passage_grad = torch.zeros_like(passage_PD) if needs_passage else None
        for idx_Q, grad_Q in zip(candidate_idx_QC.T, grad_QC.T, strict=True):
            if query_grad is not None:
                query_grad.addcmul_(grad_Q[:, None], passage_PD[idx_Q])
            if passage_grad is not None:
                passage_grad.index_add_(0, idx_Q, grad_Q[:, None] * query_QD)
        return query_grad, passage_grad, None
