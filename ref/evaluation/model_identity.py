"""The scored model: the newest run by default, its name and revision in mteb's result folders, the output folder."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from ref.model.adapter import adapter_chain
from ref.model.card import run_folder
from ref.model.checkpoint import ADAPTER_CONFIG, resolve_checkpoint
from ref.utils.files import check_type, hash_files, read_json

PLAN_FILE = "plan.json"  # in the output folder, which may be a model folder
MODEL_SUFFIXES = (".safetensors", ".json", ".model")  # files that the embeddings depend on


def newest_run(runs: Path) -> Path:
    """Return the complete run folder in `runs` that was finished last.

    Raises ValueError if there is none, and for an invalid run.json.
    """
    finished: dict[datetime, Path] = {}
    for path in sorted(runs.glob("*/run.json")):
        try:
            run = read_json(path)
            if run.get("complete"):
                finished[_finish_time(run, path)] = path.parent
        except ValueError as error:
            raise ValueError(f"{error}; remove the run folder, or choose a model with --model") from None
    if not finished:
        raise ValueError(f"{runs}: has no complete run; train one (python run_train.py --data data/soft_labels.jsonl), "
                         "or choose a model with --model")
    return finished[max(finished)]


def _finish_time(run: dict[str, Any], path: Path) -> datetime:
    what, expected = f"{path}: 'finished'", "an ISO 8601 time"
    text = check_type(run.get("finished"), str, what, expected)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{what} must be {expected} (got {text!r:.60})") from None


def model_identity(model: str, *, base: str | None = None) -> tuple[str, str]:
    """Return "owner/name" and revision: a hub id, or "local/FOLDER"; and of the model and, for an adapter, of each base
    the commit on the hub, or a hash of the local files.
    """
    folder = local_checkpoint(model)
    if folder is None:
        return model_label(model), "main"
    return model_label(model), "-".join(map(_revision, adapter_chain(folder, base=base)))


def trained_without_instructions(model: str) -> bool:
    """Whether a model is the result of a run none of whose tasks had an instruction, as its exported prompts say."""
    run = run_folder(Path(model).resolve())
    usage = {} if run is None else read_json(run / "run.json").get("usage", {})
    if usage.get("instructions") != [None, None]:  # of the largest task
        return False
    prompts = resolve_checkpoint(model) / "config_sentence_transformers.json"
    return not (prompts.is_file() and any(read_json(prompts)["prompts"].values()))


def local_checkpoint(model: str) -> Path | None:
    """The checkpoint of a folder, or of a hub id in the hub's cache; None if it has not been downloaded."""
    if Path(model).is_dir():
        return resolve_checkpoint(model)
    import huggingface_hub

    files = ("config.json", ADAPTER_CONFIG)
    cached = (huggingface_hub.try_to_load_from_cache(model, file) for file in files)
    return next((Path(path).parent for path in cached if isinstance(path, str)), None)


def _revision(folder: Path) -> str:
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):  # in the hub's cache
        return folder.name
    return _hash_model(folder)[:16]


def model_label(model: str) -> str:
    """A hub id itself, "local/FOLDER" for a folder, "local/RUN-merged" for a folder of a run."""
    if not Path(model).is_dir():
        return model
    folder = Path(model).resolve()
    run = run_folder(folder)
    return f"local/{folder.name}" if run in (None, folder) else f"local/{folder.parent.name}-{folder.name}"


def _hash_model(folder: Path) -> str:
    files = (path for path in folder.glob("*") if path.suffix in MODEL_SUFFIXES and path.name != PLAN_FILE)
    return hash_files(folder, files)


def default_output(model: str) -> Path:
    """RUN/mteb for a run folder, RUN/mteb-merged for its merged/, else results/OWNER__NAME."""
    folder = Path(model)
    run = run_folder(folder.resolve())
    if run is None:
        return Path("results") / model_label(model).replace("/", "__")
    return folder / "mteb" if run == folder.resolve() else run / f"mteb-{folder.resolve().name}"
