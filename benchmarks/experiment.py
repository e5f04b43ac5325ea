"""One experiment of the study of the report's claims (claims.py): change the data, train, score; one row.

Training is run_train.main, labelling run_label.main, scoring on real sets run_eval.py's score_task: what users call.
"""

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
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.mining_world import label

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/claims"
CODE = ("ref", "kernels", "labelling", "data", "configs", "run_train.py", "run_label.py", "benchmarks/experiment.py",
        "benchmarks/mining_world.py")
SAME = "same instruction"


@dataclass(frozen=True)
class Arm:
    """A line of options. `data`: how the ground's data are changed; `shown`: examples in the prompts of scoring."""

    options: tuple[str, ...] = ()
    data: str = ""
    shown: int = 0
    grounds: tuple[str, ...] = ("world", "real")


@dataclass(frozen=True)
class Setting:
    """What all arms of a study share. `model`: as run_train.py's --model, a path from the repository's root."""

    ground: str
    steps: int
    model: str
    device: str = "cpu"


@cache
def code_hash() -> str:
    """Of the code, the configurations and the sample data, as this process found them."""
    from ref.runs import hash_files

    files = (file for name in CODE for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]))
    return hash_files(ROOT, (file for file in files if file.suffix in (".py", ".json", ".jsonl")))[:16]


def row_path(setting: Setting, arm: Arm, seed: int) -> Path:
    """Where a row is kept: by the arm's line (not its name), the setting, the seed and the code."""
    key = json.dumps([astuple(setting), astuple(arm)[:3], seed, code_hash()])
    return RESULTS / setting.ground / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def run_one(setting: Setting, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and score one arm on one seed; the row."""
    import run_train

    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files, written = [ROOT / "data/soft_labels.jsonl"], []
        if setting.ground == "real":
            files = sorted(real_folder("soft_labels").glob("*.jsonl"))
        data = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
        if arm.data.startswith("mined"):
            _, rule, value = arm.data.split()
            data = {"soft_labels.jsonl": mined(rule, value, folder, seed)}
        changed([line for lines in data.values() for line in lines], arm.data, seed)
        for name, lines in data.items():
            written.append(folder / "data" / name)
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
        model = setting.model if setting.model == "tiny" else str(ROOT / setting.model)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), fixed_examples() if arm.data == "fixed examples" else (
                contextlib.nullcontext()):
            code = run_train.main(["--data", *map(str, written), "--model", model, "--steps", str(setting.steps),
                                   "--seed", str(seed), "--device", setting.device, "--output", str(folder / "run"),
                                   *arm.options])
        if code:
            raise SystemExit(f"{arm}, seed {seed}: run_train.py ended with {code}: {said.getvalue()[-500:]}")
        score = (world_score(folder / "run", arm, setting.device) if setting.ground == "world"
                 else real_score(folder / "run", arm, setting.device))
    return {"ground": setting.ground, "seed": seed, "steps": setting.steps, "model": setting.model, **score,
            "seconds": round(time.perf_counter() - start_s)}


# ------------------------------------------------------------------------------------------------- the data

def changed(lines: list[dict[str, Any]], how: str, seed: int) -> None:
    """Change one thing in the lines of all files."""
    prompts = [line["prompt"] for line in lines]
    if how == "shuffled instructions":
        random.Random(seed).shuffle(prompts)
    for line, prompt in zip(lines, prompts, strict=True):
        line["prompt"] = "Find texts." if how == SAME else prompt


def retriever() -> Path:
    """What mines the world: a run of the README's command, one for all seeds, on one thread."""
    from ref.runs import write_whole

    folder = RESULTS / "retriever" / code_hash()
    call = ["run_train.py", "--model", "tiny", "--data", "data/soft_labels.jsonl", "--device", "cpu", "--output"]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder, lambda draft: subprocess.run(
            [sys.executable, *call, str(draft)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, check=True))
    return folder


def mined(rule: str, value: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The world's raw pairs through run_label.py."""
    subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(folder)], check=True)
    given = ["--rule", rule, *(["--value", value] if rule != "none" else [])]
    if rule == "random":
        given = ["--rule", "none", "--negatives", "1000", "--candidates", "600", "--depth", "600"]
    lines = label(folder, retriever(), folder / "labels.jsonl", given)
    draw = random.Random(seed)
    for line in lines if rule == "random" else []:
        chosen = draw.sample(range(len(line["neg"])), 7)  # in the order drawn: training takes the first
        line["neg"], line["neg_scores"] = ([line[key][n] for n in chosen] for key in ("neg", "neg_scores"))
    return lines


def fixed_examples() -> Any:
    """Within it, the examples of a batch are the first of the task's first lines, as many as would have been drawn.

    Left out as ever: texts of the batch, and known positives of its queries.
    """
    from ref.data import SoftLabels
    from ref.mining import fold
    from ref.prompts import Example

    def examples(self: SoftLabels, numbers: Any, rows: Any, passages: Any, step: int) -> list[list[Example]]:
        most = self.options.max_examples
        wanted = random.Random(f"{self.options.seed} examples {step}").randint(0, most)  # as SoftLabels draws it
        taken = {fold(text) for row in rows for text in (row.query, *row.positives)} | set(map(fold, passages))
        first = [self[int(n)] for n in np.flatnonzero(self.task == self.task[numbers[0]])[:most]]
        pairs = [Example(row.query, row.positives[0]) for row in first]
        return [[pair for pair in pairs if not {fold(pair.query), fold(pair.response)} & taken][:wanted]]
    return mock.patch.object(SoftLabels, "_examples", examples)


# ------------------------------------------------------------------------------------------------- the score

def world_score(run: Path, arm: Arm, device: str) -> dict[str, Any]:
    """nDCG@10 x 100 on the held-out sets, behind `arm.shown` solved examples of the training data."""
    from ref import Embedder
    from ref.held_out import read_task_file, retrieval_ndcg10
    from ref.prompts import Example

    embedder = Embedder.from_pretrained(run, device=device)
    lines = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]
    sets = {}
    for folder in sorted((ROOT / "data/held_out").glob("*/task.json")):
        prompt = "Find texts." if arm.data == SAME else read_task_file(folder.parent)["instruction"]
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


def real_score(run: Path, arm: Arm, device: str) -> dict[str, Any]:
    """Mean of the main scores x 100 of the ten sets, each scored as run_eval.py does."""
    from ref import Embedder
    from ref.scoring import MtebEncoder, score_task
    from ref.tasks import tasks_from

    instructions = json.loads((ROOT / "configs/real_instructions.json").read_text())
    if arm.data == SAME:
        instructions = dict.fromkeys(instructions, "Find texts.")
    encoder = MtebEncoder(Embedder.from_pretrained(run, device=device), name="local/run", revision="1",
                          overrides=instructions)
    selection = tasks_from(",".join(instructions), real_folder("mteb"))
    if selection.missing:
        raise SystemExit(f"no data for {', '.join(selection.missing)} in {real_folder('mteb')}. Complete the data.")
    sets = {task.metadata.name: 100 * score_task(encoder, task, run / "mteb").score for task in selection.tasks}
    return {"score": sum(sets.values()) / len(sets), "sets": sets}
