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
or one of its known positives. A candidate never leaves. The mask is a constant in backward. `Groups` (whose columns)
and `Rule` (labels, and who leaves) open the next page, blocked.py.

Called by trainer.py. Source: arXiv 2506.07438 (both terms; weights and temperatures are not public);
InfoNCE: arXiv 1807.03748; distillation: arXiv 1503.02531; the margin: arXiv 2506.05176.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ref.blocked import Groups, Rule, TorchEpilogue, blocked_loss
from ref.config import Kernels


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
    in_batch: bool, margin: float | None, kernels: Kernels = "eager", whole: tuple[int, int] | None = None,
) -> LossTerms:
    """hard_weight * mean contrastive + soft_weight * mean soft label.

    `teacher_QC` (fp32) holds raw teacher scores, column by column as `groups.column_QC`; a row of NaN has no
    labels and takes part in the contrastive term alone. `whole`: queries of the whole batch, and those with labels,
    where the rows given are one process's share of it; the terms then are shares of the batch's means.
    """
    one_hot_QC = torch.zeros_like(teacher_QC)
    one_hot_QC[:, 0] = 1.0
    label_QC = soft_labels(teacher_QC, groups.column_QC, teacher_temperature)
    hard_Q, masked_Q = soft_contrastive(
        query_QD, passage_PD, groups, one_hot_QC, temperature=temperature, in_batch=in_batch, margin=margin,
        kernels=kernels)
    soft_Q, _ = soft_contrastive(
        query_QD, passage_PD, groups, label_QC, temperature=temperature, in_batch=False, margin=None)
    queries = whole[0] if whole else len(query_QD)
    rows = max(1, whole[1]) if whole else label_QC.any(1).sum().clamp(min=1)
    hard, soft = hard_Q.sum() / queries, soft_Q.sum() / rows
    entropy = torch.special.entr(label_QC).sum() / rows
    return LossTerms(hard_weight * hard + soft_weight * soft, hard.detach(), soft.detach(), masked_Q.sum(), entropy)


def soft_labels(teacher_QC: Tensor, column_QC: Tensor, teacher_temperature: float) -> Tensor:
    """softmax(teacher / T) over each query's own candidates, (Q, C) fp32; zeros for a row without scores."""
    logit_QC = (teacher_QC / teacher_temperature).masked_fill(column_QC < 0, -torch.inf)
    return torch.nan_to_num(logit_QC.softmax(-1), nan=0.0)


def soft_contrastive(
    query_QD: Tensor, passage_PD: Tensor, groups: Groups, label_QC: Tensor, *,
    temperature: float, in_batch: bool, margin: float | None, kernels: Kernels | Literal["small"] = "eager",
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of each query, (Q,) fp32, and how many columns left its set, (Q,) int64.

    `label_QC` are non-negative weights on `groups.column_QC` that sum to one by row; a row of zeros is ignored
    and its loss is zero. `in_batch` adds the batch's other passages to A_i, less the false negatives: cosine above
    the positive's by more than `margin` (None: never), or a text known to be right.

    `kernels` says who computes the loss over a batch, with equal results: "eager" (the plain page below), "blocked"
    (blocks of passages in torch), "triton" or "small" (Triton, fast or short). Without `in_batch` all are the same:
    (Q, C) scores of each query's own candidates (`own_loss`).

    Raises ValueError for tensors that the Triton kernels would read wrongly; with `check_values` also for wrong numbers
    on a device, which waits for it once.
    """
    if not in_batch:
        return own_loss(query_QD, passage_PD, groups, label_QC, temperature)
    with torch.no_grad():
        positive_Q = (query_QD.float() * passage_PD[groups.column_QC[:, 0]].float()).sum(1)
        limit_Q = torch.full_like(positive_Q, torch.inf) if margin is None else positive_Q + margin
    rule = Rule(groups, label_QC, limit_Q, temperature)
    if kernels == "eager":
        return eager_loss(query_QD, passage_PD, rule)
    if kernels == "blocked":
        return blocked_loss(query_QD, passage_PD, TorchEpilogue(rule))
    from ref.kernels.soft_contrastive import small_loss, triton_loss

    return {"small": small_loss, "triton": triton_loss}[kernels](query_QD, passage_PD, rule, check_values=check_values)


def own_loss(
    query_QD: Tensor, passage_PD: Tensor, groups: Groups, label_QC: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:
    """`soft_contrastive` where A_i = C_i: (Q, C) scores, from the gathered candidates."""
    candidate_QCD = passage_PD[groups.column_QC.clamp(min=0)].float()
    score_QC = torch.einsum("qd,qcd->qc", query_QD.float(), candidate_QCD) / temperature
    lse_Q = score_QC.masked_fill(groups.column_QC < 0, -torch.inf).logsumexp(1)
    loss_Q = lse_Q - (label_QC * score_QC).sum(1)
    return loss_Q * label_QC.any(1), torch.zeros_like(groups.column_QC[:, 0])


def eager_loss(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The loss over the batch, plainly: every score, the mask, a log-sum-exp. The oracle of the faster ones."""
    cosine_QP = query_QD.float() @ passage_PD.float().T
    label_QP, own_QP = rule.label_block(0, len(passage_PD))
    masked_QP = rule.leaves(cosine_QP.detach(), 0).masked_fill(own_QP, False)
    score_QP = cosine_QP / rule.temperature
    lse_Q = score_QP.masked_fill(masked_QP, -torch.inf).logsumexp(1)
    loss_Q = lse_Q - (label_QP * score_QP).sum(1)
    return loss_Q * rule.label_QC.any(1), masked_QP.sum(1)
