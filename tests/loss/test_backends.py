"""The backends of the loss against fp64 loops: eager, chunked, Triton, and the loss of the candidates alone.

Three levels: fp64, eager code, chunked code and kernels (by Triton's interpreter, or on a GPU). Uninitialised memory
and bands around the inputs are NaN, so that memory read before it is written, or written outside a tensor, is noticed.
"""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ref.loss import chunked as chunked_module
from ref.loss.chunked import PASSAGES_PER_CHUNK, TorchChunkOps, chunked_loss
from ref.loss.contrastive import CandidateIndex, LossRows, LossTargets, candidate_loss, eager_loss

kernels = pytest.importorskip("ref.kernels.soft_contrastive")  # needs triton
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("nan_in_uninitialised_memory"),
    pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
                       reason="no GPU, and TRITON_INTERPRET=1 is not set")]

Backend = Callable[[Tensor, Tensor, LossTargets], LossRows]
Case = tuple[Tensor, Tensor, LossTargets, tuple[Tensor, Tensor]]
FAST: dict[str, Backend] = {"chunked": chunked_loss, "triton": kernels.triton_loss}
ALL: dict[str, Backend] = {"eager": eager_loss, **FAST, "candidates": candidate_loss}


def loss_case(
    queries: int, candidates: int, width: int, *, extra: int = 0, temperature: float = 0.02,
    margin: float | None = 0.1, dtype: torch.dtype = torch.float32,
) -> Case:
    """Unit vectors, missing candidates, rows without labels, repeated texts, a near-duplicate; upstream gradients."""
    passages = queries * candidates + extra
    query_QD, passage_PD = (F.normalize(torch.randn(n, width, dtype=torch.float64), dim=1) for n in (queries, passages))
    candidate_idx_QC = torch.arange(queries * candidates).view(queries, candidates)
    missing_QC = torch.rand(queries, candidates) < 0.2
    missing_QC[:, 0] = False
    candidate_idx_QC[missing_QC] = -1
    passage_PD[candidate_idx_QC[:, 0]] = F.normalize(query_QD + passage_PD[candidate_idx_QC[:, 0]], dim=1)
    if extra:
        passage_PD[-1] = query_QD[0]  # cosine 1: a false negative by the margin
    label_QC = torch.rand(queries, candidates).masked_fill(missing_QC, 0.0)
    label_QC /= label_QC.sum(1, keepdim=True)
    label_QC[torch.rand(queries) < 0.2] = 0.0
    text_id_P, known_positive_id_QX = torch.randint(0, passages, (passages,)), torch.randint(-1, passages, (queries, 3))
    positive_Q = (query_QD * passage_PD[candidate_idx_QC[:, 0]]).sum(1)
    threshold_Q = torch.full_like(positive_Q, torch.inf) if margin is None else positive_Q + margin
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    index = CandidateIndex(*(guarded(x.to(DEVICE)) for x in (candidate_idx_QC, text_id_P, known_positive_id_QX)))
    targets = LossTargets(index, *(guarded(x.to(DEVICE, wide)) for x in (label_QC, threshold_Q)), temperature)
    upstream = tuple(torch.randn(queries, dtype=wide, device=DEVICE) for _ in range(2))
    return guarded(query_QD.to(DEVICE, dtype)), guarded(passage_PD.to(DEVICE, dtype)), targets, upstream


def run(function: Backend, query_QD: Tensor, passage_PD: Tensor, targets: LossTargets, upstream) -> list[Tensor]:
    """Both terms, masked columns, gradients of queries and passages."""
    query_QD, passage_PD = (x.detach().requires_grad_() for x in (query_QD, passage_PD))
    rows = function(query_QD, passage_PD, targets)
    gradients = torch.autograd.grad([rows.contrastive_Q, rows.soft_label_Q], [query_QD, passage_PD], list(upstream))
    return [rows.contrastive_Q.detach(), rows.soft_label_Q.detach(), rows.num_masked_Q, *gradients]


def by_loops(in_batch_negatives: bool = True) -> Backend:
    """The definition as a loop over queries, in fp64."""
    def loss(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> LossRows:
        contrastive, soft_label, num_masked = [], [], []
        for i, query_D in enumerate(query_QD):
            index = targets.candidates
            label = dict(zip(index.candidate_idx_QC[i].tolist(), targets.label_QC[i].tolist(), strict=True))
            label.pop(-1, None)
            known = set(index.known_positive_id_QX[i].tolist())
            cosine_P = passage_PD @ query_D
            too_similar = (cosine_P > targets.threshold_Q[i]).tolist()
            others = [j for j in range(len(passage_PD)) if j not in label and in_batch_negatives]
            masked = {j for j in others if index.text_id_P[j].item() in known or too_similar[j]}
            included = [*label, *(j for j in others if j not in masked)]
            score_P = cosine_P / targets.temperature
            positive = index.candidate_idx_QC[i, 0]
            contrastive.append(score_P[included].logsumexp(0) - score_P[positive])
            soft_label.append(score_P[list(label)].logsumexp(0) - sum(y * score_P[j] for j, y in label.items()))
            num_masked.append(len(masked))
        return LossRows(torch.stack(contrastive), torch.stack(soft_label), torch.tensor(num_masked, device=DEVICE))
    return loss


def in_fp64(case: Case) -> Case:
    query_QD, passage_PD, targets, upstream = case
    wide = replace(targets, label_QC=targets.label_QC.double(), threshold_Q=targets.threshold_Q.double())
    return query_QD.double(), passage_PD.double(), wide, tuple(x.double() for x in upstream)


def assert_within_budget(backend: str, case: Case) -> None:
    """|backend - truth| <= |eager in the same dtype - truth| + floor for both terms and both gradients, truth in fp64.

    The terms are fp32 for vectors of any dtype: a score of up to 1 / temperature is rounded, and so are they; the
    probability then has that relative error, and a gradient that times 1 / temperature, plus the rounding of its dtype.
    """
    in_batch = backend != "candidates"
    truth = run(by_loops(in_batch), *in_fp64(case))
    reference = eager_loss if in_batch else without_in_batch_negatives
    eager, found = run(reference, *case), run(ALL[backend], *case)
    assert torch.equal(found[2], truth[2]) and torch.equal(eager[2], truth[2])
    temperature = case[2].temperature
    scale = sum(x.abs().max().item() for x in case[3]) / temperature
    for ours, other, exact in zip(found[:2] + found[3:], eager[:2] + eager[3:], truth[:2] + truth[3:], strict=True):
        of_score = 2 * torch.finfo(found[0].dtype).eps / temperature * (1 if exact.ndim == 1 else scale)
        floor = 2 * torch.finfo(ours.dtype).eps * exact.abs().max() + of_score
        assert (ours.double() - exact).abs().max() <= (other.double() - exact).abs().max() + floor + 1e-12


def without_in_batch_negatives(query_QD: Tensor, passage_PD: Tensor, targets: LossTargets) -> LossRows:
    """Eager code for candidates only: every other passage of the batch is a copy that is masked."""
    index = targets.candidates
    foreign = torch.full_like(index.text_id_P, 7)
    known = torch.full((len(query_QD), 1), 7, device=DEVICE)
    rows = eager_loss(query_QD, passage_PD, replace(targets, candidates=CandidateIndex(
        index.candidate_idx_QC, foreign, known)))
    return rows._replace(num_masked_Q=torch.zeros_like(rows.num_masked_Q))


# ---- against fp64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("queries", "candidates", "width", "extra"), [
    (1, 1, 7, 0), (1, 3, 16, 2), (5, 8, 40, 1), (33, 4, 65, 3), (40, 2, 512, 9),
])
def test_as_close_to_fp64_as_eager_code(backend, queries, candidates, width, extra):
    assert_within_budget(backend, loss_case(queries, candidates, width, extra=extra))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("passages_per_chunk", [1, 16, 50])
def test_candidates_in_any_chunk(backend, passages_per_chunk, monkeypatch):
    """Passages in random order, so that a query's candidates lie in several chunks."""
    monkeypatch.setitem(PASSAGES_PER_CHUNK, DEVICE, passages_per_chunk)
    query_QD, passage_PD, targets, upstream = loss_case(9, 4, 24, extra=13)
    order = torch.randperm(len(passage_PD), device=DEVICE)
    index, place = targets.candidates, order.argsort()
    candidate_idx_QC = torch.where(index.candidate_idx_QC < 0, -1, place[index.candidate_idx_QC])
    shuffled = replace(targets, candidates=CandidateIndex(
        candidate_idx_QC, index.text_id_P[order], index.known_positive_id_QX))
    assert_within_budget(backend, (query_QD, passage_PD[order], shuffled, upstream))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [
    {"temperature": 0.005}, {"temperature": 1.0}, {"margin": None}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
], ids=str)
def test_range_of_temperatures_margins_and_dtypes(backend, options):
    assert_within_budget(backend, loss_case(9, 4, 48, extra=5, **options))


@pytest.mark.parametrize("backend", ["triton", "candidates"])
@settings(max_examples=12)
@given(queries=st.integers(1, 40), candidates=st.integers(1, 9), width=st.integers(1, 70), extra=st.integers(0, 40))
def test_any_shape(backend, queries, candidates, width, extra):
    assert_within_budget(backend, loss_case(queries, candidates, width, extra=extra))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("term", ["contrastive", "soft label"])
def test_one_term_alone(backend, term):
    """Weight 0: an upstream gradient of zeros for the other term."""
    query_QD, passage_PD, targets, (a_Q, b_Q) = loss_case(9, 4, 24, extra=5)
    zero_Q = torch.zeros_like(a_Q)
    upstream = (a_Q, zero_Q) if term == "contrastive" else (zero_Q, b_Q)
    assert_within_budget(backend, (query_QD, passage_PD, targets, upstream))
    if term == "soft label" and backend != "candidates":  # no gradient outside the candidates
        gradient_PD = run(ALL[backend], query_QD, passage_PD, targets, upstream)[4]
        other_P = torch.ones(len(passage_PD), dtype=torch.bool, device=DEVICE)
        other_P[targets.candidates.candidate_idx_QC[targets.candidates.candidate_idx_QC >= 0]] = False
        assert other_P.any() and not gradient_PD[other_P].any()


@pytest.mark.parametrize("backend", ALL)
def test_only_one_term_is_used(backend):
    """A term that has no part in the loss has no gradient, whichever it is."""
    query_QD, passage_PD, targets, (a_Q, _) = loss_case(6, 3, 20, extra=2)
    zero_Q = torch.zeros_like(a_Q)
    for term, upstream in (("contrastive_Q", (a_Q, zero_Q)), ("soft_label_Q", (zero_Q, a_Q))):
        q, p = (x.detach().requires_grad_() for x in (query_QD, passage_PD))
        rows = ALL[backend](q, p, targets)
        found = torch.autograd.grad((getattr(rows, term) * a_Q).sum(), [q, p])
        for ours, truth in zip(found, run(ALL[backend], query_QD, passage_PD, targets, upstream)[3:], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend):
    """Both terms, fp64, with missing candidates and rows without labels."""
    query_QD, passage_PD, targets, _ = loss_case(3, 3, 4, extra=2, temperature=0.5, dtype=torch.float64)
    inputs = query_QD.requires_grad_(), passage_PD.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: ALL[backend](q, p, targets)[:2], inputs)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_requested_gradients(backend, needs):
    query_QD, passage_PD, targets, (a_Q, b_Q) = loss_case(6, 3, 20)
    query_QD.requires_grad_(needs[0])
    passage_PD.requires_grad_(needs[1])
    rows = ALL[backend](query_QD, passage_PD, targets)
    assert rows.contrastive_Q.requires_grad == rows.soft_label_Q.requires_grad == any(needs)
    assert not rows.num_masked_Q.requires_grad
    if any(needs):
        (rows.contrastive_Q * a_Q + rows.soft_label_Q * b_Q).sum().backward()
    assert (query_QD.grad is not None, passage_PD.grad is not None) == needs


# ---- special cases ------------------------------------------------------------------------------------------


def targets_of(index: CandidateIndex, label_QC: Tensor, temperature: float) -> LossTargets:
    """Without a threshold, on the device."""
    index = CandidateIndex(*(x.to(DEVICE) for x in vars(index).values()))
    return LossTargets(index, label_QC.to(DEVICE), torch.full((len(label_QC),), torch.inf, device=DEVICE), temperature)


@pytest.mark.parametrize("backend", ALL)
def test_a_query_with_its_positive_alone_has_no_loss(backend):
    """Every other passage is a known positive."""
    vector_QD = F.normalize(torch.randn(2, 8), dim=1).to(DEVICE)
    index = CandidateIndex(torch.tensor([[0], [1]]), torch.tensor([0, 1]), torch.tensor([[1], [0]]))
    one_Q = torch.ones(2, device=DEVICE)
    contrastive_Q, soft_label_Q, num_masked_Q, *gradients = run(
        ALL[backend], vector_QD, vector_QD.clone(), targets_of(index, torch.ones(2, 1), 0.02), (one_Q, one_Q))
    assert num_masked_Q.tolist() == ([0, 0] if backend == "candidates" else [1, 1])
    for value in (contrastive_Q, soft_label_Q, *gradients):
        assert value.abs().max() < 1e-4


@pytest.mark.parametrize("backend", ALL)
def test_one_dominating_score_and_duplicates_of_the_query(backend):
    query_QD = F.normalize(torch.randn(3, 16), dim=1)
    passage_PD = torch.cat((query_QD, query_QD, -query_QD)).to(DEVICE)
    index = CandidateIndex(torch.tensor([[0, 6], [1, 7], [2, 8]]), torch.arange(9), torch.full((3, 1), -1))
    targets = targets_of(index, torch.tensor([[1.0, 0.0]] * 3), 0.005)
    one_Q = torch.ones(3, device=DEVICE)
    assert_within_budget(backend, (query_QD.to(DEVICE), passage_PD, targets, (one_Q, one_Q)))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("temperature", [0.02, 0.005])
def test_an_in_batch_negative_far_above_all_candidates(backend, temperature, monkeypatch):
    """exp(its score - the candidates' log-sum-exp) exceeds fp32 in chunks that hold no candidate of the query."""
    monkeypatch.setitem(PASSAGES_PER_CHUNK, DEVICE, 2)
    query_QD = F.normalize(torch.randn(1, 16), dim=1)
    passage_PD = torch.cat((-query_QD, -query_QD, query_QD, query_QD, -query_QD)).to(DEVICE)
    index = CandidateIndex(torch.tensor([[0, 1]]), torch.arange(5), torch.full((1, 1), -1))
    targets = targets_of(index, torch.tensor([[0.5, 0.5]]), temperature)
    one_Q = torch.ones(1, device=DEVICE)
    assert_within_budget(backend, (query_QD.to(DEVICE), passage_PD, targets, (one_Q, one_Q)))


@pytest.mark.parametrize("backend", FAST)
def test_all_scores_near_the_negative_end(backend):
    """Without a running maximum exp would underflow: each score is about -1 / temperature."""
    query_QD = F.normalize(torch.randn(4, 32), dim=1)
    passage_PD = F.normalize(-query_QD.repeat(3, 1) + 0.05 * torch.randn(12, 32), dim=1).to(DEVICE)
    query_QD = query_QD[:1].to(DEVICE)
    index = CandidateIndex(torch.tensor([[0, 4, 8]]), torch.arange(12), torch.full((1, 1), -1))
    targets = targets_of(index, torch.tensor([[0.2, 0.3, 0.5]]), 0.005)
    one_Q = torch.ones(1, device=DEVICE)
    assert_within_budget(backend, (query_QD, passage_PD, targets, (one_Q, one_Q)))


@pytest.mark.parametrize("backend", FAST)
def test_candidates_are_never_masked(backend):
    """A candidate that is a known positive's text and above the threshold stays in the set."""
    query_QD, passage_PD, targets, upstream = loss_case(6, 3, 24)
    all_masked = replace(targets, threshold_Q=torch.full_like(targets.threshold_Q, -2.0))
    found = run(FAST[backend], query_QD, passage_PD, all_masked, upstream)
    own = run(candidate_loss, query_QD, passage_PD, targets, upstream)
    candidates = (targets.candidates.candidate_idx_QC >= 0).sum(1)
    assert torch.equal(found[2], len(passage_PD) - candidates)
    for ours, truth in zip(found[:2] + found[3:], own[:2] + own[3:], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_a_quarter_of_a_million_passages():
    assert_within_budget("triton", loss_case(2, 3, 8, extra=262_144 - 6))


@pytest.mark.parametrize("backend", ALL)
def test_two_runs_agree_bit_for_bit(backend):
    case = loss_case(20, 4, 33, extra=3)
    first, second = (run(ALL[backend], *case) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_written_outside_of_tensors(dtype, bands_intact):
    run(kernels.triton_loss, *loss_case(21, 3, 37, extra=6, dtype=dtype))
    assert bands_intact()


@triton.jit
def _one_too_far(out_ptr, count, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, 1.0, mask=o <= count)


def test_control_a_write_outside_is_noticed(bands_intact):
    _one_too_far[(1,)](torch.empty(5, device=DEVICE), 5, BLOCK=8)
    assert not bands_intact()


# ---- memory -------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest number of bytes that tensors allocated by `call` occupy at once, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    live, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.skipif(DEVICE == "cuda", reason="allocations on the CPU are counted")
def test_peak_memory_of_the_chunked_loss():
    """Forward and backward of both terms: a few chunks and the two gradients, never a (Q, P) matrix."""
    queries, passages, width = 128, 16384, 8
    query_QD, passage_PD = (F.normalize(torch.randn(n, width), dim=1) for n in (queries, passages))
    index = CandidateIndex(torch.arange(4 * queries).view(queries, 4), torch.arange(passages),
                           torch.full((queries, 1), -1))
    targets = targets_of(index, torch.full((queries, 4), 0.25), 0.02)
    one_Q = torch.ones(queries)
    peak = {name: peak_bytes(lambda f=f: run(f, query_QD, passage_PD, targets, (one_Q, one_Q)))
            for name, f in (("chunked", chunked_loss), ("eager", eager_loss))}
    chunk, matrix = 4 * queries * PASSAGES_PER_CHUNK["cpu"], 4 * queries * passages
    gradients = 2 * query_QD.nbytes + passage_PD.nbytes + index.text_id_P.nbytes
    assert chunk < peak["chunked"] <= 5 * chunk + gradients < matrix
    assert peak["eager"] > 2 * matrix  # control


def saved_sizes(call: Callable[[], object]) -> list[int]:
    """Numbers of elements of the tensors that autograd keeps for backward."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sizes


@pytest.mark.parametrize("backend", FAST)
def test_the_chunked_loss_keeps_two_numbers_per_query(backend):
    """Besides the vectors themselves."""
    query_QD, passage_PD, targets, _ = loss_case(20, 4, 16, extra=3)
    inputs = query_QD.requires_grad_(), passage_PD.requires_grad_()
    sizes = sorted(saved_sizes(lambda: FAST[backend](*inputs, targets)))
    assert sizes == sorted([20, 20, query_QD.numel(), passage_PD.numel()])


# ---- negative controls --------------------------------------------------------------------------------------


def wrong_gradient(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
    """ChunkOps.gradient with other upstream gradients of the two terms."""
    def breakage(ops: type, monkeypatch: pytest.MonkeyPatch) -> None:
        original = ops.gradient

        def gradient(self, cosine, first, lse_batch_Q, lse_candidates_Q, a_Q, b_Q):
            return original(self, cosine, first, lse_batch_Q, lse_candidates_Q, *change(a_Q, b_Q))
        monkeypatch.setattr(ops, "gradient", gradient)
    return breakage


def without_label_scores(ops: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft-label term's second half is never added up."""
    original = ops.update

    def update(self, cosine, first, state):
        original(self, cosine, first, state)
        state.label_score_Q.zero_()
    monkeypatch.setattr(ops, "update", update)


def without_threshold(ops: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """No in-batch passage is too similar."""
    original = ops.__init__

    def init(self, targets, *rest):
        original(self, replace(targets, threshold_Q=torch.full_like(targets.threshold_Q, torch.inf)), *rest)
    monkeypatch.setattr(ops, "__init__", init)


BREAKAGES = {
    "soft-label value missing": without_label_scores,
    "soft-label gradient missing": wrong_gradient(lambda a_Q, b_Q: (a_Q, 0 * b_Q)),
    "soft-label weight doubled": wrong_gradient(lambda a_Q, b_Q: (a_Q, 2 * b_Q)),
    "contrastive gradient missing": wrong_gradient(lambda a_Q, b_Q: (0 * a_Q, b_Q)),
    "weights swapped": wrong_gradient(lambda a_Q, b_Q: (b_Q, a_Q)),
    "threshold ignored": without_threshold,
}


def telling_case() -> Case:
    """A case whose near-duplicate is masked by its cosine alone."""
    case = loss_case(6, 3, 24, extra=4, temperature=0.2)  # no passage dominates: each part of the gradient counts
    case[2].candidates.text_id_P[-1] = 10**6
    return case


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", BREAKAGES)
def test_control_breakages_are_noticed(backend, name, monkeypatch):
    case = telling_case()
    assert_within_budget(backend, case)
    BREAKAGES[name]({"chunked": TorchChunkOps, "triton": kernels.TritonChunkOps}[backend], monkeypatch)
    with pytest.raises(AssertionError):
        assert_within_budget(backend, case)


def test_control_a_masked_candidate_is_noticed(monkeypatch):
    """The mask without the exception for candidates; the positive's own text is always a known one."""
    query_QD, passage_PD, targets, upstream = telling_case()
    index = targets.candidates
    known_QX = torch.cat((index.text_id_P[index.candidate_idx_QC[:, :1]], index.known_positive_id_QX), dim=1)
    case = (query_QD, passage_PD, replace(targets, candidates=replace(index, known_positive_id_QX=known_QX)), upstream)
    assert_within_budget("chunked", case)

    def mask_all(cosine_QP: Tensor, targets: LossTargets, first: int = 0) -> Tensor:
        text_id_P = targets.candidates.text_id_P[first : first + cosine_QP.shape[1]]
        known = (text_id_P[None, :, None] == targets.candidates.known_positive_id_QX[:, None]).any(2)
        return known | (cosine_QP > targets.threshold_Q[:, None])
    monkeypatch.setattr(chunked_module, "false_negative_mask", mask_all)
    with pytest.raises(AssertionError):
        assert_within_budget("chunked", case)


# ---- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"passage": torch.zeros(6, 5)}, "passages must be .P, 4. torch.float32 as the queries .got .6, 5."),
    ({"query": torch.zeros(2, 4, dtype=torch.int32)}, "queries must be .Q, D. of a float type .got .2, 4. torch.int32"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0 .got 0.0"),
    ({"temperature": float("nan")}, "temperature must be a finite number > 0 .got nan"),
    ({"label": torch.ones(3, 3)}, "labels must be .2, C. .got .3, 3."),
    ({"column": torch.zeros(2, 3)}, "candidate columns must be .2, 3. int64 .got .2, 3. torch.float32"),
    ({"text": torch.zeros(5, dtype=torch.int64)}, "text ids must be .6,. int64.*got .5,."),
    ({"text": torch.zeros(6, dtype=torch.int64, device="meta")}, "one device .got cpu|one device .got cuda"),
    ({"column": torch.tensor([[0, 1, 6], [3, 4, 5]])}, r"candidate columns must lie in 0\.\.5, or be -1"),
    ({"text": torch.arange(6) + 2**32}, "text ids must fit into 32 bits"),
    ({"column": torch.tensor([[-1, 1, 2], [3, 4, 5]])}, "positive in its first column"),
    ({"column": torch.tensor([[0, 1, 1], [3, 4, 5]])}, "candidate columns must differ"),
    ({"label": torch.tensor([[1.5, -0.5, 0.0], [1.0, 0, 0]])}, "labels must be >= 0"),
    ({"label": torch.tensor([[torch.nan, 0.5, 0.0], [1.0, 0, 0]])}, "labels must be >= 0"),
    ({"label": torch.tensor([[1, 0, 0], [1, 0, 0]])}, "labels must be float32 or float64 .got torch.int64"),
    ({"text": torch.zeros(6, dtype=torch.int32)}, "int64.*torch.int32"),
    ({"threshold": torch.ones(1)}, "thresholds must be .2,. float32 or float64 .got .1,."),
    ({"label": torch.tensor([[0.5, 0.2, 0.0], [1.0, 0, 0]])}, "labels must sum to 1"),
    ({"label": torch.tensor([[0.5, 0.2, 0.3], [1, 0, 0]]), "column": torch.tensor([[0, 1, -1], [3, 4, 5]])},
     "labels must be 0 where there is no candidate"),
])
def test_bad_input_is_rejected(change, message):
    good = {"query": torch.zeros(2, 4), "passage": torch.zeros(6, 4), "column": torch.arange(6).view(2, 3),
            "label": torch.tensor([[1.0, 0, 0]] * 2), "text": torch.arange(6), "threshold": torch.ones(2),
            "temperature": 0.1}
    case = {name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x
            for name, x in {**good, **change}.items()}
    index = CandidateIndex(case["column"], case["text"], torch.full((2, 1), -1, device=DEVICE))
    targets = LossTargets(index, case["label"], case["threshold"], case["temperature"])
    with pytest.raises(ValueError, match=message):
        kernels.triton_loss(case["query"], case["passage"], targets, check_values=True)
