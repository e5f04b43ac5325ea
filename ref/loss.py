"""The loss: a cross-entropy between soft labels and the model's softmax over the passages a query may see.

With unit vectors q_i, p_j and scores s_ij = q_i . p_j / tau, one function serves both terms:

    L_i = logsumexp_{j in A_i} s_ij  -  sum_{j in C_i} y_ij s_ij

    contrastive   y one-hot at the positive;        A_i = own group and the batch's other passages
    soft label    y_i = softmax(teacher_i / T);     A_i = C_i, the query's own group

Three queries, groups of a positive and one negative (six columns; c a candidate, x a negative from the batch, 0 a
false negative that has left the set):

    query 0    c c x x 0 x
    query 1    x x c c x x
    query 2    0 x x x c c

A column leaves A_i when its cosine exceeds the positive's by more than a margin, or when its text is the query's own
or one of its known positives. A candidate never leaves. The mask is a constant in backward.

Called by run_train.py. Source: arXiv 2506.07438 (both terms; weights and temperatures are not public);
InfoNCE: arXiv 1807.03748; distillation: arXiv 1503.02531; the margin: arXiv 2506.05176.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which passages belong to which query, and which texts are the same. Columns count the passages of the batch."""

    column_QC: Tensor  # int64: the positive's column, then the hard negatives'; -1 where a query has fewer
    text_P: Tensor  # int64: equal numbers for equal texts
    known_QX: Tensor  # int64: numbers of the query's own text and of all its known positives; -1 where fewer


@dataclass(frozen=True)
class LossTerms:
    """A batch's loss (a scalar with a graph) and what it is made of (detached scalars)."""

    total: Tensor
    hard: Tensor  # mean of the contrastive term
    soft: Tensor  # mean of the soft-label term over the rows that have labels
    masked: Tensor  # columns that left their sets as false negatives
    label_entropy: Tensor  # mean over the rows that have labels, in nats


def training_loss(
    query_QD: Tensor, passage_PD: Tensor, groups: Groups, teacher_QC: Tensor, *,
    temperature: float, teacher_temperature: float, hard_weight: float, soft_weight: float,
    in_batch: bool, margin: float | None,
) -> LossTerms:
    """hard_weight * mean contrastive + soft_weight * mean soft label.

    `teacher_QC` (fp32) holds raw teacher scores, column by column as `groups.column_QC`; a row of NaN has no
    labels and takes part in the contrastive term alone.
    """
    one_hot_QC = torch.zeros_like(teacher_QC)
    one_hot_QC[:, 0] = 1.0
    label_QC = soft_labels(teacher_QC, groups.column_QC, teacher_temperature)
    hard_Q, masked_Q = soft_contrastive(
        query_QD, passage_PD, groups, one_hot_QC, temperature=temperature, in_batch=in_batch, margin=margin)
    soft_Q, _ = soft_contrastive(
        query_QD, passage_PD, groups, label_QC, temperature=temperature, in_batch=False, margin=None)
    rows = label_QC.any(1).sum().clamp(min=1)
    hard, soft = hard_Q.mean(), soft_Q.sum() / rows
    entropy = torch.special.entr(label_QC).sum() / rows
    return LossTerms(hard_weight * hard + soft_weight * soft, hard.detach(), soft.detach(), masked_Q.sum(), entropy)


def soft_labels(teacher_QC: Tensor, column_QC: Tensor, teacher_temperature: float) -> Tensor:
    """softmax(teacher / T) over each query's own candidates, (Q, C) fp32; zeros for a row without scores."""
    logit_QC = (teacher_QC / teacher_temperature).masked_fill(column_QC < 0, -torch.inf)
    return torch.nan_to_num(logit_QC.softmax(-1), nan=0.0)


def soft_contrastive(
    query_QD: Tensor, passage_PD: Tensor, groups: Groups, label_QC: Tensor, *,
    temperature: float, in_batch: bool, margin: float | None,
) -> tuple[Tensor, Tensor]:
    """The loss of each query, (Q,) fp32, and how many columns left its set, (Q,) int64.

    `label_QC` are non-negative weights on `groups.column_QC` that sum to one by row; a row of zeros is ignored
    and its loss is zero. `in_batch` adds the batch's other passages to A_i, less the false negatives: cosine above
    the positive's by more than `margin` (None: never), or a text known to be right.
    """
    query_QD, passage_PD = query_QD.float(), passage_PD.float()
    own_QC = groups.column_QC.clamp(min=0)
    if in_batch:
        score_QP = query_QD @ passage_PD.T / temperature
        score_QC = score_QP.gather(1, own_QC)
        masked_QP = false_negatives(score_QP * temperature, groups, margin)
        masked_Q, seen = masked_QP.sum(1), score_QP.masked_fill(masked_QP, -torch.inf)
    else:
        score_QC = torch.einsum("qd,qcd->qc", query_QD, passage_PD[own_QC]) / temperature
        masked_Q, seen = own_QC.new_zeros(len(own_QC)), score_QC.masked_fill(groups.column_QC < 0, -torch.inf)
    loss_Q = seen.logsumexp(1) - (label_QC * score_QC).sum(1)
    return loss_Q * label_QC.any(1), masked_Q


@torch.no_grad()
def false_negatives(cosine_QP: Tensor, groups: Groups, margin: float | None) -> Tensor:
    """Columns that leave A_i, (Q, P) bool: too close to be wrong, or known to be right; never a candidate."""
    own_QC = groups.column_QC.clamp(min=0)
    masked_QP = (groups.text_P[None, :, None] == groups.known_QX[:, None, :]).any(-1)
    if margin is not None:
        masked_QP |= cosine_QP > cosine_QP.gather(1, own_QC[:, :1]) + margin
    return masked_QP.scatter(1, own_QC, False)
