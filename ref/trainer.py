"""One training step: a batch of lines -> prompts -> vectors -> loss -> gradient -> AdamW.

    trainer.prepare(lines)   reads a batch and turns it into ids: the host's part, done a step ahead in a thread
    trainer.step(work)       leaves the gradient of both loss terms in the weights that learn
    trainer.update(rate)     clips it and moves them

Neither of the last two reads a number from the device, so the host never waits for it. The loop stands in run_train.py.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ref.config import Options
from ref.data import KINDS, Batch, SoftLabels
from ref.gradcache import GradientCache, Segment
from ref.loss import LossTerms, training_loss
from ref.model import Mistral
from ref.packing import to_device
from ref.prompts import Prefix, Prompter
from ref.runs import trainable


@dataclass(frozen=True)
class Work:
    """A batch, ready for the model."""

    step: int
    epoch: int
    batch: Batch
    segments: list[Segment]
    examples: float  # in a prompt, on average


@dataclass
class Trainer:
    """All that a step needs."""

    options: Options
    data: SoftLabels
    model: Mistral
    prompter: Prompter
    optimiser: torch.optim.AdamW
    device: torch.device

    def prepare(self, lines: np.ndarray, *, epoch: int, step: int) -> Work:
        """Read the lines of a batch and tokenise its prompts."""
        batch = self.data.batch(lines, epoch=epoch, step=step)
        return Work(step, epoch, batch, *self.segments(batch))

    def step(self, work: Work) -> tuple[LossTerms, dict[str, float]]:
        """Leave the gradient of a batch's loss in the weights; returns the loss and counts of what was read."""
        kernels = self.options.kernels or "eager"
        cache = GradientCache(self.model, work.segments, chunk_tokens=self.options.chunk_tokens, kernels=kernels)
        low = self.options.train == "all" and self.options.dtype == "bfloat16"
        model_in = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=low)
        with model_in():
            vectors = cache.vectors()
        terms = self.loss(work.batch, vectors)  # in fp32, whatever the model computes in
        terms.total.backward()
        with model_in():
            cache.backward()
        tokens = sum(s.tokens for s in work.segments)
        useful = tokens * cache.passes / cache.positions
        return terms, {"tokens": tokens, "useful_token_share": useful, "examples": work.examples}

    def segments(self, batch: Batch) -> tuple[list[Segment], float]:
        """Queries, then passages, as ids behind their prefixes; and the mean number of examples that got in."""
        instruction, both_sides = batch.task.instruction, KINDS[batch.task.kind].both_sides
        prefixes = [self.prompter.prefix(instruction, examples) for examples in batch.examples]
        count = sum(prefix.examples for prefix in prefixes) / len(prefixes)
        if len(prefixes) == 1:
            queries = self._segment(prefixes[0], batch.queries)
        else:  # each query has examples of its own: nothing is shared
            queries = Segment([], [[*prefix.ids, *self.prompter.texts([text], prefix)[0]]
                                   for prefix, text in zip(prefixes, batch.queries, strict=True)])
        passages = self._segment(self.prompter.prefix(instruction if both_sides else None), batch.passages)
        return [queries, passages], count

    def _segment(self, prefix: Prefix, texts: list[str]) -> Segment:
        ids = self.prompter.texts(texts, prefix)
        if len(prefix.ids) == 1:  # `<s>` alone is cheaper in each text than as a shared prefix
            return Segment([], [[*prefix.ids, *text] for text in ids])
        return Segment(prefix.ids, ids)

    def loss(self, batch: Batch, vectors: torch.Tensor) -> LossTerms:
        """Both terms on the vectors of a batch, its queries first."""
        query_QD, passage_PD = vectors.split([len(batch.queries), len(batch.passages)])
        options = self.options
        groups = dataclasses.replace(batch.groups, **{
            name: to_device(value, self.device) for name, value in vars(batch.groups).items()})
        return training_loss(
            query_QD, passage_PD, groups, to_device(batch.teacher_QC, self.device), temperature=options.temperature,
            teacher_temperature=options.teacher_temperature, hard_weight=options.hard_weight,
            soft_weight=options.soft_weight, in_batch=batch.in_batch, margin=options.false_negative_margin,
            kernels=options.kernels or "eager")

    def update(self, rate: float) -> torch.Tensor:
        """Clip the gradient and take AdamW's step; returns the gradient's norm before clipping, on the device."""
        weights = list(trainable(self.model).values())
        norm = torch.nn.utils.clip_grad_norm_(weights, self.options.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm
