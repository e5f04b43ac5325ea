"""Adaptive hard-negative mining: which candidates are wrong enough to be negatives.

A retriever's best passages for a query are mostly right or nearly right, and a passage that is right makes a bad
negative. So each query gets a bar of its own, from the score of its positive: what scores above the bar is likely a
positive that nobody marked, and is left out. The best of the rest are the hard negatives.

    rule          keep a candidate n of the pair (q, p) iff        published value
    percentage    s(q,n) < r s(q,p)      (the report's rule)       r = 0.95
    margin        s(q,n) < s(q,p) - m                              m = 0.05
    absolute      s(q,n) < c                                       c = 0.7
    none          always

One query whose positive scores 0.80, candidates by score, two negatives wanted (x kept, . not needed, - left out):

    score         0.81  0.77  0.75  0.71  0.52
    percentage     -     -     x     x     .       bar 0.76
    margin         -     -     -     x     x       bar 0.75
    absolute       -     -     -     -     x       bar 0.70: one negative is all there is
    none           x     x     .     .     .

`s` is a score on a bounded scale (a cosine, or a reranker's logit through a sigmoid), of one model for positive and
candidates. Several positives: the lowest sets the bar. Below zero r s would raise the bar, so what is taken off is a
share of the size: s - (1 - r) |s|, which is r s for s >= 0 and (2 - r) s below.

Standard library only: this is the page to read. Called by run_label.py, labelling/; `fold` by data.py and scoring/ too.
Source: arXiv 2506.07438, mining (its sentence has the inequality the wrong way round: it would drop the easy ones);
rules and values: NV-Retriever, arXiv 2407.15831, section 3.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

RULES = {"percentage": 0.95, "margin": 0.05, "absolute": 0.7, "none": 0.0}  # with the published values


@dataclass(slots=True)
class Candidate:
    """A passage that might be a negative; `score` is on the bounded scale."""

    id: str
    text: str
    score: float


Why = Literal["kept", "not needed", "above the bar", "known positive", "same text"]


def bar(rule: str, value: float, positive_scores: Iterable[float]) -> float:
    """The score below which a candidate is a negative; inf where there is no limit."""
    lowest = min(positive_scores)
    share = value if lowest >= 0 else 2 - value
    return {"percentage": share * lowest, "margin": lowest - value, "absolute": value, "none": math.inf}[rule]


def judge(
    query: str, positives: Sequence[Candidate], candidates: Iterable[Candidate], *,
    rule: str = "percentage", value: float = RULES["percentage"], negatives: int = 7,
    elsewhere: Sequence[Candidate] = (),
) -> Iterator[tuple[Candidate, Why]]:
    """What becomes of each candidate, one after another, best first as they come in.

    Left out whatever they score: the positives by id, and any text equal to the query, to a positive or to a negative
    that was already kept (white space folded). `elsewhere`: positives of the same query on other lines, left out too;
    they do not set the bar.
    """
    limit = bar(rule, value, [positive.score for positive in positives])
    right = (*positives, *elsewhere)
    known = {positive.id for positive in right}
    seen = {fold(query)} | {fold(positive.text) for positive in right}
    kept = 0
    for candidate in candidates:
        if candidate.id in known:
            yield candidate, "known positive"
        elif (text := fold(candidate.text)) in seen:
            yield candidate, "same text"
        elif candidate.score >= limit:
            yield candidate, "above the bar"
        elif kept == negatives:
            yield candidate, "not needed"
        else:
            kept += 1
            seen.add(text)
            yield candidate, "kept"


def best_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By falling score, ties by id: so the order they were found in changes nothing."""
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.id))


def mine(
    query: str, positives: Sequence[Candidate], candidates: Iterable[Candidate], *,
    rule: str = "percentage", value: float = RULES["percentage"], negatives: int = 7,
) -> list[Candidate]:
    """The `negatives` best candidates below the bar; fewer where there are no more: nothing is filled up."""
    fates = judge(query, positives, best_first(candidates), rule=rule, value=value, negatives=negatives)
    return list(islice((candidate for candidate, why in fates if why == "kept"), negatives))


def reciprocal_rank_fusion(lists: Sequence[Sequence[str]], *, constant: int = 60) -> list[tuple[str, float]]:
    """Ids of several ranked lists by falling sum over the lists of 1 / (constant + rank), ties by id.

    Ranks start at 1; a list without the id adds nothing. Source: arXiv 2506.07438 (k "typically 60"); Cormack et al.,
    SIGIR 2009. Example: [a b], [b c] -> b (1/62 + 1/61), a (1/61), c (1/62).
    """
    score: defaultdict[str, float] = defaultdict(float)
    for ranked in lists:
        for rank, passage in enumerate(ranked, start=1):
            score[passage] += 1 / (constant + rank)
    return sorted(score.items(), key=lambda item: (-item[1], item[0]))


def sigmoid(logit: float) -> float:
    """A reranker's logit on the scale from 0 to 1, without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


@lru_cache(maxsize=2**12)  # the same passages come again, for other queries; texts may be long
def fold(text: str) -> str:
    """The text with each run of white space as one space: what counts as the same text."""
    return " ".join(text.split())
