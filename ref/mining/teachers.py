"""The teachers: a retriever embeds texts as unit vectors, a reranker scores (query, passage) pairs.

A retriever is a model of this project (run, checkpoint or adapter; queries carry the instruction) or any
sentence-transformers model (with its own prompts, if it has some). A reranker is any sentence-transformers CrossEncoder
with one output; its raw logits are stored. Models are loaded at the first call: not at all if the cache has everything.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download

from ref.embedder import Embedder
from ref.model.adapter import adapter_chain
from ref.model.checkpoint import ADAPTER_CONFIG, resolve_checkpoint
from ref.text.prompts import PROMPT_FILE
from ref.utils.block_cache import model_hash
from ref.utils.device import resolve_device, resolve_dtype
from ref.utils.files import read_json

USUAL_ENDING = "\nQuery: "  # of a prompt "Instruct: …", as of e5-mistral-7b-instruct
OTHER_FORMATS = ["*.bin", "*.onnx", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.gguf"]


class Retriever(Protocol):
    """Texts to unit vectors, (texts, D) float32."""

    name: str
    key: str  # a hash of all that the vectors depend on besides the texts
    precision: str  # dtype, and why
    uses_instructions: bool

    @property
    def num_tokens(self) -> int: ...  # of the texts so far, for the progress bar; 0: not known

    @property
    def tokenizer_file(self) -> Path: ...

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray: ...

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray: ...


class Reranker(Protocol):
    """(query, passage) pairs to raw logits, (pairs,) float32."""

    name: str
    key: str
    precision: str

    @property
    def num_tokens(self) -> int: ...

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray: ...


class EmbedderRetriever:
    """A model of this project."""

    uses_instructions = True

    def __init__(self, name: str, device: str | None, dtype: str) -> None:
        self.name, self.device = name, resolve_device(device)
        self.dtype, why = resolve_dtype(dtype, self.device)
        self.precision = f"{self.dtype} ({why})"
        self.key = " ".join([*map(model_hash, adapter_chain(resolve_checkpoint(name))), self.device.type, self.dtype])

    @property
    def num_tokens(self) -> int:
        """Tokens embedded so far; the model is not loaded for it."""
        return self.embedder.num_tokens if "embedder" in self.__dict__ else 0

    @property
    def tokenizer_file(self) -> Path:
        """tokenizer.json of the model; of an adapter its own, else its base's."""
        chain = adapter_chain(resolve_checkpoint(self.name))
        own, root = (folder / "tokenizer.json" for folder in (chain[0], chain[-1]))
        return own if own.exists() else root

    @cached_property
    def embedder(self) -> Embedder:
        """The model, loaded at the first use."""
        return Embedder.from_pretrained(self.name, device=str(self.device), dtype=self.dtype)

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        return self.embedder.encode(texts, instruction=instruction)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.encode(texts)


class SentenceTransformerRetriever:
    """A sentence-transformers model, with its own prompts; with instructions if one of these contains one."""

    num_tokens = 0

    def __init__(self, name: str, device: str | None, dtype: str) -> None:
        _sentence_transformers()
        self.name, self.folder, self.device = name, _model_folder(name), resolve_device(device)
        self.options, self.precision = _library_dtype(dtype)
        self.after_instruction = _after_instruction(self.folder)
        self.uses_instructions = self.after_instruction is not None
        usual = self.after_instruction == USUAL_ENDING
        self.key = " ".join([model_hash(self.folder), self.device.type, *self.options.values(), *(
            ["instructed" if usual else f"instructed {self.after_instruction!r}"] if self.uses_instructions else [])])

    @cached_property
    def model(self) -> Any:
        """The model, loaded at the first use."""
        return _sentence_transformers().SentenceTransformer(
            str(self.folder), device=str(self.device), model_kwargs=self.options)

    @property
    def tokenizer_file(self) -> Path:
        """tokenizer.json of the model. Raises ValueError if it has none."""
        found = [path for path in (self.folder / "tokenizer.json", self.folder / "0_Transformer/tokenizer.json")
                 if path.exists()]
        if not found:
            raise ValueError(f"--bm25-tokens subwords: {self.name} has no tokenizer.json; use words")
        return found[0]

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        if instruction is None or not self.uses_instructions:
            return self._encode(self.model.encode_query, texts)
        prompt = f"Instruct: {instruction}{self.after_instruction}"
        return self._encode(self.model.encode_query, texts, prompt=prompt)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self.model.encode_document, texts)

    def _encode(self, encode: Any, texts: Sequence[str], **options: str) -> np.ndarray:
        vectors: np.ndarray = encode(list(texts), convert_to_numpy=True, normalize_embeddings=True,
                                     show_progress_bar=False, **options)
        self.num_tokens += _count_tokens(self.model, texts)
        return vectors.astype(np.float32)


class CrossEncoderReranker:
    """A sentence-transformers CrossEncoder."""

    num_tokens = 0

    def __init__(self, name: str, device: str | None, dtype: str) -> None:
        _sentence_transformers()
        self.name, self.folder, self.device = name, _model_folder(name), resolve_device(device)
        config = read_json(self.folder / "config.json")
        classes = config.get("architectures") or []
        if not any(str(kind).endswith("ForSequenceClassification") for kind in classes):
            raise ValueError(f"--reranker {name}: must be a …ForSequenceClassification, with a head that scores a pair "
                             f"(got {classes!r:.80})")
        num_labels = config.get("num_labels", len(config.get("id2label", ("one", "two"))))  # the library's default: two
        if num_labels != 1:
            raise ValueError(f"--reranker {name}: must have one output, the relevance of a passage (got {num_labels})")
        self.options, self.precision = _library_dtype(dtype)
        self.key = " ".join([model_hash(self.folder), self.device.type, *self.options.values()])

    @cached_property
    def model(self) -> Any:
        """The model, loaded at the first use; the identity activation keeps raw logits."""
        return _sentence_transformers().CrossEncoder(
            str(self.folder), device=str(self.device), activation_fn=torch.nn.Identity(), model_kwargs=self.options)

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        scores: np.ndarray = self.model.predict(list(pairs), convert_to_numpy=True, show_progress_bar=False)
        self.num_tokens += _count_tokens(self.model, *map(list, zip(*pairs, strict=True)))
        return scores.astype(np.float32)


def load_retriever(name: str, device: str | None, dtype: str = "auto") -> Retriever:
    """A model of this project if the folder has its files, else one of sentence-transformers; ValueError if neither."""
    files = ("run.json", PROMPT_FILE, ADAPTER_CONFIG)
    if Path(name).is_dir() and any((Path(name) / file).exists() for file in files):
        return EmbedderRetriever(name, device, dtype)
    return SentenceTransformerRetriever(name, device, dtype)


def load_reranker(name: str, device: str | None, dtype: str = "auto") -> Reranker:
    """A CrossEncoder by hub id or folder."""
    return CrossEncoderReranker(name, device, dtype)


def check_finite(output: np.ndarray, texts: Sequence[Any], model: str) -> np.ndarray:
    """Return the scores or vectors of `texts`. Raises ValueError that names the first text with one not finite."""
    bad = np.flatnonzero(~np.isfinite(output.reshape(len(texts), -1)).all(1))
    if len(bad):
        raise ValueError(f"{model}: the output is not finite for {texts[bad[0]]!r:.120}")
    return output


def _count_tokens(model: Any, *columns: Sequence[str]) -> int:
    """Tokens of texts, or of pairs, as a sentence-transformers model truncates them; without those of its prompts.

    Extrapolated from at most 200 of them, for the progress bar. 0 for a tokenizer of another library than transformers.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not columns or not columns[0] or not hasattr(tokenizer, "is_fast"):
        return 0
    sample = [list(column[:: -(-len(column) // 200)]) for column in columns]
    limit = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None)
    ids = tokenizer(*sample, truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]
    return round(sum(map(len, ids)) * len(columns[0]) / len(ids))


def _after_instruction(folder: Path) -> str | None:
    """What follows the instruction in a sentence-transformers model's prompt "Instruct: …"; None without such a prompt.

    It decides about tokens: e5-mistral declares "\\nQuery: ", Qwen3-Embedding "\\nQuery:" without a space.
    """
    path = folder / "config_sentence_transformers.json"
    prompts = (read_json(path).get("prompts") if path.exists() else None) or {}
    declared = [text for text in prompts.values() if isinstance(text, str) and text.startswith("Instruct: ")]
    endings = [re.search(r"\s*\n[^\n]+\n?\Z", text) for text in declared]
    return next((found[0] for found in endings if found), None)


def _library_dtype(dtype: str) -> tuple[dict[str, str], str]:
    """Options for a model that sentence-transformers loads, and what to print: `auto` leaves the choice to it."""
    return ({}, "dtype of its library") if dtype == "auto" else ({"dtype": dtype}, f"{dtype} (as given)")


def _sentence_transformers() -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError("this teacher needs the package sentence-transformers; pip install -e .[teacher], or give a "
                         "model of this project as --retriever") from None
    return sentence_transformers


def _model_folder(name: str) -> Path:
    """The folder of a sentence-transformers model: itself, or the downloaded hub repository."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            raise ValueError(f"{name}: a model folder must have config.json or modules.json")
        return folder
    try:
        return Path(snapshot_download(name, ignore_patterns=OTHER_FORMATS))
    except Exception as error:  # many kinds: unknown, private, offline
        raise ValueError(f"{name!r:.80}: must be a model folder or a hub id (got {type(error).__name__} from the hub); "
                         "check the name and the network") from None
