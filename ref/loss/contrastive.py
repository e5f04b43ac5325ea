"""The soft-label contrastive loss in plain torch: the definition that the other backends equal.

With unit vectors q_i, p_j and scores s_ij = q_i . p_j / temperature, each query has two terms:

    contrastive    log sum_{j in A_i} exp s_ij  -  s_i,pos                       InfoNCE
    soft label     log sum_{j in C_i} exp s_ij  -  sum_{j in C_i} y_ij s_ij      y_i = softmax(teacher_i / T)

C_i are the query's candidates: its positive and its hard negatives. A_i are the candidates and the other passages of
the batch (in-batch negatives), without false negatives. Both terms are a cross-entropy between labels, one-hot or soft,
and the model's softmax over a set of passages.

Three queries with a positive and one negative each (c candidate, x in-batch negative, . false negative, masked):

    query 0    c c x x . x
    query 1    x x c c x x
    query 2    . x x x c c

An in-batch passage is a false negative if its cosine exceeds the positive's by more than a margin, or if its text is
the query's own or one of its known positives. Candidates are never masked, and the mask is a constant in backward.

Source: arXiv 2506.07438 (both terms; weights and temperatures are not public); InfoNCE: arXiv 1807.03748, equation 4;
distillation: arXiv 1503.02531, section 2; false-negative margin: arXiv 2506.05176.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ref.loss.candidate_scores import CandidateScoresFunction
from ref.utils.fused_by import fused_by


class LossRows(NamedTuple):
    """Both terms of each query, unweighted: one entry per row of the score matrix."""

    contrastive_Q: Tensor  # fp32, or fp64 for fp64 vectors
    soft_label_Q: Tensor  # the same; meaningless for a query without labels, which training_loss gives weight 0
    num_masked_Q: Tensor  # int64: columns masked as false negatives


@dataclass(frozen=True)
class CandidateIndex:
    """Which passages are candidates of which query, and which texts are equal. Columns count the batch's passages."""

    candidate_idx_QC: Tensor  # int64: columns of the positive, then of the hard negatives; -1 where there are fewer
    text_id_P: Tensor  # int64 below 2^31: equal for equal texts
    known_positive_id_QX: Tensor  # int64: text ids of the query's own text and all its known positives; -1: fewer


@dataclass(frozen=True)
class LossTargets:
    """What the loss compares the scores with."""

    candidates: CandidateIndex
    label_QC: Tensor  # fp32 soft labels; rows sum to 1, or to 0 for a query without teacher scores
    threshold_Q: Tensor  # fp32 cosine above which an in-batch passage counts as a false negative; inf: none does
    temperature: float


def eager_loss(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> LossRows:
    """Both terms of each query from the whole score matrix, in fp32 for inputs of any float type, in fp64 for fp64."""
    cosine_QP = at_least_fp32(query_QD) @ at_least_fp32(passage_PD).T
    masked_QP = false_negative_mask(cosine_QP.detach(), targets)
    score_QP = cosine_QP / targets.temperature
    candidate_idx_QC = targets.candidates.candidate_idx_QC
    score_QC = score_QP.gather(1, candidate_idx_QC.clamp(min=0))
    log_sum_exp_Q = score_QP.masked_fill(masked_QP, -torch.inf).logsumexp(1)
    return LossRows(log_sum_exp_Q - score_QC[:, 0], soft_label_term(score_QC, targets), masked_QP.sum(1))


def soft_label_term(score_QC: Tensor, targets: LossTargets) -> Tensor:
    """Cross-entropy of the soft labels against the softmax over each query's own candidates, (Q,)."""
    missing_QC = targets.candidates.candidate_idx_QC < 0
    log_sum_exp_Q = score_QC.masked_fill(missing_QC, -torch.inf).logsumexp(1)
    return log_sum_exp_Q - (targets.label_QC * score_QC.masked_fill(missing_QC, 0.0)).sum(1)


def candidate_loss(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> LossRows:
    """Both terms without in-batch negatives (A_i = C_i): only the (Q, C) scores of the candidates are computed."""
    candidate_idx_QC = targets.candidates.candidate_idx_QC
    score_QC = candidate_scores(at_least_fp32(query_QD), at_least_fp32(passage_PD), candidate_idx_QC)
    score_QC = score_QC / targets.temperature
    log_sum_exp_Q = score_QC.masked_fill(candidate_idx_QC < 0, -torch.inf).logsumexp(1)
    num_masked_Q = torch.zeros_like(candidate_idx_QC[:, 0])
    return LossRows(log_sum_exp_Q - score_QC[:, 0], soft_label_term(score_QC, targets), num_masked_Q)


@fused_by(CandidateScoresFunction)
def candidate_scores(query_QD: Tensor, passage_PD: Tensor, candidate_idx_QC: Tensor) -> Tensor:
    """Dot products of each query with its candidates, (Q, C)."""
    return torch.einsum("qd,qcd->qc", query_QD, passage_PD[candidate_idx_QC.clamp(min=0)])


def soft_labels(teacher_QC: Tensor, candidate_idx_QC: Tensor, teacher_temperature: float) -> Tensor:
    """softmax(teacher / T) over each query's own candidates, (Q, C) fp32; zeros for a query without teacher scores."""
    logit_QC = (teacher_QC / teacher_temperature).masked_fill(candidate_idx_QC < 0, -torch.inf)
    return torch.nan_to_num(logit_QC.softmax(-1), nan=0.0)


def false_negative_threshold(
    query_QD: Tensor, passage_PD: Tensor, candidate_idx_QC: Tensor, margin: float | None,
) -> Tensor:
    """The positive's cosine plus the margin, (Q,) fp32; inf without a margin."""
    with torch.no_grad():
        positive_Q = (query_QD.float() * passage_PD[candidate_idx_QC[:, 0]].float()).sum(1)
        return torch.full_like(positive_Q, torch.inf) if margin is None else positive_Q + margin


def false_negative_mask(cosine_QP: Tensor, targets: LossTargets, first: int = 0) -> Tensor:
    """True where a column is excluded from the denominator, (Q, P) bool.

    `first`: index in the batch of the passage in column 0, if the columns are a chunk of the passages.
    """
    index, count = targets.candidates, cosine_QP.shape[1]
    text_id_P = index.text_id_P[first : first + count].int()  # half the memory traffic of int64
    masked = cosine_QP > targets.threshold_Q[:, None]
    for known_positive_id_Q in index.known_positive_id_QX.T.int():
        masked |= text_id_P == known_positive_id_Q[:, None]
    column_QC, inside_QC = columns_in_chunk(index.candidate_idx_QC, first, count)
    query, place = inside_QC.nonzero(as_tuple=True)
    masked[query, column_QC[query, place]] = False  # candidates are never masked
    return masked


def columns_in_chunk(candidate_idx_QC: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """For each candidate its column in the chunk (0 if it is outside) and whether it is inside, (Q, C) each.

    The chunk is the `count` passages from `first` on.
    """
    inside_QC = (candidate_idx_QC >= first) & (candidate_idx_QC < first + count)
    return (candidate_idx_QC - first).where(inside_QC, 0), inside_QC


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 as fp32; wider types unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x
