"""Soft labels from scored pairs: soft_labels.jsonl, a description beside it (.json) and a histogram (.png)."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ref.mining.pipeline import LabellingPipeline, ScoredPair
from ref.mining.rules import RULES, Candidate, filter_candidates, sigmoid, sort_by_score
from ref.mining.statistics import LabelStatistics, compare_rules
from ref.task_types import TASK_TYPES
from ref.utils.environment import environment_info, utc_now
from ref.utils.files import atomic_write, hash_file, read_json, write_json

TEACHER_TEMPERATURE = {"cosine": 0.05, "logit": 1.0}  # defaults by scale


@dataclass(frozen=True)
class LabelConfig:
    """How candidates become negatives. Raises ValueError for a value out of range."""

    rule: str = "percentage"
    value: float = RULES["percentage"]
    num_negatives: int = 7
    teacher_temperature: float = TEACHER_TEMPERATURE["cosine"]  # for the entropy in the description

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"--value must be a finite number (got {self.value})")
        if self.rule == "percentage" and not 0 < self.value <= 1:
            raise ValueError(f"--value must be > 0 and <= 1 for --rule percentage (got {self.value})")
        if not 0 < self.teacher_temperature < math.inf:
            raise ValueError(f"--teacher-temperature must be a finite number > 0 (got {self.teacher_temperature})")


def write_labels(
    pipeline: LabellingPipeline, config: LabelConfig, output: Path,
) -> tuple[dict[str, Any], dict[str, LabelStatistics]]:
    """Write the labels and their description; returns the description and the statistics of each task.

    A query without negatives is left out and counted if its type has no in-batch negatives by default. Raises
    ValueError if no query is left; an earlier file stays then.
    """
    statistics: dict[str, LabelStatistics] = {}
    left_out = Counter[str]()
    description: dict[str, Any] = {}

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            for scored in pipeline.scored_pairs():
                line = label_line(scored, pipeline, config, statistics)
                if line is None:
                    left_out[scored.pair.task] += 1
                else:
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if not statistics:
            raise ValueError(f"--rule {config.rule}: no query has a negative, which their types need (got --value "
                             f"{config.value}); choose another rule or value with --compare-rules")
        description.update(describe(pipeline, config, statistics), queries_left_out=dict(left_out),
                           output={"file": output.name, "sha256": hash_file(draft)})
        write_json(output.with_suffix(".json"), description)  # before the labels get their name: see is_label_file
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, write)
    return description, statistics


def is_label_file(output: Path) -> bool:
    """Whether `output`, if it exists, is as `write_labels` left it: the description beside it has its hash."""
    try:
        described = read_json(output.with_suffix(".json")).get("output")
    except ValueError:
        return False
    digest = hash_file(output) if output.exists() else None
    return isinstance(described, dict) and described.get("file") == output.name and (
        digest in (None, described.get("sha256")))


def label_line(
    scored: ScoredPair, pipeline: LabellingPipeline, config: LabelConfig, statistics: dict[str, LabelStatistics],
) -> dict[str, Any] | None:
    """One line of the output, in the format that run_train.py reads; it is counted in its task's statistics.

    None for a query that is left out.
    """
    query, positives, candidates, other_positives = bounded_scores(scored, pipeline.scale)
    decisions = list(filter_candidates(
        query, positives, sort_by_score(candidates), rule=config.rule, value=config.value,
        num_negatives=config.num_negatives, other_positives=other_positives))
    negatives = [candidate for candidate, decision in decisions if decision == "selected"]
    if not negatives and not TASK_TYPES[scored.pair.task_type].in_batch_negatives:
        return None
    raw_score = {name: score for name, _, score in scored.candidates}
    positive_scores = [round(score, 6) for _, _, score in scored.positives]
    negative_scores = [round(raw_score[negative.id], 6) for negative in negatives]
    task, prompt = scored.pair.task, scored.pair.prompt or pipeline.instruction
    statistics.setdefault(task, LabelStatistics(config.teacher_temperature)).add(
        decisions, positive_scores, negative_scores, [score for _, _, score in scored.candidates])
    return {
        "query": query, "pos": [text for _, text, _ in scored.positives], "neg": [n.text for n in negatives],
        "pos_scores": positive_scores, "neg_scores": negative_scores, **({"prompt": prompt} if prompt else {}),
        "type": scored.pair.task_type, "task": task,
        "mining": {"candidates": len(decisions), **Counter(decision for _, decision in decisions)}}


def bounded_scores(
    scored: ScoredPair, scale: str,
) -> tuple[str, list[Candidate], list[Candidate], list[Candidate]]:
    """Query, positives, candidates and other positives with the scores that the rule compares: cosines, or the sigmoid
    of logits. The other positives have no score.
    """
    bounded = sigmoid if scale == "logit" else float
    positives, candidates = ([Candidate(name, text, bounded(score)) for name, text, score in passages]
                             for passages in (scored.positives, scored.candidates))
    others = [Candidate(name, text, math.nan) for name, text in scored.other_positives]
    return scored.pair.query, positives, candidates, others


def rule_table(pipeline: LabellingPipeline, num_negatives: int) -> list[str]:
    """Lines of a table of what each rule would select."""
    queries = (bounded_scores(scored, pipeline.scale) for scored in pipeline.scored_pairs())
    return compare_rules(queries, num_negatives=num_negatives)


def describe(
    pipeline: LabellingPipeline, config: LabelConfig, statistics: dict[str, LabelStatistics],
) -> dict[str, Any]:
    """All that the labels depend on, hashes of the inputs, and statistics by task."""
    retriever, reranker, pairs, corpus = pipeline.retriever, pipeline.reranker, pipeline.pairs, pipeline.corpus
    return {
        "date": utc_now(), **environment_info(),
        "teacher": {"retriever": retriever.name, "retriever_hash": retriever.key,
                    "reranker": reranker and reranker.name, "reranker_hash": reranker and reranker.key},
        "scale": pipeline.scale, "instruction": pipeline.instruction,
        "rule": {"name": config.rule, "value": config.value, "num_negatives": config.num_negatives,
                 "compared_score": {"cosine": "cosine", "logit": "sigmoid(logit)"}[pipeline.scale]},
        "retrieval": asdict(pipeline.config),
        "pairs": {"file": pairs.path.name, "sha256": pairs.sha256, "queries": len(pairs)},
        "corpus": {"file": corpus.path.name, "sha256": corpus.sha256, "passages": len(corpus)},
        "by_task": {task: of_task.to_json(config.num_negatives) for task, of_task in statistics.items()}}
