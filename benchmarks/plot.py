"""Draw the results of a device as results/DEVICE/overview.svg; `python -m benchmarks` does it after a run.

Left: how many times as long each peer takes, with the target as a mark and the numbers in columns. Right: time and peak
memory against the number of texts on logarithmic axes, where linear growth is a straight line of slope 1.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FASTER, SLOWER, MISSED, TEXT, MUTED = "#4477aa", "#c98a2b", "#cc3311", "#1a2027", "#56616d"
SIZE_UNITS = {"B2": "texts", "B9": "passages"}
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Ratio(NamedTuple):
    """How many times as long a peer takes."""

    label: str
    value: float
    target: float | None


class Growth(NamedTuple):
    """Time and peak memory by the number of texts."""

    sizes: list[int]
    seconds: list[float]
    megabytes: list[float]


def draw(folder: Path) -> str:
    """Draw the results in `folder`; return the path of the figure, or the reason why there is none."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure: matplotlib is not installed (pip install -e .[plots])"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("B*.json"), key=_number)
               if _number(path) < 11]  # B11 and B12 have eight cases each: a table shows them better
    ratios = [ratio for result in results for ratio in _ratios(result)]
    growths = {r["benchmark"]: growth for r in results if (growth := _growth(r.get("figures", {})))}
    if not ratios:
        return f"no figure: {folder} has no ratios"
    figure = Figure(figsize=(9.5, max(3.2, 0.34 * len(ratios) + 1.4)), layout="constrained")
    if growths:
        parts: Any = figure.subfigures(1, 2, width_ratios=[2.7, 1], wspace=0.03)
        _draw_ratios(parts[0].subplots(), ratios)
        _draw_growth(parts[1], growths)
    else:
        _draw_ratios(figure.subplots(), ratios)
    with rc_context({"svg.hashsalt": "overview"}):  # the same file for the same results
        figure.savefig(folder / "overview.svg", metadata={"Date": None})
    return f"figure: {folder / 'overview.svg'}"


def _draw_ratios(axes: Any, ratios: list[Ratio]) -> None:
    """Draw bars from 1, to the right where the peer is slower; the numbers are in columns beside the axes."""
    from matplotlib.ticker import NullLocator

    _write_beside(axes, -1, ("ratio", MUTED), ("target", MUTED))
    for row, ratio in enumerate(ratios):
        axes.barh(row, ratio.value - 1, left=1, height=0.6, color=FASTER if ratio.value >= 1 else SLOWER)
        value, target = (f"{ratio.value:.2f}" if ratio.value < 100 else f"{ratio.value:.0f}", TEXT), ("", TEXT)
        if ratio.target is not None:
            color = MISSED if ratio.value < ratio.target else TEXT
            axes.plot([ratio.target] * 2, [row - 0.42, row + 0.42], color=color, linewidth=2, solid_capstyle="butt")
            target = (f"{ratio.target:g}", color)
        _write_beside(axes, row, value, target)
    shown = [value for ratio in ratios for value in (ratio.value, ratio.target) if value is not None]
    low, high = 0.85 * min(1, *shown), 1.15 * max(1, *shown)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks := _ticks(low, high), [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(ratios)), [ratio.label for ratio in ratios])
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.axvline(1, color=MUTED, linewidth=0.8)
    axes.set_xlabel("time of the peer / time of ours, log scale\nmark: target, red if missed")
    axes.spines[["top", "right"]].set_visible(False)


def _write_beside(axes: Any, row: int, value: tuple[str, str], target: tuple[str, str]) -> None:
    """Write two right-aligned (text, color) columns to the right of the axes."""
    for offset, (text, color) in ((36, value), (76, target)):
        axes.annotate(text, (1, row), (offset, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      ha="right", va="center", fontsize=9, color=color, annotation_clip=False)


def _draw_growth(figure: Any, growths: dict[str, Growth]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, growth in growths.items():
        upper.loglog(growth.sizes, growth.seconds, "o-", markersize=4, label=f"{name} {SIZE_UNITS.get(name, '')}")
        lower.loglog(growth.sizes, growth.megabytes, "o-", markersize=4)
    upper.set_title("time, s", fontsize=10)
    lower.set_title("peak memory, MB", fontsize=10)
    for axes in (upper, lower):
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 100 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    ends = sorted({size for growth in growths.values() for size in (growth.sizes[0], growth.sizes[-1])})
    lower.set_xticks(ends, [f"{size / 1000:.0f}k" if size >= 10000 else str(size) for size in ends])
    lower.set_xlabel("size, log scale", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(growths), fontsize=8, frameon=False, handlelength=1.2,
                  columnspacing=1)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from `low` to `high`: 1, 2 and 5 times the powers of 10, or only these if that is too many."""
    ticks = [tick for tick in TICKS if low <= tick <= high]
    return ticks if len(ticks) <= 7 else [tick for tick in ticks if f"{tick:g}".strip("0.") == "1"]


def _number(path: Path) -> int:
    return int(path.stem[1:].partition("-")[0])


def _ratios(result: dict[str, Any]) -> list[Ratio]:
    """One ratio per peer that was measured."""
    rows = {name: row for name, row in result.get("timings", {}).items() if "median_s" in row}
    targets = {name: float(target["wanted"].split()[1]) for name, target in result["targets"].items()}

    def own_s(peer: str) -> float:  # "PEER, mining" is compared with "ours, mining"
        return float((rows.get(f"ours,{peer.partition(',')[2]}") or rows["ours"])["median_s"])

    def target(peer: str) -> float | None:
        return next((value for name, value in targets.items() if name.startswith((f"{peer} / ours", "gain"))
                     or name.endswith(f"ours / {peer}")), None)
    return [Ratio(f"{result['benchmark']}  {peer}", row["median_s"] / own_s(peer), target(peer))
            for peer, row in rows.items() if not peer.startswith("ours")]


def _growth(figures: dict[str, float]) -> Growth | None:
    sizes = sorted(int(match[1]) for name in figures if (match := re.fullmatch(r"s at (\d+)", name)))
    if not sizes:
        return None
    return Growth(sizes, [figures[f"s at {n}"] for n in sizes], [figures[f"peak MB at {n}"] for n in sizes])
