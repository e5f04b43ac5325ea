"""Settings of the published checkpoints of this family, beyond what config.json says.

All are Mistral-7B with last-token pooling on `</s>`, which we append by id. Each is loaded and scored by its name:

    python run_eval.py --model intfloat/e5-mistral-7b-instruct --tasks all

Scoring computes in the precision of --dtype, whatever the stored dtype. Token limit: 512, as of BGE-EN-ICL.
Source: the model cards; arXiv 2506.07438; template of bge-en-icl: arXiv 2409.15700.
"""

from typing import NamedTuple


class KnownModel(NamedTuple):
    """One published checkpoint."""

    template: str  # key of TEMPLATES in ref/text/prompts.py
    vocab_size: int  # rows of the embedding
    max_text_tokens: int


KNOWN_MODELS = {
    "annamodels/LGAI-Embedding-Preview": KnownModel("paper", 32003, 512),  # stored in fp32
    "intfloat/e5-mistral-7b-instruct": KnownModel("paper", 32000, 512),
    "Linq-AI-Research/Linq-Embed-Mistral": KnownModel("paper", 32000, 512),
    "Salesforce/SFR-Embedding-Mistral": KnownModel("paper", 32000, 512),
    "BAAI/bge-en-icl": KnownModel("bge-en-icl", 32003, 512),  # stored in fp32
    "mistralai/Mistral-7B-v0.1": KnownModel("paper", 32000, 512),
}


def defaults_for(name: str) -> dict[str, str | int]:
    """Template and token limit of a known hub id; empty for any other name."""
    known = KNOWN_MODELS.get(name)
    return {} if known is None else {"template": known.template, "max_text_tokens": known.max_text_tokens}


def check_known_vocab(name: str, vocab_size: int) -> None:
    """Raise ValueError if a known hub id has another vocabulary size than it is known to have."""
    known = KNOWN_MODELS.get(name)
    if known is not None and vocab_size != known.vocab_size:
        raise ValueError(f"{name}: the embedding must have {known.vocab_size} rows (got {vocab_size})")
