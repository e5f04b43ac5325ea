"""The soft-label contrastive loss without the score matrix, twice: as small as it can be, and as fast.

    L_i = logsumexp_{j in A_i} s_ij - sum_{j in C_i} y_ij s_ij,        s = Q P^T / tau

A_i holds the query's own candidates C_i and the batch's other passages, less the false negatives. The mask is a rule
on (i, j), computed in the tile where it is used: candidate columns, text numbers, and a cosine limit by row.

Bytes at 4096 queries, 32768 passages, D = 4096, bf16 (vectors 34 and 268 MB): eager code writes and reads the scores,
the mask, the probabilities and their gradient, about 537 MB for each fp32 matrix (Q, P), and keeps 2.1 GB. Neither
variant keeps anything of (Q, P): saved for backward is the log-sum-exp, one number a query.

The smallest (`*_small`): everything in the tile.

    forward     a program owns some rows, walks over the columns       running maximum and sum stay on the chip
    backward Q  a program owns rows and a slice of D, walks over columns, scores its tiles again: dQ = g P
    backward P  a program owns columns and a slice of D, walks over rows, scores its tiles again: dP = g^T Q

The fast (`TritonEpilogue`): the products are the library's, over blocks of passages whose scores stay in the cache
(ref/blocked.py), and one kernel here turns a block of scores into row statistics, another into g. One program owns
a row of the block, so nothing is written twice; there are no atomics, and two runs agree bit for bit.

Plain version and oracle: `ref.loss.eager_loss`. Called by ref/loss.py on CUDA. Source: arXiv 2506.07438 (the loss);
the tiling: arXiv 2411.09009. Letters: o_ offsets, m_ mask, b_ values on the chip.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ref.blocked import RowState, Rule, blocked_loss

# rows x columns of a tile and its step along D: nothing spills on sm_80 and sm_90; not tuned for speed
TILE = {"BLOCK_Q": 16, "BLOCK_P": 32, "BLOCK_D": 32, "num_warps": 4}
ROW_WARPS = 4  # that share a row of a block in the fast kernels


@triton.jit
def _load(pointer, o_r, o_d, rows, width, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Rows o_r, columns o_d of a matrix (rows, width); zeros outside."""
    mask = (o_r < rows)[:, None] & (o_d < width)[None, :]
    b = tl.load(pointer + o_r.to(tl.int64)[:, None] * width + o_d[None, :], mask=mask, other=0.0)
    if UPCAST:  # the interpreter computes bf16 wrongly: cast before anything else
        b = b.to(ACC)
    return b


@triton.jit
def _score_tile(
    query_ptr, passage_ptr, o_q, o_p, queries, passages, width,
    ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines of a tile, (BLOCK_Q, BLOCK_P): an inner product that walks along D."""
    b_cosine = tl.zeros((BLOCK_Q, BLOCK_P), ACC)
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = _load(query_ptr, o_q, o_d, queries, width, ACC, UPCAST)
        b_p = _load(passage_ptr, o_p, o_d, passages, width, ACC, UPCAST)
        b_cosine += tl.dot(b_q, tl.trans(b_p), input_precision="ieee", out_dtype=ACC)
    return b_cosine


@triton.jit
def _rule_tile(
    b_cosine, o_q, o_p, queries, passages,
    column_ptr,  # (Q, C) int64
    label_ptr,  # (Q, C)
    text_ptr,  # (P,) int32
    known_ptr,  # (Q, X) int32
    limit_ptr,  # (Q,)
    candidates, knowns, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Labels of a tile and who leaves the set: the rule of ref/blocked.py, for all (i, j) at once."""
    m_q, m_p = o_q < queries, o_p < passages
    b_text = tl.load(text_ptr + o_p, mask=m_p, other=-2)
    b_limit = tl.load(limit_ptr + o_q, mask=m_q, other=float("inf"))
    b_out = b_cosine > b_limit[:, None]
    b_label = tl.zeros((BLOCK_Q, BLOCK_P), b_cosine.dtype)
    b_own = tl.zeros((BLOCK_Q, BLOCK_P), tl.int1)
    for x in range(knowns):
        b_known = tl.load(known_ptr + o_q * knowns + x, mask=m_q, other=-1)
        b_out = b_out | (b_known[:, None] == b_text[None, :])
    for c in range(candidates):
        b_column = tl.load(column_ptr + o_q * candidates + c, mask=m_q, other=-1)
        b_weight = tl.load(label_ptr + o_q * candidates + c, mask=m_q, other=0.0)
        b_hit = b_column[:, None] == o_p[None, :]
        b_own = b_own | b_hit
        b_label += tl.where(b_hit, b_weight[:, None].to(b_cosine.dtype), 0.0)
    return b_label, b_out & (b_own == 0) & m_p[None, :]


def tensors_of(rule: Rule) -> tuple[Tensor, ...]:
    """The rule's tensors in the order of the kernels' arguments, rows without gaps; texts in half their bytes."""
    groups = rule.groups
    tensors = (groups.column_QC, rule.label_QC, groups.text_P.int(), groups.known_QX.int(), rule.limit_Q)
    return tuple(tensor.contiguous() for tensor in tensors)


# ------------------------------------------------------------------------------------------------- the smallest


@triton.jit
def _forward_small(
    query_ptr, passage_ptr,  # (Q, D), (P, D)
    column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # the rule
    lse_ptr, target_ptr, masked_ptr,  # (Q,) out: log-sum-exp, label . score, columns that left
    queries, passages, width, candidates, knowns, temperature,
    ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_max = tl.full((BLOCK_Q,), float("-inf"), ACC)
    b_sum = tl.zeros((BLOCK_Q,), ACC)
    b_target = tl.zeros((BLOCK_Q,), ACC)
    b_masked = tl.zeros((BLOCK_Q,), tl.int32)
    for p in range(0, passages, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_cosine = _score_tile(query_ptr, passage_ptr, o_q, o_p, queries, passages, width,
                               ACC, UPCAST, BLOCK_Q, BLOCK_P, BLOCK_D)
        b_label, b_out = _rule_tile(b_cosine, o_q, o_p, queries, passages, column_ptr, label_ptr, text_ptr, known_ptr,
                                    limit_ptr, candidates, knowns, BLOCK_Q, BLOCK_P)
        b_score = b_cosine / temperature
        b_target += tl.sum(b_label * b_score, 1)
        b_masked += tl.sum(b_out.to(tl.int32), 1)
        b_score = tl.where(b_out | (o_p >= passages)[None, :], float("-inf"), b_score)
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # a tile may be masked as a whole
        b_sum = b_sum * tl.exp(b_max - b_safe) + tl.sum(tl.exp(b_score - b_safe[:, None]), 1)
        b_max = b_new
    m_q = o_q < queries
    tl.store(lse_ptr + o_q, b_max + tl.log(b_sum), mask=m_q)
    tl.store(target_ptr + o_q, b_target, mask=m_q)
    tl.store(masked_ptr + o_q, b_masked, mask=m_q)


@triton.jit
def _coefficient_tile(
    query_ptr, passage_ptr, column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr, lse_ptr, grad_ptr,
    o_q, o_p, queries, passages, width, candidates, knowns, temperature,
    ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g = (exp(s - lse) - y) dL / tau of a tile: its scores computed again, zero outside the set."""
    b_cosine = _score_tile(query_ptr, passage_ptr, o_q, o_p, queries, passages, width,
                           ACC, UPCAST, BLOCK_Q, BLOCK_P, BLOCK_D)
    b_label, b_out = _rule_tile(b_cosine, o_q, o_p, queries, passages, column_ptr, label_ptr, text_ptr, known_ptr,
                                limit_ptr, candidates, knowns, BLOCK_Q, BLOCK_P)
    m_q = o_q < queries
    b_lse = tl.load(lse_ptr + o_q, mask=m_q, other=0.0)
    b_grad = tl.load(grad_ptr + o_q, mask=m_q, other=0.0)
    m_tile = m_q[:, None] & (o_p < passages)[None, :]
    b_exponent = tl.where(m_tile & (b_out == 0), b_cosine / temperature - b_lse[:, None], float("-inf"))
    return (tl.exp(b_exponent) - b_label) * (b_grad / temperature)[:, None]


@triton.jit
def _backward_query_small(
    query_ptr, passage_ptr, column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # as in forward
    lse_ptr, grad_ptr,  # (Q,) kept by forward; incoming gradient
    out_ptr,  # (Q, D) out: dQ
    queries, passages, width, candidates, knowns, temperature,
    ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for p in range(0, passages, BLOCK_P):
        o_p = p + tl.arange(0, BLOCK_P)
        b_g = _coefficient_tile(query_ptr, passage_ptr, column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr, lse_ptr,
                                grad_ptr, o_q, o_p, queries, passages, width, candidates, knowns, temperature,
                                ACC, UPCAST, BLOCK_Q, BLOCK_P, BLOCK_D)
        b_p = _load(passage_ptr, o_p, o_d, passages, width, ACC, True)
        b_dq += tl.dot(b_g, b_p, input_precision="ieee", out_dtype=ACC)
    mask = (o_q < queries)[:, None] & (o_d < width)[None, :]
    o_out = o_q.to(tl.int64)[:, None] * width + o_d[None, :]
    tl.store(out_ptr + o_out, b_dq.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_passage_small(
    query_ptr, passage_ptr, column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # as in forward
    lse_ptr, grad_ptr,  # (Q,) kept by forward; incoming gradient
    out_ptr,  # (P, D) out: dP
    queries, passages, width, candidates, knowns, temperature,
    ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_dp = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    for q in range(0, queries, BLOCK_Q):
        o_q = q + tl.arange(0, BLOCK_Q)
        b_g = _coefficient_tile(query_ptr, passage_ptr, column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr, lse_ptr,
                                grad_ptr, o_q, o_p, queries, passages, width, candidates, knowns, temperature,
                                ACC, UPCAST, BLOCK_Q, BLOCK_P, BLOCK_D)
        b_q = _load(query_ptr, o_q, o_d, queries, width, ACC, True)
        b_dp += tl.dot(tl.trans(b_g), b_q, input_precision="ieee", out_dtype=ACC)
    mask = (o_p < passages)[:, None] & (o_d < width)[None, :]
    o_out = o_p.to(tl.int64)[:, None] * width + o_d[None, :]
    tl.store(out_ptr + o_out, b_dp.to(out_ptr.dtype.element_ty), mask=mask)


class _Small(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        (queries, width), passages = query_QD.shape, len(passage_PD)
        exact = query_QD.dtype == torch.float64
        ctx.constants = {**TILE, "ACC": tl.float64 if exact else tl.float32, "UPCAST": interpreted()}
        ctx.rule = tensors_of(rule)
        candidates, knowns = rule.label_QC.shape[1], rule.groups.known_QX.shape[1]
        ctx.scalars = (queries, passages, width, candidates, knowns, rule.temperature)
        dtype = torch.float64 if exact else torch.float32
        lse_Q, target_Q = (query_QD.new_empty(queries, dtype=dtype) for _ in range(2))
        masked_Q = torch.empty(queries, dtype=torch.int64, device=query_QD.device)
        _forward_small[(triton.cdiv(queries, TILE["BLOCK_Q"]),)](
            query_QD, passage_PD, *ctx.rule, lse_Q, target_Q, masked_Q, *ctx.scalars, **ctx.constants)
        ctx.save_for_backward(query_QD, passage_PD, lse_Q)
        ctx.mark_non_differentiable(masked_Q)
        return (lse_Q - target_Q) * rule.label_QC.any(1), masked_Q

    @staticmethod
    def backward(ctx: Any, grad_Q: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_QD, passage_PD, lse_Q = ctx.saved_tensors
        label_QC = ctx.rule[1]
        grad_Q = (grad_Q * label_QC.any(1)).contiguous()
        results: list[Tensor | None] = []
        for needed, of, kernel, block in zip(
                ctx.needs_input_grad, (query_QD, passage_PD), (_backward_query_small, _backward_passage_small),
                (TILE["BLOCK_Q"], TILE["BLOCK_P"]), strict=False):
            out = torch.empty_like(of) if needed else None
            if out is not None:
                grid = (triton.cdiv(len(of), block), triton.cdiv(of.shape[1], TILE["BLOCK_D"]))
                kernel[grid](query_QD, passage_PD, *ctx.rule, lse_Q, grad_Q, out, *ctx.scalars, **ctx.constants)
            results.append(out)
        return results[0], results[1], None


# ------------------------------------------------------------------------------------------------- the fast


@triton.jit
def _rule_row(
    b_cosine, i_q, o_local, first, count,
    column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # the rule
    candidates, knowns, CANDIDATES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`_rule_tile` for a row of a block. Few blocks hold a candidate of the row: one look at its columns tells."""
    m_p = o_local < count
    b_text = tl.load(text_ptr + first + o_local, mask=m_p, other=-2)
    b_out = (b_cosine > tl.load(limit_ptr + i_q)) & m_p
    for x in range(knowns):
        b_out = b_out | (b_text == tl.load(known_ptr + i_q * knowns + x))
    b_label = tl.zeros((BLOCK_P,), b_cosine.dtype)
    o_c = tl.arange(0, CANDIDATES)
    b_column = tl.load(column_ptr + i_q * candidates + o_c, mask=o_c < candidates, other=-1) - first
    if tl.max(((b_column >= 0) & (b_column < count)).to(tl.int32), 0) > 0:
        for c in range(candidates):
            b_hit = o_local == tl.load(column_ptr + i_q * candidates + c) - first
            b_out = b_out & (b_hit == 0)
            b_label += tl.where(b_hit & m_p, tl.load(label_ptr + i_q * candidates + c).to(b_cosine.dtype), 0.0)
    return b_label, b_out


@triton.jit
def _reduce_block(
    cosine_ptr,  # (Q, count) fp32
    column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # the rule
    max_ptr, sum_ptr, target_ptr, masked_ptr,  # (Q,) in and out: the row's statistics so far
    count, first, candidates, knowns, temperature,
    CANDIDATES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0)
    o_local = tl.arange(0, BLOCK_P)
    m_p = o_local < count
    b_cosine = tl.load(cosine_ptr + i_q.to(tl.int64) * count + o_local, mask=m_p, other=0.0)
    b_label, b_out = _rule_row(b_cosine, i_q, o_local, first, count, column_ptr, label_ptr, text_ptr, known_ptr,
                               limit_ptr, candidates, knowns, CANDIDATES, BLOCK_P)
    b_score = b_cosine * (1.0 / temperature)
    target = tl.load(target_ptr + i_q) + tl.sum(b_label * b_score, 0)
    masked = tl.load(masked_ptr + i_q) + tl.sum(b_out.to(tl.int32), 0)
    b_score = tl.where(b_out | (m_p == 0), float("-inf"), b_score)
    before = tl.load(max_ptr + i_q)
    highest = tl.maximum(before, tl.max(b_score, 0))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # a block may be masked as a whole
    total = tl.load(sum_ptr + i_q) * tl.exp(before - safe) + tl.sum(tl.exp(b_score - safe), 0)
    tl.store(max_ptr + i_q, highest)
    tl.store(sum_ptr + i_q, total)
    tl.store(target_ptr + i_q, target)
    tl.store(masked_ptr + i_q, masked)


@triton.jit
def _gradient_block(
    cosine_ptr,  # (Q, count) fp32
    column_ptr, label_ptr, text_ptr, known_ptr, limit_ptr,  # the rule
    lse_ptr, grad_ptr,  # (Q,)
    out_ptr,  # (Q, count) out: g, in the dtype of the vectors
    count, first, candidates, knowns, temperature,
    CANDIDATES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_q = tl.program_id(0)
    o_local = tl.arange(0, BLOCK_P)
    m_p = o_local < count
    o_row = i_q.to(tl.int64) * count + o_local
    b_cosine = tl.load(cosine_ptr + o_row, mask=m_p, other=0.0)
    b_label, b_out = _rule_row(b_cosine, i_q, o_local, first, count, column_ptr, label_ptr, text_ptr, known_ptr,
                               limit_ptr, candidates, knowns, CANDIDATES, BLOCK_P)
    inverse = 1.0 / temperature
    b_probability = tl.where(b_out, 0.0, tl.exp(b_cosine * inverse - tl.load(lse_ptr + i_q)))
    b_g = (b_probability - b_label) * (tl.load(grad_ptr + i_q) * inverse)
    tl.store(out_ptr + o_row, b_g.to(out_ptr.dtype.element_ty), mask=m_p)


class TritonEpilogue:
    """Between two products of the library: one kernel over the rows of a block of cosines (ref/blocked.py)."""

    def __init__(self, rule: Rule, dtype: torch.dtype) -> None:
        self.rule, self.dtype = rule, dtype  # of the vectors, which multiply the gradient
        self.tensors = tensors_of(rule)

    def reduce(self, cosine: Tensor, first: int, state: RowState) -> None:
        """Add a block (Q, count) fp32 to the row statistics, in place."""
        self._launch(_reduce_block, cosine, first, state.maximum, state.total, state.target, state.masked)

    def gradient(self, cosine: Tensor, first: int, lse_Q: Tensor, grad_Q: Tensor) -> Tensor:
        """(exp(cosine / temperature - lse) - label) * grad / temperature, (Q, count)."""
        out = torch.empty_like(cosine, dtype=self.dtype)
        self._launch(_gradient_block, cosine, first, lse_Q, grad_Q.contiguous(), out)
        return out

    def _launch(self, kernel: Any, cosine: Tensor, first: int, *tensors: Tensor) -> None:
        (queries, count), candidates = cosine.shape, self.rule.label_QC.shape[1]
        kernel[(queries,)](
            cosine, *self.tensors, *tensors, count, first, candidates, self.rule.groups.known_QX.shape[1],
            self.rule.temperature, CANDIDATES=triton.next_power_of_2(candidates),
            BLOCK_P=triton.next_power_of_2(count), num_warps=ROW_WARPS)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def small_loss(
    query_QD: Tensor, passage_PD: Tensor, rule: Rule, *, check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The smallest variant: loss of each query (Q,) and columns that left its set (Q,) int64, as `loss.eager_loss`.

    Raises ValueError for bad input; for bad numbers on a device only with `check_values` (see `check`).
    """
    check(query_QD, passage_PD, rule, values=check_values)
    return _Small.apply(query_QD.contiguous(), passage_PD.contiguous(), rule)


def triton_loss(
    query_QD: Tensor, passage_PD: Tensor, rule: Rule, *, check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The fast variant, with the same results: loss of each query (Q,) and columns that left its set (Q,) int64.

    Raises ValueError for bad input; for bad numbers on a device only with `check_values` (see `check`).
    """
    check(query_QD, passage_PD, rule, values=check_values)
    return blocked_loss(query_QD, passage_PD, TritonEpilogue(rule, passage_PD.dtype))


def check(query_QD: Tensor, passage_PD: Tensor, rule: Rule, *, values: bool) -> None:
    """ValueError for what the kernels would read wrongly.

    Shapes, dtypes and devices are looked at always and cost no wait. The numbers are looked at where they lie on the
    host; on a device that would wait for it once, so only with `values`: data.py builds them right, other callers
    may not.
    """
    groups, floats = rule.groups, (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    expected = "Expected are (Q, D) and (P, D) of one float type on one device"
    if query_QD.ndim != 2 or query_QD.dtype not in floats:
        raise ValueError(f"queries are {tuple(query_QD.shape)} {query_QD.dtype}. {expected}. Convert them.")
    if passage_PD.shape[1:] != query_QD.shape[1:] or passage_PD.dtype != query_QD.dtype:
        raise ValueError(f"passages are {tuple(passage_PD.shape)} {passage_PD.dtype}, queries {tuple(query_QD.shape)} "
                         f"{query_QD.dtype}. {expected}. Convert them.")
    shape = rule.label_QC.shape
    if len(shape) != 2 or len(query_QD) != shape[0]:
        raise ValueError(f"labels are {tuple(shape)} for {len(query_QD)} queries. Expected is (Q, C). "
                         "Give one row a query.")
    if groups.column_QC.shape != shape or groups.column_QC.dtype != torch.int64:
        raise ValueError(f"columns are {tuple(groups.column_QC.shape)} {groups.column_QC.dtype}. "
                         f"Expected is {tuple(shape)} int64.")
    numbers = (groups.text_P, groups.known_QX)
    if (groups.text_P.shape != passage_PD.shape[:1] or groups.known_QX.ndim != 2
            or groups.known_QX.shape[:1] != shape[:1] or {x.dtype for x in numbers} != {torch.int64}):
        raise ValueError(f"texts are {tuple(groups.text_P.shape)} and known texts {tuple(groups.known_QX.shape)}, "
                         f"{groups.text_P.dtype} and {groups.known_QX.dtype}. Expected are ({len(passage_PD)},) and "
                         f"({shape[0]}, X) int64. Give one number a passage and one row a query.")
    wide = (torch.float32, torch.float64)
    if rule.limit_Q.shape != shape[:1] or rule.limit_Q.dtype not in wide or rule.label_QC.dtype not in wide:
        raise ValueError(f"limits are {tuple(rule.limit_Q.shape)} {rule.limit_Q.dtype}, labels {rule.label_QC.dtype}. "
                         f"Expected are ({shape[0]},) and float32. Give one limit a query, inf for none.")
    if not 0 < rule.temperature < float("inf"):
        raise ValueError(f"temperature is {rule.temperature}. Expected is a finite number above 0. Give another.")
    devices = {x.device for x in (query_QD, passage_PD, rule.label_QC, rule.limit_Q, *vars(groups).values())}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {', '.join(map(str, devices))}. Expected is one device. Move them.")
    if values or query_QD.device.type == "cpu":
        _check_values(rule, len(passage_PD))


def _check_values(rule: Rule, passages: int) -> None:
    column_QC, label_QC = rule.groups.column_QC, rule.label_QC
    sums_Q, sorted_QC = label_QC.sum(1), column_QC.sort(1).values
    texts = torch.cat((rule.groups.text_P, rule.groups.known_QX.flatten()))
    faults = {
        "columns lie outside 0..P-1": (column_QC >= passages) | (column_QC < -1),
        "a query has no positive in its first column": column_QC[:, :1] < 0,
        "numbers of texts do not fit into 32 bits": texts != texts.int(),
        "a column stands twice in a row": (sorted_QC[:, 1:] == sorted_QC[:, :-1]) & (sorted_QC[:, 1:] >= 0),
        "labels are negative or NaN": ~(label_QC >= 0),
        "a weight stands where there is no column": (label_QC > 0) & (column_QC < 0),
        "labels do not sum to 1, or all to 0, by row": ~((sums_Q - 1).abs() <= 1e-3) & (sums_Q != 0),
    }
    found = torch.stack([fault.any() for fault in faults.values()]).tolist()  # the one wait
    for fault, is_there in zip(faults, found, strict=True):
        if is_there:
            raise ValueError(f"{fault}. Expected are valid groups and soft labels, as ref/data.py builds them. "
                             "Correct them.")
