"""The training loss against fp64 loops written from the definition alone, and properties that follow from its form.

The oracle has no masks, no matrices and no stable log-sum-exp: for each query it collects the passages of A_i and C_i,
then sums. Its gradients come from autograd through those loops.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ref.loss import training_loss as module
from ref.loss.contrastive import CandidateIndex, LossRows, soft_labels
from ref.loss.training_loss import soft_contrastive, training_loss

TEMPERATURE = 0.05
DEFAULTS = {
    "temperature": TEMPERATURE, "teacher_temperature": 0.7, "contrastive_weight": 1.0, "soft_label_weight": 0.6,
    "in_batch_negatives": True, "false_negative_margin": 0.1}
TERMS = ("contrastive", "soft_label", "num_masked", "label_entropy")


@dataclass(frozen=True)
class Case:
    """A batch: lists for the oracle, tensors for the function under test."""

    query_QD: Tensor
    passage_PD: Tensor
    candidates: list[list[int]]  # columns of each query: its positive, then its hard negatives
    text_ids: list[int]  # equal for equal texts
    known: list[list[int]]  # text ids of the query's own text and its known positives
    teacher: list[list[float] | None]

    @property
    def index(self) -> CandidateIndex:
        return CandidateIndex(padded(self.candidates, -1), torch.tensor(self.text_ids), padded(self.known, -1))

    @property
    def teacher_QC(self) -> Tensor:
        rows = [scores or [math.nan] * len(own) for scores, own in zip(self.teacher, self.candidates, strict=True)]
        return padded(rows, math.nan).float()


def padded(rows: list[list], fill: float) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def draw(generator: torch.Generator, *, queries: int = 6, hidden_size: int = 5) -> Case:
    """1 to 4 candidates per query, repeated texts, known positives elsewhere, every third query without labels."""
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))
    candidates: list[list[int]] = []
    for _ in range(queries):
        start = candidates[-1][-1] + 1 if candidates else 0
        candidates.append(list(range(start, start + integer(1, 5))))
    passages = candidates[-1][-1] + 1
    text_ids = [integer(0, 2 * passages) for _ in range(passages)]
    known = [[text_ids[own[0]], *(text_ids[integer(0, passages)] for _ in range(integer(0, 3)))] for own in candidates]
    teacher = [None if i % 3 == 2 else torch.randn(len(own), generator=generator).tolist()
               for i, own in enumerate(candidates)]
    vectors = F.normalize(torch.randn(queries + passages, hidden_size, generator=generator), dim=-1)
    return Case(vectors[:queries], vectors[queries:], candidates, text_ids, known, teacher)


Result = tuple[Tensor, dict[str, float], list[Tensor]]  # total, terms, gradients of the queries and passages


def by_loops(case: Case, **options) -> Result:
    """The definition line by line, in fp64."""
    o = {**DEFAULTS, **options}
    q = case.query_QD.double().requires_grad_()
    p = case.passage_PD.double().requires_grad_()
    contrastive, soft_label, entropy, num_masked = [], [], [], 0
    for i, own in enumerate(case.candidates):
        cosine = [torch.dot(q[i], p[j]) for j in range(len(p))]
        score = [c / o["temperature"] for c in cosine]
        included = list(own)
        for j in range(len(p)):
            if j in own or not o["in_batch_negatives"]:
                continue
            margin = o["false_negative_margin"]
            too_similar = margin is not None and cosine[j].item() > cosine[own[0]].item() + margin
            if too_similar or case.text_ids[j] in case.known[i]:
                num_masked += 1
            else:
                included.append(j)
        contrastive.append(torch.log(sum(torch.exp(score[j]) for j in included)) - score[own[0]])
        teacher = case.teacher[i]
        if teacher is None:
            continue
        weight = [math.exp(s / o["teacher_temperature"]) for s in teacher]
        label = [w / sum(weight) for w in weight]
        soft_label.append(torch.log(sum(torch.exp(score[j]) for j in own))
                          - sum(y * score[j] for y, j in zip(label, own, strict=True)))
        entropy.append(-sum(y * math.log(y) for y in label if y > 0))
    mean_contrastive = sum(contrastive) / len(contrastive)
    mean_soft_label = sum(soft_label) / len(soft_label) if soft_label else torch.zeros(())
    total = o["contrastive_weight"] * mean_contrastive + o["soft_label_weight"] * mean_soft_label
    terms = {"contrastive": mean_contrastive.item(), "soft_label": mean_soft_label.item(), "num_masked": num_masked,
             "label_entropy": sum(entropy) / max(1, len(entropy))}
    return total, terms, list(torch.autograd.grad(total, [q, p]))


def ours(case: Case, **options) -> Result:
    q, p = case.query_QD.clone().requires_grad_(), case.passage_PD.clone().requires_grad_()
    terms = training_loss(q, p, case.index, case.teacher_QC, **{**DEFAULTS, **options})
    return (terms.total, {name: float(getattr(terms, name)) for name in TERMS},
            list(torch.autograd.grad(terms.total, [q, p])))


def near_threshold(case: Case, margin: float | None) -> bool:
    """Whether a cosine is so close to the mask's threshold that fp32 and fp64 may differ."""
    if margin is None:
        return False
    cosine = case.query_QD.double() @ case.passage_PD.double().T
    threshold = cosine[range(len(case.candidates)), [c[0] for c in case.candidates]] + margin
    return bool(((cosine - threshold[:, None]).abs() < 1e-5).any())


def same(found: Result, truth: Result) -> bool:
    """Whether total, terms and gradients agree to the accuracy of fp32 for scores of up to 1 / TEMPERATURE."""
    values = [torch.tensor([x[0].item(), *x[1].values()]) for x in (found, truth)]
    return torch.allclose(*values, rtol=1e-5, atol=3e-5) and all(
        torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4) for a, b in zip(found[2], truth[2], strict=True))


# ---- against the loops --------------------------------------------------------------------------------------


OPTIONS = [
    {}, {"in_batch_negatives": False}, {"false_negative_margin": None}, {"false_negative_margin": 0.01},
    {"contrastive_weight": 0.0}, {"soft_label_weight": 0.0}, {"temperature": 0.02}, {"teacher_temperature": 0.05}]


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_total_terms_and_gradients_equal_the_loops(seed, options, backend):
    generator, compared, masked = torch.Generator().manual_seed(seed), 0, 0
    for _ in range(12):
        case = draw(generator)
        if not near_threshold(case, options.get("false_negative_margin", 0.1)):
            truth = by_loops(case, **options)
            assert same(ours(case, backend=backend, **options), truth)
            compared, masked = compared + 1, masked + truth[1]["num_masked"]
    assert compared >= 8
    assert masked > 0 or options == {"in_batch_negatives": False}


@pytest.mark.parametrize("wrong", [
    {"false_negative_margin": 0.3}, {"false_negative_margin": None}, {"in_batch_negatives": False},
    {"temperature": 0.06}, {"teacher_temperature": 1.0}, {"soft_label_weight": 1.0}, {"contrastive_weight": 0.9},
], ids=str)
def test_control_other_options_are_noticed(seed, wrong):
    generator = torch.Generator().manual_seed(seed)
    cases = [draw(generator) for _ in range(8)]
    assert not all(same(ours(case), by_loops(case, **wrong)) for case in cases)


def without_soft_label_term(rows: LossRows) -> LossRows:
    return rows._replace(soft_label_Q=torch.zeros_like(rows.soft_label_Q))


def without_its_gradient(rows: LossRows) -> LossRows:
    return rows._replace(soft_label_Q=rows.soft_label_Q.detach())


def terms_swapped(rows: LossRows) -> LossRows:
    return rows._replace(contrastive_Q=rows.soft_label_Q, soft_label_Q=rows.contrastive_Q)


def doubled(rows: LossRows) -> LossRows:
    return rows._replace(contrastive_Q=2 * rows.contrastive_Q)


@pytest.mark.parametrize("change", [without_soft_label_term, without_its_gradient, terms_swapped, doubled])
def test_control_a_wrong_term_is_noticed(seed, change, monkeypatch):
    cases = [draw(torch.Generator().manual_seed(seed + n)) for n in range(8)]
    cases = [case for case in cases if not near_threshold(case, 0.1)]
    truths = [by_loops(case) for case in cases]
    assert all(same(ours(case), truth) for case, truth in zip(cases, truths, strict=True))
    original = module.soft_contrastive
    monkeypatch.setattr(module, "soft_contrastive", lambda *args, **options: change(original(*args, **options)))
    unnoticed = sum(same(ours(case), truth) for case, truth in zip(cases, truths, strict=True))
    assert unnoticed <= len(cases) // 2  # in some cases a term is close to zero


def test_control_labels_averaged_over_all_queries_are_noticed(seed, monkeypatch):
    """The soft-label term is a mean over the queries with labels, not over all."""
    case = draw(torch.Generator().manual_seed(seed))
    original = module.soft_labels
    truth = by_loops(case, false_negative_margin=None)
    assert same(ours(case, false_negative_margin=None), truth)
    uniform = (case.index.candidate_idx_QC >= 0).float()

    def labels_for_all(*args):
        label_QC = original(*args)
        return label_QC.where(label_QC.any(1, keepdim=True), uniform / uniform.sum(1, keepdim=True))
    monkeypatch.setattr(module, "soft_labels", labels_for_all)
    assert not same(ours(case, false_negative_margin=None), truth)


def test_shards_sum_to_the_whole_batch(seed):
    """With `global_counts` the terms of parts of the queries, and their gradients, add up to those of the batch."""
    case = draw(torch.Generator().manual_seed(seed), queries=7)
    truth = ours(case)
    labelled = sum(scores is not None for scores in case.teacher)
    total, terms = 0.0, dict.fromkeys(TERMS, 0.0)
    q, p = case.query_QD.clone().requires_grad_(), case.passage_PD.clone().requires_grad_()
    for part in (slice(0, 3), slice(3, 7), slice(7, 7)):
        index = replace(case.index, candidate_idx_QC=case.index.candidate_idx_QC[part],
                        known_positive_id_QX=case.index.known_positive_id_QX[part])
        shard = training_loss(q[part], p, index, case.teacher_QC[part], global_counts=(7, labelled), **DEFAULTS)
        total = total + shard.total
        terms = {name: value + float(getattr(shard, name)) for name, value in terms.items()}
    assert same((total, terms, list(torch.autograd.grad(total, [q, p]))),
                (truth[0], truth[1], [g.double() for g in truth[2]]))


# ---- against other libraries, and properties ----------------------------------------------------------------


def plain_case(seed: int, *, queries: int = 5, candidates: int = 4, hidden_size: int = 8) -> Case:
    """Equally many candidates, different texts, no known positives elsewhere: what other libraries compute too."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(queries * (1 + candidates), hidden_size, generator=generator), dim=-1)
    columns = [list(range(i * candidates, (i + 1) * candidates)) for i in range(queries)]
    return Case(vectors[:queries], vectors[queries:], columns, list(range(queries * candidates)),
                [[c[0]] for c in columns], [None] * queries)


def test_one_hot_labels_give_cross_entropy(seed):
    case = plain_case(seed)
    score_QP = case.query_QD @ case.passage_PD.T / TEMPERATURE
    positive = torch.tensor([columns[0] for columns in case.candidates])
    _, terms, _ = ours(case, false_negative_margin=None)
    assert terms["contrastive"] == pytest.approx(F.cross_entropy(score_QP, positive).item(), rel=1e-5)
    assert terms["soft_label"] == 0


def test_soft_label_term_is_torchs_cross_entropy_with_probabilities(seed):
    case = plain_case(seed)
    teacher_QC = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    case = replace(case, teacher=teacher_QC.tolist())
    score_QC = torch.einsum("qd,qcd->qc", case.query_QD, case.passage_PD.view(5, 4, -1)) / TEMPERATURE
    truth = F.cross_entropy(score_QC, (teacher_QC / 0.7).softmax(1))
    assert ours(case)[1]["soft_label"] == pytest.approx(truth.item(), rel=1e-5)


def test_contrastive_term_equals_that_of_sentence_transformers(seed):
    losses = pytest.importorskip("sentence_transformers.losses")
    case = plain_case(seed, candidates=2)
    positive, negative = case.passage_PD[::2], case.passage_PD[1::2]
    peer = losses.MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=1 / TEMPERATURE)
    value = peer.compute_loss_from_embeddings([case.query_QD, positive, negative], None)
    assert ours(case, false_negative_margin=None)[1]["contrastive"] == pytest.approx(value.item(), rel=1e-5)


def rows_of(case: Case, label_QC: Tensor, **options) -> LossRows:
    given = {"temperature": TEMPERATURE, "in_batch_negatives": True, "false_negative_margin": None, **options}
    return soft_contrastive(case.query_QD, case.passage_PD, case.index, label_QC, **given)


@settings(max_examples=200)
@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4),
       st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.sampled_from([0.05, 1.0]), st.booleans())
def test_each_term_is_at_least_the_entropy_of_its_labels(teacher, cosine, teacher_temperature, in_batch_negatives):
    count = len(teacher)
    candidate_idx_QC = torch.arange(3 * count).view(count, 3)
    index = CandidateIndex(candidate_idx_QC, torch.arange(3 * count), torch.full((count, 1), -1))
    label_QC = soft_labels(torch.tensor(teacher), candidate_idx_QC, teacher_temperature)
    options = {"temperature": TEMPERATURE, "false_negative_margin": None}
    rows = soft_contrastive(torch.ones(count, 1), torch.tensor(cosine * count)[:, None], index, label_QC,
                            in_batch_negatives=in_batch_negatives, **options)
    entropy_Q = torch.special.entr(label_QC).sum(-1)
    assert (rows.soft_label_Q >= entropy_Q - 1e-4).all()
    assert (rows.contrastive_Q >= -1e-4).all()
    matched = torch.log(label_QC.clamp(min=1e-30)) * TEMPERATURE  # scores equal to log labels reach the bound
    if count == 1:
        reached = soft_contrastive(
            torch.ones(1, 1), matched.T, index, label_QC, in_batch_negatives=False, **options).soft_label_Q
        assert reached.item() == pytest.approx(entropy_Q.item(), abs=1e-4)


@pytest.mark.parametrize("in_batch_negatives", [True, False])
def test_gradients_of_the_scores_sum_to_zero_in_each_row(seed, in_batch_negatives):
    case = draw(torch.Generator().manual_seed(seed))
    passages = len(case.text_ids)
    case = replace(case, query_QD=torch.rand(len(case.candidates), passages), passage_PD=torch.eye(passages))
    gradient_QP, _ = ours(case, in_batch_negatives=in_batch_negatives)[2]  # the queries are the scores
    assert gradient_QP.abs().max() > 1e-3
    assert gradient_QP.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("in_batch_negatives", [True, False])
def test_queries_without_labels_have_no_soft_label_term(in_batch_negatives):
    case = plain_case(1, queries=3)
    labelled = replace(case, teacher=[[3.0, 1.0, 0.5, 0.0], None, None])
    one = replace(case, query_QD=case.query_QD[:1], candidates=case.candidates[:1], known=case.known[:1],
                  teacher=labelled.teacher[:1])
    options = {"contrastive_weight": 0.0, "in_batch_negatives": in_batch_negatives}
    value, _, (gradient_QD, _) = ours(labelled, **options)
    assert value.item() == pytest.approx(ours(one, **options)[0].item(), rel=1e-6)
    assert (gradient_QD[1:] == 0).all()
    assert (gradient_QD[0] != 0).any()
    value, terms, gradients = ours(case, in_batch_negatives=in_batch_negatives)
    assert terms["soft_label"] == terms["label_entropy"] == 0
    assert all(torch.isfinite(g).all() for g in [value, *gradients])


# ---- the false-negative mask --------------------------------------------------------------------------------

# One query at (1, 0) with positive p0 (cosine 0.5) and negative p1; p2, p3 belong to another query.
COSINE = {"positive": 0.5, "negative": 0.9, "near": 0.65, "far": 0.2}


def planted(other: float, *, text_ids: list[int] | None = None, known: list[int] | None = None) -> Case:
    cosines = [COSINE["positive"], COSINE["negative"], other, COSINE["far"]]
    passage_PD = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])
    query_QD = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    return Case(query_QD, passage_PD, [[0, 1], [2, 3]], text_ids or [0, 1, 2, 3], [known or [0], [2]], [None, None])


ONE_HOT = torch.eye(1, 2).repeat(2, 1)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize(("case", "margin", "masked"), [
    (planted(COSINE["near"]), 0.1, 1),
    (planted(COSINE["near"]), 0.2, 0),
    (planted(COSINE["near"]), None, 0),
    (planted(COSINE["far"]), 0.1, 0),
    (planted(COSINE["far"], text_ids=[0, 1, 0, 3]), 0.1, 1),  # another query's passage has the positive's text
    (planted(COSINE["far"], known=[0, 2]), None, 1),  # a known positive that was not drawn, or the query's own text
    (planted(COSINE["far"], text_ids=[0, 1, 1, 3]), 0.1, 0),  # the text of a hard negative remains a negative
    (planted(COSINE["far"], text_ids=[0, 0, 2, 3]), 0.1, 0),  # candidates are never masked, whatever their text
], ids=["similar", "within the margin", "no margin", "far", "same text", "known", "negative's text", "candidate"])
def test_which_columns_are_masked(case, margin, masked, backend):
    rows = rows_of(case, ONE_HOT, false_negative_margin=margin, backend=backend)
    assert rows.num_masked_Q.tolist()[0] == masked
    cosine = case.passage_PD[:, 0]
    # 1 exceeds the positive by more than the margin, but is a candidate; 0 is known, but is the positive
    included = [0, 1, 3] if masked else [0, 1, 2, 3]
    expected = torch.logsumexp(cosine[included] / TEMPERATURE, 0) - cosine[0] / TEMPERATURE
    assert rows.contrastive_Q[0].item() == pytest.approx(expected.item(), rel=1e-5)
    own = torch.logsumexp(cosine[:2] / TEMPERATURE, 0) - cosine[0] / TEMPERATURE
    assert rows.soft_label_Q[0].item() == pytest.approx(own.item(), rel=1e-5)  # its set is never masked


def test_without_in_batch_negatives_nothing_is_masked():
    rows = rows_of(planted(COSINE["near"], text_ids=[0, 1, 0, 0]), ONE_HOT, in_batch_negatives=False,
                   false_negative_margin=0.1)
    assert rows.num_masked_Q.tolist() == [0, 0]


@pytest.mark.parametrize(("margin", "has_gradient"), [(0.1, False), (None, True)])
def test_the_mask_is_a_constant_in_backward(margin, has_gradient):
    case = planted(COSINE["near"])
    q, p = case.query_QD.clone().requires_grad_(), case.passage_PD.clone().requires_grad_()
    rows = rows_of(replace(case, query_QD=q, passage_PD=p), ONE_HOT, false_negative_margin=margin)
    gradient_QD, gradient_PD = torch.autograd.grad(rows.contrastive_Q[0], [q, p])
    assert bool((gradient_PD[2] != 0).any()) is has_gradient
    included = [0, 1, 3] if margin else [0, 1, 2, 3]
    q0 = case.query_QD[0].clone().requires_grad_()
    score = case.passage_PD[included] @ q0 / TEMPERATURE
    (expected,) = torch.autograd.grad(torch.logsumexp(score, 0) - score[0], q0)
    torch.testing.assert_close(gradient_QD[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_one_dominating_score_stays_finite(backend):
    case = plain_case(3, queries=2)
    case = replace(case, passage_PD=case.passage_PD * torch.tensor([1.0, 1e3, 1, 1, 1, 1, 1, 1])[:, None])
    case = replace(case, teacher=[[0.0, 1.0, 2.0, 3.0]] * 2)
    value, _, gradients = ours(case, temperature=0.02, backend=backend)
    assert all(torch.isfinite(x).all() for x in [value, *gradients])
