"""The published family: what each checkpoint needs beyond what its config.json says, as one table.

All are Mistral-7B with last-token pooling on `</s>`, which we append by id; each is loaded and scored by its name:

    python run_eval.py --model intfloat/e5-mistral-7b-instruct --tasks all

The columns end_token and stored_bits are for the reader: `</s>` is appended for all, and whatever the files hold,
scoring computes in bf16 on CUDA and in fp32 on a CPU. Token limit: 512, as in the lineage.
Source: the model cards; arXiv 2506.07438; for the template of bge-en-icl arXiv 2409.15700. Called by embedder.py.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A row of the table."""

    template: str  # of ref/prompts.py
    end_token: str
    vocab_size: int  # rows of the embedding
    stored_bits: int  # of a weight in the files
    max_text_tokens: int


PUBLISHED = {
    "annamodels/LGAI-Embedding-Preview": Published("report", "</s>", 32003, 32, 512),
    "intfloat/e5-mistral-7b-instruct": Published("report", "</s>", 32000, 16, 512),
    "Linq-AI-Research/Linq-Embed-Mistral": Published("report", "</s>", 32000, 16, 512),
    "Salesforce/SFR-Embedding-Mistral": Published("report", "</s>", 32000, 16, 512),
    "BAAI/bge-en-icl": Published("bge-en-icl", "</s>", 32003, 32, 512),
    "mistralai/Mistral-7B-v0.1": Published("report", "</s>", 32000, 16, 512),
}


def defaults_for(name: str) -> dict[str, str | int]:
    """Template and token limit of a published checkpoint by its hub id; nothing for any other name."""
    row = PUBLISHED.get(name)
    return {} if row is None else {"template": row.template, "max_text_tokens": row.max_text_tokens}


def check_vocabulary(name: str, vocab_size: int) -> None:
    """ValueError where a checkpoint is not the one that its name promises."""
    row = PUBLISHED.get(name)
    if row is not None and vocab_size != row.vocab_size:
        raise ValueError(f"{name}: the embedding has {vocab_size} rows. Expected are {row.vocab_size}. Fetch the "
                         "checkpoint again, or give its folder in place of the name.")
