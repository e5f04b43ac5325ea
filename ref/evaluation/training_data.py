"""Tasks whose data a model was trained on, by name: their scores are not those of unseen data.

A run names the tasks of its training lines in run.json; of a model of the hub mteb's metadata name the training sets.
A run's names are compared without case, punctuation and the words that mteb appends: `stsb` and `sts-benchmark_train`
both name STSBenchmark. Texts are not compared.

Importing this file imports mteb (three seconds).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from mteb.models.get_model_meta import MODEL_REGISTRY

from ref.evaluation.tasks import CATEGORIES, earlier_names
from ref.utils.files import read_json

SUFFIX = re.compile(rf"(\.v\d+|HardNegatives|S2S|P2P|{'|'.join(CATEGORIES)})$")
RESULTS = ("adapter", "merged", "model")  # folders of a run
MIN_CHARS = 4  # of a name that is the beginning of another


def tasks_in_training_data(model: str, tasks: Iterable[str]) -> dict[str, str]:
    """Task -> the name of the training data that are its own, for those of `tasks` that have some.

    A run that continues another run, or starts from a model of the hub, has the training data of that too.
    """
    published = _published_training_sets(model)
    names = [] if published else _training_names(Path(model))
    found = {}
    for task in tasks:
        own = {_stem(name) for name in (task, *earlier_names(task))}
        same = [name for name in names if any(_is_same(_stem(name), other) for other in own)]
        if task in published or same:
            found[task] = (same or [task])[0]
    return found


def _published_training_sets(model: str) -> set[str]:
    meta = MODEL_REGISTRY.get(model)
    return set() if meta is None else set(meta.get_training_datasets() or ())


def _training_names(folder: Path) -> list[str]:
    """Task names of the training lines of a run and of the models it started from."""
    names: list[str] = []
    seen: set[Path] = set()
    while folder not in seen:
        seen.add(folder)
        run = folder.parent if folder.name in RESULTS else folder
        if not (run / "run.json").is_file():  # perhaps a model of the hub
            return [*names, *sorted(_published_training_sets(str(folder)))]
        values = read_json(run / "run.json")
        names += values.get("tasks") or []
        folder = Path(str(values.get("model")))
    return names


def _stem(name: str) -> str:
    """`BiorxivClusteringP2P.v2` -> `biorxiv`."""
    while (shorter := SUFFIX.sub("", name)) not in ("", name):
        name = shorter
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_same(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return short == long or (len(short) >= MIN_CHARS and long.startswith(short))
