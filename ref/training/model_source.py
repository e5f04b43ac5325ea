"""What --model names, and the model and tokenizer built from it: a checkpoint, or random initialisation."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ref.config import MISTRAL, TINY, ModelConfig, TrainConfig
from ref.embedder import load_model_and_tokenizer
from ref.model.adapter import VERSION_2, adapter_base, adapter_chain, model_fingerprint
from ref.model.card import run_folder
from ref.model.checkpoint import resolve_checkpoint
from ref.model.known_models import defaults_for
from ref.model.lora import apply_lora
from ref.model.transformer import Mistral, init_weights
from ref.text.prompts import PROMPT_FILE, PromptEncoder, get_template, template_of_vocabulary
from ref.text.tokenizer import Tokenizer, train_tokenizer
from ref.training.data import SoftLabelDataset
from ref.utils.compile import check_compiler
from ref.utils.device import DTYPES, resolve_dtype
from ref.utils.files import read_json

SMALL = 10**9  # parameters


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The name of a checkpoint, or a configuration for random initialisation."""

    name: str
    reason: str
    config: ModelConfig | None = None  # None: a checkpoint

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's folder, downloaded for a hub id."""
        return resolve_checkpoint(self.name)

    @cached_property
    def run(self) -> dict[str, Any]:
        """run.json of the run whose result the checkpoint is; empty for any other."""
        run = run_folder(Path(self.name)) if self.config is None else None
        return {} if run is None else read_json(run / "run.json")

    @property
    def earlier_data(self) -> list[dict[str, Any]]:
        """Data of the run whose result the checkpoint is, and of those before it, with the name of the `run`."""
        folder = Path(self.name).resolve()
        name = (run_folder(folder) or folder).name
        return [*self.run.get("earlier_data", ()), *({**file, "run": name} for file in self.run.get("data", ()))]

    def fingerprint(self, *, like: str = VERSION_2) -> str | None:
        """Fingerprint of the checkpoint's files, an adapter's base included, of the version of a stored one (`like`);
        None for random initialisation.
        """
        return None if self.config is not None else model_fingerprint(adapter_chain(self.folder), like=like)

    def default_preset(self) -> str:
        """small for random initialisation; for a checkpoint by its size, which config.json tells."""
        if self.config is not None:
            return "small"
        folder = adapter_chain(resolve_checkpoint(self.name, weights=False))[-1]
        config = ModelConfig.from_file(folder / "config.json")
        return "small-pretrained" if config.num_parameters < SMALL else "paper"


def resolve_model(name: str | None, device: str | None = None) -> ModelSource:
    """Read --model: tiny, a config.json, a folder or hub id; by default Mistral-7B-v0.1 on a GPU, else tiny.

    `device`: of --device; None: a GPU if there is one.
    """
    if name is None and torch.cuda.is_available() and not (device or "").startswith("cpu"):
        return ModelSource(MISTRAL, "default on a GPU; choose another with --model")
    if name is None:
        return ModelSource("tiny", "default without a GPU; choose another with --model FOLDER, HUB-ID or CONFIG.json",
                           TINY)
    if name == "tiny":
        return ModelSource(name, "built in, random initialisation", TINY)
    if name.endswith(".json"):
        return ModelSource(name, "random initialisation", ModelConfig.from_file(Path(name)))
    return ModelSource(name, "checkpoint")


def build_model(
    source: ModelSource, config: TrainConfig, data: SoftLabelDataset, *, device: torch.device,
) -> tuple[Mistral, PromptEncoder]:
    """The model on `device`, ready to train, and its prompts; every task's instruction is checked.

    Trainable parameters are fp32; a frozen base has the dtype of the forward pass.
    """
    template = get_template(config.template, "--template")
    if source.config is None and config.train == "all" and adapter_base(source.folder) is not None:
        raise ValueError(f"--train all: {source.name} is an adapter on a frozen base; give a merged model, such as the "
                         "run's merged/ (run_train.py --resume --merge)")
    dtype = DTYPES[resolve_dtype(config.dtype, device)[0]] if config.train == "lora" else torch.float32
    if source.config is None:
        model, tokenizer = load_model_and_tokenizer(source.folder, device=device, dtype=dtype)
    else:
        tokenizer = train_tokenizer(_all_texts(data), vocab_size=source.config.vocab_size, lowercase=config.lowercase,
                                    special_tokens=template.markers)
        model = _random_model(source.config, tokenizer, config.seed).to(device, dtype)
    if config.compile or device.type == "cuda":
        check_compiler(device)
    model.gradient_checkpointing, model.compile_on_cpu = config.gradient_checkpointing, config.compile
    if config.train == "lora":
        torch.manual_seed(config.seed)
        apply_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout,
                   target_modules=config.lora_target_modules)
    prompt_encoder = PromptEncoder(tokenizer, template, config.max_text_tokens, config.max_prompt_tokens,
                                   config.max_example_tokens)
    for task in data.tasks:
        try:
            prompt_encoder.prefix(task.instruction)
        except ValueError as error:
            raise ValueError(f"{data.first_location(task)}: 'prompt': {error}") from None
    return model, prompt_encoder


def declared_template(source: ModelSource, prompt_encoder: PromptEncoder) -> str | None:
    """The template in a checkpoint's embedder.json, else a known model's or the one whose markers its vocabulary has,
    unless that is paper, else None.
    """
    if source.config is not None:
        return None
    path = source.folder / PROMPT_FILE
    known = str(defaults_for(source.name).get("template", template_of_vocabulary(prompt_encoder.tokenizer)))
    declared = read_json(path).get("template") if path.exists() else None
    return declared if declared is not None else known if known != "paper" else None


def _random_model(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> Mistral:
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, dtype="float32")
    return init_weights(Mistral(config), seed=seed)


def _all_texts(data: SoftLabelDataset) -> Iterator[str]:
    for number in range(len(data)):
        example = data[number]
        # the words of the paper's template too, so that the vocabulary contains them
        yield from (example.task.instruction or "", example.query, *example.positives, *example.negatives,
                    "Instruct: Query: Response:")
