"""Texts in, unit vectors out: the class that people call.

    from ref import Embedder
    embedder = Embedder.from_pretrained("runs/my-run")          # a run, a checkpoint folder, or a hub id
    queries = embedder.encode(["how do magnets work"], instruction="Find a passage that answers the question.")
    passages = embedder.encode(["Magnetism comes from …"])      # passages are bare
    score_QP = queries @ passages.T                             # cosine similarity

Nothing is computed twice: equal texts are embedded once, instruction and examples pass through the model once
for all texts, and batches are packed from texts of nearly one length. Nothing waits: a thread turns the next window of
texts into ids while the model is at work, and vectors are copied to the host a batch late (overlap.py). Beyond the
vectors the host holds at most 32 bytes a text, the ids of two windows and two batches.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ref import lora
from ref.checkpoint import load_model, locate
from ref.config import DTYPES, Kernels, checked, pick_device, pick_kernels, read_json
from ref.lora import load_adapter, merge
from ref.model import Mistral
from ref.overlap import LateCopies, different, fill_repeated, first_of_equal, one_ahead
from ref.packing import cut_by_tokens, pack
from ref.pooling import embed
from ref.prompts import TEMPLATES, Example, Prompter
from ref.published import check_vocabulary, defaults_for
from ref.tokenizer import TextTokenizer

TEXTS_PER_WINDOW = 50_000  # sorted by length together; bounds the memory for token ids
TOKENS_PER_BATCH = {"cuda": 8192, "cpu": 1024}  # a CPU wants its activations in the cache, a GPU large products
SETTINGS = "embedder.json"  # template and lengths, beside a model of ours


class Embedder:
    """A model with its tokenizer and its prompts."""

    def __init__(
        self, model: Mistral, prompter: Prompter, *, tokens_per_batch: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        fitting(model, prompter.tokenizer)
        device = model.norm.weight.device
        self.model, self.prompter = model, prompter
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH[device.type]
        self.kernels = pick_kernels(kernels, device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | None = None, dtype: str | None = None, template: str | None = None,
        max_text_tokens: int | None = None, tokens_per_batch: int | None = None,
    ) -> "Embedder":
        """Load a run folder of run_train.py, a checkpoint or adapter folder, or a hub id.

        Template and lengths come from the model's embedder.json where it has one, for a published model from its row
        in published.py, else they are the report's.
        `dtype` is bfloat16 or float32 (default: bfloat16 on cuda, float32 on cpu). An adapter is merged.
        Raises ValueError that names file and tensor for anything malformed.
        """
        where = pick_device(device)
        if dtype not in (None, "bfloat16", "float32"):
            raise ValueError(f"dtype {dtype!r:.60} is not supported. Expected is bfloat16 or float32. Choose one.")
        precision = DTYPES[dtype or ("bfloat16" if where.type == "cuda" else "float32")]
        folder = inside_run(locate(str(name)))
        model, tokenizer = load_with_adapter(folder, device=where, dtype=precision)
        check_vocabulary(str(name), model.arch.vocab_size)
        given = {"template": template, "max_text_tokens": max_text_tokens}
        settings = defaults_for(str(name)) | {k: v for k, v in given.items() if v is not None}
        prompter = read_prompter(folder, tokenizer, **settings)
        return cls(model.eval(), prompter, tokens_per_batch=tokens_per_batch)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.model.arch.width

    @property
    def precision(self) -> str:
        """What a vector's rounding depends on: the weights' dtype and the kind of device."""
        weight = self.model.norm.weight
        return f"{weight.dtype} {weight.device.type}"

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Example] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors of texts, (texts, width) float32 on the host, in the order given.

        With an `instruction` the texts are queries of that task, behind `examples` where some are given; without,
        they are passages. Raises ValueError for anything that is not a text, and for an instruction that
        leaves no room.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts is {texts!r:.60}. Expected is a sequence of str. Put a single text in a list.")
        device = self.model.norm.weight.device
        prefix = self.prompter.prefix(instruction, examples)
        shared = self.model.prefix_key_values(pack([prefix.ids], device=device)) if len(prefix.ids) > 1 else None
        ahead = () if shared else prefix.ids  # `<s>` alone is cheaper in each text than as a shared prefix
        first = first_of_equal(texts)
        once = different(first)
        windows = [once[start : start + TEXTS_PER_WINDOW] for start in range(0, len(once), TEXTS_PER_WINDOW)]

        def tokenise(rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            ids = self.prompter.texts([texts[row] for row in rows], prefix)
            return rows, [np.array([*ahead, *text], np.int32) for text in ids]

        vectors = np.empty((len(texts), self.width), np.float32)
        late = LateCopies(vectors)
        done = 0
        for rows, ids in one_ahead(tokenise, windows):
            for batch in cut_by_tokens([len(text) for text in ids], tokens_per_batch=self.tokens_per_batch):
                packed = pack([ids[n] for n in batch], device=device, prefix_tokens=0 if ahead else len(prefix.ids))
                late.add(rows[batch], embed(self.model, packed, prefix=shared, kernels=self.kernels))
            done += len(rows)
            if progress:
                print(f"  {done:,} of {len(once):,} texts", flush=True)
        late.finish()
        fill_repeated(vectors, first, rows_at_a_time=TEXTS_PER_WINDOW)
        return vectors


def inside_run(folder: Path) -> Path:
    """The model inside a run folder; any other folder is itself."""
    if not (folder / "run.json").exists() or any(
            (folder / name).exists() for name in ("config.json", lora.CONFIG)):
        return folder
    for name in ("model", "adapter"):
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"{folder} holds no model yet. Expected is model/ or adapter/, which a run writes at its end. "
                     "Go on with it: run_train.py --resume --output that folder.")


def base_of(folder: Path) -> Path | None:
    """The folder of an adapter's base model; None for a folder that holds no adapter."""
    path = folder / lora.CONFIG
    if not path.exists():
        return None
    named = read_json(path).get("base_model_name_or_path")
    name = checked(named, str, f"{path}: base_model_name_or_path", "a folder or hub id")
    inside = (folder / name).resolve()
    base = inside if name.startswith("../") and inside.is_dir() else inside_run(locate(name))
    if base.resolve() == folder.resolve():
        raise ValueError(f"{path}: base_model_name_or_path is this adapter itself. Expected is the model under it. "
                         "Correct it there.")
    return base


def with_bases(folder: Path) -> list[Path]:
    """A checkpoint's folder; behind an adapter's the model under it, and so on: all that its vectors depend on."""
    base = base_of(folder)
    return [folder] if base is None else [folder, *with_bases(base)]


def load_with_adapter(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None,
) -> tuple[Mistral, TextTokenizer]:
    """Model and tokenizer of a checkpoint folder; an adapter folder's base is found, the adapter merged into it."""
    base = base_of(folder)
    if base is None:
        return fitting(load_model(folder, device=device, dtype=dtype), TextTokenizer.from_folder(folder))
    model, tokenizer = load_with_adapter(base, device=device, dtype=dtype)
    load_adapter(model, folder)
    merge(model)
    return model, tokenizer


def fitting(model: Mistral, tokenizer: TextTokenizer) -> tuple[Mistral, TextTokenizer]:
    """Both, if every id of the tokenizer has a row in the model's embedding; else ValueError."""
    if tokenizer.vocab_size > model.arch.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.arch.vocab_size}. "
            "Expected are at most as many. Take both from one checkpoint.")
    return model, tokenizer


def read_prompter(folder: Path, tokenizer: TextTokenizer, **given: str | int) -> Prompter:
    """The prompter that a model's embedder.json describes, under what is given."""
    path = folder / SETTINGS
    settings = {**(read_json(path) if path.exists() else {}), **given}
    where = {key: key if key in given else f"{path}: {key}" for key in settings}
    name = checked(settings.pop("template", "report"), str, where.get("template", ""), "a template's name")
    if name not in TEMPLATES:
        raise ValueError(f"{where['template']} {name!r:.60} is unknown. Expected is one of {', '.join(TEMPLATES)}.")
    lengths = {"max_text_tokens", "max_prompt_tokens", "max_example_tokens"}
    for key, value in settings.items():
        if key not in lengths or checked(value, int, where[key], "a number of tokens") < 1:
            raise ValueError(f"{where[key]} is {value!r:.60}. "
                             f"Expected are {', '.join(sorted(lengths))} of at least 1.")
    if "max_text_tokens" in given:  # a prompt has room for a text of that length behind the rest
        rest = Prompter.max_prompt_tokens - Prompter.max_text_tokens
        least = settings["max_text_tokens"] + rest
        settings["max_prompt_tokens"] = max(least, settings.get("max_prompt_tokens", Prompter.max_prompt_tokens))
    prompter = Prompter(tokenizer, TEMPLATES[name], **settings)
    if prompter.max_text_tokens > prompter.max_prompt_tokens - 2:
        raise ValueError(f"{path}: a text of max_text_tokens, {prompter.max_text_tokens}, does not fit into "
                         f"max_prompt_tokens, {prompter.max_prompt_tokens}, with <s> and </s>. Expected is room for "
                         "it. Correct one of them.")
    return prompter


def write_prompter(folder: Path, prompter: Prompter) -> None:
    """Note template and lengths beside a model."""
    name = next(name for name, template in TEMPLATES.items() if template == prompter.template)
    settings = {"template": name, "max_text_tokens": prompter.max_text_tokens,
                "max_prompt_tokens": prompter.max_prompt_tokens, "max_example_tokens": prompter.max_example_tokens}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1))
