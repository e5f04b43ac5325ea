"""The result of a run: an adapter in PEFT's format, or a checkpoint that transformers and sentence-transformers load.

sentence-transformers reads modules.json: the transformer, last-token pooling, normalisation; the end token comes from
tokenizer.json (ref/text/tokenizer.py). Its named prompts are the training instructions: encode(texts,
prompt_name=TASK); encode_query and encode_document take those named query and document. It truncates prompt and text
together, we truncate the text alone: the limits agree for passages without an instruction.
"""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ref.config import TrainConfig
from ref.model.adapter import save_adapter
from ref.model.card import CARD_FILE, SCORES_FILE, is_unedited_card
from ref.model.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    resolve_checkpoint,
    save_model,
    shards,
)
from ref.model.lora import frozen_base, merge_lora
from ref.model.transformer import Mistral
from ref.task_types import TASK_TYPES
from ref.text.prompts import PROMPT_FILE, TEMPLATES, PromptEncoder, save_prompt_encoder
from ref.training.data import SoftLabelDataset, Task
from ref.training.model_source import ModelSource
from ref.utils.files import atomic_write

# Of sentence-transformers' Pooling module. text-embeddings-inference does not load a folder that leaves some out.
POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
RETRIEVAL_TYPES = ("normal", "only_1neg")
# What _save_for_libraries writes.
FOR_LIBRARIES = ("tokenizer.json", "tokenizer_config.json", PROMPT_FILE, "modules.json", "sentence_bert_config.json",
                 "1_Pooling/config.json", "config_sentence_transformers.json")


def save_result(
    folder: Path, model: Mistral, prompt_encoder: PromptEncoder, config: TrainConfig, source: ModelSource,
    data: SoftLabelDataset,
) -> None:
    """Write model/, or adapter/ (with base/ if the base was randomly initialised) into the run folder."""
    if config.train == "all":
        prompts = exported_prompts(data)
        atomic_write(folder / "model", lambda draft: export_model(model, prompt_encoder, prompts, draft))
        return
    base = str(resolve_checkpoint(source.name).resolve()) if Path(source.name).is_dir() else source.name
    if source.config is not None:
        base = str((folder / "base").resolve())  # PEFT reads a relative path from the working directory
        frozen = frozen_base(model)
        atomic_write(folder / "base", lambda draft: export_model(frozen, prompt_encoder, {}, draft))

    def write(draft: Path) -> None:
        draft.mkdir()
        save_adapter(model, draft, base=base)
        _save_for_libraries(model, prompt_encoder, exported_prompts(data), draft)
    atomic_write(folder / "adapter", write)


def save_merged(folder: Path, model: Mistral, prompt_encoder: PromptEncoder, data: SoftLabelDataset) -> None:
    """Write merged/: base and adapter as one checkpoint. The model in memory stays merged."""
    merge_lora(model)
    prompts = exported_prompts(data)
    atomic_write(folder / "merged", lambda draft: export_model(model, prompt_encoder, prompts, draft))


def earlier_results(folder: Path) -> list[Path]:
    """What these two functions write, and the scores in its model cards: not of the weights from here on.

    Raises ValueError if there is another file, or a card that somebody edited: the folders will be replaced.
    """
    results = [folder / name for name in ("model", "adapter", "base", "merged")]
    for result in results:
        ours, card = {result / name for name in _written(result)}, result / CARD_FILE
        for path in sorted(result.rglob("*")):
            if not path.is_dir() and path not in ours and not (path == card and is_unedited_card(path)):
                reason = "was edited" if path == card else "was not written by this command"
                raise ValueError(f"{path} {reason}, and its folder is replaced; move it first")
    return [*results, folder / SCORES_FILE]


def _written(result: Path) -> list[str]:
    """Names of the files of model/, adapter/, base/ or merged/, without the card."""
    if result.name == "adapter":
        return [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *FOR_LIBRARIES]
    weights = shards(result, must_exist=False)
    return ["config.json", *weights, *(() if weights == [SINGLE] else (INDEX,)), *FOR_LIBRARIES]


def main_task(data: SoftLabelDataset) -> Task:
    """The retrieval task (type `normal` or `only_1neg`) with the most lines, else the largest task."""
    lines = np.bincount(data.task, minlength=len(data.tasks))
    tasks = [data.tasks[n] for n in np.argsort(-lines, kind="stable")]
    return next((task for task in tasks if task.type in RETRIEVAL_TYPES), tasks[0])


def usage(data: SoftLabelDataset, template_name: str) -> dict[str, Any]:
    """For the model card: the instructions of a query and of a passage of the main task, and the prompts in front of
    them, None for a template that puts something behind a text too.
    """
    task, template = main_task(data), TEMPLATES[template_name]
    instructions = [task.instruction, task.instruction if TASK_TYPES[task.type].instruct_passages else None]
    prompts = ["" if text is None else template.before_text.format(instruction=text) for text in instructions]
    return {"instructions": instructions, "prompts": None if template.suffix else prompts}


def exported_prompts(data: SoftLabelDataset) -> dict[str, str | None]:
    """Instruction by the name of a prompt: `query` and `document`, which encode_query and encode_document use, and the
    tasks. None: no prompt.

    `query` is the instruction of the largest retrieval task, or the only instruction there is. Documents have none,
    except where the only task has it on its passages.
    """
    tasks, task = data.tasks, main_task(data)
    prompts: dict[str, str | None] = {}
    if task.type in RETRIEVAL_TYPES or len({task.instruction for task in tasks}) == 1:
        prompts = {"query": task.instruction,
                   "document": task.instruction if TASK_TYPES[task.type].instruct_passages else None}
    return {**prompts, **named_prompts(data)}


def named_prompts(data: SoftLabelDataset) -> dict[str, str]:
    """Instruction by task name; a second instruction of the same name gets the next free number, as does a task named
    query or document.
    """
    prompts: dict[str, str] = {}
    names = {task.name for task in data.tasks}
    for name, instruction in dict.fromkeys((task.name, task.instruction) for task in data.tasks):
        if instruction is None:
            continue
        numbered = (f"{name}-{number}" for number in count(2))
        free = next(other for other in numbered if other not in prompts and other not in names)
        prompts[free if name in prompts or name in ("query", "document") else name] = instruction
    return prompts


def export_model(
    model: Mistral, prompt_encoder: PromptEncoder, prompts: Mapping[str, str | None], folder: Path,
) -> None:
    """Write a checkpoint that transformers and sentence-transformers load, with equal embeddings.

    `prompts` become sentence-transformers' named prompts, except for a template with a suffix: sentence-transformers
    appends nothing to a text.
    """
    folder.mkdir()
    save_model(model, folder, dtype=model.norm.weight.dtype)
    _save_for_libraries(model, prompt_encoder, prompts, folder)


def _save_for_libraries(
    model: Mistral, prompt_encoder: PromptEncoder, prompts: Mapping[str, str | None], folder: Path,
) -> None:
    """Tokenizer, embedder.json and what sentence-transformers reads beside the weights of a checkpoint or adapter."""
    prompt_encoder.tokenizer.save(folder)
    save_prompt_encoder(folder, prompt_encoder)
    named = {} if prompt_encoder.template.suffix else prompts
    added = 1 + (prompt_encoder.tokenizer.bos_id is not None)  # EOS, and BOS where there is one
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files = {
        "modules.json": [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                         for n, (path, kind) in enumerate(modules)],
        "sentence_bert_config.json": {"max_seq_length": prompt_encoder.max_text_tokens + added, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": model.config.hidden_size,
                                  **{f"pooling_mode_{mode}": mode == "lasttoken" for mode in POOLING_MODES},
                                  "include_prompt": True},
        "config_sentence_transformers.json": {
            "prompts": {name: "" if text is None else prompt_encoder.template.before_text.format(instruction=text)
                        for name, text in named.items()},
            "default_prompt_name": None, "similarity_fn_name": "cosine"},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1))
    (folder / "2_Normalize").mkdir()
