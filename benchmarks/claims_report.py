"""Statistics, tables and figures of the study of the paper's claims (claims.py)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import CLAIMS, TEACHER, Claim
from benchmarks.experiment_data import RESULTS
from benchmarks.world import bootstrap_interval
from ref.utils.files import read_json

BATCH = {"world": 64, "real": 64, "llm": 32}  # queries of the preset
Rows = dict[tuple[str, int], dict[str, Any]]  # by arm and seed


# ---- statistics --------------------------------------------------------------------------------------------


def student_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; infinite for fewer than two differences."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return -np.inf, np.inf
    half = t.ppf(0.975, count - 1) * float(np.std(differences, ddof=1)) / count**0.5
    return float(np.mean(differences) - half), float(np.mean(differences) + half)


def verdict(low: float, high: float, sign: int) -> str:
    """The verdict for an interval and the expected sign."""
    if low <= 0 <= high:
        return "inconclusive"
    return "as expected" if (low > 0) == (sign > 0) else "opposite"


def detectable_difference(scores: Sequence[float], seeds: int) -> float:
    """The difference that `seeds` paired runs detect in four of five studies, from a few runs of one arm.

    (t(0.975) + t(0.8)) x standard deviation of a difference / sqrt(seeds), with seeds - 1 degrees of freedom; the two
    arms of a pair are taken as independent.
    """
    from scipy.stats import t

    deviation = float(np.std(scores, ddof=1)) * 2**0.5
    return float(t.ppf(0.975, seeds - 1) + t.ppf(0.8, seeds - 1)) * deviation / seeds**0.5


def compare(rows: Rows, ground: str = "world") -> list[dict[str, Any]]:
    """The result of each claim, on the seeds with which both its arms have run."""
    def score(arm: str, seed: int, task: str) -> float | None:
        row = rows.get((arm, seed), {"task_scores": {}})
        return row["task_scores"].get(task) if task else row.get("score")

    results = []
    for claim in CLAIMS:
        scores = [(score(claim.arm, seed, claim.task), score(claim.baseline, seed, claim.task))
                  for seed in sorted({seed for _, seed in rows})]
        pairs = [(a, b) for a, b in scores if a is not None and b is not None]
        if not pairs or claim.ground not in ("", ground):
            continue
        gain = [a - b for a, b in pairs]
        (low, high), (wide_low, wide_high) = bootstrap_interval(gain), student_interval(gain)
        results.append({
            "claim": claim.text.format(batch=BATCH[ground]), "arm": claim.arm, "baseline": claim.baseline,
            "task": claim.task, "by_query": by_query(rows, claim), "difference": float(np.mean(gain)), "low": low,
            "high": high, "seeds": len(gain),
            "expected": claim.expected, "student_interval": [wide_low, wide_high] if len(gain) > 1 else None,
            "verdict": verdict(min(low, wide_low), max(high, wide_high), claim.sign) if len(gain) > 2
            else "inconclusive",
            "mean": float(np.mean([a for a, _ in pairs]))})
    return results


def key(claim: Claim | dict[str, Any]) -> tuple[str, str, str]:
    """What a claim compares: the same in all studies, unlike its text."""
    return ((claim.arm, claim.baseline, claim.task) if isinstance(claim, Claim)
            else (claim["arm"], claim["baseline"], claim["task"]))


def by_query(rows: Rows, claim: Claim) -> dict[str, list[float]]:
    """By task with scores for each query: the difference and its 95 % interval over queries (paired bootstrap).

    The difference of a query is the mean over the seeds with which both arms have run.
    """
    def scores(arm: str, seed: int) -> dict[str, list[float]]:
        return rows.get((arm, seed), {}).get("query_scores", {})

    pairs = [(scores(claim.arm, seed), scores(claim.baseline, seed)) for seed in sorted({seed for _, seed in rows})]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
    results = {}
    for task in pairs[0][0] if pairs else ():
        gain_Q = np.mean([np.subtract(ours[task], theirs[task]) for ours, theirs in pairs], axis=0)
        results[task] = [float(gain_Q.mean()), *bootstrap_interval(gain_Q.tolist())]
    return results


def against_teacher(rows: Rows) -> list[dict[str, Any]]:
    """By task: the teacher's score, the mean of the arm `default` over its seeds, and Student's interval of that."""
    teacher = rows.get((TEACHER, 0), {"task_scores": {}})["task_scores"]
    students = [row["task_scores"] for (arm, _), row in rows.items() if arm == "default"]
    return [{"task": task, "teacher": score, "student": float(np.mean([student[task] for student in students])),
             "interval": student_interval([student[task] for student in students])}
            for task, score in teacher.items() if students]


# ---- report ------------------------------------------------------------------------------------------------


def as_markdown(results: list[dict[str, Any]]) -> str:
    """The table of the README and of docs/evidence.md."""
    lines = ["| comparison | difference in points (95 % interval) | seeds | expected | verdict |",
             "|---|---|---|---|---|"]
    lines += [f"| {r['claim']} | {_difference(r)} | {r['seeds']} | {r['expected']} | {r['verdict']} |" for r in results]
    return "\n".join(lines)


def query_table(results: list[dict[str, Any]]) -> str:
    """The differences with their intervals over queries; empty if no task has scores for each query."""
    tasks = list(dict.fromkeys(task for r in results for task in r["by_query"]))
    lines = [f"| comparison, 95 % interval over queries | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    lines += [f"| {r['claim']} | " + " | ".join(
        "{:+.2f} ({:+.2f} to {:+.2f})".format(*r["by_query"][task]) for task in tasks) + " |"
        for r in results if r["by_query"] and not r["task"]]
    return "\n".join(lines) if tasks else ""


def teacher_table(compared: list[dict[str, Any]]) -> str:
    """The student's scores beside the teacher's; empty if the teacher was not scored."""
    lines = ["| task | student (95 % interval over seeds) | teacher | difference |", "|---|---|---|---|"]
    lines += [f"| {r['task']} | {r['student']:.2f} ({r['interval'][0]:.2f} to {r['interval'][1]:.2f}) | "
              f"{r['teacher']:.2f} | {r['student'] - r['teacher']:+.2f} |" for r in compared]
    return "\n".join(lines) if compared else ""


def plot_claims(panels: dict[str, list[dict[str, Any]]], path: Path) -> str:
    """Draw the differences with their intervals, a panel for each study and a line for each claim.

    Returns the path, or the reason if it cannot be drawn.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "figure not drawn: matplotlib is not installed (pip install -e .[plots])"
    lines = {key(row): row["claim"] for results in reversed(panels.values()) for row in results}
    lines = {which: lines[which] for which in map(key, CLAIMS) if which in lines}
    figure = Figure(figsize=(5 + 5 * len(panels), 0.3 * len(lines) + 1.2), layout="constrained")
    colors = {"as expected": "#228833", "opposite": "#cc3311", "inconclusive": "#888888"}
    [columns] = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (name, results) in zip(columns, panels.items(), strict=True):
        for row in results:
            middle = row["difference"]
            axes.errorbar(middle, list(lines).index(key(row)), fmt="o", color=colors[row["verdict"]], capsize=3,
                          xerr=[[middle - row["low"]], [row["high"] - middle]])
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(xlabel=f"difference in points, {name}")
    columns[0].set_yticks(range(len(lines)), list(lines.values()))
    columns[0].invert_yaxis()
    figure.supxlabel("green: as expected, red: opposite, gray: inconclusive", fontsize="medium")
    with rc_context({"svg.hashsalt": "claims"}):  # the same file for the same rows
        figure.savefig(path, metadata={"Date": None})
    return f"figure: {path}"


def write_report(name: str, study: dict[str, Any], *, write: bool = True) -> None:
    """Print the tables; with `write` also write rows (.json), tables (.md) and figure (.svg) under `name`."""
    rows = {(row["arm"], row["seed"]): row for row in study["rows"]}
    results, compared = compare(rows, name.split("-")[0]), against_teacher(rows)
    tables = "\n\n".join(filter(None, (as_markdown(results), query_table(results), teacher_table(compared))))
    print("\n" + tables)
    default = [row["score"] for (arm, _), row in rows.items() if arm == "default"]
    if len(default) > 2:
        print("detectable differences, from the runs of the arm `default`: " + ", ".join(
            f"{detectable_difference(default, seeds):.2f} points with {seeds} seeds" for seeds in (3, 5, 10)))
    if write:
        head = {**{key: value for key, value in study.items() if key not in ("rows", "claims")}, "claims": results}
        lines = ",\n".join(json.dumps(row) for row in study["rows"])  # a line each: they may hold scores by query
        text = f"{json.dumps(head, indent=1)[:-2]},\n \"rows\": [\n{lines}\n ]\n}}\n"
        (RESULTS / f"{name}.json").write_text(text)
        (RESULTS / f"{name}.md").write_text(tables + "\n")
        print(plot_claims({name: results}, RESULTS / f"{name}.svg"))


def write_overview() -> str:
    """Write overview.md and overview.svg: each claim in all studies, the pretrained model's first."""
    titles = {"llm": "SmolLM2-135M, real data", "real": "random initialisation, real data", "world": "sample world"}
    panels = {}
    for ground, title in titles.items():
        stored = RESULTS / f"{ground}.json"
        if stored.exists():
            rows = {(row["arm"], row["seed"]): row for row in read_json(stored)["rows"]}
            panels[title] = compare(rows, ground)
    found = {title: {key(row): row for row in results} for title, results in panels.items()}
    lines = [f"| comparison | expected | {' | '.join(panels)} |", "|---" * (len(panels) + 2) + "|"]
    for claim in CLAIMS:
        cells = [_cell(of_study.get(key(claim))) for of_study in found.values()]
        if any(cells):
            lines.append(f"| {claim.text.format(batch='64 (32)')} | {claim.expected} | {' | '.join(cells)} |")
    (RESULTS / "overview.md").write_text("\n".join(lines) + "\n")
    return plot_claims(panels, RESULTS / "overview.svg")


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{_difference(row)}, n = {row['seeds']}: {row['verdict']}"


def _difference(row: dict[str, Any]) -> str:
    """The difference with its interval, which one seed does not have."""
    return f"{row['difference']:+.2f}" + (f" ({row['low']:+.2f} to {row['high']:+.2f})" if row["seeds"] > 1 else "")
