"""Statistics of the labels: numbers per task for the companion file, a table of rules, a histogram of the scores."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ref.mining.rules import Candidate, Decision, filter_candidates, sort_by_score
from ref.utils.entropy import softmax_entropy
from ref.utils.files import atomic_write

COMPARED_RULES = [("none", 0.0), *(("percentage", r) for r in (0.99, 0.97, 0.95, 0.9, 0.8)),
                  *(("margin", m) for m in (0.02, 0.05, 0.1)), *(("absolute", c) for c in (0.8, 0.7, 0.6))]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CANDIDATE_SAMPLING = 10  # every tenth candidate's score is kept, at 4 bytes


@dataclass
class LabelStatistics:
    """Counts of one task, accumulated query by query."""

    teacher_temperature: float
    num_queries: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    queries_by_negatives: Counter[int] = field(default_factory=Counter)
    entropy: float = 0.0
    scores: dict[str, "array[float]"] = field(default_factory=lambda: defaultdict(lambda: array("f")))

    def add(
        self, decisions: Sequence[tuple[Candidate, Decision]], positives: Sequence[float], negatives: Sequence[float],
        candidates: Sequence[float],
    ) -> None:
        """Add a query: decisions about its candidates, and raw scores of positives, negatives and all candidates."""
        self.num_queries += 1
        self.decisions.update(decision for _, decision in decisions)
        self.queries_by_negatives[len(negatives)] += 1
        self.entropy += softmax_entropy([positives[0], *negatives], self.teacher_temperature)
        self.scores["positive"].extend(positives)
        self.scores["negative"].extend(negatives)
        self.scores["candidate"].extend(candidates[self.num_queries % CANDIDATE_SAMPLING :: CANDIDATE_SAMPLING])

    def to_json(self, num_negatives: int) -> dict[str, Any]:
        """Shares, mean entropy in nats with its maximum, and quantiles."""
        compared = sum(self.decisions[name] for name in ("selected", "not needed", "above threshold"))
        return {
            "queries": self.num_queries, "candidates": self.decisions.total(), "decisions": dict(self.decisions),
            "rejected_share": round(self.decisions["above threshold"] / max(1, compared), 4),
            "queries_with_fewer_negatives": sum(
                queries for count, queries in self.queries_by_negatives.items() if count < num_negatives),
            "queries_by_num_negatives": {str(n): queries for n, queries in sorted(self.queries_by_negatives.items())},
            "label_entropy": round(self.entropy / max(1, self.num_queries), 4),
            "max_label_entropy": round(math.log(1 + num_negatives), 4),
            "teacher_temperature": self.teacher_temperature,
            "score_quantiles": {name: {str(q): round(float(np.quantile(self.scores[name], q)), 4) for q in QUANTILES}
                                for name in ("positive", "negative") if self.scores[name]}}


def compare_rules(
    queries: Iterable[tuple[str, list[Candidate], list[Candidate], list[Candidate]]], *, num_negatives: int,
) -> list[str]:
    """Lines of a table: for each rule and value the candidates below the threshold per query, the share rejected, and
    the share of queries with `num_negatives` negatives. `queries`: (query, positives, candidates, other positives).
    """
    below, complete = Counter[tuple[str, float]](), Counter[tuple[str, float]]()
    num_queries = 0
    for query, positives, candidates, other_positives in queries:
        num_queries += 1
        ranked = sort_by_score(candidates)
        for rule, value in COMPARED_RULES:
            counts = Counter(decision for _, decision in filter_candidates(
                query, positives, ranked, rule=rule, value=value, num_negatives=num_negatives,
                other_positives=other_positives))
            below[rule, value] += counts["selected"] + counts["not needed"]
            complete[rule, value] += counts["selected"] == num_negatives
    compared = below[COMPARED_RULES[0]]  # the rule `none` rejects nothing by score
    lines = [f"{'rule':<12}{'value':>7}{'below/query':>13}{'rejected':>10}{f'with {num_negatives} negatives':>19}"]
    for rule, value in COMPARED_RULES:
        lines.append(f"{rule:<12}{value:>7.2f}{below[rule, value] / num_queries:>13.1f}"
                     f"{1 - below[rule, value] / max(1, compared):>10.1%}{complete[rule, value] / num_queries:>19.1%}")
    return lines


def plot_histogram(statistics: dict[str, LabelStatistics], path: Path, *, scale: str) -> str | None:
    """Plot the scores of positives, candidates and negatives by task as a PNG; returns the reason if it cannot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no histogram: matplotlib is not installed (pip install -e .[plots])"
    figure = Figure(figsize=(7, 2.6 * len(statistics)), layout="constrained")
    all_axes = figure.subplots(len(statistics), squeeze=False)[:, 0]
    for axes, (task, task_statistics) in zip(all_axes, statistics.items(), strict=True):
        for name, color in (("candidate", "#bbbbbb"), ("negative", "#cc3311"), ("positive", "#4477aa")):
            if task_statistics.scores[name]:
                axes.hist(task_statistics.scores[name], bins=60, density=True, alpha=0.6, color=color, label=name)
        axes.set(title=task, xlabel=f"teacher score ({scale})", ylabel="density")
        axes.legend(fontsize=8)
    atomic_write(path, lambda draft: figure.savefig(draft, dpi=120, format="png"))
    return None
