"""The two teachers, behind one call each: a retriever gives unit vectors, a reranker a logit for a query and a passage.

A retriever is one of our own models (a run, a checkpoint or an adapter: queries carry the instruction) or any
sentence-transformers model (its own prompts, where it has some). A reranker is any sentence-transformers CrossEncoder
with one output, called with the identity activation so that raw logits are stored.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub import snapshot_download

from labelling.cache import fingerprint
from ref.checkpoint import locate
from ref.config import pick_device, read_json
from ref.embedder import SETTINGS, Embedder, inside_run, with_bases

OTHER_FORMATS = ["*.bin", "*.onnx", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.gguf"]


class Retriever(Protocol):
    """Texts to unit vectors (texts, D) float32."""

    name: str
    key: str  # a hash of all that its vectors depend on, but for the texts

    def queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray: ...

    def passages(self, texts: Sequence[str]) -> np.ndarray: ...


class Reranker(Protocol):
    """Queries and passages to raw logits (pairs,) float32."""

    name: str
    key: str

    def logits(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray: ...


class OurRetriever:
    """A model of this project."""

    def __init__(self, name: str, device: str | None) -> None:
        self.name, self.device = name, pick_device(device)
        precision = "bfloat16" if self.device.type == "cuda" else "float32"
        self.key = " ".join([*map(fingerprint, with_bases(inside_run(locate(name)))), precision])

    @cached_property
    def embedder(self) -> Embedder:
        """Loaded when it is first asked: not where all is in the cache."""
        return Embedder.from_pretrained(self.name, device=str(self.device))

    def queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        return self.embedder.encode(texts, instruction=instruction)

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self.embedder.encode(texts)


class LibraryRetriever:
    """A sentence-transformers model."""

    def __init__(self, name: str, device: str | None) -> None:
        _library()
        self.name, self.folder, self.device = name, _folder(name), pick_device(device)
        self.key = f"{fingerprint(self.folder)} {self.device.type}"

    @cached_property
    def model(self) -> Any:
        """Loaded when it is first asked."""
        return _library().SentenceTransformer(str(self.folder), device=str(self.device))

    def queries(self, texts: Sequence[str], instruction: str | None) -> np.ndarray:
        return self._vectors(self.model.encode_query, texts)

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(self.model.encode_document, texts)

    @staticmethod
    def _vectors(encode: Any, texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = encode(list(texts), convert_to_numpy=True, normalize_embeddings=True,
                                     show_progress_bar=False)
        return vectors.astype(np.float32)


class LibraryReranker:
    """A sentence-transformers CrossEncoder."""

    def __init__(self, name: str, device: str | None) -> None:
        _library()
        self.name, self.folder, self.device = name, _folder(name), pick_device(device)
        config = read_json(self.folder / "config.json")
        kinds = config.get("architectures") or []
        if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
            raise ValueError(f"--reranker {name}: its config.json says {kinds!r:.80}, which has no head that scores a "
                             "pair. Expected is a CrossEncoder (…ForSequenceClassification). Choose another reranker.")
        outputs = config.get("num_labels", len(config.get("id2label", ("one", "two"))))  # two is the library's default
        if outputs != 1:
            raise ValueError(f"--reranker {name}: it has {outputs} outputs. Expected is one, the relevance of a "
                             "passage to a query. Choose another reranker.")
        self.key = f"{fingerprint(self.folder)} {self.device.type}"

    @cached_property
    def model(self) -> Any:
        """Loaded when it is first asked."""
        return _library().CrossEncoder(str(self.folder), device=str(self.device), activation_fn=torch.nn.Identity())

    def logits(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        scores: np.ndarray = self.model.predict(list(pairs), convert_to_numpy=True, show_progress_bar=False)
        return scores.astype(np.float32)


def open_retriever(name: str, device: str | None) -> Retriever:
    """One of ours where the folder says so, else sentence-transformers'; ValueError where there is no such model."""
    folder = Path(name)
    ours = folder.is_dir() and any((folder / file).exists() for file in ("run.json", SETTINGS, "adapter_config.json"))
    return OurRetriever(name, device) if ours else LibraryRetriever(name, device)


def open_reranker(name: str, device: str | None) -> Reranker:
    """A CrossEncoder by name or folder."""
    return LibraryReranker(name, device)


def finite(scores: np.ndarray, texts: Sequence[Any], model: str) -> np.ndarray:
    """The scores or vectors; ValueError that names the first text for which one is not a number."""
    bad = np.flatnonzero(~np.isfinite(scores.reshape(len(texts), -1)).all(1))
    if len(bad):
        raise ValueError(f"{model} gives a number that is not finite for {texts[bad[0]]!r:.120}. Expected are finite "
                         "numbers. Look at that text, or choose another model or precision.")
    return scores


def _library() -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError("sentence-transformers is not installed, which runs this teacher. Expected is pip install "
                         "-e .[teacher]. Install it, or use a model of this project as --retriever.") from None
    return sentence_transformers


def _folder(name: str) -> Path:
    """The folder of a sentence-transformers model: itself, or the hub repository, downloaded."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
            raise ValueError(f"{name} holds neither config.json nor modules.json. Expected is a model. Fetch it again.")
        return folder
    try:
        return Path(snapshot_download(name, ignore_patterns=OTHER_FORMATS))
    except Exception as error:  # the hub's many: unknown, private, offline
        raise ValueError(f"model {name!r:.80} is no folder, and the hub does not give it ({type(error).__name__}). "
                         "Expected is a sentence-transformers model or a run of ours. Check the name, or the "
                         "network.") from None
