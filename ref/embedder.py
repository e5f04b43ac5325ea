"""Embedder: texts to unit vectors.

    from ref import Embedder
    embedder = Embedder.from_pretrained("runs/my-run")          # a run, a checkpoint folder, or a hub id
    queries = embedder.encode(["how do magnets work"], instruction="Find a passage that answers the question.")
    passages = embedder.encode(["Magnetism comes from …"])      # passages have no instruction
    score_QP = queries @ passages.T                             # cosine similarity

Equal texts are embedded once, instruction and in-context examples pass through the model once for all texts, and
batches are packed from texts of similar length. On a CPU every core embeds its own batch. A thread tokenises the next
window of texts while the model computes, and vectors are copied to the host one batch later. Besides the vectors the
host holds up to 32 bytes per text, the ids of two windows, and batches that are not yet copied.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ref.model.adapter import load_model_chain
from ref.model.attention import KeyValue
from ref.model.checkpoint import resolve_checkpoint
from ref.model.known_models import KNOWN_MODELS, check_known_vocab, defaults_for
from ref.model.packing import batch_by_tokens, pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.text.prompts import InContextExample, PromptEncoder, load_prompt_encoder
from ref.text.tokenizer import Tokenizer
from ref.utils.compile import check_compiler
from ref.utils.dedup import first_occurrence, scatter_to_duplicates, unique_index
from ref.utils.device import DTYPES, Backend, resolve_backend, resolve_device, resolve_dtype
from ref.utils.prefetch import AsyncCopies, map_on_cores, prefetch
from ref.utils.progress import TokenRate, progress_bar

TEXTS_PER_WINDOW = 50_000  # texts that are sorted by length together; bounds the memory for token ids
TOKENS_PER_BATCH = {"cuda": 8192, "cpu": 1024}  # a CPU's cache holds the activations; a GPU needs large products


class Embedder:
    """A model with its tokenizer and prompts."""

    def __init__(
        self, model: Mistral, prompt_encoder: PromptEncoder, *, tokens_per_batch: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        check_vocab(model, prompt_encoder.tokenizer)
        if tokens_per_batch is not None and not (isinstance(tokens_per_batch, Integral) and tokens_per_batch >= 1):
            raise ValueError(f"tokens_per_batch must be an integer >= 1 (got {tokens_per_batch!r:.60})")
        self.device = model.norm.weight.device
        self.model, self.prompt_encoder = model, prompt_encoder
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH[self.device.type]
        self.backend = resolve_backend(backend, self.device)
        self.num_tokens = 0  # embedded so far, without a shared prefix

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | None = None, dtype: str = "auto", template: str | None = None,
        max_text_tokens: int | None = None, tokens_per_batch: int | None = None, base: str | None = None,
    ) -> "Embedder":
        """Load a run folder of run_train.py, a checkpoint or adapter folder, or a hub id.

        By default the first that exists counts:

            template          of a known hub id, of embedder.json, the one whose markers the vocabulary has, the paper's
            max_text_tokens   of a known hub id, of embedder.json, of sentence-transformers' files, 512

        `dtype`: auto, bfloat16 or float32 (device.py). `tokens_per_batch`: of a forward pass. Adapters are merged;
        `base` replaces the model that an adapter names, for one that has moved. Known hub ids: known_models.py. Raises
        ValueError that names file and tensor for anything malformed.
        """
        where = resolve_device(device)
        precision = DTYPES[resolve_dtype(dtype, where)[0]]
        if where.type == "cuda":
            check_compiler(where)
        folder = resolve_checkpoint(str(name))
        model, tokenizer = load_model_and_tokenizer(folder, device=where, dtype=precision, base=base)
        check_known_vocab(str(name), model.config.vocab_size)
        if str(name) not in KNOWN_MODELS:
            check_end_token(folder, tokenizer)
        given = {"template": template, "max_text_tokens": max_text_tokens}
        settings = defaults_for(str(name)) | {k: v for k, v in given.items() if v is not None}
        prompt_encoder = load_prompt_encoder(folder, tokenizer, **settings)
        return cls(model.eval(), prompt_encoder, tokens_per_batch=tokens_per_batch)

    @property
    def embedding_dim(self) -> int:
        """Length of a vector."""
        return self.model.config.hidden_size

    @property
    def precision(self) -> str:
        """What the rounding of a vector depends on: dtype of the weights and type of the device."""
        return f"{self.model.norm.weight.dtype} {self.device.type}"

    @torch.inference_mode()
    def encode(
        self, texts: Iterable[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """Unit vectors of texts, (texts, embedding_dim) float32 on the host, in the order of iteration.

        With an `instruction` the texts are queries of that task, preceded by the in-context `examples`; without, they
        are passages. Raises ValueError for anything that is not a string, for a set, mapping or table, whose order says
        nothing, for what is no prompt (`check_prompt`), for an instruction that leaves no room, and for a result that
        is not finite.
        """
        texts = list_of_texts(texts)
        check_prompt(instruction, examples)
        prefix = self.prompt_encoder.prefix(instruction, examples)
        shared = None
        if prefix.is_shared:
            shared = self.model.prefix_key_values(pack_sequences([prefix.ids], device=self.device))
        in_each_text, first = () if shared else prefix.ids, first_occurrence(texts)
        unique = unique_index(first)
        windows = [unique[start : start + TEXTS_PER_WINDOW] for start in range(0, len(unique), TEXTS_PER_WINDOW)]

        def tokenise(rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
            ids = self.prompt_encoder.encode([texts[row] for row in rows], prefix)
            return rows, [np.array([*in_each_text, *text], np.int32) for text in ids]

        vectors = np.empty((len(texts), self.embedding_dim), np.float32)
        copies = AsyncCopies(vectors)
        bar = TokenRate(progress_bar(desc="encoding", total=len(unique), unit="text", enabled=progress))
        for rows, ids in prefetch(tokenise, windows):
            batches = batch_by_tokens([len(text) for text in ids], tokens_per_batch=self.tokens_per_batch)
            embed_batch = partial(self._embed_batch, ids, shared, len(prefix.ids) if shared else 0)
            for batch, vector_BD in zip(batches, map_on_cores(embed_batch, batches, self.device), strict=True):
                copies.add(rows[batch], vector_BD)
                bar.update(len(batch), sum(len(ids[n]) for n in batch))
        bar.close()
        self.num_tokens += bar.num_tokens
        copies.finish()
        scatter_to_duplicates(vectors, first, rows_at_a_time=TEXTS_PER_WINDOW)
        check_finite(vectors, texts)
        return vectors

    @torch.inference_mode()  # of the thread that runs it
    def _embed_batch(
        self, ids: Sequence[np.ndarray], prefix: Sequence[KeyValue] | None, prefix_length: int, batch: Sequence[int],
    ) -> Tensor:
        packed = pack_sequences([ids[n] for n in batch], device=self.device, prefix_length=prefix_length)
        return embed(self.model, packed, prefix=prefix, backend=self.backend)


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """The texts in the order of iteration: a pandas Series answers texts[n] by label, a generator not at all.

    Raises ValueError for a set or mapping, and for anything in it that is not a string.
    """
    is_table = getattr(texts, "ndim", 1) != 1  # a DataFrame's iterator gives the names of its columns
    if isinstance(texts, (str, bytes, Set, Mapping)) or not isinstance(texts, Iterable) or is_table:
        raise ValueError(f"texts must be a sequence of str (got {texts!r:.60})")
    listed = list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise ValueError(f"texts must be a sequence of str (got {text!r:.60} in it)")
    return listed


def check_finite(vectors: np.ndarray, texts: Sequence[str]) -> None:
    """Raise ValueError with the first text whose vector has a value that is infinite or not a number."""
    if not np.isfinite(vectors.sum()):
        row = int((~np.isfinite(vectors).all(1)).argmax())
        raise ValueError(f"the embedding of {texts[row]!r:.60} is not finite; check the weights, or use float32")


def check_prompt(instruction: str | None, examples: Sequence[InContextExample]) -> None:
    """Raise ValueError for anything but one instruction, or none, and in-context examples of a query and a response."""
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction must be a str for all texts, or None (got {instruction!r:.60})")
    for example in examples:
        if not isinstance(example, InContextExample) or not (
                isinstance(example.query, str) and isinstance(example.response, str)):
            raise ValueError(f"examples must be InContextExample(query, response) of two str (got {example!r:.80})")
    if examples and instruction is None:
        raise ValueError("examples are of a task, so they need its instruction (got None)")


def load_model_and_tokenizer(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None, base: str | None = None,
) -> tuple[Mistral, Tokenizer]:
    """Model and tokenizer of a checkpoint or adapter folder, adapters merged; the tokenizer is their own, else that of
    their base.
    """
    model, root = load_model_chain(folder, device=device, dtype=dtype, base=base)
    tokenizer = Tokenizer.from_folder(folder if (folder / "tokenizer.json").exists() else root)
    try:
        check_vocab(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model, tokenizer


def check_end_token(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a folder of sentence-transformers whose tokenizer appends no end token."""
    if (folder / "modules.json").exists() and not tokenizer.adds_eos:
        raise ValueError(f"{folder}: pools the last word, which is not supported: neither the post-processor of "
                         "tokenizer.json nor 'add_eos_token' in tokenizer_config.json adds an end token")


def check_vocab(model: Mistral, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer has ids without a row in the model's embedding."""
    if tokenizer.num_ids > model.config.vocab_size:
        raise ValueError(f"the tokenizer must have at most {model.config.vocab_size} tokens, the rows of the embedding "
                         f"(got {tokenizer.num_ids})")
