"""What training calls: both loss terms of a batch, weighted and averaged, by the backend of the device.

    batch                    backend    contrastive term              soft-label term              memory besides inputs
    in-batch negatives       eager      from the score matrix         gathered from it             several (Q, P)
                             chunked    running log-sum-exp           a second one, same pass      one chunk of columns
                             triton     the same, one kernel a chunk  the same kernel              one chunk of columns
    own candidates only      all        from the (Q, C) scores        from the same scores         (Q, D)

eager: contrastive.py, chunked: chunked.py, triton: kernels/soft_contrastive.py. All compute one function of each query,

    L_i = a_i (log sum_{A_i} exp s - s_pos) + b_i (log sum_{C_i} exp s - sum_{C_i} y s)

with a_i = contrastive weight / number of queries, b_i = soft-label weight / number of queries with labels, and b_i = 0
for a query without labels. Source: arXiv 2506.07438; the weights are not public.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ref.loss.chunked import chunked_loss
from ref.loss.contrastive import (
    CandidateIndex,
    LossRows,
    LossTargets,
    candidate_loss,
    eager_loss,
    false_negative_threshold,
    soft_labels,
)
from ref.utils.device import Backend


@dataclass(frozen=True)
class LossTerms:
    """The loss of a batch, a scalar with a graph, and what it consists of, detached scalars."""

    total: Tensor
    contrastive: Tensor  # mean over the queries
    soft_label: Tensor  # mean over the queries with labels
    num_masked: Tensor  # columns masked as false negatives
    label_entropy: Tensor  # mean over the queries with labels, in nats


def training_loss(
    query_QD: Tensor, passage_PD: Tensor, candidates: CandidateIndex, teacher_QC: Tensor, *,
    temperature: float, teacher_temperature: float, contrastive_weight: float, soft_label_weight: float,
    in_batch_negatives: bool, false_negative_margin: float | None, backend: Backend = "eager",
    global_counts: tuple[int, int] | None = None,
) -> LossTerms:
    """contrastive_weight * mean contrastive term + soft_label_weight * mean soft-label term.

    `teacher_QC` (fp32): raw teacher scores, column by column as `candidates.candidate_idx_QC`; a row of NaN has no
    labels and takes part in the contrastive term alone. `global_counts`: queries of the whole batch, and those with
    labels, where the given rows are one rank's shard; the terms then sum to the batch's means over the ranks.
    """
    label_QC = soft_labels(teacher_QC, candidates.candidate_idx_QC, teacher_temperature)
    has_labels_Q = label_QC.any(1)
    queries, labelled = global_counts or (len(query_QD), has_labels_Q.sum())
    mean_Q = torch.full_like(label_QC[:, 0], 1 / queries)
    labelled_mean_Q = has_labels_Q / (torch.as_tensor(labelled).clamp(min=1))
    rows = soft_contrastive(
        query_QD, passage_PD, candidates, label_QC, temperature=temperature, in_batch_negatives=in_batch_negatives,
        false_negative_margin=false_negative_margin, backend=backend)
    a_Q, b_Q = contrastive_weight * mean_Q, soft_label_weight * labelled_mean_Q
    total = (a_Q * rows.contrastive_Q + b_Q * rows.soft_label_Q).sum()
    with torch.no_grad():
        contrastive, soft_label = (mean_Q * rows.contrastive_Q).sum(), (labelled_mean_Q * rows.soft_label_Q).sum()
        entropy = (labelled_mean_Q[:, None] * torch.special.entr(label_QC)).sum()
    return LossTerms(total, contrastive, soft_label, rows.num_masked_Q.sum(), entropy)


def soft_contrastive(
    query_QD: Tensor, passage_PD: Tensor, candidates: CandidateIndex, label_QC: Tensor, *,
    temperature: float, in_batch_negatives: bool, false_negative_margin: float | None, backend: Backend = "eager",
    check_values: bool = False,
) -> LossRows:
    """Both terms of each query, unweighted: calls the implementation that `backend` names.

    `query_QD`, `passage_PD`: unit vectors of one float type. `label_QC` (fp32): non-negative, rows sum to 1 or to 0.
    Without `in_batch_negatives` both terms see the query's own candidates only. `false_negative_margin`: None never
    masks by cosine. The backend "triton" raises ValueError for tensors that its kernels would read wrongly; with
    `check_values` also for wrong numbers on a GPU, which waits for it.
    """
    threshold_Q = false_negative_threshold(query_QD, passage_PD, candidates.candidate_idx_QC, false_negative_margin)
    targets = LossTargets(candidates, label_QC, threshold_Q, temperature)
    if not in_batch_negatives:
        return candidate_loss(query_QD, passage_PD, targets)
    if backend == "eager":
        return eager_loss(query_QD, passage_PD, targets)
    if backend == "chunked":
        return chunked_loss(query_QD, passage_PD, targets)
    from ref.kernels.soft_contrastive import triton_loss

    return triton_loss(query_QD, passage_PD, targets, check_values=check_values)
