"""Generate docs/walkthrough.md: one batch followed from text to gradient. `python -m benchmarks.walkthrough`.

Two queries and five passages of the sample world and the built-in model with random weights, run through the functions
that training calls. All numbers on the page are computed here, and a test compares the page with a newly generated one.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.walkthrough_figures import gradient_figure, mask_figure, score_figure
from benchmarks.walkthrough_page import page
from ref.config import TINY, TrainConfig
from ref.loss.chunked import LossState, TorchChunkOps
from ref.loss.contrastive import (
    LossTargets,
    eager_loss,
    false_negative_mask,
    false_negative_threshold,
    soft_labels,
)
from ref.loss.training_loss import training_loss
from ref.model.flex import mask_mod
from ref.model.packing import PackedBatch, pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral, init_weights
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import Tokenizer, train_tokenizer
from ref.training.data import Batch, SoftLabelDataset
from ref.training.grad_cache import PromptedTexts
from ref.training.trainer import Shard, Trainer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/walkthrough.md"
FIGURES = ROOT / "docs/walkthrough"
LINES = (43, 44, 45)  # of data/soft_labels.jsonl, counted from 0: two queries, and the in-context example


@dataclass
class Walk:
    """Everything the page shows."""

    config: TrainConfig
    whole_row: dict[str, Any]  # the first line, with all its negatives
    rows: list[dict[str, Any]]  # the lines of the batch, shortened, and the in-context example
    tokenizer: Tokenizer
    batch: Batch
    groups: list[PromptedTexts]
    packed: PackedBatch  # the queries, behind their prefix
    embedding_BD: Tensor  # of queries, then passages
    cosine_QP: Tensor
    masked_QP: Tensor
    label_QC: Tensor
    contrastive_Q: Tensor
    soft_label_Q: Tensor
    total: Tensor
    gradient_QP: Tensor  # dL/ds

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of some ids, as text."""
        return [str(self.tokenizer.library.id_to_token(i)) for i in ids]


def main() -> int:
    """Write the page and its figures."""
    text, figures = generate()
    FIGURES.mkdir(exist_ok=True)
    for name, svg in figures.items():
        (FIGURES / name).write_text(svg, encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


def generate() -> tuple[str, dict[str, str]]:
    """The page, and its figures by file name."""
    walk = compute()
    packed, texts, roles = walk.packed, (walk.batch.queries, walk.batch.passages), _roles(walk)
    score_QP = walk.cosine_QP / walk.config.temperature
    figures = {
        "mask.svg": mask_figure(walk.tokens(packed.input_ids_T.tolist()), _allowed(packed), packed.prefix_length),
        "scores.svg": score_figure(*texts, score_QP.tolist(), roles),
        "gradient.svg": gradient_figure(*texts, walk.gradient_QP.tolist(), roles),
    }
    return "\n".join(page(walk)) + "\n", figures


def compute() -> Walk:
    """Run the batch through the code that training runs."""
    config = TrainConfig(max_examples=2, temperature=0.05, teacher_temperature=0.05)
    lines = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").open()]
    rows = [{**lines[n], "neg": lines[n]["neg"][:count], "neg_scores": lines[n]["neg_scores"][:count]}
            for n, count in zip(LINES, (2, 1, 1), strict=True)]  # five passages for both queries
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soft_labels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = SoftLabelDataset([path], config)
        batch = _chosen_batch(data, rows)
    tokenizer = train_tokenizer(
        (text for row in lines for text in (
            row["prompt"], row["query"], *row["pos"], *row["neg"], "Instruct: Query: Response:")),
        vocab_size=TINY.vocab_size, lowercase=True)
    model = init_weights(Mistral(replace(TINY, vocab_size=tokenizer.vocab_size)), seed=0)
    trainer = Trainer(
        config, data, model, PromptEncoder(tokenizer), torch.optim.AdamW(model.parameters()), torch.device("cpu"))
    groups, _ = trainer.prompted_texts(
        batch, Shard(slice(0, len(batch.queries)), slice(0, len(batch.passages)), [len(batch.passages)]))
    packed, embedding_BD = _embed(model, groups)
    return Walk(config, lines[LINES[0]], rows, tokenizer, batch, groups, packed, embedding_BD,
                **_loss(config, batch, embedding_BD))


def _loss(config: TrainConfig, batch: Batch, embedding_BD: Tensor) -> dict[str, Tensor]:
    """Scores, labels, both terms and the gradient of the scores, by the fields of Walk."""
    query_QD, passage_PD = embedding_BD.split([len(batch.queries), len(batch.passages)])
    index = batch.candidates
    label_QC = soft_labels(batch.teacher_QC, index.candidate_idx_QC, config.teacher_temperature)
    threshold_Q = false_negative_threshold(
        query_QD, passage_PD, index.candidate_idx_QC, config.false_negative_margin)
    targets = LossTargets(index, label_QC, threshold_Q, config.temperature)
    cosine_QP = query_QD @ passage_PD.T
    rows = eager_loss(query_QD, passage_PD, targets)
    ops, state = TorchChunkOps(targets), LossState.empty(query_QD)
    ops.update(cosine_QP.clone(), 0, state)
    a_Q = torch.full((len(query_QD),), config.contrastive_weight / len(query_QD))
    b_Q = torch.full((len(query_QD),), config.soft_label_weight / len(query_QD))
    gradient_QP = ops.gradient(
        cosine_QP.clone(), 0, state.batch.log_sum_exp(), state.candidates.log_sum_exp(), a_Q, b_Q)
    terms = training_loss(
        query_QD, passage_PD, index, batch.teacher_QC, temperature=config.temperature,
        teacher_temperature=config.teacher_temperature, contrastive_weight=config.contrastive_weight,
        soft_label_weight=config.soft_label_weight, in_batch_negatives=True,
        false_negative_margin=config.false_negative_margin)
    return {
        "cosine_QP": cosine_QP, "masked_QP": false_negative_mask(cosine_QP, targets), "label_QC": label_QC,
        "contrastive_Q": rows.contrastive_Q, "soft_label_Q": rows.soft_label_Q, "total": terms.total,
        "gradient_QP": gradient_QP * config.temperature}


def _embed(model: Mistral, groups: Sequence[PromptedTexts]) -> tuple[PackedBatch, Tensor]:
    """The packed queries, and the embeddings of queries and passages."""
    queries, passages = groups
    with torch.no_grad():
        prefix = model.prefix_key_values(pack_sequences([queries.prefix], device=torch.device("cpu")))
        packed = pack_sequences(queries.texts, device=torch.device("cpu"), prefix_length=len(queries.prefix))
        return packed, torch.cat((embed(model, packed, prefix=prefix),
                                  embed(model, pack_sequences(passages.texts, device=torch.device("cpu")))))


def _chosen_batch(data: SoftLabelDataset, rows: list[dict[str, Any]]) -> Batch:
    """Both queries and one example, in an epoch that draws for the second query a known positive of the first."""
    shared = (set(rows[0]["pos"]) & set(rows[1]["pos"])).pop()
    for epoch in range(100):
        for step in range(20):
            batch = data.batch(torch.arange(2).numpy(), epoch=epoch, step=step)
            if shared == batch.passages[3] and shared != batch.passages[0] and len(batch.in_context_examples[0]) == 1:
                return batch
    raise AssertionError("no epoch draws these positives")


def _allowed(packed: PackedBatch) -> list[list[bool]]:
    """Which key each query position attends to, by the rule itself: rows are tokens, columns prefix and tokens."""
    rule = mask_mod(packed, None, TINY.sliding_window)
    tokens = len(packed.input_ids_T)
    query, key = torch.arange(tokens)[:, None], torch.arange(packed.prefix_length + tokens)
    zero = torch.zeros(1, dtype=torch.int64)
    return rule(zero, zero, query, key).tolist()


def _roles(walk: Walk) -> list[list[str]]:
    """positive, negative, in-batch or masked for each query and passage."""
    roles = [["masked" if masked else "in-batch" for masked in row] for row in walk.masked_QP.tolist()]
    for row, columns in zip(roles, walk.batch.candidates.candidate_idx_QC.tolist(), strict=True):
        for place, column in enumerate(columns):
            if column >= 0:
                row[column] = "negative" if place else "positive"
    return roles


if __name__ == "__main__":
    sys.exit(main())
