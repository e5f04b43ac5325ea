"""The scores of a trained model of the study (claims.py): held-out sets of the sample world, or the ten real tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import Arm
from benchmarks.experiment_data import (
    INSTRUCTION,
    REAL_INSTRUCTIONS,
    ROOT,
    SAME_INSTRUCTION,
    real_folder,
    teacher_folder,
    training_lines,
)
from ref.evaluation.retrieval import TextEmbedder, evaluate_retrieval, read_task_file
from ref.mining.teachers import load_retriever
from ref.text.prompts import InContextExample
from ref.utils.files import read_json


class PromptedEmbedder:
    """An embedder that replaces the instruction of queries by its own, with in-context examples."""

    def __init__(self, embedder: TextEmbedder, instruction: str, examples: Sequence[InContextExample]) -> None:
        self.embedder, self.instruction, self.examples = embedder, instruction, examples

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """As `Embedder.encode`."""
        if instruction is None:
            return self.embedder.encode(texts)
        return self.embedder.encode(texts, instruction=self.instruction, examples=self.examples)


class TeacherEmbedder:
    """The teacher of the real soft labels, which uses no instructions."""

    def __init__(self, device: str) -> None:
        self.retriever = load_retriever(teacher_folder(), device)

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """As `Embedder.encode`."""
        return self.retriever.encode_passages(texts)


def first_examples(lines: Sequence[dict[str, Any]], prompt: str, count: int) -> list[InContextExample]:
    """The first training queries with this instruction, each with its first positive."""
    return [InContextExample(line["query"], line["pos"][0]) for line in lines if line["prompt"] == prompt][:count]


def evaluate_world(embedder: TextEmbedder, arm: Arm) -> dict[str, float]:
    """nDCG@10 x 100 of each held-out set, with `arm.num_examples` in-context examples from the training data."""
    lines = training_lines("world")
    scores = {}
    for path in sorted((ROOT / "data/held_out").glob("*/task.json")):
        same = arm.change == SAME_INSTRUCTION
        instruction = INSTRUCTION if same else read_task_file(path.parent)["instruction"]
        prompted = PromptedEmbedder(embedder, instruction, first_examples(lines, instruction, arm.num_examples))
        scores[path.parent.name] = 100 * evaluate_retrieval(prompted, path.parent)
    return scores


def evaluate_real(
    embedder: TextEmbedder, arm: Arm, folder: Path, *, short: bool = False,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Main score x 100 of each of the ten tasks, as run_eval.py scores it, with `arm.num_examples` examples.

    Also that score by query, in the order of the query ids, where mteb computes one (retrieval, reranking). `folder`:
    for mteb's result files. `short`: see `shorten`.
    """
    from ref.evaluation.encoder import MtebEncoder  # imports mteb
    from ref.evaluation.few_shot import FewShotExamples
    from ref.evaluation.results import score_task
    from ref.evaluation.tasks import select_tasks

    instructions = read_json(REAL_INSTRUCTIONS)
    if arm.change == SAME_INSTRUCTION:
        instructions = dict.fromkeys(instructions, INSTRUCTION)
    lines = training_lines("real") if arm.num_examples else []
    few_shot = {name: FewShotExamples(first_examples(lines, prompt, arm.num_examples), "first lines of training data")
                for name, prompt in instructions.items() if arm.num_examples}
    encoder = MtebEncoder(embedder, name="local/run", revision="1", overrides=instructions, few_shot=few_shot)
    selection = select_tasks(",".join(instructions), real_folder("mteb"))
    if selection.missing:
        raise SystemExit(f"{real_folder('mteb')}: must have data for all tasks (missing "
                         f"{', '.join(selection.missing)})")
    scores, query_scores = {}, {}
    for task in selection.tasks:
        if short:
            shorten(task)
        by_query = keep_query_scores(task)
        scores[task.metadata.name] = 100 * score_task(encoder, task, folder).score
        if by_query:
            query_scores[task.metadata.name] = [round(100 * by_query[query], 2) for query in sorted(by_query)]
    return scores, query_scores


EVERY = {"TwitterURLCorpus": 40, "SummEvalSummarization.v2": 4, "STS12": 2}  # every n-th row remains


def shorten(task: Any) -> None:
    """Reduce the tasks that have most of all tokens, in place: to a quarter, so that a run can score all ten.

    Of three tasks every n-th row remains; of MedQuADRetrieval the judged passages and every third of the others.
    Classification has three random training sets instead of ten.
    """
    name = task.metadata.name
    if task.metadata.type == "Classification":
        task.n_experiments = 3
    elif name in EVERY:
        task.load_data()
        task.dataset = {split: rows.select(range(0, len(rows), EVERY[name])) for split, rows in task.dataset.items()}
    elif name == "MedQuADRetrieval":
        task.load_data()
        task.convert_v1_dataset_format_to_v2(None)
        for split in task.dataset["default"].values():
            judged = {passage for of_query in split["relevant_docs"].values() for passage in of_query}
            split["corpus"] = split["corpus"].select(
                row for row, passage in enumerate(split["corpus"]["id"]) if passage in judged or row % 3 == 0)


def keep_query_scores(task: Any) -> dict[str, float]:
    """A dictionary that will hold the main score of each query id when a retrieval task is evaluated.

    mteb passes all scores to a method of the task that may derive others from them; this method is wrapped.
    """
    by_query: dict[str, float] = {}
    original = getattr(task, "task_specific_scores", None)
    if original is None:
        return by_query
    metric = task.metadata.main_score.replace("ndcg_at_", "ndcg_cut_").replace("map_at_", "map_cut_")

    def keep(scores: dict[str, dict[str, float]], *given: Any, **named: Any) -> dict[str, float]:
        by_query.update({query: values[metric] for query, values in scores.items()})
        return original(scores, *given, **named)
    task.task_specific_scores = keep
    return by_query
