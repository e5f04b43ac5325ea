"""What the labels look like: numbers by data set for the companion file, a table of rules, a histogram."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ref.mining import Candidate, Why, best_first, judge
from ref.runs import write_whole

COMPARED = [("none", 0.0), *(("percentage", r) for r in (0.99, 0.97, 0.95, 0.9, 0.8)),
            *(("margin", m) for m in (0.02, 0.05, 0.1)), *(("absolute", c) for c in (0.8, 0.7, 0.6))]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class Tally:
    """Counts of one data set, query by query. A score takes 4 bytes, a tenth of the candidates' are kept."""

    temperature: float
    queries: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    queries_by_negatives: Counter[int] = field(default_factory=Counter)
    entropy: float = 0.0
    scores: dict[str, "array[float]"] = field(default_factory=lambda: defaultdict(lambda: array("f")))

    def add(
        self, fate: Sequence[tuple[Candidate, Why]], positives: Sequence[float], negatives: Sequence[float],
        candidates: Sequence[float],
    ) -> None:
        """A query with what became of its candidates, and raw scores: those its line holds, and of all candidates."""
        self.queries += 1
        self.fates.update(why for _, why in fate)
        self.queries_by_negatives[len(negatives)] += 1
        self.entropy += entropy([positives[0], *negatives], self.temperature)
        for what, some in (("positive", positives), ("negative", negatives),
                           ("candidate", candidates[self.queries % 10 :: 10])):
            self.scores[what].extend(some)

    def as_json(self, wanted: int) -> dict[str, Any]:
        """Shares, entropy in nats (the most there can be beside it) and quantiles."""
        judged = sum(self.fates[why] for why in ("kept", "not needed", "above the bar"))
        return {
            "queries": self.queries, "candidates": self.fates.total(), "fates": dict(self.fates),
            "rejected_share": round(self.fates["above the bar"] / max(1, judged), 4),
            "queries_with_fewer_negatives": sum(n for count, n in self.queries_by_negatives.items() if count < wanted),
            "queries_by_negatives": {str(count): n for count, n in sorted(self.queries_by_negatives.items())},
            "label_entropy": round(self.entropy / max(1, self.queries), 4), "entropy_of_flat_labels":
                round(math.log(1 + wanted), 4), "label_temperature": self.temperature,
            "raw_score_quantiles": {what: {str(q): round(float(np.quantile(self.scores[what], q)), 4)
                                           for q in QUANTILES}
                                    for what in ("positive", "negative") if self.scores[what]}}


def entropy(scores: Sequence[float], temperature: float) -> float:
    """Of softmax(scores / temperature), in nats."""
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    total = sum(weights)
    return math.log(total) - sum(w * math.log(w) for w in weights if w > 0) / total


def rules_table(
    queries: Iterable[tuple[str, list[Candidate], list[Candidate], list[Candidate]]], *, negatives: int,
) -> list[str]:
    """For each rule and value: candidates that stay below the bar, and queries that get all their negatives."""
    kept, full = Counter[tuple[str, float]](), Counter[tuple[str, float]]()
    count = judged = 0
    for query, positives, candidates, elsewhere in queries:
        count += 1
        ranked = best_first(candidates)
        for rule in COMPARED:
            fates = Counter(why for _, why in judge(
                query, positives, ranked, rule=rule[0], value=rule[1], negatives=negatives, elsewhere=elsewhere))
            below = fates["kept"] + fates["not needed"]
            kept[rule] += below
            full[rule] += fates["kept"] == negatives
            judged += below if rule == COMPARED[0] else 0  # the rule `none` keeps whatever can be judged
    lines = [f"{'rule':<12}{'value':>7}{'kept a query':>14}{'rejected':>10}{f'with {negatives} negatives':>19}"]
    for rule in COMPARED:
        lines.append(f"{rule[0]:<12}{rule[1]:>7.2f}{kept[rule] / count:>14.1f}{1 - kept[rule] / max(1, judged):>10.1%}"
                     f"{full[rule] / count:>19.1%}")
    return lines


def draw_histogram(tallies: dict[str, Tally], path: Path, *, scale: str) -> str | None:
    """Scores of positives, candidates and kept negatives by data set, as a PNG; returns why not, if it cannot be."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no histogram: matplotlib is not installed (pip install -e .[plots])"
    figure = Figure(figsize=(7, 2.6 * len(tallies)), layout="constrained")
    for axes, (task, tally) in zip(figure.subplots(len(tallies), squeeze=False)[:, 0], tallies.items(), strict=True):
        for what, color in (("candidate", "#bbbbbb"), ("negative", "#cc3311"), ("positive", "#4477aa")):
            if tally.scores[what]:
                axes.hist(tally.scores[what], bins=60, density=True, alpha=0.6, color=color, label=what)
        axes.set(title=task, xlabel=f"teacher's score ({scale})", ylabel="density")
        axes.legend(fontsize=8)
    write_whole(path, lambda draft: figure.savefig(draft, dpi=120, format="png"))
    return None
