"""The text of docs/walkthrough.md, from the numbers that benchmarks/walkthrough.py has computed."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ref.loss.chunked import TorchChunkOps
from ref.loss.contrastive import eager_loss, false_negative_mask, soft_labels
from ref.loss.training_loss import training_loss
from ref.mining.rules import RULES, Candidate, filter_candidates, sort_by_score, threshold
from ref.model.attention import attention_mask
from ref.model.packing import pack_sequences
from ref.model.pooling import last_token_pool
from ref.model.transformer import Mistral
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import Tokenizer
from ref.training.data import SoftLabelDataset

if TYPE_CHECKING:
    from benchmarks.walkthrough import Walk

ROOT = Path(__file__).parent.parent


def _link(function: Callable[..., Any], name: str | None = None) -> str:
    """A link to the definition of a function or class."""
    source = getattr(function, "plain", function)
    path = Path(inspect.getsourcefile(source) or "").resolve().relative_to(ROOT)
    line = inspect.getsourcelines(source)[1]
    return f"[`{path}: {name or function.__qualname__}`](../{path}#L{line})"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(map(str, header)), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _numbers(values: Sequence[float], digits: int = 3) -> list[str]:
    return [f"{value:.{digits}f}".replace("-0.000", "0.000") for value in values]


def page(walk: "Walk") -> Iterator[str]:
    yield "# One batch, from text to gradient"
    yield ""
    yield ("This page follows two queries and five passages of the sample world through one training step. The model "
           "is the built-in `tiny` with random weights, so the scores mean nothing yet; the operations are those of "
           "the 7B model. All numbers are computed by `python -m benchmarks.walkthrough`, which writes this page.")
    yield ""
    for section in (_page_text, _page_prompt, _page_model, _page_scores, _page_terms, _page_mining):
        yield from section(walk)


def _page_text(walk: "Walk") -> Iterator[str]:
    first, second, _ = walk.rows
    yield "## 1. Two lines of training data"
    yield ""
    yield ("Two lines of `soft_labels.jsonl`; query 0 keeps two negatives, query 1 one. "
           f"{_link(SoftLabelDataset)} reads them.")
    yield ""
    yield from _table(["", "query 0", "query 1"], [
        ["`prompt`", first["prompt"], second["prompt"]], ["`query`", first["query"], second["query"]],
        *([f"`{name}` with score", *("<br>".join(f"{text} ({score})" for text, score in zip(
            row[name], row[f"{name}_scores"], strict=True)) for row in (first, second))] for name in ("pos", "neg"))])
    yield (f"{_link(SoftLabelDataset.batch)} draws one positive per query and lists the candidates of both: the "
           "positive, then the negatives. The candidates of all queries are the passages of the batch.")
    yield ""
    columns = walk.batch.candidates.candidate_idx_QC.tolist()
    yield from _table(["passage", "text", "candidate of"], [
        [column, text, next(f"query {q}, {'positive' if row.index(column) == 0 else 'hard negative'}"
                            for q, row in enumerate(columns) if column in row)]
        for column, text in enumerate(walk.batch.passages)])
    yield f"`candidate_idx_QC` is `{columns}`; -1 marks that query 1 has one candidate less."
    yield ""


def _page_prompt(walk: "Walk") -> Iterator[str]:
    yield "## 2. Prompt"
    yield ""
    example = walk.batch.in_context_examples[0][0]
    yield (f"The batch has one in-context example, drawn from another line of the task: query “{example.query}”, "
           f"response “{example.response}”. {_link(PromptEncoder.prefix)} puts it and the instruction in front of "
           "each query, up to and including `Query:`. These are the same ids for both queries: the shared prefix. "
           "Passages have no instruction. The vocabulary was learned from the sample world: it ignores case and has "
           "no token for a line break, so each becomes `<unk>`.")
    yield ""
    yield "```"
    yield _decoded(walk, walk.groups[0].prefix)
    yield "```"
    yield ""
    yield "## 3. Input ids"
    yield ""
    yield (f"{_link(Tokenizer.encode)} turns each text into ids, truncated to `--max-text-tokens`; `<s>` and `</s>` "
           "are added as ids.")
    yield ""
    texts = [("shared prefix", walk.groups[0].prefix), *(
        (f"query {n}", ids) for n, ids in enumerate(walk.groups[0].texts)), *(
        (f"passage {n}", ids) for n, ids in enumerate(walk.groups[1].texts))]
    yield from _table(["", "ids", "tokens"], [
        [name, " ".join(map(str, ids)), "`" + " ".join(walk.tokens(ids)) + "`"]
        for name, ids in texts])


def _decoded(walk: "Walk", ids: Sequence[int]) -> str:
    pieces = walk.tokens(ids)
    return "".join(pieces).replace("▁", " ").replace("<s> ", "<s>")


def _page_model(walk: "Walk") -> Iterator[str]:
    packed = walk.packed
    yield "## 4. Packed batch"
    yield ""
    yield (f"{_link(pack_sequences)} concatenates the queries without padding. Positions continue after the prefix of "
           f"{packed.prefix_length} tokens, which is computed once ({_link(Mistral.prefix_key_values)}).")
    yield ""
    yield from _table(["", *range(len(packed.input_ids_T))], [
        ["token", *(f"`{piece}`" for piece in walk.tokens(walk.packed.input_ids_T.tolist()))],
        ["`input_ids_T`", *packed.input_ids_T.tolist()], ["`document_ids_T`", *packed.document_ids_T.tolist()],
        ["`position_ids_T`", *packed.position_ids_T.tolist()]])
    yield f"`cu_seqlens` {packed.cu_seqlens.tolist()}, `last_token_B` {packed.last_token_B.tolist()}."
    yield ""
    yield "## 5. Attention mask"
    yield ""
    yield (f"{_link(attention_mask)}: each token attends to the shared prefix, itself and the earlier tokens of its "
           "own text, within the sliding window, which is longer than these texts. In the last layer only each "
           "text's last token is a query.")
    yield ""
    yield "![attention mask of the packed queries behind the shared prefix](walkthrough/mask.svg)"
    yield ""
    yield "## 6. Embeddings"
    yield ""
    yield (f"{_link(last_token_pool)} takes the hidden state of each text's `</s>`, applies the final RMSNorm and "
           f"scales it to unit length: {len(walk.embedding_BD)} vectors of {walk.embedding_BD.shape[1]} numbers. The "
           "first four of each:")
    yield ""
    queries = len(walk.batch.queries)
    yield from _table(["", "e[0]", "e[1]", "e[2]", "e[3]", "norm"], [
        [f"query {n}" if n < queries else f"passage {n - queries}", *_numbers(row[:4].tolist()),
         f"{row.norm().item():.3f}"] for n, row in enumerate(walk.embedding_BD)])


def _page_scores(walk: "Walk") -> Iterator[str]:
    tau, index = walk.config.temperature, walk.batch.candidates.candidate_idx_QC
    yield "## 7. Scores and the false-negative mask"
    yield ""
    yield (f"s = q · p / temperature, with temperature {tau}. Passage 3, the positive of query 1, is also a known "
           f"positive of query 0: {_link(false_negative_mask)} excludes it from the denominator of query 0. A passage "
           f"whose cosine exceeds the positive's by more than {walk.config.false_negative_margin} is excluded as well.")
    yield ""
    yield "![scores of both queries with the role of each passage](walkthrough/scores.svg)"
    yield ""
    yield "## 8. Soft labels"
    yield ""
    yield (f"{_link(soft_labels)}: the teacher's scores of a query's candidates, divided by the teacher temperature "
           f"{walk.config.teacher_temperature}, through a softmax.")
    yield ""
    yield from _table(["", "teacher scores", "soft labels y"], [
        [f"query {q}", ", ".join(f"{score:g}" for score in teacher if score == score),
         ", ".join(_numbers([y for y, i in zip(labels, columns, strict=True) if i >= 0]))]
        for q, (teacher, labels, columns) in enumerate(zip(
            [[round(x, 4) for x in row] for row in walk.batch.teacher_QC.tolist()], walk.label_QC.tolist(),
            index.tolist(), strict=True))])


def _page_terms(walk: "Walk") -> Iterator[str]:
    score_QP = walk.cosine_QP / walk.config.temperature
    yield "## 9. Both terms of the loss"
    yield ""
    yield (f"{_link(eager_loss)}. A_i: all passages that are not masked. C_i: the query's candidates.")
    yield ""
    yield from _table(["", "log-sum-exp over A", "s of the positive", "contrastive", "log-sum-exp over C", "sum y s",
                       "soft label"], list(_term_rows(walk, score_QP)))
    total = walk.total.item()
    yield (f"{_link(training_loss)} averages each term over the queries and adds them, both with weight 1: the loss "
           f"is {walk.contrastive_Q.mean().item():.3f} + {walk.soft_label_Q.mean().item():.3f} = {total:.3f}.")
    yield ""
    yield "## 10. Gradient of the scores"
    yield ""
    yield ("dL/ds = a (softmax over A − one-hot) + b (softmax over C − y) with a = b = 1/2, the second part for "
           f"candidates only ({_link(TorchChunkOps.gradient)}). A negative value means that a larger score lowers the "
           "loss. Each row sums to zero, and a masked passage has gradient zero.")
    yield ""
    yield "![gradient of each score](walkthrough/gradient.svg)"
    yield ""
    yield ("For query 0 the soft-label term dominates. The model scores only the positive highly. The teacher gives "
           "passage 1 the same score: it is an unlabelled positive. The gradient lowers the score of the positive "
           "and raises that of passage 1. The contrastive term alone would treat passage 1 as wrong.")
    yield ""
    yield ("From here the gradient flows to the embeddings (dq = sum of dL/ds · p / temperature), and mini-batch by "
           "mini-batch through the model ([`ref/training/grad_cache.py`](../ref/training/grad_cache.py)). The "
           "prefix's keys and values collect the gradients of both queries.")
    yield ""


def _term_rows(walk: "Walk", score_QP: Tensor) -> Iterator[list[str]]:
    for q, columns in enumerate(walk.batch.candidates.candidate_idx_QC.tolist()):
        own = score_QP[q, [c for c in columns if c >= 0]]
        lse_batch = score_QP[q].masked_fill(walk.masked_QP[q], -torch.inf).logsumexp(0).item()
        label_score = (walk.label_QC[q, : len(own)] * own).sum().item()
        values = [lse_batch, own[0].item(), walk.contrastive_Q[q].item(), own.logsumexp(0).item(), label_score,
                  walk.soft_label_Q[q].item()]
        yield [f"query {q}", *_numbers(values)]


def _page_mining(walk: "Walk") -> Iterator[str]:
    row = walk.whole_row
    positives = [Candidate(f"p{n}", *pair) for n, pair in enumerate(zip(row["pos"], row["pos_scores"], strict=True))]
    candidates = sort_by_score(
        [Candidate(f"n{n}", *pair) for n, pair in enumerate(zip(row["neg"], row["neg_scores"], strict=True))])
    yield "## 11. What mining would have kept"
    yield ""
    yield (f"Hard negatives are selected before training. For query 0, {_link(filter_candidates)} compares the "
           "teacher's score of each candidate with a threshold relative to the lowest-scored positive "
           f"({min(row['pos_scores'])}), and keeps those below it (num_negatives = 2 here). "
           f"“{candidates[0].text}” has the same score as the positives: it is probably an unlabelled positive. "
           "The sample world keeps it among the negatives on purpose, as noise.")
    yield ""
    limits = {rule: threshold(rule, value, row["pos_scores"]) for rule, value in RULES.items()}
    decisions = {rule: [decision for _, decision in filter_candidates(
        row["query"], positives, candidates, rule=rule, value=value, num_negatives=2)]
        for rule, value in RULES.items()}
    yield from _table(["candidate", "score", *(f"{rule}, below {limits[rule]:.3f}" if limits[rule] < 2 else rule
                                               for rule in RULES)], [
        [candidate.text, candidate.score, *(decisions[rule][n] for rule in RULES)]
        for n, candidate in enumerate(candidates)])
    yield f"The paper's filter is `percentage` with 0.95 ({_link(threshold)})."
