"""Measuring side by side: time, memory, and what the figures depend on.

Every figure is a ratio within one run: `measure` calls all contestants in turn, round after round, so that what
disturbs the machine disturbs all of them. A result is checked against the peer's before anything is timed (where a
pass takes long, after it); a benchmark whose check fails raises and reports no speed.
"""

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ref.runs import machine, now, package_version

RESULTS = Path(__file__).parent / "results"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
PEERS = ("transformers", "peft", "sentence-transformers", "liger-kernel")


Target = tuple[float, str, float]  # measured, "<=" or ">=", wanted


@dataclass
class Contestant:
    """Seconds of each round and the most memory beyond what was there before; or why it did not run."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # 0: not looked at, and not reported
    missing: str = ""  # the reason

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Result:
    """One benchmark: its contestants, ratios that were asked for, and targets."""

    name: str
    shape: dict[str, Any]
    contestants: dict[str, Contestant]
    checks: dict[str, float]  # what was compared before timing, and the largest difference
    targets: dict[str, Target]
    figures: dict[str, float] = field(default_factory=dict)  # whatever else was measured

    def as_json(self) -> dict[str, Any]:
        """All of it, with date, commit, hardware and versions."""
        rows = {name: {"missing": c.missing} if c.missing else {
            "median_s": c.median_s, "min_s": min(c.seconds), "max_s": max(c.seconds), "rounds": len(c.seconds),
            "peak_bytes": c.peak_bytes or None} for name, c in self.contestants.items()}
        about = machine()
        about["versions"] |= {name: package_version(name) for name in PEERS}
        return {"benchmark": self.name, "date": now(), **about, "shape": self.shape, "checks": self.checks,
                "contestants": rows, "figures": self.figures,
                "targets": {what: {"measured": value, "wanted": f"{sign} {wanted:g}", "met": met(value, sign, wanted)}
                            for what, (value, sign, wanted) in self.targets.items()}}


def met(value: float, sign: str, wanted: float) -> bool:
    """Whether a target is met."""
    return value <= wanted if sign == "<=" else value >= wanted


def measure(
    calls: Mapping[str, Callable[[], object] | str], *, device: torch.device, rounds: int, warm: bool = False,
) -> dict[str, Contestant]:
    """Time every call in turn, `rounds` times; a text in place of a call says why not.

    A call of each warms up, and on the CPU another measures memory. Calls that take long may come in `warm`: then
    neither is done. On CUDA, where looking at memory costs no time, the first call that is timed does that.
    """
    found = {name: Contestant(missing=call if isinstance(call, str) else "") for name, call in calls.items()}
    runnable = {name: call for name, call in calls.items() if not isinstance(call, str)}
    for name, call in () if warm else runnable.items():
        call()
        if device.type == "cpu":
            found[name].peak_bytes = peak_bytes(call, device)
    for n in range(rounds):
        for name, call in runnable.items():
            if n == 0 and device.type == "cuda":
                duration_s, found[name].peak_bytes = seconds_and_peak(call, device)
            else:
                duration_s = seconds(call, device)
            found[name].seconds.append(duration_s)
            if duration_s > 0.1:
                print(f"  round {n + 1} of {rounds}, {name}: {duration_s:.3f} s", file=sys.stderr, flush=True)
    return found


def seconds_and_peak(call: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Both, of one call on CUDA, of a call each on the CPU, where looking at memory takes time."""
    if device.type == "cpu":
        return seconds(call, device), peak_bytes(call, device)
    durations: list[float] = []
    peak = peak_bytes(lambda: durations.append(seconds(call, device)), device)
    return durations[0], peak


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call: by the host's clock, on CUDA by events, so that the launch of the first is left out."""
    if device.type == "cpu":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory a call holds beyond what was held before it; what it returns counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)  # what is freed goes back at once: no holes are counted
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    call()
    peak = _status("VmHWM") - before
    libc.mallopt(MMAP_THRESHOLD, 2**25)  # what glibc itself comes to once large blocks are freed
    libc.mallopt(TRIM_THRESHOLD, 2**26)
    return peak


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def growth(call: Callable[[int], object], sizes: Sequence[int], device: torch.device) -> dict[str, float]:
    """How time and peak memory grow with size: the exponents, by least squares on logarithms, a pass each a size."""
    call(sizes[0])
    times, peaks = zip(*(seconds_and_peak(partial(call, size), device) for size in sizes), strict=True)
    exponents = {what: slope(sizes, values) for what, values in (("time", times), ("peak memory", peaks))}
    return {**{f"exponent of {what}, {sizes[0]} to {sizes[-1]}": value for what, value in exponents.items()},
            **{f"s at {size}": seconds for size, seconds in zip(sizes, times, strict=True)},
            **{f"peak MB at {size}": peak / 1e6 for size, peak in zip(sizes, peaks, strict=True)}}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of values ~ size^b."""
    x, y = (torch.tensor(v, dtype=torch.float64).clamp(min=1e-9).log() for v in (sizes, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def difference(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """|ours - truth| / |truth|, Euclidean, in fp64; NaN is infinitely far."""
    ours, truth = ours.double(), truth.double()
    value = ((ours - truth).norm() / truth.norm()).item()
    return value if value == value else float("inf")


def agree(checks: Mapping[str, float], bound: float) -> None:
    """Raise where a difference is above the bound: no speed is reported for a wrong result."""
    for what, value in checks.items():
        if not value <= bound:
            raise RuntimeError(f"{what} differs by {value:.2e}. Expected is at most {bound:.0e}. Nothing is timed.")


def report(result: Result, folder: Path = RESULTS) -> str:
    """Write folder/NAME.json and return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    content = result.as_json()
    (folder / f"{result.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"{result.name}  {', '.join(f'{key} {value}' for key, value in result.shape.items())}"]
    for name, row in content["contestants"].items():
        lines.append(f"  {name:<44} not measured: {row['missing']}" if "missing" in row else
                     f"  {name:<44}{1000 * row['median_s']:>10.3f} ms  ({1000 * row['min_s']:.3f} to "
                     f"{1000 * row['max_s']:.3f}, {row['rounds']} rounds)"
                     + ("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:>10.1f} MB"))
    lines += [f"  {what}: {value:.4g}" for what, value in result.figures.items()]
    lines += [f"  {what}: {t['measured']:.3g}, wanted {t['wanted']}{'' if t['met'] else '   MISSED'}"
              for what, t in content["targets"].items()]
    return "\n".join(lines)
