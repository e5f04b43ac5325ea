"""An embedder as mteb's evaluators call it: which texts get the task's instruction.

    task                                                       instruction and in-context examples on
    retrieval, reranking                                       queries
    STS, clustering, pair classification, summarisation,
    classification                                             all texts

Importing this file imports mteb (three seconds). Written for mteb 2.26.
Source: docs/method.md (query prompt; passages); mteb/models/models_protocols.py, EncoderProtocol.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.get_model_meta import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from ref.evaluation.few_shot import FewShotExamples
from ref.evaluation.retrieval import NO_INSTRUCTION, TextEmbedder
from ref.evaluation.tasks import benchmark_tasks, unknown_name
from ref.utils.files import check_text, read_json

EXAMPLE_OPTIONS = ("examples", "examples_file", "seed")


class MtebEncoder(AbsEncoder):
    """The encoder that mteb scores; its `similarity`, inherited, is the cosine.

    `name` ("owner/model") and `revision` are the folder of the results. `overrides`: task name -> instruction.
    `few_shot`: task name -> in-context examples. `settings`: other options that the embeddings depend on, such as
    template and token limit. All of them are recorded with each result. `experiment`: those of them in which the model
    is not scored as it is; mteb keeps such results in a folder of their own (`for_task`).
    """

    def __init__(
        self, embedder: TextEmbedder, *, name: str, revision: str, overrides: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None, few_shot: Mapping[str, FewShotExamples] | None = None,
        experiment: Mapping[str, Any] | None = None, progress: bool = False,
    ) -> None:
        self.embedder, self.progress = embedder, progress
        self.overrides, self.settings, self.few_shot = overrides or {}, settings or {}, few_shot or {}
        self.experiment = experiment or {}
        identity = {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty({**identity, "use_instructions": True})

    def encode(
        self,
        inputs: Iterable[Any],  # a DataLoader of {"text": list of texts}; mteb has joined a document's title and text
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **recorded: Any,  # the encode_kwargs of `score_task`, which mteb writes to run_settings.jsonl
    ) -> np.ndarray:
        """Unit vectors, (texts, embedding_dim) float32, in the order of the data set."""
        texts = [text for batch in inputs for text in batch["text"]]
        # mteb's own prompt lookup gives documents the task's prompt too
        is_document = prompt_type == PromptType.document
        instruction = None if is_document else instruction_for(task_metadata, self.overrides)
        few_shot = None if is_document else self.few_shot.get(task_metadata.name)
        examples = few_shot.examples if few_shot else ()
        return self.embedder.encode(texts, instruction=instruction, examples=examples, progress=self.progress)

    def prompt_settings(self, task_metadata: TaskMetadata) -> dict[str, Any]:
        """Instruction, in-context examples and their source for a task, as recorded with its result."""
        few_shot = self.few_shot.get(task_metadata.name, FewShotExamples([], "zero-shot"))
        examples = [[e.query, e.response, *([e.instruction] if e.instruction else [])] for e in few_shot.examples]
        return {"instruction": instruction_for(task_metadata, self.overrides), "examples": examples,
                "examples_source": few_shot.source}

    def for_task(self, task_metadata: TaskMetadata) -> "MtebEncoder":
        """A copy whose results go to folders of their own: experiments/OPTIONS if the task is scored with other options
        or in-context examples, REVISION-local-data if its data are not the hub's.
        """
        has_examples = bool(self.prompt_settings(task_metadata)["examples"])
        options = {key: value for key, value in self.experiment.items() if has_examples or key not in EXAMPLE_OPTIONS}
        other = copy.copy(self)
        local = "-local-data" * str(task_metadata.revision).startswith("local-")
        other.mteb_model_meta = self.mteb_model_meta.model_copy(update={
            "experiment_kwargs": options or None, "revision": f"{self.mteb_model_meta.revision}{local}"})
        return other

    def with_embedder(self, embedder: TextEmbedder) -> "MtebEncoder":
        """A copy with another embedder."""
        other = copy.copy(self)
        other.embedder = embedder
        return other


def instruction_for(task_metadata: TaskMetadata, overrides: Mapping[str, str]) -> str | None:
    """The task's instruction: the override, else mteb's query prompt of the task, else that of the task type.

    None where that is "none": the texts are embedded without. The instruction of a local folder's task.json is already
    in `task_metadata.prompt` (`local_task`).
    """
    prompt = overrides.get(task_metadata.name, task_metadata.prompt)
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    instruction = prompt or get_abstask_prompt(task_metadata.name)
    return None if instruction == NO_INSTRUCTION else instruction


def published_instructions(model: str) -> dict[str, str]:
    """Task name -> instruction that mteb has for a model of the hub, as its authors gave it; empty if it has none.

    Instructions by type of task, which a few models have too, are under the names of the types.
    """
    meta = MODEL_REGISTRY.get(model)
    prompts = (meta.loader_kwargs.get("prompts_dict") or {}) if meta else {}
    texts = {name: text.get("query") if isinstance(text, dict) else text for name, text in prompts.items()}
    return {name: text for name, text in texts.items() if text}


def read_instructions(path: str | Path, known_tasks: Iterable[str]) -> dict[str, str]:
    """Read task name -> instruction, or "none" for no instruction, from a JSON file.

    Raises ValueError that names the file for anything else, and for a name that is neither a task of the benchmark nor
    in `known_tasks`.
    """
    instructions = read_json(Path(path))
    known = [*benchmark_tasks(), *known_tasks]
    for name, text in instructions.items():
        if name not in known:
            raise ValueError(f"{path}: {unknown_name('task', name, known)}")
        check_text(text, f"{path}: {name!r}")
    return instructions
