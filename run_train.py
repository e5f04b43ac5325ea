"""Train a text embedder from soft labels: `python run_train.py --data soft_labels.jsonl`.

For each step:   lines of one task  ->  prompts, with 0 to k in-context examples  ->  embeddings (in mini-batches)
                 ->  contrastive + soft-label loss  ->  gradient  ->  AdamW

All options: `python run_train.py --help`. The step and the loop: ref/training/trainer.py. The run folder:
ref/training/run_dir.py. Ctrl-C stops after the current step with everything saved; `--resume --output FOLDER`
continues, and with a larger --steps, --epochs or --minutes extends a complete run.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ref.config import PRESETS, TrainConfig
from ref.embedder import Embedder
from ref.evaluation.retrieval import BEIR_QRELS, evaluate_retrieval
from ref.model.card import write_model_cards
from ref.training.arguments import parse_args, train_config
from ref.training.data import SoftLabelDataset
from ref.training.export import earlier_results, save_merged, save_result, usage
from ref.training.memory import auto_mini_batch_tokens
from ref.training.metrics import GracefulStop, held_out_scores, plot_loss
from ref.training.model_source import ModelSource, build_model, declared_template, resolve_model
from ref.training.run_dir import (
    BEGINNING,
    check_resumed,
    last_position,
    load_best,
    load_state,
    open_run_dir,
    resume_options,
    run_metadata,
    schedule_start,
    trainable_parameters,
)
from ref.training.trainer import Trainer, num_steps, train
from ref.utils.device import Dtype, keep_freed_memory, resolve_backend, resolve_device, resolve_dtype
from ref.utils.distributed import Distributed, RankFailure
from ref.utils.environment import utc_now
from ref.utils.files import hash_files, remove_path, write_json
from ref.utils.progress import escape_unprintable, print_line


def main(arguments: list[str] | None = None) -> int:
    """Train, save, evaluate.

    Returns 0; 130 after Ctrl-C; with a message 2 for bad input, 3 if the GPU runs out of memory, 4 if another rank
    fails.
    """
    escape_unprintable()
    try:
        with ExitStack() as claims:
            trainer, folder, source = set_up(arguments, claims)
            code = run(trainer, folder, source)
            trainer.distributed.close()
            return code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step, or after the last
        print("stopped; --resume continues a run that has begun", file=sys.stderr)
        return 130
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: out of GPU memory ({str(error).splitlines()[0]:.200}); lower --mini-batch-tokens or add "
              "--gradient-checkpointing; --resume continues", file=sys.stderr)
        return 3
    except RankFailure as error:
        print(f"error: {error}; --resume continues from the last saved state", file=sys.stderr)
        return 4


def set_up(arguments: list[str] | None, claims: ExitStack) -> tuple[Trainer, Path, ModelSource]:
    """Command line to a trainer, printing what was chosen and why; `claims` holds the run folder."""
    given = parse_args(arguments)
    log: Callable[[str], None] = print if os.environ.get("RANK", "0") == "0" else lambda _: None
    if getattr(given, "resume", False):
        given = resume_options(given)
    source = resolve_model(getattr(given, "model", None), getattr(given, "device", None))
    log(f"model: {source.name} ({source.reason})")
    if source.run and not source.run.get("complete"):
        log(f"note: the run {source.name} is not complete; this is the model of its last stop")
    config = train_config(given, source)
    distributed = Distributed(timeout=timedelta(seconds=config.distributed_timeout), device=config.device)
    if distributed.world_size > 1 and config.minutes is not None:
        raise ValueError("--minutes is not supported with several processes, whose clocks differ; give --steps or "
                         "--epochs")
    device = resolve_device(config.device)
    keep_freed_memory(device)
    if not config.resume and getattr(given, "compile", None) is False and device.type == "cuda":
        raise ValueError("--no-compile is for a CPU; on cuda the blocks are always compiled")
    dtype, why = resolve_train_dtype(config, device)
    config = dataclasses.replace(config, dtype=dtype, backend=resolve_backend(config.backend, device))
    describe_options(given, config, source, device, why, log)
    folder = claims.enter_context(open_run_dir(config, source, create=distributed.rank == 0))
    data = SoftLabelDataset([Path(path) for path in config.data], config)
    describe_data(data, log)
    model, prompt_encoder = build_model(source, config, data, device=device)
    if (declared := declared_template(source, prompt_encoder)) not in (None, config.template):
        log(f"note: the checkpoint's own template is {declared}; --template is {config.template}")
    parameters = list(trainable_parameters(model).values())
    if config.mini_batch_tokens == "auto":
        tokens, why = auto_mini_batch_tokens(model, resolve_backend(config.backend, device))
        config = dataclasses.replace(config, mini_batch_tokens=tokens)
        log(f"mini-batches: {tokens:,} tokens ({why})")
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}, of which {sum(p.numel() for p in parameters):,} "
        f"are trainable; vocabulary: {prompt_encoder.tokenizer.vocab_size:,} tokens")
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    log(f"run: {folder}")
    sys.stdout.flush()
    return Trainer(config, data, model, prompt_encoder, optimiser, device, distributed), folder, source


def describe_data(data: SoftLabelDataset, log: Callable[[str], None]) -> None:
    """Counts, and what is worth knowing before the first step."""
    log(f"data: {len(data):,} lines, {len(data.tasks)} tasks, {data.num_with_labels:,} lines with soft labels, "
        f"{len(data) - data.num_with_labels:,} with the contrastive term only")
    tasks = len({(task.name, task.type) for task in data.tasks})
    in_batch = [data.has_in_batch_negatives(task) for task in data.tasks]
    sizes = {"batch_size": any(in_batch), "batch_size_symmetric": not all(in_batch)}
    for line in data.report.lines(
            lambda: data.batches(0), instructions_per_task=len(data.tasks) / tasks,
            batch_size=min(vars(data.config)[name] for name, is_used in sizes.items() if is_used)):
        log(line)
    preset = {**vars(TrainConfig()), **PRESETS[data.config.preset or "paper"]}
    for names, is_unused, reason in (
            (("batch_size", "false_negative_margin"), not any(in_batch), "no task has in-batch negatives"),
            (("batch_size_symmetric",), all(in_batch), "every task has in-batch negatives"),
            (("teacher_temperature",), not data.num_with_labels, "no line has teacher scores")):
        for name in names:
            if is_unused and vars(data.config)[name] != preset[name]:
                log(f"note: --{name.replace('_', '-')} is not used: {reason}")


def resolve_train_dtype(config: TrainConfig, device: torch.device) -> tuple[Dtype, str]:
    """The precision of the forward pass, and why."""
    if config.dtype == "auto" and config.train == "all" and device.type == "cpu":
        return "float32", "default on a CPU for --train all, whose weights are float32"
    return resolve_dtype(config.dtype, device)


def preset_values(config: TrainConfig) -> str:
    """The options that presets change, with this run's values."""
    default, names = TrainConfig(), dict.fromkeys(name for preset in PRESETS.values() for name in preset)
    values = {name: getattr(default, name) for name in names} | PRESETS[config.preset or "paper"]
    return ", ".join(f"{name} {value}" for name, value in values.items())


def describe_options(
    given: argparse.Namespace, config: TrainConfig, source: ModelSource, device: torch.device, why: str,
    log: Callable[[str], None],
) -> None:
    """Print preset, trainable parameters, device and precision; `why`: the reason for the precision."""
    log(f"preset: {config.preset} ({preset_values(config)}); options on the command line override it")
    if config.train == "all" and source.config is None and not hasattr(given, "learning_rate"):
        log(f"note: the preset's learning rate, {config.learning_rate}, was chosen for LoRA; --train all needs a lower "
            "one, such as --learning-rate 2e-5")
    log(f"trainable: {config.train}; device: {device}; backend: {config.backend}")
    log(f"dtype: {config.dtype} ({why})")
    if config.compile and device.type == "cpu":
        log("compiled blocks (--compile): the first steps take a minute longer")


def run(trainer: Trainer, folder: Path, source: ModelSource) -> int:
    """One run from its first step, or from a saved state, to its result."""
    config, data = trainer.config, trainer.data
    sets = held_out_sets(config, data)
    metadata = {**run_metadata(config, source, trainer.model, data), "held_out": {
        path.name: hash_files(path, [*path.glob("*.json*"), *path.glob(BEIR_QRELS)]) for path in sets}}
    is_first, start, position = trainer.distributed.rank == 0, BEGINNING, BEGINNING
    if is_first and not sets and config.eval_data is None:
        print(f"held-out sets: none in {data.paths[0].parent / 'held_out'} (--eval-data names another folder)")
    if config.resume:
        saved = check_resumed(folder, metadata)
        begin = schedule_start(saved, config, num_steps(config, data))
        if begin is None:
            print(f"{folder} is complete: nothing to resume; a larger --steps, --epochs or --minutes extends it")
            if config.merge and is_first and not (folder / "merged").exists():
                add_merged(trainer, folder, saved)
            return 0
        start, position = begin, load_state(folder, trainer.model, trainer.optimiser, begin)
        same_sets = saved.get("held_out", metadata["held_out"]) == metadata["held_out"]
        metadata |= {"started": saved["started"], "eval_before": saved.get("eval_before") if same_sets else None,
                     "schedule_start": start, "extended": [*saved.get("extended", ()), *ended(saved)]}
    elif is_first:
        metadata["eval_before"] = evaluate(trainer, sets, "before training") if sets else None
    if is_first:
        results = earlier_results(folder)
        write_json(folder / "run.json", metadata)
        for result in results:
            remove_path(result)
    trainer.distributed.barrier(while_alive=True)
    with GracefulStop() as stop:
        complete = train(trainer, folder, position, start, stop,
                         lambda step: evaluate(trainer, sets, f"after {step} steps"))
        if is_first:
            finish(trainer, folder, source, sets, metadata, complete=complete)
        trainer.distributed.barrier(while_alive=True)  # a launcher ends all ranks when the first returns 130
    return 0 if complete else 130


def ended(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """What run.json keeps of a complete run that is extended."""
    kept = ("end", "finished", "commit", "versions")
    return [{name: saved.get(name) for name in kept}] if saved.get("complete") else []


def finish(
    trainer: Trainer, folder: Path, source: ModelSource, sets: list[Path], metadata: dict[str, Any], *, complete: bool,
) -> None:
    """Write the result of a run, and complete run.json unless the run was stopped."""
    config, data, scores = trainer.config, trainer.data, held_out_scores(folder)
    end = last_position(folder)
    result_step = end["step"]
    if complete and config.keep_best and scores:
        result_step = load_best(folder, trainer.model)
        print(f"the result is the state after {result_step} steps, which has the best held-out score")
    save_result(folder, trainer.model, trainer.prompt_encoder, config, source, data)
    if not_drawn := plot_loss(folder):
        print(not_drawn)
    if not complete:
        print(f"stopped and saved; continue with: python run_train.py --resume --output {folder}")
        return
    score = scores.get(result_step)
    if sets and score is None:
        score = evaluate(trainer, sets, "after training")
    if config.merge and config.train == "lora":
        save_merged(folder, trainer.model, trainer.prompt_encoder, data)
    write_json(folder / "run.json", {**metadata, "eval_after": score, "result_step": result_step, "end": end,
                                     "complete": True, "finished": utc_now()})
    write_model_cards(folder)
    print(f"done: {folder}\nevaluate it: python run_eval.py --model {folder}")


def add_merged(trainer: Trainer, folder: Path, saved: dict[str, Any]) -> None:
    """Write merged/ of a complete run, from the state that is its result."""
    if trainer.config.keep_best and held_out_scores(folder):
        step = load_best(folder, trainer.model)
    else:
        step = load_state(folder, trainer.model, trainer.optimiser, BEGINNING)["step"]
    if step != (result := saved.get("result_step")):
        raise ValueError(f"--merge: {folder / 'state'} must have the state of step {result}, the run's result (got "
                         f"{step})")
    save_merged(folder, trainer.model, trainer.prompt_encoder, trainer.data)
    write_json(folder / "run.json", {
        **saved, "options": {**saved["options"], "merge": True}, "usage": usage(trainer.data, trainer.config.template)})
    write_model_cards(folder)
    print(f"written: {folder / 'merged'}")


def held_out_sets(config: TrainConfig, data: SoftLabelDataset) -> list[Path]:
    """The retrieval sets with a task.json in --eval-data, or in held_out/ beside the first data file, no other sets.

    Raises ValueError if --eval-data has none, or if there is none for --eval-steps.
    """
    given = config.eval_data
    folder = Path(given) if given else data.paths[0].parent / "held_out"
    sets = [] if given == "none" else [
        path.parent for path in sorted(folder.glob("*/task.json"))
        if any((path.parent / name).exists() for name in ("corpus.jsonl", "queries.jsonl", "qrels.jsonl", BEIR_QRELS))]
    if not sets and given and given != "none":
        raise ValueError(f"--eval-data {folder}: must hold folders with task.json, corpus.jsonl, queries.jsonl and "
                         f"qrels.jsonl{' (got one of these folders)' if (folder / 'task.json').exists() else ''}")
    if not sets and config.eval_steps:
        raise ValueError("--eval-steps needs held-out sets: give their folder as --eval-data")
    return sets


def evaluate(trainer: Trainer, sets: list[Path], when: str) -> float:
    """Print and return the mean nDCG@10 of the held-out sets; without instructions if no task in training has one."""
    trainer.model.eval()
    instructed = any(task.instruction is not None for task in trainer.data.tasks)
    embedder = Embedder(trainer.model, trainer.prompt_encoder, backend=trainer.backend)
    scores = {path.name: evaluate_retrieval(embedder, path, instructed=instructed) for path in sets}
    each = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    how = "" if instructed else ", without instructions, as in training"
    mean = sum(scores.values()) / len(scores)
    print_line(f"held-out nDCG@10 {when}: {mean:.3f} ({each}){how}")
    return mean


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":  # ranks wait for each other where no handler interrupts
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, before the first step
    sys.exit(main())
