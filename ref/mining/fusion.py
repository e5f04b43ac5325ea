"""Fusion of ranked lists, such as the results of BM25 and of dense search."""

from collections import defaultdict
from collections.abc import Sequence


def reciprocal_rank_fusion(lists: Sequence[Sequence[str]], *, constant: int = 60) -> list[tuple[str, float]]:
    """Ids with the sum over the lists of 1 / (constant + rank), sorted by it in descending order, ties by id.

    Ranks start at 1; a list without the id adds nothing. Example: [a b], [b c] -> b (1/62 + 1/61), a (1/61), c (1/62).
    Source: arXiv 2506.07438 (constant "typically 60"); Cormack et al., SIGIR 2009.
    """
    score: defaultdict[str, float] = defaultdict(float)
    for ranked in lists:
        for rank, passage in enumerate(ranked, start=1):
            score[passage] += 1 / (constant + rank)
    return sorted(score.items(), key=lambda item: (-item[1], item[0]))
