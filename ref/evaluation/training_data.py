"""Tasks whose data a model was trained on, by name: their scores are not those of unseen data.

A run names the tasks of its training lines in run.json; of a model of the hub mteb's metadata name the training sets.
A run's names are compared without case, punctuation, split, year and the words that mteb appends: `banking77`,
`sts-benchmark_train` and `fiqa` name Banking77Classification, STSBenchmark and FiQA2018. Texts are not compared.

Importing this file imports mteb (three seconds).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from mteb.models.get_model_meta import MODEL_REGISTRY

from ref.evaluation.tasks import CATEGORIES, earlier_names
from ref.model.card import RESULTS
from ref.utils.files import read_json

SUFFIX = re.compile(rf"(\.v\d+|HardNegatives|S2S|P2P|{'|'.join(CATEGORIES)}|[-_ ]?(train|dev|validation|test))$")
YEAR = re.compile(r"(19|20)\d\d$")
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
    """Task names of the training lines of a run and of the runs it started from; mteb's names for a model below them.

    A run.json from before task names were written there has the names of the files, which are those of most tasks.
    """
    names: list[str] = []
    seen: set[Path] = set()
    folder = Path(model)
    while folder not in seen:
        seen.add(folder)
        run = folder.parent if folder.name in RESULTS else folder
        if not (run / "run.json").is_file():
            break
        values = read_json(run / "run.json")
        names += values.get("tasks") or [Path(file["file"]).stem for file in values.get("data", ())]
        folder = Path(str(values.get("model")))
    meta = MODEL_REGISTRY.get(str(folder))
    return names, set() if meta is None else set(meta.get_training_datasets() or ())


def _stem(name: str) -> str:
    """`BiorxivClusteringP2P.v2` -> `biorxiv`, `sts12_train` -> `sts12`."""
    while (shorter := SUFFIX.sub("", name)) not in ("", name):
        name = shorter
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return OTHER_NAMES.get(letters, YEAR.sub("", letters))
