"""Train: `python run_train.py --data soft_labels.jsonl`. From soft labels to an embedder, one loop.

For each step:   lines of one task  ->  prompts, with 0 to k solved examples  ->  vectors (in chunks)
                 ->  contrastive + soft-label loss  ->  gradient, chunk by chunk  ->  AdamW

Every option: `python run_train.py --help`. The folder of a run: ref/runs.py. Ctrl-C ends after the step
that runs, with everything saved; `--resume --output FOLDER` goes on.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ref import runs
from ref.config import PRESETS, OptionParser, Options, pick_device, pick_kernels, read_json
from ref.data import Batch, SoftLabels
from ref.embedder import Embedder
from ref.export import drop_result, save_merged, save_result
from ref.held_out import retrieval_ndcg10
from ref.model import Mistral
from ref.overlap import one_ahead
from ref.prompts import Prompter
from ref.team import PeerError, Team
from ref.trainer import Trainer, Work


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
    options, data, team = trainer.options, trainer.data, trainer.team
    total = options.steps or math.ceil(options.epochs * len(data.batches(0)))
    position: dict[str, Any] = {"step": 0, "elapsed_s": 0.0}
    if options.resume:
        position = runs.load_state(folder, trainer.model, trainer.optimiser)
    clock = runs.Clock(position["elapsed_s"])
    if team.rank == 0:
        runs.keep_metrics(folder, position["step"])
    log = runs.StepLog(folder if team.rank == 0 else None, runs.Progress(options, total), clock)
    trainer.model.train()

    def prepare(item: tuple[int, int, np.ndarray]) -> Work:
        step, epoch, lines = item
        return trainer.prepare(lines, epoch=epoch, step=step)

    with runs.StopAfterStep() as stop:
        for work in one_ahead(prepare, schedule(data, position["step"])):
            step = work.step
            done = clock.elapsed_s / (60 * options.minutes) if options.minutes else step / total
            # all processes end after the same step: the one that the figures, summed, say
            ended = done >= 1 or (stop.asked if team.size == 1 else log.stopped)
            if ended or (step > position["step"] and step % options.save_every == 0):
                log.flush()  # what is not finite is noticed here, and not saved
                if team.rank == 0:
                    runs.save_state(folder, trainer.model, trainer.optimiser,
                                    {"step": step, "elapsed_s": clock.elapsed_s}, keep=options.keep)
                team.wait(while_alive=True)  # a large state takes its time
            if ended:
                log.close()
                return done >= 1
            torch.manual_seed(options.seed * 2**32 + step)  # LoRA dropout, the same after a resume
            team.wait()
            figures, counts = trainer.step(work, stop=stop.asked)
            rate = learning_rate(options, done + (0 if options.minutes else 1 / total / 2))
            norm = trainer.update(rate)
            log.add({"step": step, "epoch": work.epoch, "task": work.batch.task.name, "learning_rate": rate, **counts},
                    {**figures, "gradient_norm": norm}, partial(NotFiniteError, step, work.batch, data))
    raise AssertionError("the schedule does not end")


class NotFiniteError(ValueError):
    """The loss or its gradient is not a number: names the lines of the batch."""

    def __init__(self, step: int, batch: Batch, data: SoftLabels, loss: float, norm: float) -> None:
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {norm}, on {data.places(batch.rows)}. Expected are finite "
            "numbers. Look at these lines, or start a new run with a lower --learning-rate. What was saved before is "
            "whole.")


def held_out_score(trainer: Trainer, folder: Path | None, when: str) -> float | None:
    """Print and return the mean nDCG@10 of the held-out sets, if there are some."""
    if folder is None:
        return None
    trainer.model.eval()
    embedder = Embedder(trainer.model, trainer.prompter, kernels=trainer.options.kernels)
    scores = {task.parent.name: retrieval_ndcg10(embedder, task.parent) for task in sorted(folder.glob("*/task.json"))}
    if not scores:
        raise ValueError(f"{folder} holds no set. Expected are folders with task.json, corpus.jsonl, queries.jsonl and "
                         "qrels.jsonl. Give another --held-out.")
    each = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    mean = sum(scores.values()) / len(scores)
    print(f"held-out nDCG@10 {when}: {mean:.3f} ({each})", flush=True)
    return mean


def set_up(arguments: list[str] | None) -> tuple[Trainer, Path, runs.Start]:
    """From the command line to a model that is ready to train, telling what was chosen and why."""
    given = OptionParser().parse_args(arguments)  # as given: defaults are laid under it below
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_, **__: None
    if getattr(given, "resume", False):
        given = runs.resumed(given)
    start = runs.starting_point(getattr(given, "model", None))
    say(f"model: {start.name} ({start.reason})")
    options = OptionParser.options(given, fresh_weights=start.architecture is not None)
    team = Team(patience=timedelta(seconds=options.peer_timeout))
    if team.size > 1 and options.minutes is not None:
        raise ValueError("--minutes is given to several processes, whose clocks differ. Expected is one end for all. "
                         "Give --steps or --epochs.")
    device = pick_device(options.device)  # of the process: the team has set which
    options = dataclasses.replace(
        options, dtype=options.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        kernels=pick_kernels(options.kernels, device))
    defaults = {name: getattr(Options(), name) for name in PRESETS["small"]}
    values = {**defaults, **PRESETS[options.preset or "report"]}
    say(f"preset: {options.preset} ({', '.join(f'{name} {value}' for name, value in values.items())}), "
          "under what the command line says")
    say(f"weights that learn: {options.train}; device: {device}, {options.dtype}; "
          f"pooling and in-batch loss: {options.kernels}")
    data = SoftLabels([Path(path) for path in options.data], options)
    say(f"data: {len(data):,} lines, {len(data.tasks)} tasks, {data.with_labels:,} lines with soft labels, "
          f"{len(data) - data.with_labels:,} for the contrastive term alone")
    folder = runs.open_folder(options, start, make=team.rank == 0)
    try:
        model, prompter = ready(start, options, data, device)
    except BaseException:
        runs.drop_if_empty(folder)
        raise
    tokens = prompter.tokenizer
    weights = list(runs.trainable(model).values())
    say(f"weights: {sum(p.numel() for p in model.parameters()):,}, of which {sum(w.numel() for w in weights):,} "
          f"learn; vocabulary: {tokens.vocab_size:,} tokens")
    optimiser = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=options.weight_decay,
                                  fused=True)
    say(f"run: {folder}", flush=True)
    return Trainer(options, data, model, prompter, optimiser, device, team), folder, start


def ready(start: runs.Start, options: Options, data: SoftLabels, device: torch.device) -> tuple[Mistral, Prompter]:
    """The model and its prompts, every task's instruction tried."""
    model, tokens = runs.build(start, options, data, device=device)
    prompter = Prompter(tokens, runs.checked_template(options.template), options.max_text_tokens,
                        options.max_prompt_tokens, options.max_example_tokens)
    for task in data.tasks:
        try:
            prompter.prefix(task.instruction)
        except ValueError as error:
            raise ValueError(f"{data.first_line(task)}: prompt: {error}") from None
    return model, prompter


def main(arguments: list[str] | None = None) -> int:
    """Train, save, score. Returns 0; 130 after Ctrl-C; with a message 2 for bad input, 3 when the GPU's memory is full,
    4 when another process is dead or stuck.
    """
    try:
        trainer, folder, start = set_up(arguments)
        try:
            code = run(trainer, folder, start)
            trainer.team.close()
            return code
        finally:
            if trainer.team.rank == 0:
                runs.drop_if_empty(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: out of memory on the GPU ({str(error).splitlines()[0]:.200}). Lower --chunk-tokens (memory of a "
              "pass is proportional to it), or add --checkpointing. --resume goes on.", file=sys.stderr)
        return 3
    except PeerError as error:
        print(f"error: a process is dead or stuck: {error}. --resume goes on from the last saved state.",
              file=sys.stderr)
        return 4


def run(trainer: Trainer, folder: Path, start: runs.Start) -> int:
    """One run from its first step to its result."""
    options, data = trainer.options, trainer.data
    sets = Path(options.held_out) if options.held_out else data.paths[0].parent / "held_out"
    sets_or_none = sets if options.held_out or sets.is_dir() else None
    facts = runs.facts(options, start, trainer.model, data)
    lead = trainer.team.rank == 0
    if options.resume:
        before = read_json(folder / "run.json")
        for what in ("data", "architecture"):
            if before.get(what) != facts[what]:
                raise ValueError(f"the {what} of {folder} changed since it started. Expected are the same files. "
                                 "Put them back, or start a new run.")
        if before.get("complete"):
            print(f"{folder} is complete: there is nothing to go on with")
            return 0
        facts = {**facts, "started": before["started"], "held_out_before": before.get("held_out_before")}
    else:
        facts["held_out_before"] = held_out_score(trainer, sets_or_none, "before training") if lead else None
    if lead:
        runs.write_json(folder / "run.json", facts)
        drop_result(folder)  # of a run that was stopped: it is older than the states from here on
    trainer.team.wait(while_alive=True)
    complete = train(trainer, folder)
    if not lead:
        return 0 if complete else 130
    save_result(folder, trainer.model, trainer.prompter, options, start, data)
    why_not = runs.plot_loss(folder)
    if why_not:
        print(why_not)
    if not complete:
        print(f"stopped and saved; go on with: python run_train.py --resume --output {folder}")
        return 130
    facts["held_out_after"] = held_out_score(trainer, sets_or_none, "after training")
    if options.merge and options.train == "lora":
        save_merged(folder, trainer.model, trainer.prompter, data)
    runs.write_json(folder / "run.json", {**facts, "complete": True, "finished": runs.now()})
    print(f"done: {folder}. Score it: python run_eval.py --model {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
