"""The mteb encoder: which texts get the instruction, where the instruction comes from, invalid files."""

from pathlib import Path

import mteb
import numpy as np
import pytest
from sample_sets import WordHash, encoder_of, world
from tiny_mteb import write_json

from ref.evaluation.encoder import instruction_for, published_instructions, read_instructions
from ref.evaluation.results import score_task
from ref.evaluation.retrieval import evaluate_retrieval, read_retrieval_folder
from ref.evaluation.tasks import CATEGORIES, benchmark_tasks, select_tasks

__all__ = ["world"]  # a fixture


def test_every_task_type_runs_and_the_right_texts_get_the_instruction(world: Path, tmp_path: Path) -> None:
    selection = select_tasks("all", world)
    assert {task.metadata.type for task in selection.tasks} == set(CATEGORIES)
    for task in selection.tasks:
        embedder = WordHash()
        row = score_task(encoder_of(embedder), task, tmp_path / "out")
        assert np.isfinite(row.score) and row.elapsed_s is not None, row
        instructions = {instruction for instruction, _ in embedder.calls} - {None}
        assert instructions == {instruction_for(task.metadata, {})}, "one instruction, and not an empty one"
        if row.category in ("Retrieval", "Reranking"):
            queries, documents, _ = read_retrieval_folder(world / row.task)
            assert embedder.texts(instructed=True) == set(queries.values())
            assert embedder.texts(instructed=False) == set(documents.values()), "title + text, without instruction"
        else:
            assert embedder.texts(instructed=False) == set()


def test_mteb_itself_would_give_documents_the_instruction(world: Path) -> None:
    """Negative control: mteb returns a string prompt, or the default of the class, for documents too."""
    task = benchmark_tasks()["AskUbuntuDupQuestions"]
    encoder = encoder_of(WordHash())
    document = mteb.types.PromptType.document
    assert encoder.get_task_instruction(task.metadata, document) == task.metadata.prompt
    loader = [{"text": ["one text"]}]
    encoder.encode(loader, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=document)
    assert encoder.embedder.calls == [(None, ["one text"])]


def test_instructions_come_from_the_override_then_the_task_then_its_class(world: Path, tmp_path: Path) -> None:
    tasks = benchmark_tasks()
    assert instruction_for(tasks["ArguAna"].metadata, {}) == tasks["ArguAna"].metadata.prompt["query"]
    assert instruction_for(tasks["STS12"].metadata, {}) == tasks["STS12"].abstask_prompt
    path = write_json(tmp_path / "own.json", {"STS12": "Mine", "MyRetrieval": "Own"})
    overrides = read_instructions(path, ["MyRetrieval"])
    assert instruction_for(tasks["STS12"].metadata, overrides) == "Mine"
    (task,) = select_tasks("MyRetrieval", world).tasks
    assert instruction_for(task.metadata, overrides) == "Own"


def test_none_means_no_instruction(world: Path, tmp_path: Path) -> None:
    """In --instructions, for mteb's tasks and folders, and in task.json, for run_train.py's own scoring too."""
    overrides = read_instructions(write_json(tmp_path / "own.json", {"BIOSSES": "none"}), [])
    write_json(world / "MyRetrieval" / "task.json", {"class": "ArguAna", "instruction": "none"})
    for task in select_tasks("BIOSSES,MyRetrieval", world).tasks:
        embedder = WordHash()
        encoder = encoder_of(embedder, overrides=overrides)
        score_task(encoder, task, tmp_path / "out")
        assert embedder.calls and {instruction for instruction, _ in embedder.calls} == {None}
        assert encoder.prompt_settings(task.metadata)["instruction"] is None
    embedder = WordHash()
    evaluate_retrieval(embedder, world / "MyRetrieval")
    assert embedder.texts(instructed=True) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"STS23": "x"}', r"own.json: task 'STS23' is unknown \(nearest: STS"),
        ('{"STS12": 3}', r"own.json: 'STS12' must be a non-empty string \(got 3\)"),
        ('{"STS12": ""}', r"own.json: 'STS12' must be a non-empty string \(got ''\)"),
        ("[1", r"own.json: invalid JSON \(Expecting"),
    ],
)
def test_a_malformed_file_of_instructions(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_instructions(tmp_path / "own.json", [])


@pytest.mark.parametrize("model", ["codefuse-ai/F2LLM-0.6B", "tencent/KaLM-Embedding-Gemma3-12B-2511"])
def test_the_instructions_of_a_published_model_are_those_that_mteb_gives_it(model: str) -> None:
    encoder = encoder_of(WordHash())
    encoder.prompts_dict = mteb.get_model_meta(model).loader_kwargs["prompts_dict"]
    published = published_instructions(model)
    own = [task for name, task in benchmark_tasks().items() if name in published]
    assert len(own) >= 20
    for task in own:
        assert instruction_for(task.metadata, published) == encoder.get_task_instruction(
            task.metadata, mteb.types.PromptType.query)
    assert any(instruction_for(task.metadata, published) != instruction_for(task.metadata, {}) for task in own)


def test_no_published_instructions_for_prefixes_folders_and_unknown_models(tmp_path: Path) -> None:
    for model in ("BAAI/bge-base-en-v1.5", "intfloat/e5-mistral-7b-instruct", "nobody/nothing", str(tmp_path)):
        assert published_instructions(model) == {}
