"""Hard-negative filters relative to the positive's score.

Most of the passages that a retriever finds for a query are relevant or nearly so, and a relevant passage makes a bad
negative. So each query has a threshold, computed from the score of its positive: a candidate at or above it is likely
a positive that nobody has marked (a false negative) and is rejected. The best of the others are the hard negatives.

    rule          NV-Retriever's name    n is a negative of (q, p) if      published value
    percentage    TopK-PercPos           s(q,n) < r s(q,p)                 r = 0.95 (the paper's rule)
    margin        TopK-MarginPos         s(q,n) < s(q,p) - m               m = 0.05
    absolute      TopK-Abs               s(q,n) < c                        c = 0.7
    none          Naive Top-K            always

Example: the positive scores 0.80, the candidates are sorted by score, and two negatives are wanted (x selected, . not
needed, - above the threshold):

    score         0.81  0.77  0.75  0.71  0.52
    percentage     -     -     x     x     .       threshold 0.76
    margin         -     -     -     x     x       threshold 0.75
    absolute       -     -     -     -     x       threshold 0.70: there is only one negative
    none           x     x     .     .     .

These filters run before training, on the teacher's scores. In training, in-batch passages have a threshold of their own
(ref/loss/contrastive.py: false_negative_mask).

s is a bounded score (a cosine, or a reranker's logit through a sigmoid) from one model for positives and candidates. Of
several positives the lowest determines the threshold. If s = s(q,p) < 0, then r s > s; therefore the
threshold is s - (1 - r) |s|, which is r s for s >= 0 and (2 - r) s for s < 0.

Source: arXiv 2506.07438, mining (its sentence states the inequality the wrong way round and would select the false
negatives); rules and values: NV-Retriever, arXiv 2407.15831, section 3.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ref.utils.text import normalize_whitespace

RULES = {"percentage": 0.95, "margin": 0.05, "absolute": 0.7, "none": 0.0}  # with the published values

Decision = Literal["selected", "not needed", "above threshold", "known positive", "duplicate text"]


@dataclass(slots=True)
class Candidate:
    """A passage with its bounded score."""

    id: str
    text: str
    score: float


def threshold(rule: str, value: float, positive_scores: Iterable[float]) -> float:
    """The score that a negative must be below; inf for the rule `none`."""
    lowest = min(positive_scores)
    share = value if lowest >= 0 else 2 - value
    return {"percentage": share * lowest, "margin": lowest - value, "absolute": value, "none": math.inf}[rule]


def filter_candidates(
    query: str, positives: Sequence[Candidate], candidates: Iterable[Candidate], *,
    rule: str = "percentage", value: float = RULES["percentage"], num_negatives: int = 7,
    other_positives: Sequence[Candidate] = (),
) -> Iterator[tuple[Candidate, Decision]]:
    """Yield each candidate with the decision about it; `candidates` are sorted by score, the highest first.

    Always rejected: passages with the id of a positive, or with a text equal to the query, a positive or a selected
    negative (up to white space). `other_positives`, from other lines with the same query, are rejected as well, but do
    not determine the threshold.
    """
    limit = threshold(rule, value, [positive.score for positive in positives])
    known = (*positives, *other_positives)
    known_ids = {positive.id for positive in known}
    seen = {normalize_whitespace(text) for text in (query, *(positive.text for positive in known))}
    num_selected = 0
    for candidate in candidates:
        if candidate.id in known_ids:
            yield candidate, "known positive"
        elif (text := normalize_whitespace(candidate.text)) in seen:
            yield candidate, "duplicate text"
        elif candidate.score >= limit:
            yield candidate, "above threshold"
        elif num_selected == num_negatives:
            yield candidate, "not needed"
        else:
            num_selected += 1
            seen.add(text)
            yield candidate, "selected"


def sort_by_score(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Candidates by descending score, ties by id: the result does not depend on their order."""
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.id))


def select_hard_negatives(
    query: str, positives: Sequence[Candidate], candidates: Iterable[Candidate], *,
    rule: str = "percentage", value: float = RULES["percentage"], num_negatives: int = 7,
) -> list[Candidate]:
    """The `num_negatives` best candidates below the threshold, or fewer if there are no more."""
    decisions = filter_candidates(
        query, positives, sort_by_score(candidates), rule=rule, value=value, num_negatives=num_negatives)
    return list(islice((candidate for candidate, decision in decisions if decision == "selected"), num_negatives))


def sigmoid(logit: float) -> float:
    """A reranker's logit as a score from 0 to 1, without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
