"""Train: `python run_train.py --data soft_labels.jsonl`. From soft labels to an embedder, one loop.

For each step:   lines of one task  ->  prompts, with 0 to k solved examples  ->  vectors (in chunks)
                 ->  contrastive + soft-label loss  ->  gradient, chunk by chunk  ->  AdamW

Every option: `python run_train.py --help`. The folder of a run: ref/runs.py. Ctrl-C ends after the step
that runs, with everything saved; `--resume --output FOLDER` goes on.
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ref import runs
from ref.config import OptionParser, Options, parse_options, pick_device, pick_kernels, read_json
from ref.data import KINDS, Batch, SoftLabels
from ref.embedder import Embedder
from ref.gradcache import GradientCache, Segment
from ref.held_out import retrieval_ndcg10
from ref.loss import LossTerms, training_loss
from ref.model import Mistral
from ref.prompts import Prefix, Prompter


@dataclass
class Trainer:
    """All that a step needs."""

    options: Options
    data: SoftLabels
    model: Mistral
    prompter: Prompter
    optimiser: torch.optim.AdamW
    device: torch.device

    def step(self, batch: Batch) -> tuple[LossTerms, dict[str, float]]:
        """Leave the gradient of a batch's loss in the weights; returns the loss and counts of what was read."""
        segments, examples = self.segments(batch)
        kernels = self.options.kernels or "eager"
        cache = GradientCache(self.model, segments, chunk_tokens=self.options.chunk_tokens, kernels=kernels)
        low = self.options.train == "all" and self.options.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            vectors_ND = cache.vectors()
            terms = self.loss(batch, vectors_ND)
            terms.total.backward()
            cache.backward()
        tokens = sum(s.tokens for s in segments)
        useful = sum(len(t) for s in segments for t in s.texts) + sum(len(s.prefix) for s in segments)
        return terms, {"tokens": tokens, "useful_token_share": useful / tokens, "examples": examples}

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

    def loss(self, batch: Batch, vectors_ND: torch.Tensor) -> LossTerms:
        """Both terms of method section 5 on the vectors of a batch."""
        query_QD, passage_PD = vectors_ND.split([len(batch.queries), len(batch.passages)])
        options = self.options
        groups = dataclasses.replace(batch.groups, **{
            name: value.to(self.device) for name, value in vars(batch.groups).items()})
        return training_loss(
            query_QD, passage_PD, groups, batch.teacher_QC.to(self.device), temperature=options.temperature,
            teacher_temperature=options.teacher_temperature, hard_weight=options.hard_weight,
            soft_weight=options.soft_weight, in_batch=batch.in_batch, margin=options.false_negative_margin,
            kernels=options.kernels or "eager")

    def update(self, rate: float) -> float:
        """Clip the gradient and take AdamW's step; returns the gradient's norm before clipping."""
        weights = list(runs.trainable(self.model).values())
        norm = torch.nn.utils.clip_grad_norm_(weights, self.options.max_grad_norm).item()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm


def learning_rate(options: Options, progress: float) -> float:
    """The rate after a share `progress` (0 to 1) of the run: linear warm-up, then linear or cosine decay to zero."""
    if progress < options.warmup:
        return options.learning_rate * progress / options.warmup
    left = (1 - min(1.0, progress)) / (1 - options.warmup)
    return options.learning_rate * (left if options.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def schedule(data: SoftLabels, first_step: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, line numbers) for ever, from a step on."""
    batches_per_epoch = len(data.batches(0))
    epoch, step = first_step // batches_per_epoch, first_step
    while True:
        for lines in data.batches(epoch)[step - epoch * batches_per_epoch :]:
            yield step, epoch, lines
            step += 1
        epoch += 1


def train(trainer: Trainer, folder: Path) -> bool:
    """The loop. Returns False if Ctrl-C ended it early."""
    options, data = trainer.options, trainer.data
    total = options.steps or math.ceil(options.epochs * len(data.batches(0)))
    position: dict[str, Any] = {"step": 0, "elapsed_s": 0.0}
    if options.resume:
        position = runs.load_state(folder, trainer.model, trainer.optimiser)
    clock = runs.Clock(position["elapsed_s"])
    keep_metrics(folder, position["step"])
    stop = StopAfterStep()
    progress = Progress(options, total)
    trainer.model.train()
    with (folder / "metrics.jsonl").open("a") as metrics, stop:
        for step, epoch, lines in schedule(data, position["step"]):
            done = clock.elapsed_s / (60 * options.minutes) if options.minutes else step / total
            ended = done >= 1 or stop.asked
            if ended or (step > position["step"] and step % options.save_every == 0):
                runs.save_state(folder, trainer.model, trainer.optimiser, {"step": step, "elapsed_s": clock.elapsed_s})
            if ended:
                return done >= 1
            before_s = clock.elapsed_s
            torch.manual_seed(options.seed * 2**32 + step)  # LoRA dropout, the same after a resume
            batch = data.batch(lines, epoch=epoch, step=step)
            terms, counts = trainer.step(batch)
            rate = learning_rate(options, done + (0 if options.minutes else 1 / total / 2))
            norm = trainer.update(rate)
            loss = terms.total.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFiniteError(step, loss, norm, batch, data)
            row = {"step": step, "epoch": epoch, "task": batch.task.name, "loss": loss, "hard": terms.hard.item(),
                   "soft": terms.soft.item(), "learning_rate": rate, "gradient_norm": norm,
                   "masked": int(terms.masked), "label_entropy": terms.label_entropy.item(), **counts,
                   "tokens_per_s": counts["tokens"] / (clock.elapsed_s - before_s), "elapsed_s": clock.elapsed_s}
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            progress.show(row)
    raise AssertionError("the schedule does not end")


def keep_metrics(folder: Path, steps: int) -> None:
    """Drop lines of steps that a resumed run will do again."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:steps]))


class NotFiniteError(ValueError):
    """The loss or its gradient is not a number: names the lines of the batch."""

    def __init__(self, step: int, loss: float, norm: float, batch: Batch, data: SoftLabels) -> None:
        places = ", ".join(data.place(number) for number in batch.rows[:8])
        more = f" and {len(batch.rows) - 8} more" if len(batch.rows) > 8 else ""
        super().__init__(f"step {step}: loss {loss}, gradient norm {norm}, on lines {places}{more}. Expected are finite numbers. "
                         "Look at these lines, or lower --learning-rate; the last saved state is whole.")


class StopAfterStep:
    """Turns the first Ctrl-C into a wish, the second into an end."""

    asked = False

    def __enter__(self) -> "StopAfterStep":
        self.before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        print("\nending after this step; Ctrl-C again ends at once", flush=True)
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


class Progress:
    """One line that renews itself on a terminal, and comes every ten seconds elsewhere."""

    def __init__(self, options: Options, total: int) -> None:
        self.options, self.total, self.shown_s, self.clock = options, total, -math.inf, runs.Clock()

    def show(self, row: dict[str, Any]) -> None:
        """Print step, loss, speed and time left."""
        terminal = sys.stdout.isatty()
        if self.clock.elapsed_s - self.shown_s < (0.2 if terminal else 10):
            return
        self.shown_s = self.clock.elapsed_s
        step, elapsed_s = row["step"] + 1, row["elapsed_s"]
        left_s = 60 * self.options.minutes - elapsed_s if self.options.minutes else elapsed_s / step * (self.total - step)
        of = "" if self.options.minutes else f"/{self.total}"
        line = (f"step {step}{of}  loss {row['loss']:.3f} = contrastive {row['hard']:.3f}, soft {row['soft']:.3f}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  left {int(left_s) // 60}:{int(left_s) % 60:02}")
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", flush=True)


def held_out_score(trainer: Trainer, folder: Path | None, when: str) -> float | None:
    """Print and return the mean nDCG@10 of the held-out sets, if there are some."""
    if folder is None:
        return None
    trainer.model.eval()
    embedder = Embedder(trainer.model, trainer.prompter)
    scores = {task.parent.name: retrieval_ndcg10(embedder, task.parent) for task in sorted(folder.glob("*/task.json"))}
    if not scores:
        raise ValueError(f"{folder} holds no set. Expected are folders with task.json, corpus.jsonl, queries.jsonl, qrels.jsonl.")
    each = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    mean = sum(scores.values()) / len(scores)
    print(f"held-out nDCG@10 {when}: {mean:.3f} ({each})", flush=True)
    return mean


def prepare(arguments: list[str] | None) -> tuple[Trainer, Path, runs.Start]:
    """From the command line to a model that is ready to train, telling what was chosen and why."""
    given, _ = parse_options(arguments)
    if getattr(given, "resume", False):
        given = resumed(given)
    start = runs.starting_point(getattr(given, "model", None))
    print(f"model: {start.name} ({start.reason})")
    options = OptionParser.options(given, fresh_weights=start.architecture is not None)
    device = pick_device(options.device)
    options = dataclasses.replace(
        options, dtype=options.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        kernels=pick_kernels(options.kernels, device))
    print(f"preset: {options.preset}; weights that learn: {options.train}; device: {device}, {options.dtype}; "
          f"pooling and loss: {options.kernels}")
    data = SoftLabels([Path(path) for path in options.data], options)
    print(f"data: {len(data):,} lines, {len(data.tasks)} tasks, {data.with_labels:,} lines with soft labels, "
          f"{len(data) - data.with_labels:,} for the contrastive term alone")
    folder = runs.open_folder(options, start)
    model, tokens = runs.build(start, options, data, device=device)
    weights = list(runs.trainable(model).values())
    print(f"weights: {sum(p.numel() for p in model.parameters()):,}, of which {sum(p.numel() for p in weights):,} learn; "
          f"vocabulary: {tokens.vocab_size:,} tokens")
    prompter = Prompter(tokens, runs.checked_template(options.template), options.max_text_tokens, options.max_prompt_tokens,
                        options.max_example_tokens)
    for task in data.tasks:
        prompter.prefix(task.instruction)
    optimiser = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.weight_decay,
                                  fused=True)
    print(f"run: {folder}", flush=True)
    return Trainer(options, data, model, prompter, optimiser, device), folder, start


def resumed(given: Namespace) -> Namespace:
    """The options of the run in --output, which --resume goes on with; others may not be given."""
    folder = Path(getattr(given, "output", None) or "")
    saved = read_json(folder / "run.json")
    other = {k: v for k, v in vars(given).items() if k not in ("resume", "output") and v != saved["options"][k]}
    if other:
        raise ValueError(f"--resume goes on with the options of {folder}; given is another {', '.join(other)}. Leave that out.")
    return Namespace(**{**saved["options"], "model": saved["model"], "resume": True, "output": str(folder)})


def main(arguments: list[str] | None = None) -> int:
    """Train, save, score. Returns 0; 130 after Ctrl-C; 2 for bad input, with a message."""
    try:
        trainer, folder, start = prepare(arguments)
        return run(trainer, folder, start)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(trainer: Trainer, folder: Path, start: runs.Start) -> int:
    """One run from its first step to its result."""
    options, data = trainer.options, trainer.data
    sets = Path(options.held_out) if options.held_out else data.paths[0].parent / "held_out"
    sets_or_none = sets if options.held_out or sets.is_dir() else None
    facts = runs.facts(options, start, data)
    if options.resume:
        before = read_json(folder / "run.json")
        if before["data"] != facts["data"]:
            raise ValueError(f"the data of {folder} have changed since it started. Expected are the same files. Start a new run.")
        facts = {**facts, "started": before["started"], "held_out_before": before.get("held_out_before")}
    else:
        facts["held_out_before"] = held_out_score(trainer, sets_or_none, "before training")
    runs.write_json(folder / "run.json", facts)
    complete = train(trainer, folder)
    runs.save_result(folder, trainer.model, trainer.prompter, options, start, data)
    why_not = runs.plot_loss(folder)
    if sys.stdout.isatty():
        print()
    if why_not:
        print(why_not)
    if not complete:
        print(f"stopped and saved; go on with: python run_train.py --resume --output {folder}")
        return 130
    facts["held_out_after"] = held_out_score(trainer, sets_or_none, "after training")
    runs.write_json(folder / "run.json", {**facts, "complete": True, "finished": runs.now()})
    print(f"done: {folder}. Score it: python run_eval.py --model {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
