"""The soft-label contrastive loss on CUDA: both terms of a query in one pass over its scores, in Triton.

    L_i = a_i (log sum_{j in A_i} exp s_ij - s_i,pos) + b_i (log sum_{j in C_i} exp s_ij - sum_{j in C_i} y_ij s_ij)
    dL_i/ds_ij = a_i (exp(s_ij - lse_A) - [j = pos]) + b_i (exp(s_ij - lse_C) - y_ij)        s = Q P^T / temperature

What the columns of one row i contribute (P passages; pos and c are its candidates, x in-batch negatives, m masked):

    column                        x   x   m   pos   c   c   x   m   x
    log sum exp over A_i          +   +       +     +   +   +       +
    log sum exp over C_i                      +     +   +
    s_pos                                     +
    sum y s                                   y     y   y

The matrix products are cuBLAS's, over chunks of passages whose scores stay in the cache (ref/loss/chunked.py).
Between two products one kernel here adds a chunk of scores to the row's statistics (`_update`), another turns it into
the gradient (`_gradient`). One program owns one row of the chunk, so nothing is written twice: there are no atomics,
and two runs agree bit for bit. The false-negative mask is evaluated where it is used: a cosine above the row's
threshold, or the text id of a known positive; candidates are never masked.

Bytes at 4096 queries, 32768 passages, D = 4096, bf16 (vectors 34 and 268 MB): eager code writes and reads the scores,
the mask, the probabilities and their gradient, 537 MB for each fp32 (Q, P) matrix, and keeps 2.1 GB for backward. Here
a chunk of 2048 passages is 34 MB of fp32 scores and 17 MB of bf16 gradient. Saved for backward, in
ref/loss/chunked.py: two log-sum-exps per query, besides the vectors and the targets.

Plain version and oracle: ref/loss/contrastive.py: eager_loss. Source: arXiv 2506.07438; chunks: arXiv 2411.09009.
Letters inside the kernels: i_ program index, o_ offsets, m_ mask, b_ values on the chip.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ref.loss.chunked import LossState, chunked_loss
from ref.loss.contrastive import LossRows, LossTargets

ROW_WARPS = 4  # per row of a chunk; 4 and 8 were equally fast on an H200 (2026-11-26, B7 in benchmarks/RECORDS.md)


@triton.jit
def _masked(
    b_cosine, i_q, o_p, first, count, b_column,
    column_ptr, text_ptr, known_ptr, threshold_ptr,
    candidates, knowns,
):  # fmt: skip
    """False negatives among the columns of a row's chunk, and whether the chunk holds a candidate of the row."""
    m_p = o_p < count
    b_text = tl.load(text_ptr + first + o_p, mask=m_p, other=-2)
    b_masked = (b_cosine > tl.load(threshold_ptr + i_q)) & m_p
    for x in range(knowns):
        b_masked = b_masked | (b_text == tl.load(known_ptr + i_q * knowns + x))
    holds_candidate = tl.max(((b_column >= 0) & (b_column < count)).to(tl.int32), 0) > 0
    if holds_candidate:  # few chunks do
        for c in range(candidates):
            b_masked = b_masked & (o_p != tl.load(column_ptr + i_q * candidates + c) - first)
    return b_masked & m_p, holds_candidate


@triton.jit
def _online_softmax(maximum, total, b_score):
    """Add scores to a running maximum and sum of exp(score - maximum)."""
    new = tl.maximum(maximum, tl.max(b_score, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)  # no column so far
    return new, total * tl.exp(maximum - shift) + tl.sum(tl.exp(b_score - shift), 0)


@triton.jit
def _update(
    cosine_ptr,  # (Q, count) fp32
    column_ptr,  # (Q, C) int64: candidate columns, -1 where there are fewer
    label_ptr,  # (Q, C) fp32
    text_ptr,  # (P,) int32
    known_ptr,  # (Q, X) int32
    threshold_ptr,  # (Q,) fp32
    batch_max_ptr, batch_sum_ptr,  # (Q,) in and out: running log-sum-exp over A
    candidate_max_ptr, candidate_sum_ptr,  # (Q,) in and out: over C
    positive_ptr, label_score_ptr,  # (Q,) in and out: s_pos, sum of y s
    num_masked_ptr,  # (Q,) int64 in and out
    count, first, candidates, knowns, temperature,
    CANDIDATES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0)
    o_p, o_c = tl.arange(0, BLOCK_P), tl.arange(0, CANDIDATES)
    o_row = i_q.to(tl.int64) * count
    inverse = 1.0 / temperature
    b_cosine = tl.load(cosine_ptr + o_row + o_p, mask=o_p < count, other=0.0)
    b_column = tl.load(column_ptr + i_q * candidates + o_c, mask=o_c < candidates, other=-1) - first
    b_masked, holds_candidate = _masked(b_cosine, i_q, o_p, first, count, b_column, column_ptr, text_ptr, known_ptr,
                                        threshold_ptr, candidates, knowns)
    b_score = tl.where(b_masked | (o_p >= count), float("-inf"), b_cosine * inverse)
    maximum, total = _online_softmax(tl.load(batch_max_ptr + i_q), tl.load(batch_sum_ptr + i_q), b_score)
    tl.store(batch_max_ptr + i_q, maximum)
    tl.store(batch_sum_ptr + i_q, total)
    tl.store(num_masked_ptr + i_q, tl.load(num_masked_ptr + i_q) + tl.sum(b_masked.to(tl.int32), 0))
    if holds_candidate:
        m_c = (b_column >= 0) & (b_column < count)
        b_own = tl.load(cosine_ptr + o_row + b_column, mask=m_c, other=0.0) * inverse
        b_label = tl.load(label_ptr + i_q * candidates + o_c, mask=m_c, other=0.0).to(b_own.dtype)
        maximum, total = _online_softmax(tl.load(candidate_max_ptr + i_q), tl.load(candidate_sum_ptr + i_q),
                                         tl.where(m_c, b_own, float("-inf")))
        positive = tl.sum(tl.where(o_c == 0, b_own, 0.0), 0)
        tl.store(candidate_max_ptr + i_q, maximum)
        tl.store(candidate_sum_ptr + i_q, total)
        tl.store(positive_ptr + i_q, tl.load(positive_ptr + i_q) + positive)
        tl.store(label_score_ptr + i_q, tl.load(label_score_ptr + i_q) + tl.sum(b_label * b_own, 0))


@triton.jit
def _gradient(
    cosine_ptr,  # (Q, count) fp32
    column_ptr, label_ptr, text_ptr, known_ptr, threshold_ptr,  # as in _update
    batch_lse_ptr, candidate_lse_ptr,  # (Q,) saved by forward
    grad_contrastive_ptr, grad_soft_label_ptr,  # (Q,) a and b: upstream gradients of the two terms
    out_ptr,  # (Q, count) out: gradient of the cosines, in the dtype of the vectors
    count, first, candidates, knowns, temperature,
    CANDIDATES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0)
    o_p, o_c = tl.arange(0, BLOCK_P), tl.arange(0, CANDIDATES)
    o_row = i_q.to(tl.int64) * count
    inverse = 1.0 / temperature
    grad_contrastive, grad_soft_label = tl.load(grad_contrastive_ptr + i_q), tl.load(grad_soft_label_ptr + i_q)
    b_cosine = tl.load(cosine_ptr + o_row + o_p, mask=o_p < count, other=0.0)
    b_column = tl.load(column_ptr + i_q * candidates + o_c, mask=o_c < candidates, other=-1) - first
    b_masked, holds_candidate = _masked(b_cosine, i_q, o_p, first, count, b_column, column_ptr, text_ptr, known_ptr,
                                        threshold_ptr, candidates, knowns)
    b_g = tl.where(b_masked, 0.0, tl.exp(b_cosine * inverse - tl.load(batch_lse_ptr + i_q))) * grad_contrastive
    if holds_candidate:
        candidate_lse = tl.load(candidate_lse_ptr + i_q)
        for c in range(candidates):
            column = tl.load(column_ptr + i_q * candidates + c) - first
            own = tl.load(cosine_ptr + o_row + column, mask=(column >= 0) & (column < count), other=0.0) * inverse
            label = tl.load(label_ptr + i_q * candidates + c).to(b_g.dtype)
            g = grad_soft_label * (tl.exp(own - candidate_lse) - label) - tl.where(c == 0, grad_contrastive, 0.0)
            b_g += tl.where(o_p == column, g, 0.0)
    tl.store(out_ptr + o_row + o_p, (b_g * inverse).to(out_ptr.dtype.element_ty), mask=o_p < count)


class TritonChunkOps:
    """The operations between two products (ref/loss/chunked.py: ChunkOps), one kernel each."""

    def __init__(self, targets: LossTargets, dtype: torch.dtype) -> None:
        self.targets, self.dtype = targets, dtype  # dtype of the vectors, which the gradient is multiplied with
        index = targets.candidates
        tensors = (index.candidate_idx_QC, targets.label_QC, index.text_id_P.int(), index.known_positive_id_QX.int(),
                   targets.threshold_Q)
        self.tensors = tuple(tensor.contiguous() for tensor in tensors)  # in the order of the kernels' arguments

    def update(self, cosine: Tensor, first: int, state: LossState) -> None:
        """Add a chunk (Q, count) fp32 to the state, in place."""
        self._launch(_update, cosine, first, state.batch.maximum_Q, state.batch.sum_Q, state.candidates.maximum_Q,
                     state.candidates.sum_Q, state.positive_Q, state.label_score_Q, state.num_masked_Q)

    def gradient(
        self, cosine: Tensor, first: int, lse_batch_Q: Tensor, lse_candidates_Q: Tensor, a_Q: Tensor, b_Q: Tensor,
    ) -> Tensor:
        """Gradient of a chunk of cosines, (Q, count)."""
        out = torch.empty_like(cosine, dtype=self.dtype)
        self._launch(_gradient, cosine, first, lse_batch_Q, lse_candidates_Q, a_Q.contiguous(), b_Q.contiguous(), out)
        return out

    def _launch(self, kernel: Any, cosine: Tensor, first: int, *tensors: Tensor) -> None:
        (queries, count), candidates = cosine.shape, self.targets.label_QC.shape[1]
        kernel[(queries,)](
            cosine, *self.tensors, *tensors, count, first, candidates,
            self.targets.candidates.known_positive_id_QX.shape[1], self.targets.temperature,
            CANDIDATES=triton.next_power_of_2(candidates), BLOCK_P=triton.next_power_of_2(count), num_warps=ROW_WARPS)


def triton_loss(
    query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, *, check_values: bool = False,
) -> LossRows:
    """The terms of each query, equal to `eager_loss`, with its gradient.

    Raises ValueError for bad input; for bad numbers on a GPU only with `check_values` (see `check`).
    """
    check(query_QD, passage_PD, targets, values=check_values)
    return chunked_loss(query_QD, passage_PD, targets, TritonChunkOps(targets, passage_PD.dtype))


def check(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, *, values: bool) -> None:
    """Raise ValueError for tensors that the kernels would read wrongly.

    Shapes, dtypes and devices are always checked and cost no synchronisation. Values are checked for tensors on
    a CPU; on a GPU, where reading them synchronises, only with `values`. ref/training/data.py builds them correctly.
    """
    index, floats = targets.candidates, (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if query_QD.ndim != 2 or query_QD.dtype not in floats:
        raise ValueError(f"queries must be (Q, D) of a float type (got {tuple(query_QD.shape)} {query_QD.dtype})")
    if passage_PD.shape[1:] != query_QD.shape[1:] or passage_PD.dtype != query_QD.dtype:
        raise ValueError(f"passages must be (P, {query_QD.shape[1]}) {query_QD.dtype} as the queries "
                         f"(got {tuple(passage_PD.shape)} {passage_PD.dtype})")
    shape = targets.label_QC.shape
    if len(shape) != 2 or len(query_QD) != shape[0]:
        raise ValueError(f"labels must be ({len(query_QD)}, C) (got {tuple(shape)})")
    if index.candidate_idx_QC.shape != shape or index.candidate_idx_QC.dtype != torch.int64:
        raise ValueError(f"candidate columns must be {tuple(shape)} int64 (got {tuple(index.candidate_idx_QC.shape)} "
                         f"{index.candidate_idx_QC.dtype})")
    ids = (index.text_id_P, index.known_positive_id_QX)
    if (ids[0].shape != passage_PD.shape[:1] or ids[1].ndim != 2 or ids[1].shape[:1] != shape[:1]
            or {x.dtype for x in ids} != {torch.int64}):
        raise ValueError(f"text ids must be ({len(passage_PD)},) int64 and known positives ({shape[0]}, X) int64 "
                         f"(got {tuple(ids[0].shape)} {ids[0].dtype} and {tuple(ids[1].shape)} {ids[1].dtype})")
    wide = (torch.float32, torch.float64)
    if targets.threshold_Q.shape != shape[:1] or targets.threshold_Q.dtype not in wide:
        raise ValueError(f"thresholds must be ({shape[0]},) float32 or float64 (got {tuple(targets.threshold_Q.shape)} "
                         f"{targets.threshold_Q.dtype})")
    if targets.label_QC.dtype not in wide:
        raise ValueError(f"labels must be float32 or float64 (got {targets.label_QC.dtype})")
    if not 0 < targets.temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0 (got {targets.temperature})")
    devices = {x.device for x in (query_QD, passage_PD, targets.label_QC, targets.threshold_Q, *vars(index).values())}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device (got {', '.join(sorted(map(str, devices)))})")
    if values or query_QD.device.type == "cpu":
        _check_values(targets, len(passage_PD))


def _check_values(targets: LossTargets, passages: int) -> None:
    column_QC, label_QC = targets.candidates.candidate_idx_QC, targets.label_QC
    sums_Q, sorted_QC = label_QC.sum(1), column_QC.sort(1).values
    ids = torch.cat((targets.candidates.text_id_P, targets.candidates.known_positive_id_QX.flatten()))
    violations = {
        f"candidate columns must lie in 0..{passages - 1}, or be -1": (column_QC >= passages) | (column_QC < -1),
        "each query must have a positive in its first column": column_QC[:, :1] < 0,
        "text ids must fit into 32 bits": ids != ids.int(),
        "a query's candidate columns must differ": (sorted_QC[:, 1:] == sorted_QC[:, :-1]) & (sorted_QC[:, 1:] >= 0),
        "labels must be >= 0": ~(label_QC >= 0),
        "labels must be 0 where there is no candidate": (label_QC > 0) & (column_QC < 0),
        "labels must sum to 1, or all be 0, in each row": ~((sums_Q - 1).abs() <= 1e-3) & (sums_Q != 0),
    }
    found = torch.stack([violation.any() for violation in violations.values()]).tolist()  # one synchronisation
    for rule, is_violated in zip(violations, found, strict=True):
        if is_violated:
            raise ValueError(rule)
