"""B7: the soft-label contrastive loss, forward and backward, against eager torch, torch.compile, Liger and a loop.

    cuda    4096 queries x 32,768 passages x 4096, bf16        cpu    1024 x 8192 x 256, fp32

Eight candidates a row with soft labels, the batch's other passages as negatives, false negatives masked by margin and
by text. The eager peer computes the same: one score matrix, a mask, a log-sum-exp, labels gathered from their columns.
Liger's fused linear cross-entropy and sentence-transformers' loop know hard labels only and no mask, so they do less;
they are checked against ours on hard labels without a mask.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, Target, agree, difference, measure
from ref.loss import Groups, Rule, TorchEpilogue, blocked_loss

TEMPERATURE, MARGIN, CANDIDATES = 0.02, 0.1, 8
Loss = Callable[[Tensor, Tensor, Rule], Tensor]


def case(queries: int, width: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Rule]:
    """Unit vectors and a rule: the positive close to its query, some false negatives by margin and by text."""
    passages = queries * CANDIDATES
    draw = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31)
    random = lambda *shape: torch.randn(*shape, device=device, generator=draw)  # noqa: E731
    query_QD = F.normalize(random(queries, width), dim=1)
    passage_PD = F.normalize(random(passages, width), dim=1)
    column_QC = torch.arange(passages, device=device).view(queries, CANDIDATES)
    passage_PD[column_QC[:, 0]] = F.normalize(query_QD + 1.5 * passage_PD[column_QC[:, 0]], dim=1)
    passage_PD[column_QC[:-1, 1]] = query_QD[1:]  # a hard negative of one query is the next query itself
    text_P = torch.arange(passages, device=device) % (passages - 7)
    known_QX = torch.stack((text_P[column_QC[:, 0]], text_P.roll(5)[column_QC[:, 0]]), 1)
    label_QC = (random(queries, CANDIDATES) * 2).softmax(1)
    query_QD, passage_PD = query_QD.to(dtype), passage_PD.to(dtype)
    limit_Q = (query_QD.float() * passage_PD[column_QC[:, 0]].float()).sum(1) + MARGIN
    return query_QD, passage_PD, Rule(Groups(column_QC, text_P, known_QX), label_QC, limit_Q, TEMPERATURE)


def hard(rule: Rule) -> Rule:
    """The rule with one-hot labels and without a mask: what the other peers compute."""
    label_QC = torch.zeros_like(rule.label_QC)
    label_QC[:, 0] = 1.0
    groups = Groups(rule.groups.column_QC, torch.full_like(rule.groups.text_P, -2), rule.groups.known_QX[:, :0])
    return Rule(groups, label_QC, torch.full_like(rule.limit_Q, torch.inf), rule.temperature)


def eager(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> Tensor:
    """The loss as one writes it: every score in memory, products in the dtype of the vectors."""
    groups = rule.groups
    cosine_QP = (query_QD @ passage_PD.T).float()
    leaves_QP = cosine_QP.detach() > rule.limit_Q[:, None]
    for known_Q in groups.known_QX.T:
        leaves_QP |= groups.text_P == known_Q[:, None]
    leaves_QP.scatter_(1, groups.column_QC, False)
    score_QP = cosine_QP / rule.temperature
    target_Q = (rule.label_QC * score_QP.gather(1, groups.column_QC)).sum(1)
    return (score_QP.masked_fill(leaves_QP, -torch.inf).logsumexp(1) - target_Q).mean()


def ours(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> Tensor:
    """What training calls on this device."""
    if query_QD.device.type == "cpu":
        return blocked_loss(query_QD, passage_PD, TorchEpilogue(rule))[0].mean()
    from ref.kernels.soft_contrastive import triton_loss

    return triton_loss(query_QD, passage_PD, rule)[0].mean()


def small(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> Tensor:
    """The smallest kernels, which have no speed target."""
    from ref.kernels.soft_contrastive import small_loss

    return small_loss(query_QD, passage_PD, rule)[0].mean()


def liger() -> Loss | str:
    """Fused linear cross-entropy: the passages are the vocabulary, the query over tau is the hidden state."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "liger-kernel is not installed"
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda q, p, rule: loss(p, q / rule.temperature, rule.groups.column_QC[:, 0])


def loop() -> Loss | str:
    """sentence-transformers' CachedMultipleNegativesRankingLoss on given vectors: its loop over the score matrix."""
    try:
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss as Cached
    except ImportError:
        return "sentence-transformers is not installed"
    no_model: Any = torch.nn.Sequential(torch.nn.Identity())
    loss: Any = Cached(no_model, scale=1 / TEMPERATURE, mini_batch_size=1024)

    def call(query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> Tensor:
        columns = passage_PD.view(len(query_QD), CANDIDATES, -1).unbind(1)  # views: it has them as texts of its own
        return loss.calculate_loss([[query_QD], *([column] for column in columns)])
    return call


def gradients(loss: Loss, query_QD: Tensor, passage_PD: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients: one forward and backward."""
    query_QD, passage_PD = query_QD.detach().requires_grad_(), passage_PD.detach().requires_grad_()
    value = loss(query_QD, passage_PD, rule)
    value.backward()
    assert query_QD.grad is not None and passage_PD.grad is not None
    return value.detach(), query_QD.grad, passage_PD.grad


def differences(loss: Loss, truth: tuple[Tensor, ...], *inputs: Any) -> float:
    """The largest difference of loss and gradients from `truth`."""
    return max(difference(a, b) for a, b in zip(gradients(loss, *inputs), truth, strict=True))


def b7(device: torch.device, *, quick: bool = False) -> Result:
    """Check, then measure."""
    cuda = device.type == "cuda"
    queries, width = (4096, 4096) if cuda else (1024, 256)
    if quick:
        queries, width = queries // 8, width // 4
    dtype = torch.bfloat16 if cuda else torch.float32
    inputs = case(queries, width, device=device, dtype=dtype)
    query_QD, passage_PD, rule = inputs
    exact = query_QD.float(), passage_PD.float()

    # at a quarter of the queries and their passages, so that the fp32 truth fits everywhere
    part = queries // 4
    groups = Groups(rule.groups.column_QC[:part], rule.groups.text_P[: part * CANDIDATES], rule.groups.known_QX[:part])
    few = Rule(groups, rule.label_QC[:part], rule.limit_Q[:part], TEMPERATURE)
    sample, sample_exact = ((q[:part], p[: part * CANDIDATES]) for q, p in (inputs[:2], exact))
    truth = gradients(eager, *sample_exact, few)
    own = differences(ours, truth, *sample, few)
    bound = 1e-5 if not cuda else 1.2 * differences(eager, truth, *sample, few)
    agree({"ours against eager in fp32": own}, bound)
    checks = {"ours against eager in fp32": own}
    peers: dict[str, Loss | str] = {"Liger, hard labels": liger() if cuda else "needs an NVIDIA GPU",
                                    "sentence-transformers' loop, hard labels": loop()}
    compiled = torch.compile(eager) if cuda else "CPU: torch.compile is left out"
    if not isinstance(compiled, str):
        checks["torch.compile against eager in fp32"] = differences(compiled, truth, *sample, few)
    one_hot = hard(few)
    hard_truth = gradients(eager, *sample_exact, one_hot)
    for name, peer in peers.items():
        if not isinstance(peer, str):
            # the loop scales its vectors to unit length itself, so that its gradients are other ones
            found_by_peer = gradients(peer, *sample, one_hot)
            compared = 1 if "loop" in name else 3
            checks[f"{name}, against eager in fp32"] = max(map(
                difference, found_by_peer[:compared], hard_truth[:compared]))
    agree(checks, 5e-2 if cuda else 1e-5)  # bf16: the peers' own rounding
    twice = [gradients(ours, *inputs) for _ in range(2)]
    if not all(torch.equal(one, two) for one, two in zip(*twice, strict=True)):
        raise RuntimeError("two runs differ. Expected are the same bits. Nothing is timed.")
    calls: dict[str, Any] = {"ours": ours, "torch eager": eager, "torch.compile": compiled, **peers}
    found = measure(
        {name: loss if isinstance(loss, str) else _call(loss, inputs) for name, loss in calls.items()},
        device=device, rounds=5 if quick or not cuda else 20)
    gradient_bytes = (queries * (1 + CANDIDATES)) * width * dtype.itemsize
    beyond = {name: c.peak_bytes - gradient_bytes for name, c in found.items() if not c.missing}
    mine, plain = found["ours"], found["torch eager"]
    targets: dict[str, Target] = {}
    if not quick:
        targets["torch eager / ours, time"] = (plain.median_s / mine.median_s, ">=", 1.2 if cuda else 1.0)
    if cuda and not quick:
        targets["ours, ms"] = (1000 * mine.median_s, "<=", 6.4)
        targets["ours, GB beyond inputs and gradients"] = (beyond["ours"] / 1e9, "<=", 0.1)
        fused = found["Liger, hard labels"]
        if not fused.missing:
            targets["Liger, hard labels / ours, time"] = (fused.median_s / mine.median_s, ">=", 1.0)
    elif not quick:
        targets["ours / torch eager, peak memory beyond inputs"] = (mine.peak_bytes / plain.peak_bytes, "<=", 0.25)
    if cuda:  # training pools in fp32 and passes fp32 vectors: products without tensor cores
        wide = measure({"": _call(ours, (*exact, rule))}, device=device, rounds=5)[""]
        beyond["ours, fp32 vectors"] = wide.peak_bytes - 2 * gradient_bytes
        found["ours, fp32 vectors as in training"] = wide
    figures = {f"{name}, MB beyond inputs and gradients": value / 1e6 for name, value in beyond.items()}
    shape = {"queries": queries, "passages": queries * CANDIDATES, "width": width, "dtype": str(dtype)[6:]}
    return Result("B7", shape, found, checks, targets, figures)


def _call(loss: Loss, inputs: tuple[Tensor, Tensor, Rule]) -> Callable[[], object]:
    return lambda: gradients(loss, *inputs)
