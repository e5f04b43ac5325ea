"""Training: one step, and the loop around it.

    prepare    lines of one task -> prompts with 0 to k in-context examples -> input ids     (host, one step ahead)
    step       embeddings -> contrastive and soft-label loss -> gradient                     (grad_cache.py)
    update     clip the gradient, AdamW
    train      learning-rate schedule, saved states, metrics, end of the run

With the default backends neither `step` nor `update` reads a number from the device, so the host never waits for it.
Source of the defaults: docs/method.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ref.config import TrainConfig
from ref.loss.contrastive import CandidateIndex
from ref.loss.training_loss import LossTerms, training_loss
from ref.model.packing import to_device
from ref.model.transformer import Mistral
from ref.task_types import TASK_TYPES
from ref.text.prompts import PromptEncoder, PromptPrefix
from ref.training.data import Batch, SoftLabelDataset
from ref.training.grad_cache import GradientCache, PromptedTexts
from ref.training.metrics import (
    GracefulStop,
    MetricsLogger,
    Stopwatch,
    TrainingProgress,
    held_out_scores,
    truncate_metrics,
    write_held_out_scores,
)
from ref.training.run_dir import (
    Position,
    drop_best_after,
    save_if_best,
    save_state,
    share_done,
    trainable_parameters,
)
from ref.utils.device import Backend, resolve_backend
from ref.utils.distributed import Distributed
from ref.utils.prefetch import prefetch

Evaluate = Callable[[int], float]  # steps so far -> held-out score
METRICS = ("loss", "contrastive_loss", "soft_label_loss", "num_masked", "label_entropy", "tokens", "stop")


class Shard(NamedTuple):
    """The part of a batch that one rank embeds: consecutive queries and their passages."""

    queries: slice
    passages: slice
    num_passages_by_rank: list[int]


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as input ids."""

    step: int
    epoch: int
    batch: Batch
    shard: Shard
    groups: list[PromptedTexts]  # queries, passages
    examples_per_prompt: float


@dataclass
class Trainer:
    """Model, data, optimiser and options of a run."""

    config: TrainConfig
    data: SoftLabelDataset
    model: Mistral
    prompt_encoder: PromptEncoder
    optimiser: torch.optim.AdamW
    device: torch.device
    distributed: Distributed = field(default_factory=Distributed)

    @property
    def backend(self) -> Backend:
        """Implementation of pooling and loss."""
        return resolve_backend(self.config.backend, self.device)

    def prepare(self, lines: np.ndarray, *, epoch: int, step: int) -> PreparedBatch:
        """Read the lines of a batch and encode the prompts of this rank's shard."""
        batch = self.data.batch(lines, epoch=epoch, step=step)
        shard = shard_batch(batch, self.distributed)
        return PreparedBatch(step, epoch, batch, shard, *self.prompted_texts(batch, shard))

    def prompted_texts(self, batch: Batch, shard: Shard) -> tuple[list[PromptedTexts], float]:
        """Queries and passages as ids behind their prefixes, and the mean number of examples that fitted."""
        instruct_passages = TASK_TYPES[batch.task.type].instruct_passages
        prefixes = [self.prompt_encoder.prefix(batch.task.instruction, each) for each in batch.in_context_examples]
        if len(prefixes) == 1:
            queries = self._prompted(prefixes[0], batch.queries[shard.queries])
        else:  # each query has its own examples: there is no shared prefix
            queries = PromptedTexts([], [
                [*prefix.ids, *self.prompt_encoder.encode([text], prefix)[0]]
                for prefix, text in list(zip(prefixes, batch.queries, strict=True))[shard.queries]])
        passage_prefix = self.prompt_encoder.prefix(batch.task.instruction if instruct_passages else None)
        passages = self._prompted(passage_prefix, batch.passages[shard.passages])
        return [queries, passages], sum(prefix.num_examples for prefix in prefixes) / len(prefixes)

    def _prompted(self, prefix: PromptPrefix, texts: list[str]) -> PromptedTexts:
        ids = self.prompt_encoder.encode(texts, prefix)
        if not prefix.is_shared:
            return PromptedTexts([], [[*prefix.ids, *text] for text in ids])
        return PromptedTexts(prefix.ids, ids)

    def step(self, prepared: PreparedBatch, *, stop: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Accumulate the gradient of the whole batch's loss in the parameters; returns metrics on device and host.

        `stop`: whether this rank received Ctrl-C or SIGTERM; the metric `stop` is the number of such ranks.
        """
        assert self.config.mini_batch_tokens != "auto", "resolve it first (memory.py)"
        cache = GradientCache(self.model, prepared.groups, mini_batch_tokens=self.config.mini_batch_tokens,
                              backend=self.backend)
        mixed = self.config.train == "all" and self.config.dtype == "bfloat16"
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=mixed)
        with autocast():
            embeddings = cache.embeddings()
        terms = self.loss(prepared, embeddings)  # in fp32, whatever the model computes in
        terms.total.backward()
        with autocast():
            cache.backward()
        tokens = sum(group.num_tokens for group in prepared.groups)
        counts = to_device(torch.tensor([tokens, stop], dtype=torch.float32), self.device)
        metrics = torch.cat((torch.stack([
            terms.total.detach(), terms.contrastive, terms.soft_label, terms.num_masked, terms.label_entropy]).float(),
            counts))
        parameters = list(trainable_parameters(self.model).values())
        for parameter in parameters:
            if parameter.grad is None:  # the shard is empty
                parameter.grad = torch.zeros_like(parameter)
        self.distributed.all_reduce_([*(p.grad for p in parameters if p.grad is not None), metrics])
        drawn = sum(map(len, prepared.batch.in_context_examples)) / len(prepared.batch.in_context_examples)
        return dict(zip(METRICS, metrics, strict=True)), {
            "examples_per_prompt": prepared.examples_per_prompt, "examples_drawn": drawn}

    def loss(self, prepared: PreparedBatch, embeddings: torch.Tensor) -> LossTerms:
        """This rank's part of both terms: its queries against all passages of the batch."""
        batch, shard, config = prepared.batch, prepared.shard, self.config
        rows, index = shard.queries, batch.candidates
        query_QD, own_passage_PD = embeddings.split(
            [rows.stop - rows.start, shard.passages.stop - shard.passages.start])
        passage_PD = self.distributed.all_gather(own_passage_PD, shard.num_passages_by_rank)
        candidates = CandidateIndex(*(to_device(x, self.device) for x in (
            index.candidate_idx_QC[rows], index.text_id_P, index.known_positive_id_QX[rows])))
        num_labelled = int((~batch.teacher_QC.isnan()).any(1).sum())
        return training_loss(
            query_QD, passage_PD, candidates, to_device(batch.teacher_QC[rows], self.device),
            temperature=config.temperature, teacher_temperature=config.teacher_temperature,
            contrastive_weight=config.contrastive_weight, soft_label_weight=config.soft_label_weight,
            in_batch_negatives=batch.in_batch_negatives, false_negative_margin=config.false_negative_margin,
            backend=self.backend, global_counts=(len(batch.queries), num_labelled))

    def update(self, learning_rate: float) -> torch.Tensor:
        """Clip the gradient and take one AdamW step; returns the gradient norm before clipping, on the device."""
        parameters = list(trainable_parameters(self.model).values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def shard_batch(batch: Batch, distributed: Distributed) -> Shard:
    """The queries of a batch that belong to this rank, and their passages."""
    bounds = distributed.split_bounds(len(batch.queries))
    passages_before = np.cumsum([0, *(batch.candidates.candidate_idx_QC >= 0).sum(1).tolist()])
    places = [int(passages_before[bound]) for bound in bounds]
    by_rank = [last - first for first, last in pairwise(places)]
    rank = distributed.rank
    return Shard(slice(bounds[rank], bounds[rank + 1]), slice(places[rank], places[rank + 1]), by_rank)


# ---- the loop ----------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate after a share `progress` in [0, 1] of the schedule: linear warm-up, then linear or cosine decay to
    0. An extension of a complete run has a schedule of its own.
    """
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    left = (1 - min(1.0, progress)) / (1 - config.warmup_ratio)
    return config.learning_rate * (left if config.lr_scheduler == "linear" else (1 - math.cos(math.pi * left)) / 2)


def batch_schedule(data: SoftLabelDataset, first_step: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Endless (step, epoch, line numbers), from a step on."""
    batches_per_epoch = len(data.batches(0))
    epoch, step = first_step // batches_per_epoch, first_step
    while True:
        for lines in data.batches(epoch)[step - epoch * batches_per_epoch :]:
            yield step, epoch, lines
            step += 1
        epoch += 1


def num_steps(config: TrainConfig, data: SoftLabelDataset) -> int:
    """Steps of the whole run; without meaning if --minutes ends it."""
    return config.steps or math.ceil(config.epochs * len(data.batches(0)))


def train(
    trainer: Trainer, folder: Path, position: Position, start: Position, stop: GracefulStop,
    evaluate: Evaluate | None = None,
) -> bool:
    """Train until the end of the schedule, or until `stop`, which returns False; saves states in the run folder.

    `position`: where to go on. `start`: where the schedule begins, later than the run's beginning if that is extended.
    `evaluate` returns a held-out score; called on rank 0 every --eval-steps and at the end.
    """
    config, distributed, total = trainer.config, trainer.distributed, num_steps(trainer.config, trainer.data)
    stopwatch, first_step, is_first = Stopwatch(position["elapsed_s"]), position["step"], distributed.rank == 0
    scored = {step for step in held_out_scores(folder) if step <= first_step}
    distributed.barrier()  # before rank 0 can write a new score
    if is_first:
        drop_later_results(folder, first_step)
    progress = TrainingProgress(config, total, first_step, enabled=is_first)
    log = MetricsLogger(folder if is_first else None, progress, stopwatch, trainer.device)
    trainer.model.train()
    for prepared in prefetch(lambda item: trainer.prepare(item[2], epoch=item[1], step=item[0]),
                             batch_schedule(trainer.data, first_step)):  # save or score the state so far, then a step
        position = Position(step=(step := prepared.step), elapsed_s=stopwatch.elapsed_s)
        done = share_done(config, total, position, start)
        # all ranks stop at the same step: the first whose all-reduced metric `stop` is above 0
        ended = done >= 1 or (stop.requested if distributed.world_size == 1 else log.stop_requested)
        due_to_score = config.eval_steps and step > 0 and (done >= 1 or (step % config.eval_steps == 0 and not ended))
        # with --keep-best before every scoring too: a resumed run never goes back behind the best state
        due_to_save = step > first_step and (step % config.save_steps == 0 or (due_to_score and config.keep_best))
        if ended or due_to_save:
            log.flush()  # a loss that is not finite is noticed here and not saved
            if is_first:
                save_state(folder, trainer.model, trainer.optimiser, position, limit=config.save_total_limit)
            distributed.barrier(while_alive=True)  # writing a large state takes long
        if due_to_score and evaluate and step not in scored:
            score_held_out(trainer, folder, step, log, evaluate)
        if ended:
            log.close()
            return done >= 1
        half_step = 0 if config.minutes else 1 / (total - start["step"]) / 2  # so that no step has rate 0
        train_step(trainer, prepared, log, done + half_step, stop=stop.requested)
    raise AssertionError("the schedule is endless")


def drop_later_results(folder: Path, step: int) -> None:
    """Delete what a resumed run computes again: metrics, scores and the best state of later steps."""
    truncate_metrics(folder, step)
    drop_best_after(folder, step)


def score_held_out(trainer: Trainer, folder: Path, step: int, log: MetricsLogger, evaluate: Evaluate) -> None:
    """Rank 0 scores the held-out sets and keeps the best state, the others wait."""
    with log.paused():
        if trainer.distributed.rank == 0:
            score = evaluate(step)
            if trainer.config.keep_best:
                save_if_best(folder, trainer.model, step, score)
            write_held_out_scores(folder, {**held_out_scores(folder), step: score})
            trainer.model.train()
        trainer.distributed.barrier(while_alive=True)


def train_step(
    trainer: Trainer, prepared: PreparedBatch, log: MetricsLogger, progress: float, *, stop: bool,
) -> None:
    """One step of the loop: gradient, update, metrics."""
    torch.manual_seed(trainer.config.seed * 2**32 + prepared.step)  # LoRA dropout, equal after a resume
    trainer.distributed.barrier()
    metrics, counts = trainer.step(prepared, stop=stop)
    rate = learning_rate(trainer.config, progress)
    norm = trainer.update(rate)
    log.add({"step": prepared.step, "epoch": prepared.epoch, "task": prepared.batch.task.name, "learning_rate": rate,
             **counts}, {**metrics, "grad_norm": norm}, partial(NotFiniteError, prepared, trainer.data))


class NotFiniteError(ValueError):
    """The loss or its gradient is not finite: names the task and the first lines of the batch."""

    def __init__(self, prepared: PreparedBatch, data: SoftLabelDataset, loss: float, norm: float) -> None:
        lines = prepared.batch.lines
        more = f" and {len(lines) - 3} more lines" if len(lines) > 3 else ""
        super().__init__(
            f"step {prepared.step}: loss and gradient norm must be finite (got {loss} and {norm}); the batch of task "
            f"{prepared.batch.task.name} has {data.locations(lines[:3])}{more}; check these lines or start a new run "
            "with a lower --learning-rate, earlier saved states are complete")
