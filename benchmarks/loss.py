"""B7: the soft-label contrastive loss, forward and backward, against eager torch, torch.compile, Liger and a loop.

    cuda    4096 queries x 32,768 passages, width 4096, bf16        cpu    1024 x 8192, width 256, fp32

    both terms          the contrastive term over the batch and the soft-label term over each query's eight candidates,
                        false negatives masked by margin and by text; peers: the eager backend, its fastest form
                        ("torch eager"), torch.compile
    contrastive term    the same function, without the soft-label term; peers: also Liger's fused linear cross-entropy
                        and sentence-transformers' loop, which have no mask and are checked without it
    training steps      both terms on fp32 embeddings of 512 queries x 4096 passages, and of 4096 x 32,768
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, Target, Timing, check_errors, measure, relative_error
from ref.loss.chunked import chunked_loss
from ref.loss.contrastive import CandidateIndex, LossRows, LossTargets, eager_loss, soft_label_term

TEMPERATURE, MARGIN, CANDIDATES = 0.02, 0.1, 8
LIGER, LOOP = "Liger, contrastive term", "sentence-transformers' loop, contrastive term"
Loss = Callable[[Tensor, Tensor, LossTargets], Tensor]
Inputs = tuple[Tensor, Tensor, LossTargets]


def random_inputs(queries: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Unit vectors and targets: each positive close to its query, some false negatives by margin and by text."""
    passages = queries * CANDIDATES
    generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31)
    normal = partial(torch.randn, device=device, generator=generator)
    query_QD = F.normalize(normal(queries, width), dim=1)
    passage_PD = F.normalize(normal(passages, width), dim=1)
    candidate_idx_QC = torch.arange(passages, device=device).view(queries, CANDIDATES)
    positive_Q = candidate_idx_QC[:, 0]
    passage_PD[positive_Q] = F.normalize(query_QD + 1.5 * passage_PD[positive_Q], dim=1)
    passage_PD[candidate_idx_QC[:-1, 1]] = query_QD[1:]  # a hard negative of each query equals the next query
    text_id_P = torch.arange(passages, device=device) % (passages - 7)
    known_positive_id_QX = torch.stack((text_id_P[positive_Q], text_id_P.roll(5)[positive_Q]), 1)
    label_QC = (normal(queries, CANDIDATES) * 2).softmax(1)
    query_QD, passage_PD = query_QD.to(dtype), passage_PD.to(dtype)
    threshold_Q = (query_QD.float() * passage_PD[positive_Q].float()).sum(1) + MARGIN
    index = CandidateIndex(candidate_idx_QC, text_id_P, known_positive_id_QX)
    return query_QD, passage_PD, LossTargets(index, label_QC, threshold_Q, TEMPERATURE)


def first_queries(inputs: Inputs, count: int) -> Inputs:
    """The first queries, their candidates and targets."""
    query_QD, passage_PD, targets = inputs
    passages, index = count * CANDIDATES, targets.candidates
    part = CandidateIndex(index.candidate_idx_QC[:count], index.text_id_P[:passages],
                          index.known_positive_id_QX[:count])
    return query_QD[:count], passage_PD[:passages], LossTargets(
        part, targets.label_QC[:count], targets.threshold_Q[:count], TEMPERATURE)


def without_mask(targets: LossTargets) -> LossTargets:
    """The same targets without false negatives: equal to Liger and sentence-transformers in the contrastive term."""
    index = targets.candidates
    no_masked_text = CandidateIndex(index.candidate_idx_QC, torch.full_like(index.text_id_P, -2),
                                    index.known_positive_id_QX[:, :0])
    return LossTargets(no_masked_text, targets.label_QC, torch.full_like(targets.threshold_Q, torch.inf), TEMPERATURE)


# ---- ours and the peers ------------------------------------------------------------------------------------


def both_terms(rows: LossRows) -> Tensor:
    """The mean of both terms, equally weighted."""
    return rows.contrastive_Q.mean() + rows.soft_label_Q.mean()


def contrastive_term(rows: LossRows) -> Tensor:
    """The mean of the contrastive term."""
    return rows.contrastive_Q.mean()


def ours(
    query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, mean: Callable[[LossRows], Tensor] = both_terms,
) -> Tensor:
    """The loss by the default backend of the device."""
    if query_QD.device.type == "cpu":
        return mean(chunked_loss(query_QD, passage_PD, targets))
    from ref.kernels.soft_contrastive import triton_loss

    return mean(triton_loss(query_QD, passage_PD, targets))


def eager(
    query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, mean: Callable[[LossRows], Tensor] = both_terms,
) -> Tensor:
    """`eager_loss` at its fastest: the product in the dtype of the vectors, the mask in place."""
    index = targets.candidates
    cosine_QP = (query_QD @ passage_PD.T).float()
    masked_QP = cosine_QP.detach() > targets.threshold_Q[:, None]
    for known_positive_id_Q in index.known_positive_id_QX.T:
        masked_QP |= index.text_id_P == known_positive_id_Q[:, None]
    masked_QP.scatter_(1, index.candidate_idx_QC, False)
    score_QP = cosine_QP / targets.temperature
    score_QC = score_QP.gather(1, index.candidate_idx_QC)
    log_sum_exp_Q = score_QP.masked_fill(masked_QP, -torch.inf).logsumexp(1)
    return mean(LossRows(log_sum_exp_Q - score_QC[:, 0], soft_label_term(score_QC, targets), masked_QP))


def liger_loss() -> Loss | str:
    """Liger's fused linear cross-entropy with the passages as vocabulary and query / temperature as hidden state."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "liger-kernel is not installed"
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda query_QD, passage_PD, targets: loss(
        passage_PD, query_QD / targets.temperature, targets.candidates.candidate_idx_QC[:, 0])


def sentence_transformers_loss() -> Loss | str:
    """CachedMultipleNegativesRankingLoss on given vectors: its loop over rows of the score matrix."""
    try:
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss as Cached
    except ImportError:
        return "sentence-transformers is not installed"
    no_model: Any = torch.nn.Sequential(torch.nn.Identity())
    loss: Any = Cached(no_model, scale=1 / TEMPERATURE, mini_batch_size=1024)

    def call(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> Tensor:
        columns = passage_PD.view(len(query_QD), CANDIDATES, -1).unbind(1)  # views: one column of texts per candidate
        return loss.calculate_loss([[query_QD], *([column] for column in columns)])
    return call


# ---- check and measure -------------------------------------------------------------------------------------


def gradients(loss: Loss, query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients: one forward and backward pass."""
    query_QD, passage_PD = query_QD.detach().requires_grad_(), passage_PD.detach().requires_grad_()
    value = loss(query_QD, passage_PD, targets)
    value.backward()
    assert query_QD.grad is not None and passage_PD.grad is not None
    return value.detach(), query_QD.grad, passage_PD.grad


def error(loss: Loss, truth: tuple[Tensor, ...], inputs: Inputs) -> float:
    """The largest relative error of loss and gradients; `truth` without gradients compares the loss alone."""
    return max(relative_error(a, b) for a, b in zip(gradients(loss, *inputs), truth, strict=False))


def true_gradients(inputs: Inputs, mean: Callable[[LossRows], Tensor] = both_terms) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `eager_loss`, in fp32."""
    return gradients(lambda *given: mean(eager_loss(*given)), inputs[0].float(), inputs[1].float(), inputs[2])


def check(inputs: Inputs, peers: dict[str, Loss | str]) -> dict[str, float]:
    """Compare ours and the peers with `eager_loss` in fp32, and two runs of ours bit for bit; RuntimeError if wrong."""
    cuda, few = inputs[0].is_cuda, first_queries(inputs, len(inputs[0]) // 4)  # the fp32 scores must fit
    truth = true_gradients(few)
    own, eager_error = error(ours, truth, few), error(eager, truth, few)
    bound = 1.2 * eager_error if cuda else 1e-5
    errors = {"ours against eager_loss in fp32": own}
    check_errors(errors, bound)
    errors["torch eager against eager_loss in fp32"] = eager_error
    unmasked = few[0], few[1], without_mask(few[2])
    unmasked_truth = true_gradients(unmasked, contrastive_term)
    for name, peer in peers.items():
        if isinstance(peer, str):
            continue
        if name == "torch.compile":
            errors[f"{name} against eager_loss in fp32"] = error(peer, truth, few)
        else:  # the loop normalises its vectors itself, so that its gradients differ
            compared = unmasked_truth[:1] if name == LOOP else unmasked_truth
            errors[f"{name} without mask, against eager_loss in fp32"] = error(peer, compared, unmasked)
    check_errors(errors, 5e-2 if cuda else 1e-5)  # in bf16 the peers' own rounding
    runs = [gradients(ours, *inputs) for _ in range(2)]
    if not all(torch.equal(one, other) for one, other in zip(*runs, strict=True)):
        raise RuntimeError("ours: two runs must agree bit for bit (they differ); nothing is timed")
    return errors


def b7(device: torch.device, *, quick: bool = False) -> Result:
    """Check, then measure all variants."""
    cuda = device.type == "cuda"
    queries, width = (4096, 4096) if cuda else (1024, 256)
    if quick:
        queries, width = queries // 8, width // 4
    dtype = torch.bfloat16 if cuda else torch.float32
    inputs = random_inputs(queries, width, device=device, dtype=dtype)
    peers: dict[str, Loss | str] = {"torch.compile": torch.compile(eager) if cuda else "GPU only",
                                    LIGER: liger_loss() if cuda else "GPU only", LOOP: sentence_transformers_loss()}
    checks = check(inputs, peers)
    calls: dict[str, Loss | str] = {
        "ours": ours, "torch eager": eager, "eager backend": lambda *given: both_terms(eager_loss(*given)),
        "torch.compile": peers.pop("torch.compile"),
        "ours, contrastive term": partial(ours, mean=contrastive_term),
        "torch eager, contrastive term": partial(eager, mean=contrastive_term), **peers}
    timings = measure(
        {name: loss if isinstance(loss, str) else partial(gradients, loss, *inputs) for name, loss in calls.items()},
        device=device, rounds=5 if quick else 20 if cuda else 15)
    gradient_bytes = queries * (1 + CANDIDATES) * width * dtype.itemsize
    beyond = {name: t.peak_bytes - gradient_bytes for name, t in timings.items() if not t.missing}
    figures = {f"{name}, MB beyond inputs and gradients": value / 1e6 for name, value in beyond.items()}
    figures["torch eager / ours, time"] = timings["torch eager"].median_s / timings["ours"].median_s
    targets = {} if quick else gpu_targets(timings, beyond) if cuda else cpu_targets(timings)
    for count in (64, 512) if quick else (512, 4096):
        timings |= measure_training_step(count, width, device, with_eager=count <= queries)
    shape = {"queries": queries, "passages": queries * CANDIDATES, "width": width, "dtype": str(dtype)[6:]}
    return Result("B7", shape, timings, checks, targets, figures)


def measure_training_step(count: int, width: int, device: torch.device, *, with_eager: bool) -> dict[str, Timing]:
    """Both terms as in training, on fp32 embeddings of `count` queries and their candidates."""
    inputs = random_inputs(count, width, device=device, dtype=torch.float32)
    calls = {"ours": ours, "torch eager": eager} if with_eager else {"ours": ours}
    return measure({f"{name}, {count} x {count * CANDIDATES} in fp32": partial(gradients, loss, *inputs)
                    for name, loss in calls.items()}, device=device, rounds=5)


def cpu_targets(timings: dict[str, Timing]) -> dict[str, Target]:
    """Both terms: time and peak memory, gradients included."""
    own, peer = timings["ours"], timings["eager backend"]
    return {"eager backend / ours, time": (peer.median_s / own.median_s, ">=", 1.5),
            "ours / eager backend, peak memory beyond inputs": (own.peak_bytes / peer.peak_bytes, "<=", 0.25)}


def gpu_targets(timings: dict[str, Timing], beyond: dict[str, int]) -> dict[str, Target]:
    """Both terms: time and memory; the contrastive term: time against Liger."""
    own, peer, liger = timings["ours"], timings["torch eager"], timings[LIGER]
    targets: dict[str, Target] = {
        "torch eager / ours, time": (peer.median_s / own.median_s, ">=", 1.2),
        "ours, ms": (1000 * own.median_s, "<=", 6.4),
        "ours, GB beyond inputs and gradients": (beyond["ours"] / 1e9, "<=", 0.1)}
    if not liger.missing:
        ratio = liger.median_s / timings["ours, contrastive term"].median_s
        targets[f"{LIGER} / ours, time"] = (ratio, ">=", 1.0)
    return targets
