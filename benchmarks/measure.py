"""Side-by-side measurement: time, peak memory, and checks of the results.

All figures are ratios within one run: `measure` calls ours and its peers in turn, round after round, so that a
disturbance of the machine affects all of them. Results are compared before they are timed (after it where a call takes
long): a wrong result raises an error, and no speed is reported.
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

from ref.utils.environment import environment_info, package_version, utc_now

RESULTS = Path(__file__).parent / "results"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
PEER_PACKAGES = ("transformers", "peft", "sentence-transformers", "liger-kernel")

Target = tuple[float, str, float]  # measured, "<=" or ">=", wanted


@dataclass
class Timing:
    """Time and memory of one call, ours or a peer's; or the reason why it was not measured."""

    seconds: list[float] = field(default_factory=list)  # one per round
    peak_bytes: int = 0  # allocated beyond what was allocated before the call; 0: not measured
    missing: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Result:
    """One benchmark."""

    name: str
    shape: dict[str, Any]
    timings: dict[str, Timing]  # by name: "ours" and the peers
    checks: dict[str, float]  # relative errors that were checked
    targets: dict[str, Target]
    figures: dict[str, float] = field(default_factory=dict)  # other measured values

    def to_json(self) -> dict[str, Any]:
        """The result with date, commit, hardware and versions."""
        timings = {name: {"missing": t.missing} if t.missing else {
            "median_s": t.median_s, "min_s": min(t.seconds), "max_s": max(t.seconds), "rounds": len(t.seconds),
            "peak_bytes": t.peak_bytes or None} for name, t in self.timings.items()}
        environment = environment_info()
        environment["versions"] |= {name: package_version(name) for name in PEER_PACKAGES}
        return {"benchmark": self.name, "date": utc_now(), **environment, "shape": self.shape, "checks": self.checks,
                "timings": timings, "figures": self.figures, "targets": {
                    what: {"measured": value, "wanted": f"{sign} {wanted:g}", "met": is_met(value, sign, wanted)}
                    for what, (value, sign, wanted) in self.targets.items()}}


def is_met(value: float, sign: str, wanted: float) -> bool:
    """Whether a target is met."""
    return value <= wanted if sign == "<=" else value >= wanted


def speed_targets(timings: Mapping[str, Timing], wanted: Mapping[str, float]) -> dict[str, Target]:
    """Targets "PEER / ours >= wanted" on the median times of the peers that were measured."""
    ours_s = timings["ours"].median_s
    return {f"{name} / ours": (timings[name].median_s / ours_s, ">=", factor)
            for name, factor in wanted.items() if not timings[name].missing}


def measure(
    calls: Mapping[str, Callable[[], object] | str], *, device: torch.device, rounds: int, warmed_up: bool = False,
) -> dict[str, Timing]:
    """Time all calls in turn, `rounds` times. A string in place of a call is the reason why it is missing.

    Before the first round each call runs once to warm up, and on a CPU once more for its peak memory. With `warmed_up`
    both are skipped, for calls that take long. On CUDA the first round measures the memory, which costs no time there.
    """
    timings = {name: Timing(missing=call if isinstance(call, str) else "") for name, call in calls.items()}
    runnable = {name: call for name, call in calls.items() if not isinstance(call, str)}
    for name, call in () if warmed_up else runnable.items():
        call()
        if device.type == "cpu":
            timings[name].peak_bytes = peak_bytes(call, device)
    for n in range(rounds):
        for name, call in runnable.items():
            if n == 0 and device.type == "cuda":
                duration_s, timings[name].peak_bytes = time_and_peak(call, device)
            else:
                duration_s = time_call(call, device)
            timings[name].seconds.append(duration_s)
            if duration_s > 0.1:
                print(f"  round {n + 1} of {rounds}, {name}: {duration_s:.3f} s", file=sys.stderr, flush=True)
    return timings


def time_and_peak(call: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and peak memory: of one call on CUDA, of two calls on a CPU, where measuring memory takes time."""
    if device.type == "cpu":
        return time_call(call, device), peak_bytes(call, device)
    durations: list[float] = []
    peak = peak_bytes(lambda: durations.append(time_call(call, device)), device)
    return durations[0], peak


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by the host's clock; on CUDA by events, which exclude the latency of the first launch."""
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
    """Peak memory of a call beyond what was allocated before it, with its return value; 0 on a CPU without Linux."""
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
    libc.mallopt(MMAP_THRESHOLD, 2**16)  # freed memory is returned at once, so that fragmentation does not count
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _memory_status("VmRSS")
    call()
    peak = _memory_status("VmHWM") - before
    libc.mallopt(MMAP_THRESHOLD, 2**25)  # the values that glibc itself reaches after large blocks were freed
    libc.mallopt(TRIM_THRESHOLD, 2**26)
    return peak


def _memory_status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def growth(call: Callable[[int], object], sizes: Sequence[int], device: torch.device) -> dict[str, float]:
    """Growth of time and peak memory with the size: one call per size, and the exponents b of a fit ~ size^b."""
    call(sizes[0])
    times, peaks = zip(*(time_and_peak(partial(call, size), device) for size in sizes), strict=True)
    exponents = {what: fit_exponent(sizes, values) for what, values in (("time", times), ("peak memory", peaks))}
    return {**{f"exponent of {what}, {sizes[0]} to {sizes[-1]}": value for what, value in exponents.items()},
            **{f"s at {size}": duration_s for size, duration_s in zip(sizes, times, strict=True)},
            **{f"peak MB at {size}": peak / 1e6 for size, peak in zip(sizes, peaks, strict=True)}}


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of values ~ size^b, by least squares on the logarithms."""
    x, y = (torch.tensor(v, dtype=torch.float64).clamp(min=1e-9).log() for v in (sizes, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """|ours - truth| / |truth|, Euclidean, in fp64; inf where there are NaNs."""
    ours, truth = ours.double(), truth.double()
    value = ((ours - truth).norm() / truth.norm()).item()
    return value if value == value else float("inf")


def check_errors(errors: Mapping[str, float], bound: float) -> None:
    """Raise RuntimeError if an error is larger than the bound."""
    for what, value in errors.items():
        if not value <= bound:
            raise RuntimeError(f"{what}: error must be <= {bound:.0e} (got {value:.2e}); nothing is timed")


def write_result(result: Result, folder: Path = RESULTS) -> str:
    """Write folder/NAME.json and return a table for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    content = result.to_json()
    (folder / f"{result.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"{result.name}  {', '.join(f'{key} {value}' for key, value in result.shape.items())}"]
    for name, row in content["timings"].items():
        lines.append(f"  {name:<44} not measured: {row['missing']}" if "missing" in row else
                     f"  {name:<44}{1000 * row['median_s']:>10.3f} ms  ({1000 * row['min_s']:.3f} to "
                     f"{1000 * row['max_s']:.3f}, {row['rounds']} rounds)"
                     + ("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:>10.1f} MB"))
    lines += [f"  {what}: {value:.4g}" for what, value in result.figures.items()]
    lines += [f"  {what}: {t['measured']:.3g}, target {t['wanted']}{'' if t['met'] else '   MISSED'}"
              for what, t in content["targets"].items()]
    return "\n".join(lines)
