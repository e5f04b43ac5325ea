"""The results of a device as one picture: `python -m benchmarks` draws results/DEVICE/overview.svg.

Left: how many times as long each peer takes, with the target as a mark. Right: time and memory as the number of texts
grows, on logarithmic axes: a straight line of slope 1 is linear.
"""

import json
import re
from pathlib import Path
from typing import Any


def draw(folder: Path) -> str:
    """Draw the results in `folder` as its overview.svg; returns what was written, or why nothing was."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError:
        return "no picture: matplotlib is not installed (pip install -e .[plots])"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("B*.json"), key=_number)]
    bars = [bar for result in results if "contestants" in result for bar in _bars(result)]
    curves = {r["benchmark"]: points for r in results if (points := _growth(r.get("figures", {})))}
    if not bars:
        return f"no picture: {folder} holds no ratio"
    figure = Figure(figsize=(11, 0.36 * len(bars) + 1.4), layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(curves), width_ratios=[5, 3][: 1 + bool(curves)], squeeze=False)[0]
    names = [name for name, _, _ in bars]
    left.barh(names, [ratio for _, ratio, _ in bars], color="#4477aa")
    for row, (_, ratio, wanted) in enumerate(bars):
        left.annotate(f"{ratio:.2f}", (ratio, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        if wanted:
            left.plot([wanted, wanted], [row - 0.4, row + 0.4], color="#cc3311", linewidth=2)
    left.axvline(1, color="gray", linewidth=0.8)
    left.invert_yaxis()
    highest = max(ratio for _, ratio, _ in bars)
    left.set(xlabel="time of the peer / time of ours   (red: target)", xlim=(0, 1.12 * highest))
    if highest > 50:
        left.set(xscale="log", xlim=(0.5, 3 * highest))
    for axes in right:
        for name, (sizes, seconds, megabytes) in curves.items():
            axes.loglog(sizes, seconds, "o-", label=f"{name}: seconds")
            axes.loglog(sizes, megabytes, "s--", label=f"{name}: peak MB")
        axes.set(xlabel="texts (B2), passages (B9)", title="growth")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "overview.svg", metadata={"Date": None})
    return f"picture: {folder / 'overview.svg'}"


def _number(path: Path) -> int:
    return int(path.stem[1:])


def _bars(result: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(label, peer / ours, target) for each peer that ran."""
    rows = {name: row for name, row in result["contestants"].items() if "median_s" in row}
    if "ours" not in rows:
        return []
    wanted = {name: float(t["wanted"].split()[1]) for name, t in result["targets"].items()}

    def own(name: str) -> float:  # "X, mining" stands against "ours, mining"
        return float(rows.get(f"ours,{name.partition(',')[2]}", rows["ours"])["median_s"])
    return [(f"{result['benchmark']}  {name}", row["median_s"] / own(name),
             next((value for what, value in wanted.items() if what.startswith((f"{name} / ours", "gain"))
                   or what.endswith(f"ours / {name}")), None))
            for name, row in rows.items() if not name.startswith("ours")]


def _growth(figures: dict[str, float]) -> tuple[list[int], list[float], list[float]] | None:
    sizes = sorted(int(match[1]) for name in figures if (match := re.fullmatch(r"s at (\d+)", name)))
    if not sizes:
        return None
    return sizes, [figures[f"s at {n}"] for n in sizes], [figures[f"peak MB at {n}"] for n in sizes]
