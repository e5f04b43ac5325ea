"""The loss against loops in fp64 that were written from the method alone (section 5), and what follows from its form.

The oracle below knows no masks, no matrices and no stable log-sum-exp: for each query it collects the columns that the
query may see, then sums. Gradients come from autograd through those loops.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ref.loss import Groups, soft_contrastive, soft_labels, training_loss

TAU = 0.05


@dataclass(frozen=True)
class Case:
    """A batch: lists for the oracle, tensors for the function under test."""

    query_QD: Tensor
    passage_PD: Tensor
    own: list[list[int]]  # columns of each query: its positive, then its negatives
    text: list[int]  # a number for each different text
    known: list[list[int]]  # numbers of the query's text and its positives
    teacher: list[list[float] | None]

    @property
    def groups(self) -> Groups:
        return Groups(rectangle(self.own, -1), torch.tensor(self.text), rectangle(self.known, -1))

    @property
    def teacher_QC(self) -> Tensor:
        rows = [scores or [math.nan] * len(own) for scores, own in zip(self.teacher, self.own, strict=True)]
        return rectangle(rows, math.nan).float()


def rectangle(rows: list[list], fill: float) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def draw(generator: torch.Generator, *, queries: int = 6, width: int = 5) -> Case:
    """Groups of 1 to 4 candidates, repeated texts, known positives elsewhere, every third row unlabelled."""
    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))
    own: list[list[int]] = []
    for _ in range(queries):
        start = own[-1][-1] + 1 if own else 0
        own.append(list(range(start, start + whole(1, 5))))
    passages = own[-1][-1] + 1
    text = [whole(0, 2 * passages) for _ in range(passages)]
    known = [[text[columns[0]], *(text[whole(0, passages)] for _ in range(whole(0, 3)))] for columns in own]
    teacher = [None if i % 3 == 2 else torch.randn(len(c), generator=generator).tolist() for i, c in enumerate(own)]
    vectors = F.normalize(torch.randn(queries + passages, width, generator=generator), dim=-1)
    return Case(vectors[:queries], vectors[queries:], own, text, known, teacher)


def loops(case: Case, *, tau: float = TAU, teacher_tau: float = 0.7, hard_weight: float = 1.0, soft_weight: float = 0.6,
          in_batch: bool = True, margin: float | None = 0.1) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    """Total, its parts, and the gradients on query and passage vectors: method section 5, line by line, in fp64."""
    q = case.query_QD.double().requires_grad_()
    p = case.passage_PD.double().requires_grad_()
    hard, soft, entropy, masked = [], [], [], 0
    for i, own in enumerate(case.own):
        cosine = [torch.dot(q[i], p[j]) for j in range(len(p))]
        seen = list(own)
        for j in range(len(p)):
            if j in own or not in_batch:
                continue
            too_close = margin is not None and cosine[j].item() > cosine[own[0]].item() + margin
            if too_close or case.text[j] in case.known[i]:
                masked += 1
            else:
                seen.append(j)
        hard.append(torch.log(sum(torch.exp(cosine[j] / tau) for j in seen)) - cosine[own[0]] / tau)
        scores = case.teacher[i]
        if scores is None:
            continue
        weight = [math.exp(s / teacher_tau) for s in scores]
        label = [w / sum(weight) for w in weight]
        soft.append(torch.log(sum(torch.exp(cosine[j] / tau) for j in own))
                    - sum(y * cosine[j] / tau for y, j in zip(label, own, strict=True)))
        entropy.append(-sum(y * math.log(y) for y in label if y > 0))
    mean_hard, mean_soft = sum(hard) / len(hard), sum(soft) / len(soft) if soft else torch.zeros(())
    total = hard_weight * mean_hard + soft_weight * mean_soft
    parts = {"hard": mean_hard.item(), "soft": mean_soft.item(), "masked": masked,
             "label_entropy": sum(entropy) / max(1, len(entropy))}
    return total, parts, list(torch.autograd.grad(total, [q, p]))


def ours(case: Case, **options) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    q, p = case.query_QD.clone().requires_grad_(), case.passage_PD.clone().requires_grad_()
    given = {"tau": TAU, "teacher_tau": 0.7, "hard_weight": 1.0, "soft_weight": 0.6, "in_batch": True, "margin": 0.1}
    given |= options
    terms = training_loss(q, p, case.groups, case.teacher_QC, temperature=given.pop("tau"),
                          teacher_temperature=given.pop("teacher_tau"), **given)
    parts = {name: float(getattr(terms, name)) for name in ("hard", "soft", "masked", "label_entropy")}
    return terms.total, parts, list(torch.autograd.grad(terms.total, [q, p]))


def on_the_edge(case: Case, margin: float | None) -> bool:
    """Whether some cosine is so close to the mask's bar that fp32 and fp64 may differ."""
    if margin is None:
        return False
    cosine = case.query_QD.double() @ case.passage_PD.double().T
    bar = cosine[range(len(case.own)), [c[0] for c in case.own]] + margin
    return bool(((cosine - bar[:, None]).abs() < 1e-5).any())


def same(mine: tuple, truth: tuple) -> bool:
    """Whether total, parts and gradients agree to fp32's accuracy on scores of up to 1 / TAU."""
    values = torch.tensor([mine[0].item(), *mine[1].values()]), torch.tensor([truth[0].item(), *truth[1].values()])
    return torch.allclose(*values, rtol=1e-5, atol=3e-5) and all(
        torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4) for a, b in zip(mine[2], truth[2], strict=True)
    )


OPTIONS = [{}, {"in_batch": False}, {"margin": None}, {"margin": 0.01}, {"hard_weight": 0.0}, {"soft_weight": 0.0},
           {"tau": 0.02}, {"teacher_tau": 0.05}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_parts_and_gradients_are_those_of_the_loops(seed, options):
    generator, compared, masked = torch.Generator().manual_seed(seed), 0, 0
    for _ in range(12):
        case = draw(generator)
        if not on_the_edge(case, options.get("margin", 0.1)):
            truth = loops(case, **options)
            assert same(ours(case, **options), truth)
            compared, masked = compared + 1, masked + truth[1]["masked"]
    assert compared >= 8
    assert masked > 0 or options == {"in_batch": False}


@pytest.mark.parametrize("wrong", [{"margin": 0.3}, {"margin": None}, {"in_batch": False}, {"tau": 0.06},
                                   {"teacher_tau": 1.0}, {"soft_weight": 1.0}, {"hard_weight": 0.9}], ids=str)
def test_control_loops_with_another_rule_are_told_apart(seed, wrong):
    generator = torch.Generator().manual_seed(seed)
    cases = [draw(generator) for _ in range(8)]
    assert not all(same(ours(case), loops(case, **wrong)) for case in cases)


def plain_case(seed: int, *, queries: int = 5, candidates: int = 4, width: int = 8) -> Case:
    """Equal groups, no text twice, nothing known elsewhere: what other libraries compute too."""
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(queries * (1 + candidates), width, generator=generator), dim=-1)
    own = [list(range(i * candidates, (i + 1) * candidates)) for i in range(queries)]
    return Case(vectors[:queries], vectors[queries:], own, list(range(queries * candidates)), [[c[0]] for c in own],
                [None] * queries)


def test_one_hot_labels_give_cross_entropy(seed):
    case = plain_case(seed)
    score_QP = case.query_QD @ case.passage_PD.T / TAU
    positive = torch.tensor([columns[0] for columns in case.own])
    _, parts, _ = ours(case, margin=None)
    assert parts["hard"] == pytest.approx(F.cross_entropy(score_QP, positive).item(), rel=1e-5)
    assert parts["soft"] == 0


def test_contrastive_term_is_that_of_sentence_transformers(seed):
    losses = pytest.importorskip("sentence_transformers.losses")
    case = plain_case(seed, candidates=2)
    positive, negative = case.passage_PD[::2], case.passage_PD[1::2]
    peer = losses.MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=1 / TAU)
    value = peer.compute_loss_from_embeddings([case.query_QD, positive, negative], None)
    assert ours(case, margin=None)[1]["hard"] == pytest.approx(value.item(), rel=1e-5)


@settings(max_examples=200)
@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4),
       st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.sampled_from([0.05, 1.0]), st.booleans())
def test_loss_is_at_least_the_entropy_of_the_labels(teacher, cosine, teacher_temperature, in_batch):
    count = len(teacher)
    column_QC = torch.arange(3 * count).view(count, 3)
    groups = Groups(column_QC, torch.arange(3 * count), torch.full((count, 1), -1))
    label_QC = soft_labels(torch.tensor(teacher), column_QC, teacher_temperature)
    passage_PD = torch.tensor(cosine * count)[:, None]
    loss_Q, _ = soft_contrastive(torch.ones(count, 1), passage_PD, groups, label_QC, temperature=TAU, in_batch=in_batch,
                                 margin=None)
    entropy_Q = torch.special.entr(label_QC).sum(-1)
    assert (loss_Q >= entropy_Q - 1e-4).all()
    matched = torch.log(label_QC.clamp(min=1e-30)) * TAU  # scores equal to log labels: the bound is reached
    if count == 1:
        reached, _ = soft_contrastive(torch.ones(1, 1), matched.T, groups, label_QC, temperature=TAU, in_batch=False,
                                      margin=None)
        assert reached.item() == pytest.approx(entropy_Q.item(), abs=1e-4)


@pytest.mark.parametrize("in_batch", [True, False])
def test_gradients_on_the_scores_sum_to_zero_by_row(seed, in_batch):
    case = draw(torch.Generator().manual_seed(seed))
    passages = len(case.text)
    case = replace(case, query_QD=torch.rand(len(case.own), passages), passage_PD=torch.eye(passages))  # q is the score
    (gradient_QP, _) = ours(case, in_batch=in_batch)[2]
    assert gradient_QP.abs().max() > 1e-3
    assert gradient_QP.sum(-1).abs().max() < 1e-5


def test_rows_without_labels_are_ignored():
    case = plain_case(1, queries=3)
    labelled = replace(case, teacher=[[3.0, 1.0, 0.5, 0.0], None, None])
    one = replace(case, query_QD=case.query_QD[:1], own=case.own[:1], known=case.known[:1],
                  teacher=labelled.teacher[:1])
    value, parts, (gradient_QD, _) = ours(labelled, hard_weight=0.0)
    assert value.item() == pytest.approx(ours(one, hard_weight=0.0)[0].item(), rel=1e-6)
    assert (gradient_QD[1:] == 0).all()
    assert (gradient_QD[0] != 0).any()
    label_QC = torch.eye(3, 4) * torch.tensor([[1], [0], [1]])
    loss_Q, _ = soft_contrastive(case.query_QD, case.passage_PD, case.groups, label_QC,
                                 temperature=TAU, in_batch=True, margin=None)
    assert loss_Q[1] == 0
    assert (loss_Q[[0, 2]] > 0).all()
    value, parts, gradients = ours(case)
    assert parts["soft"] == parts["label_entropy"] == 0
    assert all(torch.isfinite(g).all() for g in [value, *gradients])


# One query at (1, 0) with positive p0 (cosine 0.5) and negative p1; p2, p3 belong to another query.
ANGLE = {"positive": 0.5, "negative": 0.9, "near": 0.65, "far": 0.2}


def planted(other: float, *, text: list[int] | None = None, known: list[int] | None = None) -> Case:
    cosines = [ANGLE["positive"], ANGLE["negative"], other, ANGLE["far"]]
    passage_PD = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])
    query_QD = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    return Case(query_QD, passage_PD, [[0, 1], [2, 3]], text or [0, 1, 2, 3], [known or [0], [2]], [None, None])


@pytest.mark.parametrize(("case", "margin", "masked"), [
    (planted(ANGLE["near"]), 0.1, 1),
    (planted(ANGLE["near"]), 0.2, 0),
    (planted(ANGLE["near"]), None, 0),
    (planted(ANGLE["far"]), 0.1, 0),
    (planted(ANGLE["far"], text=[0, 1, 0, 3]), 0.1, 1),  # another query's passage with the text of the own positive
    (planted(ANGLE["far"], known=[0, 2]), None, 1),  # a known positive that was not drawn, or the query's own text
    (planted(ANGLE["far"], text=[0, 1, 1, 3]), 0.1, 0),  # the text of an own negative is still a negative
    (planted(ANGLE["far"], text=[0, 0, 2, 3]), 0.1, 0),  # candidates stay, whatever their text
], ids=["close", "within the margin", "no margin", "far", "same text", "known", "negative's text", "candidate's text"])
def test_which_columns_leave(case, margin, masked):
    loss_Q, masked_Q = soft_contrastive(case.query_QD, case.passage_PD, case.groups, torch.eye(1, 2).repeat(2, 1),
                                        temperature=TAU, in_batch=True, margin=margin)
    assert masked_Q.tolist()[0] == masked
    cosine = case.passage_PD[:, 0]
    # 1 is closer than the positive by more than the margin, yet a candidate; 0 is known, yet the positive
    seen = [0, 1, 3] if masked else [0, 1, 2, 3]
    expected = torch.logsumexp(cosine[seen] / TAU, 0) - cosine[0] / TAU
    assert loss_Q[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_in_batch_negatives_nothing_leaves():
    case = planted(ANGLE["near"], text=[0, 1, 0, 0])
    _, masked_Q = soft_contrastive(case.query_QD, case.passage_PD, case.groups, torch.eye(1, 2).repeat(2, 1),
                                   temperature=TAU, in_batch=False, margin=0.1)
    assert masked_Q.tolist() == [0, 0]


@pytest.mark.parametrize(("margin", "gradient_reaches"), [(0.1, False), (None, True)])
def test_the_mask_is_a_constant_in_backward(margin, gradient_reaches):
    case = planted(ANGLE["near"])
    label_QC = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # row 1 is ignored: all gradient comes from row 0
    q, p = case.query_QD.clone().requires_grad_(), case.passage_PD.clone().requires_grad_()
    loss_Q, _ = soft_contrastive(q, p, case.groups, label_QC, temperature=TAU, in_batch=True, margin=margin)
    gradient_QD, gradient_PD = torch.autograd.grad(loss_Q.sum(), [q, p])
    assert bool((gradient_PD[2] != 0).any()) is gradient_reaches
    seen = [0, 1, 3] if margin else [0, 1, 2, 3]
    q2 = case.query_QD[0].clone().requires_grad_()
    score = case.passage_PD[seen] @ q2 / TAU
    (expected,) = torch.autograd.grad(torch.logsumexp(score, 0) - score[0], q2)
    torch.testing.assert_close(gradient_QD[0], expected, rtol=1e-4, atol=1e-5)


def test_one_score_that_dominates_stays_finite():
    case = plain_case(3, queries=2)
    case = replace(case, passage_PD=case.passage_PD * torch.tensor([1.0, 1e3, 1, 1, 1, 1, 1, 1])[:, None])
    value, _, gradients = ours(case, tau=0.02)
    assert all(torch.isfinite(x).all() for x in [value, *gradients])
