"""Hard-negative filters: by hand, by properties, by brute force, and against sentence-transformers' miner."""

import itertools
import math
import random
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.mining.rules import (
    RULES,
    Candidate,
    filter_candidates,
    select_hard_negatives,
    sigmoid,
    sort_by_score,
    threshold,
)
from ref.utils.text import normalize_whitespace

POSITIVE = Candidate("p", "the positive", 0.8)
FIVE = [Candidate(f"d{n}", f"text {n}", score) for n, score in enumerate((0.81, 0.77, 0.75, 0.71, 0.52))]


@pytest.mark.parametrize(("rule", "marks"), [("percentage", "--xx."), ("margin", "---xx"), ("absolute", "----x"),
                                             ("none", "xx...")])
def test_the_worked_example_of_the_page(rule, marks):
    decisions = filter_candidates("q", [POSITIVE], FIVE, rule=rule, value=RULES[rule], num_negatives=2)
    assert "".join({"selected": "x", "not needed": ".", "above threshold": "-"}[d] for _, d in decisions) == marks


@pytest.mark.parametrize("positive", [0.9, 1e-9, 0.0, -1e-9, -0.3])
def test_below_zero_the_threshold_is_still_below_the_positive(positive):
    assert threshold("percentage", 0.95, [positive]) == pytest.approx(positive - 0.05 * abs(positive), abs=1e-15)
    assert threshold("percentage", 0.95, [positive]) <= positive
    assert threshold("percentage", 1.0, [positive]) == positive


def test_the_lowest_positive_determines_the_threshold():
    several = [POSITIVE, Candidate("p2", "another", 0.6), Candidate("p3", "a third", 0.9)]
    assert threshold("percentage", 0.95, [p.score for p in several]) == pytest.approx(0.95 * 0.6)
    assert [n.id for n in select_hard_negatives("q", several, FIVE)] == ["d4"]


def test_other_positives_are_rejected_and_do_not_determine_the_threshold():
    others = [FIVE[0], Candidate("x", FIVE[1].text, math.nan)]
    decisions = filter_candidates("q", [POSITIVE], FIVE, rule="none", other_positives=others)
    by_id = {candidate.id: decision for candidate, decision in decisions}
    assert (by_id.pop(FIVE[0].id), by_id.pop(FIVE[1].id)) == ("known positive", "duplicate text")
    assert set(by_id.values()) == {"selected"}


def test_known_positives_and_duplicates_are_never_negatives():
    candidates = [
        Candidate("p", "known by its id", 0.1), Candidate("a", "the  positive\n", 0.2), Candidate("b", " What?", 0.3),
        Candidate("c", "a negative", 0.4), Candidate("d", "a\tnegative", 0.39), Candidate("e", "another", 0.1)]
    assert [n.id for n in select_hard_negatives("What?", [POSITIVE], candidates)] == ["c", "e"]
    decisions = filter_candidates("What?", [POSITIVE], sort_by_score(candidates))
    assert Counter(d for _, d in decisions) == {"known positive": 1, "duplicate text": 3, "selected": 2}


candidate_lists = st.lists(
    st.tuples(st.sampled_from(string.ascii_letters), st.sampled_from(["x", "y", "z z", "z  z", "q", "p", *"abcdef"]),
              st.floats(-1, 1).map(lambda x: round(x, 1))), max_size=12, unique_by=lambda c: c[0])


def by_brute_force(query, positives, candidates, rule, value, count):
    """The definition, literally: try all candidates in order, take each that nothing forbids."""
    lowest = min(p.score for p in positives)
    below = {"percentage": lambda s: s < (value * lowest if lowest >= 0 else (2 - value) * lowest),
             "margin": lambda s: s < lowest - value, "absolute": lambda s: s < value, "none": lambda s: True}[rule]
    order = list(candidates)
    for i, j in itertools.combinations(range(len(order)), 2):  # selection by exchange: no sort of the library
        if (order[j].score, ) > (order[i].score, ) or (order[j].score == order[i].score and order[j].id < order[i].id):
            order[i], order[j] = order[j], order[i]
    taken = []
    for c in order:
        same = any(c.text.split() == t.split() for t in (query, *(x.text for x in (*positives, *taken))))
        if len(taken) < count and below(c.score) and not same and all(c.id != p.id for p in positives):
            taken.append(c)
    return taken


@given(candidates=candidate_lists, positives=candidate_lists.filter(bool), rule=st.sampled_from(list(RULES)),
       value=st.sampled_from([0.5, 0.95, 0.05]), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_properties_and_brute_force(candidates, positives, rule, value, count, seed):
    candidates, positives = ([Candidate(*c) for c in some] for some in (candidates, positives))
    mined = select_hard_negatives("q", positives, candidates, rule=rule, value=value, num_negatives=count)
    assert mined == by_brute_force("q", positives, candidates, rule, value, count)
    assert all(n.score < threshold(rule, value, [p.score for p in positives]) for n in mined)
    assert not {normalize_whitespace(n.text) for n in mined} & {normalize_whitespace(p.text) for p in positives}
    assert not {n.id for n in mined} & {p.id for p in positives}
    decisions = list(filter_candidates(
        "q", positives, sort_by_score(candidates), rule=rule, value=value, num_negatives=count))
    assert [c for c, _ in decisions] == sort_by_score(candidates)
    assert [c for c, decision in decisions if decision == "selected"] == mined
    random.Random(seed).shuffle(candidates)
    assert select_hard_negatives("q", positives, candidates, rule=rule, value=value, num_negatives=count) == mined


def test_a_wrong_inequality_would_be_noticed():
    """Control: the paper's sentence, taken literally, selects what scores above 95 % of the positive."""
    literally = [c for c in FIVE if c.score > threshold("percentage", 0.95, [POSITIVE.score])]
    assert select_hard_negatives("q", [POSITIVE], FIVE) != literally


def test_sigmoid():
    assert sigmoid(0.0) == 0.5
    assert sigmoid(-800.0) == 0.0 and sigmoid(800.0) == 1.0
    assert sigmoid(2.0) == pytest.approx(1 / (1 + math.exp(-2)))


class Vectors:
    """A stand-in for a model, with given vectors of texts."""

    device = "cpu"

    def __init__(self, vectors):
        self.vectors = vectors

    def encode_query(self, texts, **_):
        return np.array([self.vectors[text] for text in texts])

    encode_document = encode_query

    def similarity(self, one, other):
        import torch
        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one, other):
        import torch
        return (torch.as_tensor(one) * torch.as_tensor(other)).sum(1)


@pytest.mark.parametrize(("rule", "value", "theirs"), [
    ("percentage", 0.9, {"relative_margin": 0.1}), ("margin", 0.05, {"absolute_margin": 0.05}),
    ("absolute", 0.6, {"max_score": 0.6}), ("none", 0.0, {})])
def test_the_same_negatives_as_sentence_transformers(rule, value, theirs):
    """Where both define the rule alike: positive scores, no equal texts, none at the threshold, one positive per query.

    They differ elsewhere: theirs selects a score that equals the threshold, raises the threshold above a negative score
    of the positive, has a threshold for each positive, drops queries with fewer negatives than asked for, and compares
    texts without normalising white space.
    """
    datasets = pytest.importorskip("datasets")
    util = pytest.importorskip("sentence_transformers.util")
    draw = np.random.default_rng(random.randrange(2**31))
    passages, queries = [f"passage {n}" for n in range(120)], [f"query {n}" for n in range(30)]
    base = np.abs(draw.normal(size=(150, 24)))  # scores are positive; fp64: rounding decides nothing
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    vectors = dict(zip(passages + queries, base, strict=True))
    pairs = [(query, passages[n]) for n, query in enumerate(queries)]
    found = util.mine_hard_negatives(
        datasets.Dataset.from_dict({"query": queries, "positive": [p for _, p in pairs]}), Vectors(vectors),
        corpus=passages, num_negatives=3, range_max=119, output_format="n-tuple", verbose=False, **theirs)
    their_negatives = {row["query"]: [row[f"negative_{n}"] for n in (1, 2, 3)] for row in found}
    ours = {}
    for query, positive in pairs:
        scored = [Candidate(p, p, float(vectors[query] @ vectors[p])) for p in passages]
        known = [c for c in scored if c.id == positive]
        mined = select_hard_negatives(query, known, scored, rule=rule, value=value, num_negatives=3)
        if len(mined) == 3:
            ours[query] = [n.text for n in mined]
    assert ours == their_negatives and len(ours) > 3
