"""One training step: a batch of lines -> prompts -> vectors -> loss -> gradient -> AdamW.

    trainer.prepare(lines)   reads a batch and turns it into ids: the host's part, done a step ahead in a thread
    trainer.step(work)       leaves the gradient of both loss terms in the weights that learn
    trainer.update(rate)     clips it and moves them

With the default kernels neither of the last two reads a number from the device, so the host never waits for it. The
loop stands in run_train.py.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ref.config import Kernels, Options, pick_kernels
from ref.data import KINDS, Batch, SoftLabels
from ref.gradcache import GradientCache, Segment
from ref.loss import Groups, LossTerms, training_loss
from ref.model import Mistral
from ref.packing import to_device
from ref.prompts import Prefix, Prompter
from ref.runs import trainable
from ref.team import Team

NAMES = ("loss", "hard", "soft", "masked", "label_entropy", "tokens", "stop")


class Share(NamedTuple):
    """What of a batch is this process's: its queries and their passages, which stand together."""

    queries: slice
    passages: slice
    passages_by_rank: list[int]


@dataclass(frozen=True)
class Work:
    """A batch, ready for the model."""

    step: int
    epoch: int
    batch: Batch
    share: Share
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
    team: Team = field(default_factory=Team)

    @property
    def kernels(self) -> Kernels:
        """Who pools, and who computes the loss over a batch."""
        return pick_kernels(self.options.kernels, self.device)

    def prepare(self, lines: np.ndarray, *, epoch: int, step: int) -> Work:
        """Read the lines of a batch and tokenise the prompts of this process's share."""
        batch = self.data.batch(lines, epoch=epoch, step=step)
        share = share_of(batch, self.team)
        return Work(step, epoch, batch, share, *self.segments(batch, share))

    def step(self, work: Work, *, stop: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Leave the gradient of the whole batch's loss in the weights; returns the loss's figures, and counts.

        `stop`: this process was asked to end; the figure of that name counts the processes that were.
        """
        cache = GradientCache(
            self.model, work.segments, chunk_tokens=self.options.chunk_tokens, kernels=self.kernels)
        low = self.options.train == "all" and self.options.dtype == "bfloat16"
        model_in = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=low)
        with model_in():
            vectors = cache.vectors()
        terms = self.loss(work, vectors)  # in fp32, whatever the model computes in
        terms.total.backward()
        with model_in():
            cache.backward()
        tokens = sum(s.tokens for s in work.segments)
        host = to_device(torch.tensor([tokens, stop], dtype=torch.float32), self.device)
        seen = torch.cat((torch.stack([terms.total.detach(), terms.hard, terms.soft, terms.masked,
                                       terms.label_entropy]).float(), host))
        weights = list(trainable(self.model).values())
        for weight in weights:
            if weight.grad is None:  # an empty share
                weight.grad = torch.zeros_like(weight)
        self.team.sum_in_place([*(weight.grad for weight in weights if weight.grad is not None), seen])
        figures = dict(zip(NAMES, seen, strict=True))
        useful = tokens * cache.passes / max(1, cache.positions)
        drawn = sum(map(len, work.batch.examples)) / len(work.batch.examples)
        return figures, {"useful_token_share": useful, "examples": work.examples, "examples_drawn": drawn}

    def segments(self, batch: Batch, share: Share) -> tuple[list[Segment], float]:
        """Queries, then passages, as ids behind their prefixes; and the mean number of examples that got in."""
        instruction, both_sides = batch.task.instruction, KINDS[batch.task.kind].both_sides
        prefixes = [self.prompter.prefix(instruction, examples) for examples in batch.examples]
        count = sum(prefix.examples for prefix in prefixes) / len(prefixes)
        if len(prefixes) == 1:
            queries = self._segment(prefixes[0], batch.queries[share.queries])
        else:  # each query has examples of its own: nothing is shared
            queries = Segment([], [[*prefix.ids, *self.prompter.texts([text], prefix)[0]]
                                   for prefix, text in list(zip(prefixes, batch.queries, strict=True))[share.queries]])
        bare_or_not = self.prompter.prefix(instruction if both_sides else None)
        passages = self._segment(bare_or_not, batch.passages[share.passages])
        return [queries, passages], count

    def _segment(self, prefix: Prefix, texts: list[str]) -> Segment:
        ids = self.prompter.texts(texts, prefix)
        if len(prefix.ids) == 1:  # `<s>` alone is cheaper in each text than as a shared prefix
            return Segment([], [[*prefix.ids, *text] for text in ids])
        return Segment(prefix.ids, ids)

    def loss(self, work: Work, vectors: torch.Tensor) -> LossTerms:
        """This process's share of both terms: its queries against all passages of the batch."""
        batch, share, options = work.batch, work.share, self.options
        columns = batch.groups
        mine = share.queries
        query_QD, own_PD = vectors.split([mine.stop - mine.start, share.passages.stop - share.passages.start])
        passage_PD = self.team.gather(own_PD, share.passages_by_rank)
        groups = Groups(*(to_device(x, self.device) for x in (
            columns.column_QC[mine], columns.text_P, columns.known_QX[mine])))
        labelled = int((~batch.teacher_QC.isnan()).any(1).sum())
        return training_loss(
            query_QD, passage_PD, groups, to_device(batch.teacher_QC[mine], self.device),
            temperature=options.temperature, teacher_temperature=options.teacher_temperature,
            hard_weight=options.hard_weight, soft_weight=options.soft_weight, in_batch=batch.in_batch,
            margin=options.false_negative_margin, kernels=self.kernels,
            whole=(len(batch.queries), labelled))

    def update(self, rate: float) -> torch.Tensor:
        """Clip the gradient and take AdamW's step; returns the gradient's norm before clipping, on the device."""
        weights = list(trainable(self.model).values())
        norm = torch.nn.utils.clip_grad_norm_(weights, self.options.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def share_of(batch: Batch, team: Team) -> Share:
    """The queries of a batch that are this process's, a run of them, and the run of their passages."""
    cuts = team.cuts(len(batch.queries))
    ends = np.cumsum([0, *(batch.groups.column_QC >= 0).sum(1).tolist()])  # passages before each query's own
    places = [int(ends[cut]) for cut in cuts]
    by_rank = [last - first for first, last in pairwise(places)]
    rank = team.rank
    return Share(slice(cuts[rank], cuts[rank + 1]), slice(places[rank], places[rank + 1]), by_rank)
