"""What a run leaves: an adapter in PEFT's format, or a checkpoint that transformers and sentence-transformers load.

sentence-transformers reads modules.json: the transformer, the last token's state, unit length; the end token comes from
tokenizer.json (tokenizer.py). Its named prompts are the training instructions: encode(texts, prompt_name=TASK). It cuts
prompt and text together, we the text alone: its limit is ours for bare passages.
Called by run_train.py.
"""

import json
from itertools import count
from pathlib import Path

import torch

from ref import lora
from ref.checkpoint import save_model
from ref.config import Options
from ref.data import SoftLabels
from ref.embedder import inside_run, write_prompter
from ref.model import Mistral
from ref.prompts import Prompter
from ref.runs import Start, remove, write_whole


def save_result(
    folder: Path, model: Mistral, prompter: Prompter, options: Options, start: Start, data: SoftLabels,
) -> None:
    """Write what was learnt: model/, or adapter/ (with base/ if its weights were fresh)."""
    prompts = named_prompts(data)
    if options.train == "all":
        write_whole(folder / "model", lambda draft: export(model, prompter, prompts, draft))
        return
    base = str(inside_run(Path(start.name)).resolve()) if Path(start.name).is_dir() else start.name
    if start.architecture is not None:
        base = "../base"
        plain = frozen_base(model)
        write_whole(folder / "base", lambda draft: export(plain, prompter, {}, draft))

    def write(draft: Path) -> None:
        draft.mkdir()
        lora.save_adapter(model, draft, base=base)
        write_prompter(draft, prompter)
    write_whole(folder / "adapter", write)


def drop_result(folder: Path) -> None:
    """Remove what these two write."""
    for name in ("model", "adapter", "base", "merged"):
        remove(folder / name)


def save_merged(folder: Path, model: Mistral, prompter: Prompter, data: SoftLabels) -> None:
    """Write merged/: base and adapter as one checkpoint. The model in memory stays merged."""
    lora.merge(model)
    write_whole(folder / "merged", lambda draft: export(model, prompter, named_prompts(data), draft))


def named_prompts(data: SoftLabels) -> dict[str, str]:
    """Instruction by the task's name; a second one under the same name gets the next number that is free."""
    prompts: dict[str, str] = {}
    names = {task.name for task in data.tasks}
    for name, instruction in dict.fromkeys((task.name, task.instruction) for task in data.tasks):
        numbered = (f"{name}-{number}" for number in count(2))
        free = next(other for other in numbered if other not in prompts and other not in names)
        prompts[free if name in prompts else name] = instruction
    return prompts


def frozen_base(model: Mistral) -> Mistral:
    """The frozen model under its adapters, sharing their weights."""
    with torch.device("meta"):
        plain = Mistral(model.arch)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(state, assign=True)
    return plain


def export(model: Mistral, prompter: Prompter, prompts: dict[str, str], folder: Path) -> None:
    """Write a checkpoint that transformers and sentence-transformers load and embed with as we do.

    `prompts` become sentence-transformers' named prompts: encode(texts, prompt_name=TASK). Not so for a template with
    a suffix, since sentence-transformers puts nothing behind a text.
    """
    folder.mkdir()
    save_model(model, folder, dtype=model.norm.weight.dtype)
    prompter.tokenizer.save(folder)
    write_prompter(folder, prompter)
    before = prompter.template.query.removesuffix("{text}")
    named = {} if prompter.template.suffix else prompts
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files = {
        "modules.json": [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                         for n, (path, kind) in enumerate(modules)],
        "sentence_bert_config.json": {"max_seq_length": prompter.max_text_tokens + 2, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": model.arch.width, "pooling_mode_lasttoken": True,
                                  "pooling_mode_mean_tokens": False, "include_prompt": True},
        "config_sentence_transformers.json": {
            "prompts": {name: before.format(instruction=text) for name, text in named.items()},
            "default_prompt_name": None, "similarity_fn_name": "cosine"},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1))
    (folder / "2_Normalize").mkdir()
