"""While a run is training: metrics.jsonl, held_out.json, the progress bar, the first Ctrl-C; the curves afterwards."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ref.config import TrainConfig
from ref.utils.files import atomic_write, read_json, write_json
from ref.utils.prefetch import async_to_host
from ref.utils.progress import progress_bar

NotFinite = Callable[[float, float], Exception]  # (loss, gradient norm) -> the error to raise


class Stopwatch:
    """Seconds of training, including those before a resume."""

    clock = staticmethod(time.perf_counter)  # tests replace it

    def __init__(self, before_s: float = 0.0) -> None:
        self.start_s = self.clock() - before_s

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begin_s = self.clock()
        yield
        self.start_s += self.clock() - begin_s


class TimeMark:
    """A point in the work of the device: a CUDA event, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.host_s = Stopwatch.clock()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def seconds_since(self, before: "TimeMark") -> float:
        """Duration since `before`; waits until the device has reached this mark."""
        if self.event is None or before.event is None:
            return self.host_s - before.host_s
        self.event.synchronize()
        return before.event.elapsed_time(self.event) / 1000


class MetricsLogger:
    """Writes metrics.jsonl one step late: a step's metrics are copied from the device while the next step runs."""

    def __init__(
        self, folder: Path | None, progress: "TrainingProgress", stopwatch: Stopwatch, device: torch.device,
    ) -> None:
        """`folder` None: a rank that reads the metrics and writes nothing. `device`: of the model."""
        self.file = None if folder is None else (folder / "metrics.jsonl").open("a")
        self.progress, self.stopwatch = progress, stopwatch
        self.stop_requested = False  # on any rank
        self.device, self.last_mark = device, TimeMark(device)
        self.pending: tuple[dict[str, Any], Callable[[], Any], NotFinite, TimeMark] | None = None

    def add(self, row: dict[str, Any], metrics: dict[str, Tensor], not_finite: NotFinite) -> None:
        """Add a step whose `metrics` are still being computed; write the previous one."""
        copied = async_to_host(torch.stack([value.detach().float() for value in metrics.values()]))
        mark = TimeMark(self.device)
        self.flush()
        self.pending = {**row, **dict.fromkeys(metrics)}, copied, not_finite, mark

    def flush(self) -> None:
        """Write the pending step; raises the error of `not_finite` if its loss or gradient norm is not finite."""
        if self.pending is None:
            return
        (row, copied, not_finite, mark), self.pending = self.pending, None
        values = iter(copied().tolist())
        row = {name: next(values) if value is None else value for name, value in row.items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise not_finite(row["loss"], row["grad_norm"])
        self.stop_requested |= row.pop("stop") > 0
        row |= {"num_masked": int(row["num_masked"]), "tokens": int(row["tokens"]),
                "elapsed_s": self.stopwatch.elapsed_s,
                "tokens_per_s": row["tokens"] / mark.seconds_since(self.last_mark)}
        self.last_mark = mark
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.progress.update(row)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not time of training; the pending step is written first."""
        self.flush()
        with self.stopwatch.paused():
            yield
        self.last_mark = TimeMark(self.device)

    def close(self) -> None:
        """Write the pending step and close file and progress bar."""
        self.flush()
        if self.file is not None:
            self.progress.close()
            self.file.close()


def truncate_metrics(folder: Path, steps: int) -> None:
    """Drop the lines of steps, and the held-out scores after steps, that a resumed run will compute again."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    atomic_write(path, lambda draft: draft.write_text("".join(lines[:steps])))
    scores = held_out_scores(folder)
    if any(step > steps for step in scores):
        write_held_out_scores(folder, {step: score for step, score in scores.items() if step <= steps})


def held_out_scores(folder: Path) -> dict[int, float]:
    """held_out.json: steps so far -> mean nDCG@10 of the held-out sets; empty without --eval-steps."""
    path = folder / "held_out.json"
    return {int(step): float(score) for step, score in (read_json(path) if path.exists() else {}).items()}


def write_held_out_scores(folder: Path, scores: Mapping[int, float]) -> None:
    """Write what `held_out_scores` reads."""
    write_json(folder / "held_out.json", {str(step): score for step, score in scores.items()})


class TrainingProgress:
    """The progress bar of a run, and how many in-context examples its prompts had."""

    def __init__(self, config: TrainConfig, total_steps: int, first_step: int, *, enabled: bool) -> None:
        self.config = config
        self.examples: list[tuple[float, float]] = []  # per prompt: fitted, drawn
        self.bar = progress_bar(desc="training", total=None if config.minutes else total_steps, initial=first_step,
                                unit="step", enabled=enabled)

    def update(self, row: dict[str, Any]) -> None:
        """Show loss, terms and speed of a step."""
        self.examples.append((row["examples_per_prompt"], row["examples_drawn"]))
        left = ""
        if self.config.minutes:
            left_s = max(0, int(60 * self.config.minutes - row["elapsed_s"]))
            left = f", {left_s // 60}:{left_s % 60:02} left"
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f} = contrastive {row['contrastive_loss']:.3f}, soft-label "
            f"{row['soft_label_loss']:.3f}; {row['tokens_per_s']:,.0f} tokens/s{left}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Close the bar and report the number of in-context examples per prompt, if some were wanted."""
        self.bar.close()
        if self.config.max_examples and self.examples:
            fitted, drawn = (sum(counts) / len(self.examples) for counts in zip(*self.examples, strict=True))
            hint = "" if drawn else ("; there are none where lines have no instruction, or where all lines of a task "
                                     "are in one batch: lower --batch-size there")
            if fitted < drawn:
                hint = f"; {drawn:.2f} were drawn: raise --max-prompt-tokens or lower --max-example-tokens"
            print(f"in-context examples per prompt: {fitted:.2f} on average, drawn from 0 to "
                  f"{self.config.max_examples}{hint}")


class GracefulStop:
    """The first Ctrl-C, SIGTERM or SIGUSR1 stops after the current step and writes the result, a second Ctrl-C ends at
    once.

    A second signal of the others does nothing: a scheduler may send it to the launcher and to each process.
    """

    requested = False

    def __enter__(self) -> "GracefulStop":
        self.handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        for kind in self.handlers:
            signal.signal(kind, self._request)
        return self

    def _request(self, *_: object) -> None:
        print("\nstopping after this step; Ctrl-C again stops at once", flush=True)
        self.requested = True
        signal.signal(signal.SIGINT, self.handlers[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.handlers.items():
            signal.signal(kind, handler)


def plot_loss(folder: Path) -> str | None:
    """Draw loss.png: the terms of the loss, and the held-out scores if there are some from during training.

    Returns the reason if it cannot be drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png not drawn: matplotlib is not installed (pip install -e .[plots])"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        return "loss.png not drawn: no step was completed"
    scored = held_out_scores(folder)
    figure = Figure(figsize=(7, 6 if scored else 4), layout="constrained")
    axes, *below = figure.subplots(2 if scored else 1, sharex=True, squeeze=False)[:, 0]
    window = max(1, len(rows) // 50)
    for key, label in (("contrastive_loss", "contrastive"), ("soft_label_loss", "soft label"),
                       ("label_entropy", "entropy of the soft labels")):
        value = torch.tensor([row[key] for row in rows]).unfold(0, window, 1).mean(-1)
        axes.plot(range(window, len(rows) + 1), value.tolist(), label=label)
    axes.set(ylabel=f"nats, mean of {window} steps", title="Training loss by term")
    axes.legend()
    for held_out in below:
        held_out.plot(list(scored), list(scored.values()), marker="o")
        held_out.set(ylabel="nDCG@10", title="Held-out sets")
    for each in (axes, *below):
        each.grid(alpha=0.3)
    (axes, *below)[-1].set_xlabel("step")
    atomic_write(folder / "loss.png", lambda draft: figure.savefig(draft, dpi=120, format="png"))
    return None
