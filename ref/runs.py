"""A run: what it starts from, and its folder.

    runs/NAME/run.json        options, versions, commit, hardware, hashes of the data; complete: true at the end
              metrics.jsonl   one line a step
              loss.png        the curve, where matplotlib is installed
              state/STEP/     weights, optimiser and position of the last saves: what --resume reads
              model/          --train all: a checkpoint that sentence-transformers and transformers load
              adapter/        --train lora: PEFT's files;  base/ beside it if the base had fresh weights
              merged/         --train lora --merge: base and adapter as one checkpoint

All but metrics.jsonl, which grows line by line, appear whole or not at all: written under another name, then renamed.
Called by run_train.py, export.py, run_eval.py and run_label.py.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ref import lora, tokenizer
from ref.checkpoint import locate, read_tensors
from ref.config import DTYPES, MISTRAL, TINY, Architecture, Options, read_json
from ref.data import SoftLabels
from ref.embedder import inside_run, load_with_adapter
from ref.model import Mistral, fresh
from ref.overlap import to_host
from ref.prompts import TEMPLATES, Template
from ref.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Start:
    """What training starts from: an architecture for fresh weights, or the name of a checkpoint."""

    name: str
    reason: str
    architecture: Architecture | None = None  # None: a checkpoint


def starting_point(name: str | None) -> Start:
    """Read --model: tiny, a config.json, a folder or hub id; by default what the machine can carry."""
    if name is None and torch.cuda.is_available():
        return Start(MISTRAL, "there is a GPU; choose another with --model")
    if name is None:
        return Start("tiny", "there is no GPU; choose another with --model FOLDER, HUB-ID or CONFIG.json", TINY)
    if name == "tiny":
        return Start(name, "as --model says: built in, fresh weights", TINY)
    if name.endswith(".json"):
        return Start(name, "as --model says: fresh weights", Architecture.from_file(Path(name)))
    return Start(name, "as --model says: a checkpoint")


MAY_CHANGE = ("chunk_tokens", "checkpointing", "save_every", "keep", "peer_timeout")  # rounding at most


def resumed(given: Namespace) -> Namespace:
    """The options of the run in --output, which --resume goes on with; but for MAY_CHANGE others may not be given."""
    folder = Path(getattr(given, "output", None) or "")
    saved = read_json(folder / "run.json")
    if not isinstance(saved.get("options"), dict) or "model" not in saved or "data" not in saved:
        raise ValueError(f"{folder / 'run.json'}: options, model or data are missing. Expected is a run of "
                         "run_train.py. Start a new one.")
    other = {k: v for k, v in vars(given).items()
             if k not in ("resume", "output", *MAY_CHANGE) and v != saved["options"].get(k)}
    if other:
        raise ValueError(f"--resume goes on with the options of {folder}; given is another {', '.join(other)}. "
                         "Leave that out.")
    options = {**saved["options"], **{k: v for k, v in vars(given).items() if k in MAY_CHANGE}}
    return Namespace(**{**options, "model": saved["model"], "resume": True, "output": str(folder)})


def build(
    start: Start, options: Options, data: SoftLabels, *, device: torch.device,
) -> tuple[Mistral, TextTokenizer]:
    """The model, ready to train on `device`, and its tokenizer.

    Weights that learn are fp32; a frozen base is in the dtype of the forward pass.
    """
    template = checked_template(options.template)
    frozen = DTYPES[options.dtype or "float32"] if options.train == "lora" else torch.float32
    if start.architecture is None:
        model, tokens = load_with_adapter(inside_run(locate(start.name)), device=device, dtype=frozen)
    else:
        arch = start.architecture
        tokens = tokenizer.train(
            _all_texts(data), vocab_size=arch.vocab_size, lowercase=options.lowercase, markers=template.markers)
        model = fresh(dataclasses.replace(arch, vocab_size=tokens.vocab_size, dtype="float32"), seed=options.seed)
        model = model.to(device, frozen)
    model.checkpointing = options.checkpointing
    if options.train == "lora":
        torch.manual_seed(options.seed)
        lora.attach(model, rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout,
                    targets=options.lora_targets)
    return model, tokens


def checked_template(name: str) -> Template:
    """The template of that name; ValueError if there is none."""
    if name not in TEMPLATES:
        raise ValueError(f"--template {name!r:.60} is unknown. Expected is one of {', '.join(TEMPLATES)}. Choose one.")
    return TEMPLATES[name]


def _all_texts(data: SoftLabels) -> Iterable[str]:
    for number in range(len(data)):
        row = data[number]
        # the template's own words too, so that the vocabulary has them
        yield from (row.task.instruction, row.query, *row.positives, *row.negatives, "Instruct: Query: Response:")


# ------------------------------------------------------------------------------------------------- the folder

def open_folder(options: Options, start: Start, *, make: bool = True) -> Path:
    """The run's folder; with `make` it is made if it is new, and tried.

    Raises ValueError if it holds another run or cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(options.output or f"runs/{Path(start.name).name.removesuffix('.json')}-{stamp}")
    if not make:
        return folder
    if (folder / "run.json").exists() != options.resume:
        raise ValueError(f"{folder} holds {'no run' if options.resume else 'a run already'}. Expected is "
                         f"{'the folder of a stopped run' if options.resume else 'a new folder'}. Give another --output"
                         f"{'' if options.resume else ', or go on with it: --resume'}.")
    for draft in list(folder.rglob(".*.draft")) if options.resume else []:  # of a killed process
        remove(draft)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}). Give another --output.") from None
    return folder


def drop_if_empty(folder: Path) -> None:
    """Take back `open_folder` of a run that did not begin."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file or folder under another name, then put it in the place of `path`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # another process may write the same
    remove(draft)
    try:
        write(draft)
    except BaseException:  # a full disk, say: nothing half-written stays
        remove(draft)
        raise
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.is_dir():
        path.rename(old)
    os.replace(draft, path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_files(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over names (below `folder`) and content of files, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, whole."""
    write_whole(path, lambda draft: draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n"))


def facts(options: Options, start: Start, model: Mistral, data: SoftLabels) -> dict[str, Any]:
    """What run.json says about a run before its first step."""
    return {
        "complete": False, "started": now(), "model": start.name, "options": dataclasses.asdict(options),
        "architecture": dataclasses.asdict(model.arch),
        "data": [{"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
                 for path, digest in zip(data.paths, data.sha256, strict=True)],
        "lines": len(data), "lines_with_labels": data.with_labels, **machine(),
    }


def machine() -> dict[str, Any]:
    """Commit, hardware and versions: what a figure depends on besides its options."""
    packages = ("torch", "numpy", "safetensors", "tokenizers", "triton", "mteb")
    versions = {"python": platform.python_version(), **{name: package_version(name) for name in packages}}
    return {"commit": _commit(), "hardware": _hardware(), "versions": versions}


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_version(package: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this code is at; None outside a checkout."""
    try:
        call = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                              cwd=Path(__file__).parent, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return call.stdout.strip()


def _hardware() -> dict[str, Any]:
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": cards}


# ------------------------------------------------------------------------------------------------- the state

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(
    folder: Path, model: nn.Module, optimiser: torch.optim.AdamW, position: dict[str, Any], *, keep: int,
) -> None:
    """Write weights that learn, AdamW's moments and the position as folder/state/STEP; the last `keep` stay.

    Random states need no saving: each draw depends on the seed, the step and the line alone.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        tensors[name] = parameter.detach()
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{moment}/{name}"] = value

    def write(draft: Path) -> None:
        draft.mkdir()
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, draft / "state.safetensors")
        (draft / "position.json").write_text(json.dumps(position))
    states = folder / "state"
    states.mkdir(exist_ok=True)
    write_whole(states / f"{position['step']:08}", write)
    for old in _states(folder)[:-keep]:
        remove(old)


def _states(folder: Path) -> list[Path]:
    """Whole states of a run, the newest last; one whose renaming was cut short counts by its old name."""
    found = [path for path in (folder / "state").glob("*") if re.fullmatch(r"\d{8}|\.\d{8}\.old", path.name)]
    return sorted(found, key=lambda path: (re.sub(r"\D", "", path.name), not path.name.startswith(".")))


def load_state(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, Any]:
    """Put back what `save_state` wrote; returns the position: step 0, if the run ended before its first save."""
    states = _states(folder)
    if not states:
        return {"step": 0, "elapsed_s": 0.0}
    state = states[-1]
    try:
        position = read_json(state / "position.json")
        found = dict(read_tensors(state / "state.safetensors", device=torch.device("cpu")))
    except ValueError as error:
        raise ValueError(f"{error} Or remove {state}: --resume then goes on from "
                         f"{states[-2] if len(states) > 1 else 'the beginning'}.") from None
    for name, parameter in trainable(model).items():
        if name not in found or found[name].shape != parameter.shape:
            raise ValueError(f"{state}: {name} is missing or misshapen. Expected is the state of this model. "
                             "Start a new run.")
        with torch.no_grad():
            parameter.copy_(found[name])
        optimiser.state[parameter] = {
            key.partition("/")[0]: value.to(parameter.device)  # AdamW's step, too: fused, it lies with the weights
            for key, value in found.items() if key.partition("/")[2] == name}
    return position


def plot_loss(folder: Path) -> str | None:
    """Draw metrics.jsonl as loss.png; returns why not if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png is left out: matplotlib is not installed (pip install -e .[plots])"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        return "loss.png is left out: no step was done"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(1, len(rows) // 50)
    for key, label in (("hard", "contrastive"), ("soft", "soft label"), ("label_entropy", "entropy of the labels")):
        value = torch.tensor([row[key] for row in rows]).unfold(0, window, 1).mean(-1)
        axes.plot(range(window, len(rows) + 1), value.tolist(), label=label)
    axes.set(xlabel="step", ylabel=f"nats, mean of {window} steps", title="Training loss by term")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(folder / "loss.png", lambda draft: figure.savefig(draft, dpi=120, format="png"))
    return None


class Clock:
    """Seconds of training, across a resume."""

    def __init__(self, before_s: float = 0.0) -> None:
        self.start_s = time.perf_counter() - before_s

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.start_s


# ------------------------------------------------------------------------------------------------- while it runs

def keep_metrics(folder: Path, steps: int) -> None:
    """Drop lines of steps that a resumed run will do again."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_whole(path, lambda draft: draft.write_text("".join(lines[:steps])))


class _Moment:
    """A point in the work of the device: on CUDA an event, elsewhere the host's clock."""

    def __init__(self) -> None:
        self.host_s = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event is not None:
            self.event.record()

    def seconds_since(self, before: "_Moment") -> float:
        """Duration from `before`; waits until this moment has come."""
        if self.event is None or before.event is None:
            return self.host_s - before.host_s
        self.event.synchronize()
        return before.event.elapsed_time(self.event) / 1000


class StepLog:
    """metrics.jsonl and the line of progress, one step late: a step's figures are read when the next is on its way."""

    def __init__(self, folder: Path | None, progress: "Progress", clock: Clock) -> None:
        """`folder` None: a process that reads the figures and writes nothing."""
        self.file = None if folder is None else (folder / "metrics.jsonl").open("a")
        self.progress, self.clock = progress, clock
        self.stopped = False  # whether a process was asked to end
        self.before = _Moment()
        self.waiting: tuple[dict[str, Any], Callable[[], Any], Callable[[float, float], Exception], _Moment] | None
        self.waiting = None

    def add(self, row: dict[str, Any], figures: dict[str, Tensor],
            not_finite: Callable[[float, float], Exception]) -> None:
        """Note a step whose `figures` are still being computed; write the one before it."""
        arrived = to_host(torch.stack([value.detach().float() for value in figures.values()]))
        moment = _Moment()
        self.flush()
        self.waiting = {**row, **dict.fromkeys(figures)}, arrived, not_finite, moment

    def flush(self) -> None:
        """Write the step that waits; raises what `not_finite` makes of its loss and gradient norm, if one is not."""
        if self.waiting is None:
            return
        (row, arrived, not_finite, moment), self.waiting = self.waiting, None
        numbers = iter(arrived().tolist())
        row = {name: next(numbers) if value is None else value for name, value in row.items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            raise not_finite(row["loss"], row["gradient_norm"])
        self.stopped |= row.pop("stop") > 0
        row |= {"masked": int(row["masked"]), "tokens": int(row["tokens"]), "elapsed_s": self.clock.elapsed_s,
                "tokens_per_s": row["tokens"] / moment.seconds_since(self.before)}
        self.before = moment
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.progress.show(row)

    def close(self) -> None:
        """Write what waits and end the line of progress."""
        self.flush()
        if self.file is not None:
            self.progress.close()
            self.file.close()


class StopAfterStep:
    """Turns the first Ctrl-C, or SIGTERM (preemption), into a wish, the second into an end."""

    asked = False

    def __enter__(self) -> "StopAfterStep":
        self.before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        for kind in self.before:
            signal.signal(kind, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        print("\nending after this step; Ctrl-C again ends at once", flush=True)
        self.asked = True
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class Progress:
    """One line that renews itself on a terminal, and comes every ten seconds elsewhere."""

    def __init__(self, options: Options, total: int) -> None:
        self.options, self.total, self.shown_s, self.clock = options, total, -math.inf, Clock()
        self.examples: list[tuple[float, float]] = []  # in a prompt; drawn for it

    def show(self, row: dict[str, Any]) -> None:
        """Print step, loss, speed and time left."""
        self.examples.append((row["examples"], row["examples_drawn"]))
        terminal = sys.stdout.isatty()
        if self.clock.elapsed_s - self.shown_s < (0.2 if terminal else 10):
            return
        self.shown_s = self.clock.elapsed_s
        step, elapsed_s = row["step"] + 1, row["elapsed_s"]
        left_s = elapsed_s / step * (self.total - step)
        if self.options.minutes:
            left_s = max(0.0, 60 * self.options.minutes - elapsed_s)
        of = "" if self.options.minutes else f"/{self.total}"
        line = (f"step {step}{of}  loss {row['loss']:.3f}: contrastive {row['hard']:.3f}, soft {row['soft']:.3f}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  left {int(left_s) // 60}:{int(left_s) % 60:02}")
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", flush=True)

    def close(self) -> None:
        """End the line, and say how many examples the prompts had, where some were wanted."""
        if sys.stdout.isatty():
            print()
        if self.options.max_examples and self.examples:
            mean, drawn = (sum(some) / len(self.examples) for some in zip(*self.examples, strict=True))
            why = "" if drawn else ": every line of a task is in its batch; lower --queries to leave some for examples"
            if mean < drawn:
                why = (f"; drawn were {drawn:.2f}, but not all fit: raise --max-prompt-tokens or lower "
                       "--max-example-tokens")
            print(f"examples in a prompt: {mean:.2f} on average, of 0 to {self.options.max_examples}{why}")
