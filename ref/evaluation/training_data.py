"""Tasks whose data a model was trained on, by name: their scores are not those of unseen data.

A run names the tasks of its training lines in run.json; of a model of the hub mteb's metadata name the training sets.
A run's names are compared without folder, case, punctuation, split, year and the words that mteb appends:
`banking77`, `sts-benchmark_train` and `fiqa` name Banking77Classification, STSBenchmark and FiQA2018; of `fiqa/train`,
whose last part is only such words, the folder counts. Texts are not compared.

Importing this file imports mteb (three seconds).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from mteb.models.get_model_meta import MODEL_REGISTRY

from ref.evaluation.tasks import CATEGORIES, earlier_names
from ref.model.card import run_folder
from ref.utils.files import read_json

WORDS = [*map(str.lower, CATEGORIES), "hardnegatives", "s2s", "p2p", "train", "dev", "validation", "test"]
SUFFIX = re.compile(rf"({'|'.join(WORDS)}|v\d+|\d+k|(19|20)\d\d)$")
ONLY_WORDS = re.compile(rf"({'|'.join(WORDS)})*")
OTHER_NAMES = {"stsb": "stsbenchmark"}  # GLUE's name


def tasks_in_training_data(model: str, tasks: Iterable[str]) -> dict[str, str]:
    """Task -> the name of the training data that are its own, for those of `tasks` that have some.

    A run that continues another run, or starts from a model of the hub, has the training data of that too.
    """
    names, published = _training_names(model)
    found = {}
    for task in tasks:
        stems = {_stem(name) for name in (task, *earlier_names(task))}
        same = [name for name in names if _stem(name) in stems]
        if same or task in published:
            found[task] = (same or [task])[0]
    return found


def _training_names(model: str) -> tuple[list[str], set[str]]:
    """Task names of the training lines of a run and of the runs it started from; mteb's names for the model below them.

    A run.json from before task names were written there has the names of the files, which are those of most tasks.
    """
    names: list[str] = []
    folder, root = run_folder(Path(model)), model
    if folder is not None:
        run = read_json(folder / "run.json")
        names = run.get("tasks") or [Path(file["file"]).stem for file in run.get("data", ())]
        root = str(run.get("root", run.get("model")))
    meta = MODEL_REGISTRY.get(root)
    return names, set() if meta is None else set(meta.get_training_datasets() or ())


def _stem(name: str) -> str:
    """`BiorxivClusteringP2P.v2` -> `biorxiv`, `folder/sts12_train` -> `sts12`, `fiqa/train` -> `fiqa`."""
    parts = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in name.split("/")]
    stem = next((part for part in reversed(parts) if not ONLY_WORDS.fullmatch(part)), parts[-1])
    while (shorter := SUFFIX.sub("", stem)) not in ("", stem):
        stem = shorter
    return OTHER_NAMES.get(stem, stem)
