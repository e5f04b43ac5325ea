"""LG-ANNA-Embedding from scratch: Mistral-7B turned into a text embedder (arXiv 2506.07438).

    ref/model        the language model, LoRA, their files         ref/training     one task per batch, gradient caching
    ref/text         tokenizer and prompts                         ref/mining       raw pairs -> soft labels
    ref/loss         the soft-label contrastive loss               ref/evaluation   mteb tasks, scores, the report page
    ref/kernels      pooling and loss as Triton kernels            ref/utils        files, devices, processes, progress

Shape suffixes: tensors carry one letter per axis, and a letter has one meaning in the whole project.

    T  tokens of a packed batch         B  texts in that batch        S  tokens of a shared prefix
    N  query positions in attention: all T tokens, or the B last ones
    D  hidden size                      H  query heads                G  key/value heads
    K  head dimension                   J  rotary pairs of a head: K / 2
    I  intermediate size of SwiGLU      V  vocabulary                 R  LoRA rank
    Q  queries of a batch or search     P  passages of a batch or corpus
    X  known positives of a query, and its own text
    C  candidates of a query: its positive, then its hard negatives
    L  passages in the top-k list of a query
    M  models of the leaderboard        E  evaluation tasks

So `x_TD` holds one hidden state per packed token, and `score_QP` is a query by passage matrix. Scalars are words.
"""

from ref.embedder import Embedder

__all__ = ["Embedder"]
__version__ = "0.1.0"
