"""One run of the study of the paper's claims (claims.py): change the data, train, evaluate, return one row.

Training is run_train.main, labelling run_label.main, evaluation on real tasks the score_task of run_eval.py: functions
that users call.
"""

import contextlib
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import run_train
from benchmarks.arms import TEACHER, Arm
from benchmarks.experiment_data import RESULTS, ROOT, code_hash, fixed_examples, real_folder, write_data
from benchmarks.experiment_scores import TeacherEmbedder, evaluate_real, evaluate_world
from ref.embedder import Embedder
from ref.evaluation.retrieval import TextEmbedder
from ref.utils.files import hash_files, read_json

# texts are cut in training and evaluation; `auto` would depend on the memory that other runs leave
LLM_OPTIONS = ("--max-text-tokens", "48", "--mini-batch-tokens", "6144")


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


def run_arms(setting: Setting, arms: Sequence[Arm], seed: int) -> list[dict[str, Any]]:
    """Train once and evaluate each of these arms, which may differ in `num_examples` only; returns their rows.

    The teacher is evaluated without training.
    """
    start_s = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        taught = arms[0].change != TEACHER
        embedder = train(setting, arms[0], seed, folder) if taught else TeacherEmbedder(setting.device)
        used = read_json(folder / "run/run.json")["options"] if taught else {}
        for number, arm in enumerate(arms):
            scores, query_scores = evaluate(setting, arm, embedder, folder / f"mteb-{number}")
            rows.append({
                "ground": setting.ground, "seed": seed, "steps": used.get("steps"), "model": setting.model,
                "dtype": used.get("dtype"), "score": sum(scores.values()) / len(scores), "task_scores": scores,
                "query_scores": query_scores, "elapsed_s": round(time.perf_counter() - start_s)})
    return rows


def evaluate(
    setting: Setting, arm: Arm, embedder: TextEmbedder, folder: Path,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Scores by task, and by task and query (`evaluate_real`)."""
    if setting.ground == "world":
        return evaluate_world(embedder, arm), {}
    return evaluate_real(embedder, arm, folder, short=setting.ground == "llm")


def train(setting: Setting, arm: Arm, seed: int, folder: Path) -> Embedder:
    """Train one arm in folder/run; returns its embedder. SystemExit if training fails."""
    data = write_data(setting.ground, arm, seed, folder)
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
    return Embedder.from_pretrained(folder / "run", device=setting.device)
