"""The report's claims, each as a paired experiment: `python -m benchmarks claims [--plan] [--quick] [--ground real]`.

One experiment is one line of ARMS: options of run_train.py over the same functions that users call, and for some a
change of the data. Each arm runs on the same seeds as the arm it is held against; what counts is the difference seed by
seed, its mean and its 95 % interval (bootstrap). Then one of three words:

    reproduced        the interval leaves out zero, on the report's side
    not reproduced    it leaves out zero, on the other side
    cannot tell       it holds zero, or there are fewer than three seeds

Grounds: `world`, the sample world (held-out nDCG@10 x 100), and `real`, five real files of soft labels and ten real
sets (mean of mteb's main scores x 100; the folder is LG_ANNA_DATA). Rows are kept in benchmarks/results/claims by
options, seed and a hash of the code, so that a stopped study goes on and a changed line runs alone.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.mining_world import label
from benchmarks.world import interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/claims"
CODE = ("ref", "kernels", "labelling", "data/make_world.py", "run_train.py", "run_label.py", "benchmarks/claims.py")
STEPS = {"world": 400, "real": 3000}
SEEDS = {"world": 10, "real": 3}
SECONDS_A_STEP = {"world": 0.085, "real": 0.3}  # one thread of a server's CPU, for --plan


@dataclass(frozen=True)
class Arm:
    """One experiment. `data`: how the ground's data are changed; `shown`: examples in the prompts when it is scored."""

    options: tuple[str, ...] = ()
    data: str = ""
    shown: int = 0
    grounds: tuple[str, ...] = ("world", "real")


ARMS = {
    "full": Arm(),
    "hard labels": Arm(("--soft-weight", "0")),
    "soft labels alone": Arm(("--hard-weight", "0")),
    "teacher temperature 0.016": Arm(("--teacher-temperature", "0.016")),
    "teacher temperature 0.16": Arm(("--teacher-temperature", "0.16")),
    "no instructions": Arm(data="same instruction"),
    "shuffled instructions": Arm(data="shuffled instructions"),
    "examples 0 to 5": Arm(("--max-examples", "5")),
    "examples 0 to 5, 2 shown": Arm(("--max-examples", "5"), shown=2, grounds=("world",)),
    "examples 0 to 5, 5 shown": Arm(("--max-examples", "5"), shown=5, grounds=("world",)),
    "fixed examples": Arm(("--max-examples", "5"), data="fixed examples"),
    "no false-negative margin": Arm(("--false-negative-margin", "none")),
    "16 queries": Arm(("--queries", "16", "--queries-symmetric", "16")),
    "256 queries": Arm(("--queries", "256", "--queries-symmetric", "256", "--chunk-tokens", "8192")),
    "mined, percentage 0.95": Arm(data="mined percentage 0.95", grounds=("world",)),
    "mined, margin 0.05": Arm(data="mined margin 0.05", grounds=("world",)),
    "mined, absolute 0.7": Arm(data="mined absolute 0.7", grounds=("world",)),
    "mined, none": Arm(data="mined none 0", grounds=("world",)),
    "mined, random": Arm(data="mined random 0", grounds=("world",)),
}


@dataclass(frozen=True)
class Claim:
    """`arm` against `other`: what the report (or its lineage) finds, in points, None where it gives no figure."""

    text: str
    arm: str
    other: str
    reported: str
    sign: int


CLAIMS = [
    Claim("soft labels beside hard ones", "full", "hard labels", "+0.63", 1),
    Claim("both terms against soft labels alone", "full", "soft labels alone", "", 1),
    Claim("teacher temperature 0.05 against 0.016", "full", "teacher temperature 0.016", "", 1),
    Claim("teacher temperature 0.05 against 0.16", "full", "teacher temperature 0.16", "", 1),
    Claim("instructions on against off", "full", "no instructions", "", 1),
    Claim("the right instructions against shuffled ones", "full", "shuffled instructions", "", 1),
    Claim("examples in training, scored without, against none", "examples 0 to 5", "full", "", 1),
    Claim("2 examples at scoring time against none", "examples 0 to 5, 2 shown", "examples 0 to 5", "-1.02", -1),
    Claim("5 examples at scoring time against none", "examples 0 to 5, 5 shown", "examples 0 to 5", "", -1),
    Claim("fixed examples against drawn ones, scored without", "fixed examples", "examples 0 to 5", "-3.17 (lineage)",
          -1),
    Claim("false negatives masked by a margin against not", "full", "no false-negative margin", "", 1),
    Claim("64 queries a batch against 16, equal steps", "full", "16 queries", "", 1),
    Claim("256 queries a batch against 64, equal steps", "256 queries", "full", "", 1),
    Claim("mining at 0.95 against no rule", "mined, percentage 0.95", "mined, none", "+0.39 (other sampling)", 1),
    Claim("mining at 0.95 against a margin", "mined, percentage 0.95", "mined, margin 0.05", "", 1),
    Claim("mining at 0.95 against an absolute bar", "mined, percentage 0.95", "mined, absolute 0.7", "", 1),
    Claim("mining at 0.95 against random negatives", "mined, percentage 0.95", "mined, random", "", 1),
]


# ------------------------------------------------------------------------------------------------- one experiment

def code_hash() -> str:
    """Of all that a result depends on besides its line."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def row_path(ground: str, name: str, seed: int, steps: int) -> Path:
    """Where a row is kept."""
    key = json.dumps([ground, name, vars(ARMS[name]) | {}, seed, steps, code_hash()], default=str)
    return RESULTS / ground / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def changed(lines: list[dict[str, Any]], how: str, seed: int) -> list[dict[str, Any]]:
    """The lines of a data set with one thing changed."""
    if how == "same instruction":
        return [{**line, "prompt": "Find texts."} for line in lines]
    if how == "shuffled instructions":
        prompts = [line["prompt"] for line in lines]
        random.Random(seed).shuffle(prompts)
        return [{**line, "prompt": prompt} for line, prompt in zip(lines, prompts, strict=True)]
    return lines


def mined(rule: str, value: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The world's raw pairs through run_label.py; its retriever is a run of the README's command, one for all seeds."""
    import run_train
    from ref.runs import write_whole

    retriever = RESULTS / "retriever" / code_hash()
    if not retriever.is_dir():
        retriever.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError):  # another process was first
            write_whole(retriever, lambda draft: run_train.main(
                ["--model", "tiny", "--data", str(ROOT / "data/soft_labels.jsonl"), "--output", str(draft)]))
    subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(folder)], check=True)
    given = ["--rule", rule, *(["--value", value] if rule != "none" else [])]
    if rule == "random":
        given = ["--rule", "none", "--negatives", "1000", "--candidates", "600", "--depth", "600"]
    lines = label(folder, retriever, folder / "labels.jsonl", given)
    draw = random.Random(seed)
    for line in lines if rule == "random" else []:
        chosen = sorted(draw.sample(range(len(line["neg"])), 7))  # they stand hardest first
        line["neg"], line["neg_scores"] = ([line[key][n] for n in chosen] for key in ("neg", "neg_scores"))
    return lines


def run_one(ground: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and score one arm on one seed; the row."""
    import run_train

    arm, start_s = ARMS[name], time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files, written = [ROOT / "data/soft_labels.jsonl"], []
        if ground == "real":
            files = sorted(real_folder("soft_labels").glob("*.jsonl"))
        for file in files:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            if arm.data.startswith("mined"):
                _, rule, value = arm.data.split()
                lines = mined(rule, value, folder, seed)
            lines = changed(lines, arm.data, seed)
            written.append(folder / "data" / file.name)
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
        model = "tiny" if ground == "world" else str(ROOT / "configs/small.json")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), fixed_examples() if arm.data == "fixed examples" else (
                contextlib.nullcontext()):
            code = run_train.main(["--data", *map(str, written), "--model", model, "--steps", str(steps), "--seed",
                                   str(seed), "--device", "cpu", "--output", str(folder / "run"), *arm.options])
        if code:
            raise SystemExit(f"{name}, seed {seed}: run_train.py ended with {code}: {said.getvalue()[-500:]}")
        score = world_score(folder / "run", arm) if ground == "world" else real_score(folder / "run")
    return {"ground": ground, "arm": name, "seed": seed, "steps": steps, **score,
            "seconds": round(time.perf_counter() - start_s)}


def fixed_examples() -> Any:
    """Within it, the first five lines of a task are its examples in every batch."""
    from ref.data import SoftLabels
    from ref.prompts import Example

    fixed: dict[Any, list[Example]] = {}

    def examples(self: SoftLabels, numbers: Any, rows: Any, *_: object) -> list[list[Example]]:
        task = rows[0].task
        if task not in fixed:
            places = np.flatnonzero(self.task == self.task[numbers[0]])[:5]
            fixed[task] = [Example(self[int(n)].query, self[int(n)].positives[0]) for n in places]
        return [fixed[task]]
    return mock.patch.object(SoftLabels, "_examples", examples)


def world_score(run: Path, arm: Arm) -> dict[str, Any]:
    """nDCG@10 x 100 on the held-out sets, behind `arm.shown` solved examples of the training data."""
    from ref import Embedder
    from ref.held_out import read_task_file, retrieval_ndcg10
    from ref.prompts import Example

    embedder = Embedder.from_pretrained(run, device="cpu")
    lines = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]
    sets = {}
    for folder in sorted((ROOT / "data/held_out").glob("*/task.json")):
        prompt = "Find texts." if arm.data == "same instruction" else read_task_file(folder.parent)["instruction"]
        shown = [Example(line["query"], line["pos"][0]) for line in lines if line["prompt"] == prompt][: arm.shown]
        sets[folder.parent.name] = 100 * retrieval_ndcg10(Shown(embedder, prompt, shown), folder.parent)
    return {"score": sum(sets.values()) / len(sets), "sets": sets}


class Shown:
    """An embedder that puts an instruction and examples before whatever carries an instruction."""

    def __init__(self, embedder: Any, prompt: str, examples: Sequence[Any]) -> None:
        self.embedder, self.prompt, self.examples = embedder, prompt, examples

    def encode(self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[Any] = (),
               progress: bool = False) -> np.ndarray:
        """`Embedder.encode`."""
        if instruction is None:
            vectors: np.ndarray = self.embedder.encode(texts)
            return vectors
        return np.asarray(self.embedder.encode(texts, instruction=self.prompt, examples=self.examples))


def real_folder(name: str) -> Path:
    """A folder of the real data; SystemExit where there is none."""
    folder = Path(os.environ.get("LG_ANNA_DATA", "")) / name
    if "LG_ANNA_DATA" not in os.environ or not folder.is_dir():
        raise SystemExit("the ground `real` needs LG_ANNA_DATA, a folder with soft_labels/ and mteb/ (RECORDS.md)")
    return folder


def real_score(run: Path) -> dict[str, Any]:
    """Mean of the main scores x 100 of the ten sets."""
    import run_eval

    with contextlib.redirect_stdout(io.StringIO()):
        run_eval.main(["--model", str(run), "--data-dir", str(real_folder("mteb")), "--output", str(run / "mteb"),
                       "--instructions", str(ROOT / "configs/real_instructions.json")])
    sets = {}
    for path in sorted((run / "mteb").rglob("*.json")):
        content = json.loads(path.read_text())
        if path.parent.name.endswith("-local-data") and "task_name" in content:
            scores = [row["main_score"] for split in content["scores"].values() for row in split]
            sets[content["task_name"]] = 100 * sum(scores) / len(scores)
    return {"score": sum(sets.values()) / len(sets), "sets": sets}


# ------------------------------------------------------------------------------------------------- the study

def verdict(low: float, high: float, sign: int) -> str:
    """One of the three words."""
    if low <= 0 <= high:
        return "cannot tell"
    return "reproduced" if (low > 0) == (sign > 0) else "not reproduced"


def table(ground: str, rows: dict[tuple[str, int], float], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each claim whose arms have run on all seeds."""
    found = []
    for claim in CLAIMS:
        pairs = [(rows.get((claim.arm, seed)), rows.get((claim.other, seed))) for seed in seeds]
        if any(a is None or b is None for a, b in pairs):
            continue
        gain = [a - b for a, b in pairs if a is not None and b is not None]
        low, high = interval(gain)
        found.append({"claim": claim.text, "difference": float(np.mean(gain)), "low": low, "high": high,
                      "seeds": len(gain), "reported": claim.reported,
                      "verdict": verdict(low, high, claim.sign) if len(gain) > 2 else "cannot tell",
                      "mean": float(np.mean([a for a, _ in pairs if a is not None]))})
    return found


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table for README and docs/evidence.md."""
    lines = ["| claim | difference, 95 % interval | n | reported | |", "|---|---|---|---|---|"]
    lines += [f"| {r['claim']} | {r['difference']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f}) | {r['seeds']} | "
              f"{r['reported'] or '-'} | {r['verdict']} |" for r in found]
    return "\n".join(lines)


def draw(ground: str, found: list[dict[str, Any]], path: Path) -> str:
    """Differences with their intervals as a picture; returns what was written, or why nothing was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed (pip install -e .[plots])"
    figure = Figure(figsize=(9, 0.36 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {"reproduced": "#228833", "not reproduced": "#cc3311", "cannot tell": "#888888"}
    for place, row in enumerate(found):
        middle = row["difference"]
        axes.errorbar(middle, place, xerr=[[middle - row["low"]], [row["high"] - middle]], fmt="o",
                      color=colors[row["verdict"]], capsize=3)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(found)), [row["claim"] for row in found])
    axes.invert_yaxis()
    axes.set(xlabel=f"points, ground: {ground} (green: reproduced, red: not reproduced, gray: cannot tell)")
    figure.savefig(path, metadata={"Date": None})
    return f"picture: {path}"


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table and write table, picture and rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ground", choices=("world", "real"), default="world")
    parser.add_argument("--seeds", type=int, help="(default: 10 in the world, 3 on real data)")
    parser.add_argument("--steps", type=int, help="of each run (default: 400; 3,000)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--plan", action="store_true", help="say what is missing and how long it takes, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, ten steps, in a folder of its own: no results")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    steps = 10 if given.quick else given.steps or STEPS[given.ground]
    if given.one:
        name, seed = given.one[0], int(given.one[1])
        path = row_path(given.ground, name, seed, steps)
        row = run_one(given.ground, name, seed, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
        return 0
    seeds = range(1 if given.quick else given.seeds or SEEDS[given.ground])
    arms = [name for name, arm in ARMS.items()
            if given.ground in arm.grounds and (not given.only or name in given.only)]
    left = [(name, seed) for seed in seeds for name in arms
            if not row_path(given.ground, name, seed, steps).exists()]
    hours = len(left) * steps * SECONDS_A_STEP[given.ground] / given.workers / 3600
    print(f"{len(arms)} arms x {len(seeds)} seeds, {len(left)} runs of {steps} steps missing: about {hours:.1f} hours "
          f"with {given.workers} at a time", flush=True)
    if given.plan:
        return 0
    return study(given, arms, seeds, left, steps)


def study(given: argparse.Namespace, arms: list[str], seeds: range, left: list[tuple[str, int]], steps: int) -> int:
    """Run the missing rows, each in a process of its own, then report."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started_s = time.perf_counter()

    def one(item: tuple[str, int]) -> bool:
        call = [sys.executable, "-m", "benchmarks.claims", "--ground", given.ground, "--steps", str(steps), "--one",
                item[0], str(item[1])]
        return subprocess.run(call, cwd=ROOT, env=environment, check=False).returncode == 0

    failed = 0
    with ThreadPoolExecutor(given.workers) as pool:
        for number, fine in enumerate(pool.map(one, left), start=1):
            failed += not fine
            minutes = (time.perf_counter() - started_s) / number * (len(left) - number) / 60
            print(f"{number} of {len(left)}: {left[number - 1][0]}, seed {left[number - 1][1]}"
                  f"{'' if fine else ' FAILED'}; left {minutes:.0f} minutes", flush=True)
    rows = {(name, seed): json.loads(path.read_text()) for name in arms for seed in seeds
            if (path := row_path(given.ground, name, seed, steps)).exists()}
    found = table(given.ground, {key: row["score"] for key, row in rows.items()}, list(seeds))
    print("\n" + as_markdown(found))
    if not given.quick and found:
        from ref.runs import machine, now

        about = {"date": now(), **machine(), "ground": given.ground, "steps": steps, "code": code_hash(),
                 "claims": found, "rows": list(rows.values())}
        (RESULTS / f"{given.ground}.json").write_text(json.dumps(about, indent=1) + "\n")
        (RESULTS / f"{given.ground}.md").write_text(as_markdown(found) + "\n")
        print(draw(given.ground, found, RESULTS / f"{given.ground}.svg"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
