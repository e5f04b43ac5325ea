"""The folder of a run, and what --resume reads from it.

    runs/NAME/run.json        options, versions, commit, hardware, hashes of the data; complete: true at the end
              metrics.jsonl   one line per step
              held_out.json   --eval-steps: held-out score by the number of steps
              loss.png        the loss curve, if matplotlib is installed
              state/STEP/     parameters, optimiser and position of the last saves
              best/           --keep-best: the parameters with the best held-out score
              model/          --train all: a checkpoint that sentence-transformers and transformers load
              adapter/        --train lora: PEFT's files; base/ beside it if the base was randomly initialised
              merged/         --train lora --merge: base and adapter as one checkpoint

All but metrics.jsonl, which grows line by line, are written under a temporary name and then renamed: after a kill
during a save the previous state is complete, and --resume continues from it.
"""

import dataclasses
import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ref.config import LENGTHS, TrainConfig
from ref.model.card import base_of
from ref.model.checkpoint import ADAPTER_CONFIG, read_tensors
from ref.model.transformer import Mistral
from ref.training.data import SoftLabelDataset
from ref.training.export import usage
from ref.training.model_source import ModelSource
from ref.utils.environment import environment_info, utc_now
from ref.utils.files import atomic_write, read_json, remove_drafts, remove_path
from ref.utils.outputs import claim_output

# Options that a resumed run may change: they change rounding at most (another device, or compiled blocks, also what
# dropout draws), or what is written beside the result.
RESUMABLE_OPTIONS = (
    "mini_batch_tokens", "gradient_checkpointing", "compile", "save_steps", "save_total_limit", "distributed_timeout",
    "device", "backend", "merge")


class Position(TypedDict):
    """A position in a run, as in position.json of a state."""

    step: int
    elapsed_s: float  # of training


BEGINNING = Position(step=0, elapsed_s=0.0)


def resume_options(given: Namespace) -> Namespace:
    """The options of the run in --output, updated by RESUMABLE_OPTIONS, and by LENGTHS if it is complete.

    Raises ValueError if others differ.
    """
    if not getattr(given, "output", None):
        raise ValueError("--resume needs --output, the folder of the run")
    folder = Path(given.output)
    saved = read_json(folder / "run.json")
    if not isinstance(saved.get("options"), dict) or "model" not in saved or "data" not in saved:
        raise ValueError(f"{folder / 'run.json'}: must have 'options', 'model' and 'data', as run_train.py writes it")
    unknown = saved["options"].keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise ValueError(f"{folder / 'run.json'}: the option {sorted(unknown)[0]!r:.60} is unknown; resume the run "
                         "with the version that began it")
    may_change = (*RESUMABLE_OPTIONS, *(LENGTHS if saved.get("complete") else ()))
    different = {k: v for k, v in vars(given).items()
                 if k not in ("resume", "output", *may_change) and v != saved["options"].get(k)
                 and (k, v) != ("dtype", "auto")}  # run.json has the precision that it stood for
    if different:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in different)
        raise ValueError(f"--resume: {flags} must be as in {folder / 'run.json'}; only "
                         f"{', '.join('--' + name.replace('_', '-') for name in may_change)} may change")
    options = {**saved["options"], **{k: v for k, v in vars(given).items() if k in RESUMABLE_OPTIONS}}
    if options.get("train") == "all" and options.get("merge"):
        raise ValueError("--merge is for --train lora (this run has --train all)")
    length = {k: v for k, v in vars(given).items() if k in LENGTHS and v is not None}
    if saved.get("complete") and length:
        options |= {**{name: getattr(TrainConfig(), name) for name in LENGTHS}, **length}
    return Namespace(**{**options, "model": saved["model"], "resume": True, "output": str(folder)})


@contextmanager
def open_run_dir(config: TrainConfig, source: ModelSource, *, create: bool = True) -> Iterator[Path]:
    """The run's folder; with `create` it is created and held for this process.

    Raises ValueError if it holds another run (without --resume), none (with it), anything else, or cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = Path(os.path.abspath(source.name)).name.removesuffix(".json")  # also of `.`
    folder = Path(config.output or f"runs/{name}-{stamp}")
    if not create:
        yield folder
        return
    has_run = (folder / "run.json").exists()
    if has_run and not config.resume and config.output:
        raise ValueError(f"--output {folder}: already holds a run; give another folder, or continue it with --resume")
    if config.resume and not has_run:
        raise ValueError(f"--resume: {folder} holds no run")
    inputs = [Path(path) for path in config.data]
    if os.path.isdir(source.name) and not config.resume:
        inputs.append(source.folder)
    with claim_output(folder, inputs=inputs, is_ours=lambda: has_run, numbered=not config.output) as folder:
        if config.resume:
            remove_drafts(folder)
        yield folder


def run_metadata(config: TrainConfig, source: ModelSource, model: Mistral, data: SoftLabelDataset) -> dict[str, Any]:
    """The content of run.json before the first step."""
    return {
        "complete": False, "started": utc_now(), "model": source.name, "options": dataclasses.asdict(config),
        "model_config": dataclasses.asdict(model.config),
        "base": None if source.config is not None else base_of(source.name, source.folder),
        "base_is_adapter": source.config is None and (source.folder / ADAPTER_CONFIG).exists(),
        "data": [{"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
                 for path, digest in zip(data.paths, data.sha256, strict=True)],
        "earlier_data": source.earlier_data,
        "model_files": source.fingerprint(), "root": source.run.get("root", source.name),
        "tasks": sorted({task.name for task in data.tasks} | set(source.run.get("tasks", ()))),
        "usage": usage(data, config.template), "num_lines": len(data),
        "num_lines_with_labels": data.num_with_labels, **environment_info(),
    }


def check_resumed(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """run.json of the run to resume. Raises ValueError if data, model or scored sets are not those of its start."""
    saved = read_json(folder / "run.json")
    scored = ("held_out",) if metadata["options"]["eval_steps"] else ()
    for field in ("data", "model_config", *(field for field in ("model_files", *scored) if field in saved)):
        now = metadata[field]
        if field == "model_config" and isinstance(saved.get(field), dict):  # an earlier version knew fewer fields
            now = {key: value for key, value in now.items() if key in saved[field]}
        if field == "model_files" and now and isinstance(saved[field], str):
            now = ModelSource(metadata["model"], "").fingerprint(like=saved[field])
        if saved.get(field) != now:
            raise ValueError(f"--resume: {field!r} of {folder / 'run.json'} must be as at the start of the run (got "
                             f"other files); restore them, or start a new run")
    return saved


def schedule_start(saved: dict[str, Any], config: TrainConfig, total_steps: int) -> Position | None:
    """Where the learning rate's present schedule begins; None if there is nothing left to do.

    A complete run that is given a larger length is extended: a schedule of its own, warm-up included, for what is
    added. Raises ValueError if run.json does not say where the run ended.
    """
    if not saved.get("complete"):
        start: Position = saved.get("schedule_start", BEGINNING)
        return start
    if "end" not in saved:
        raise ValueError("--resume: run.json of this complete run does not say where it ended; start a new run from "
                         "its result with --model")
    end: Position = saved["end"]
    return end if share_done(config, total_steps, end, BEGINNING) < 1 else None


def share_done(config: TrainConfig, total_steps: int, position: Position, start: Position) -> float:
    """Share of the way from `start` to the end of the run, 1 and above at its end."""
    here, first, end = (position["elapsed_s"], start["elapsed_s"], 60 * config.minutes) if config.minutes else (
        position["step"], start["step"], total_steps)
    return (here - first) / (end - first) if end > first else 1.0


# ---- saved states ------------------------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(
    folder: Path, model: nn.Module, optimiser: torch.optim.AdamW, position: Position, *, limit: int,
) -> None:
    """Write trainable parameters, AdamW's moments and the position to folder/state/STEP; keep the last `limit` states.

    Random states are not saved: each draw depends only on the seed, the step and the line.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensors[name] = parameter.detach()
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{moment}/{name}"] = value

    def write(draft: Path) -> None:
        draft.mkdir()
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, draft / "state.safetensors")
        (draft / "position.json").write_text(json.dumps(position))
    states = folder / "state"
    states.mkdir(exist_ok=True)
    atomic_write(states / f"{position['step']:08}", write)
    for old in _states(folder)[:-limit]:
        remove_path(old)


def last_position(folder: Path) -> Position:
    """The position of the newest complete state, the beginning if there is none."""
    states = _states(folder)
    if not states:
        return BEGINNING
    return Position(**read_json(states[-1] / "position.json"))  # type: ignore[typeddict-item]


def load_state(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW, start: Position) -> Position:
    """Restore the newest complete state; returns its position, step 0 if there is none.

    Raises ValueError for a malformed state, and for one from before the present schedule's `start`.
    """
    states = _states(folder)
    newest = int(states[-1].name.lstrip(".")[:8]) if states else 0
    if newest < start["step"]:
        raise ValueError(f"--resume: {folder / 'state'} must have a state of step {start['step']:,} or later, from "
                         f"where the run is extended (got {newest:,}); start a new run from a result with --model")
    if not states:
        return BEGINNING
    state = states[-1]
    try:
        position = last_position(folder)
        tensors = dict(read_tensors(state / "state.safetensors", device=torch.device("cpu")))
    except ValueError as error:
        before = states[-2] if len(states) > 1 else "the beginning"
        raise ValueError(f"{error}; remove {state} to resume from {before}") from None
    _copy_parameters(model, tensors, state)
    for name, parameter in trainable_parameters(model).items():
        optimiser.state[parameter] = {
            # also AdamW's step: fused, it is on the device; a copy, because the file is mapped into memory
            key.partition("/")[0]: value.to(parameter.device, copy=True)
            for key, value in tensors.items() if key.partition("/")[2] == name}
    return position


def _copy_parameters(model: nn.Module, tensors: dict[str, Tensor], state: Path) -> None:
    for name, parameter in trainable_parameters(model).items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise ValueError(f"{state}: {name} is missing or has another shape; it is not a state of this model")
        with torch.no_grad():
            parameter.copy_(tensors[name])


def save_if_best(folder: Path, model: nn.Module, step: int, score: float) -> None:
    """Keep the trainable parameters in folder/best if `score`, a held-out nDCG@10, is the highest so far."""
    best = folder / "best"
    if best.exists() and read_json(best / "score.json")["held_out_ndcg"] >= score:
        return

    def write(draft: Path) -> None:
        draft.mkdir()
        save_file({name: parameter.detach().cpu().contiguous()
                   for name, parameter in trainable_parameters(model).items()}, draft / "state.safetensors")
        (draft / "score.json").write_text(json.dumps({"step": step, "held_out_ndcg": score}))
    atomic_write(best, write)


def drop_best_after(folder: Path, step: int) -> None:
    """Delete the best state if it is of steps that a resumed run, whose newer states were removed, computes again."""
    best = folder / "best"
    if best.exists() and read_json(best / "score.json")["step"] > step:
        remove_path(best)


def load_best(folder: Path, model: nn.Module) -> int:
    """Restore the parameters of `save_if_best`; returns the number of steps they were trained."""
    best = folder / "best"
    _copy_parameters(model, dict(read_tensors(best / "state.safetensors", device=torch.device("cpu"))), best)
    return int(read_json(best / "score.json")["step"])


def _states(folder: Path) -> list[Path]:
    """Complete states of a run, newest last; one whose renaming was interrupted is found by its old name."""
    found = [path for path in (folder / "state").glob("*") if re.fullmatch(r"\d{8}|\.\d{8}\.\d+\.old", path.name)]
    return sorted(found, key=lambda path: (path.name.lstrip(".")[:8], not path.name.startswith(".")))
