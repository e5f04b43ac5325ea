"""LG-ANNA-Embedding from scratch: Mistral-7B turned into a text embedder (arXiv 2506.07438).

Tensors carry their shape as a suffix, one letter an axis; scalars are words with their unit.

    T  tokens of a packed stream        B  texts in that stream       S  tokens of a shared prefix
    D  model width                      H  query heads                G  key/value heads
    K  width of one head (rotary: K/2)  F  feed-forward width         V  vocabulary
    R  rank of a LoRA adapter           Q  queries of a batch         P  passages of a batch
    C  candidates of one query: its positive, then its hard negatives
    N  rows that ask in attention: all T, or the B last ones          X  known texts of one query

So `x_TD` is one vector of the model for each packed token and `score_QP` is a query by passage matrix.

Reading order, each file one idea: config, packing, rope, attention, model, checkpoint, lora, tokenizer, prompts,
pooling, loss, blocked, gradcache, data, overlap, published, embedder, mining, runs, team, trainer, export,
held_out; then run_train.py, run_eval.py (with scoring/) and run_label.py (with labelling/). The Triton kernels in
kernels/ come after pooling and blocked, whose results they equal.
"""

from pathlib import Path

# The Triton kernels stand beside ref/, in the folder kernels/, and are imported as ref.kernels: the plain name
# `kernels` belongs to a package of Hugging Face that transformers looks for. The folder has no __init__.py, so an
# installed package of that name wins, and this line lets `ref.kernels` be found in a checkout.
__path__ = [*__path__, str(Path(__file__).parent.parent)]

from ref.embedder import Embedder

__all__ = ["Embedder"]
__version__ = "0.1.0"
