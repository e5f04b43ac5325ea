"""Which mteb tasks to run, and on whose data: the benchmark's from the hub, or local folders.

A folder is named after its task and holds what mteb's class of that task loads: parquet or jsonl files, and a
README.md that declares configurations and splits (a retrieval folder of corpus, queries and qrels files
needs none). A folder with a name of its own says in task.json which task's class and metric to use, which
attributes to set on it, and the instruction; its results stand under its own name:

    {"class": "ArguAna", "instruction": "Given a question, retrieve answers"}
    {"class": "TwentyNewsgroupsClustering.v2", "set": {"max_fraction_of_documents_to_embed": null}}

Used by the files beside it and run_eval.py. Importing this file imports mteb (three seconds). Facts about mteb: 2.26.
"""

import difflib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
from mteb.abstasks.abstask import AbsTask
from mteb.get_tasks import TASK_LIST

from ref.held_out import read_task_file
from ref.runs import hash_files

BENCHMARK = "MTEB(eng, v2)"
CATEGORIES = (
    "Classification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
)
# A file's name says which part of a retrieval set it is; mteb reads them as configurations of one data set.
RETRIEVAL_PARTS = {"corpus": "corpus", "queries": "queries", "qrels": "default", "top_ranked": "top_ranked"}
FETCHED = ".fetched"  # in a folder: where its files are from


@dataclass(frozen=True)
class Selection:
    """What can run, and what was asked for but has no data."""

    tasks: list[AbsTask]
    missing: list[str]


def benchmark_tasks() -> dict[str, AbsTask]:
    """The 41 tasks of MTEB(eng, v2) by name, English subsets and test splits only."""
    return {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}


def tasks_from(selection: str, data_dir: str | Path | None = None) -> Selection:
    """The tasks of "all", of a category, or of names, mixed and separated by commas.

    Without data_dir: the benchmark's, data from the hub. With it: the tasks that have a folder there
    (`folder_task`); those of the benchmark that were selected and have none are `missing`.

    Raises: ValueError for an unknown name (the nearest are given), a folder that is no task, a malformed
    task.json, or if nothing is left to run.
    """
    official = benchmark_tasks()
    folders = [] if data_dir is None else task_folders(Path(data_dir))
    bases = {folder.name: _class_of(folder, official) for folder in folders}
    category_of = {name: str(task.metadata.type) for name, task in {**official, **bases}.items()}
    names = _selected(selection, category_of)
    if data_dir is None:
        return Selection([official[name] for name in names], [])
    tasks = [folder_task(Path(data_dir) / name, bases[name]) for name in names if name in bases]
    if not tasks:
        raise ValueError(
            f"{data_dir}: no folder for any of {', '.join(names)}. Expected: a folder with the task's name. "
            f"It has {', '.join(sorted(bases)) or 'no folders'}: select from these, or fetch the data."
        )
    return Selection(tasks, [name for name in names if name not in bases])


def folder_task(folder: Path, base: AbsTask) -> AbsTask:
    """The mteb task `base` on the data of `folder`, under the folder's name.

    Its data revision is "local-" and a hash of the files, so no result file can pass for one of the official
    data, and a result of older files is not reused. A folder with a name of its own takes class and metric of
    `base`, but not its prompt, which speaks of other data: the instruction of task.json counts, else the
    default of the class.

    Raises: ValueError if task.json sets an attribute that the class does not have.
    """
    task_file = read_task_file(folder)
    content = _hash_of(folder)
    place = {"path": str(folder.resolve()), "revision": f"local-{content[:16]}"}
    prompt = base.metadata.prompt if folder.name == base.metadata.name else None
    metadata = base.metadata.model_copy(
        update={
            "name": folder.name,
            "dataset": {**base.metadata.dataset, **place},
            "prompt": task_file.get("instruction") or prompt,
        }
    )
    task: AbsTask = type(type(base).__name__, (FolderData, type(base)), {"metadata": metadata})()
    task.hf_subsets = list(base.hf_subsets)
    task.filter_eval_splits(base.eval_splits)
    mark = folder / FETCHED
    task.official = (  # type: ignore[attr-defined]
        folder.name == base.metadata.name and mark.is_file()
        and mark.read_text(encoding="utf-8") == _mark(base, content))
    for key, value in task_file.get("set", {}).items():
        if not hasattr(task, key):
            raise ValueError(f"{folder / 'task.json'}, set: {unknown('attribute', key, dir(task))}")
        try:
            setattr(task, key, value)
        except AttributeError:
            raise ValueError(f"{folder / 'task.json'}, set: {key} cannot be set. Expected is a plain attribute of the "
                             "task's class. Leave it out.") from None
    return task


class FolderData(AbsTask):
    """Mixed into a task class: reads a local folder anew each time, whatever was read before.

    `datasets` keeps what it has read under ~/.cache and, for a folder with a README.md, does not notice
    changed files. So it gets a cache of its own, deleted with the task. A retrieval folder need not bring a
    README.md: the configurations that mteb asks for are written beside links to its files.
    """

    official = False  # the benchmark's own data, as `fetch` left them

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        if self.data_loaded:
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="ref-data-")  # removed with the task, and at exit
        folder = Path(self.metadata.dataset["path"])
        if not (folder / "README.md").is_file() and any(folder.glob("corpus.*")):
            place = {**self.metadata.dataset, "path": str(_with_card(folder, Path(self._scratch.name)))}
            self.metadata = self.metadata.model_copy(update={"dataset": place})  # until unload_data
        shared = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = Path(self._scratch.name) / "cache"
        try:
            super().load_data(num_proc=num_proc, **options)
        except BaseException:
            self.__dict__.pop("metadata", None)  # the next attempt starts at the folder again
            raise
        finally:
            datasets.config.HF_DATASETS_CACHE = shared

    def unload_data(self) -> None:
        super().unload_data()
        self._scratch.cleanup()


def _with_card(folder: Path, scratch: Path) -> Path:
    """A folder in `scratch` with links to the retrieval files and the README.md that declares them."""
    linked = scratch / folder.name
    linked.mkdir()
    card = ["---", "configs:"]
    for part, config in RETRIEVAL_PARTS.items():
        for path in sorted(folder.glob(f"{part}.*")):
            (linked / path.name).symlink_to(path)
            card += [f"- config_name: {config}", f"  data_files: [{{split: test, path: {path.name}}}]"]
    (linked / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return linked


def is_official(task: AbsTask) -> bool:
    """Whether a task's data are known to be the benchmark's own: from the hub, or as `fetch` left them."""
    return not isinstance(task, FolderData) or task.official


def _mark(task: AbsTask, content: str) -> str:
    """What FETCHED says: where the files are from, and a hash of them."""
    return f"{task.metadata.dataset['path']}\n{task.metadata.dataset['revision']}\n{content}\n"


def fetch(tasks: Iterable[AbsTask], data_dir: Path) -> dict[str, str]:
    """Download the data of tasks from the hub into folders that --data-dir reads; name -> error of those that failed.

    A mark in each folder says where its files are from: unchanged, they count as the benchmark's own. Prints for each
    task the repository, its revision, and whether it was there already.
    """
    failed: dict[str, str] = {}
    for task in tasks:
        name, place = task.metadata.name, task.metadata.dataset
        folder = data_dir / name
        print(f"{name}: {place['path']} at {place['revision']}", end=" ", flush=True)
        if folder.is_dir():
            print("is there")
            continue
        draft = data_dir / f".{name}.draft"  # stays after a failure: the hub's client goes on in it
        try:
            huggingface_hub.snapshot_download(
                place["path"], repo_type="dataset", revision=place["revision"], local_dir=draft)
            (draft / FETCHED).write_text(_mark(task, _hash_of(draft)), encoding="utf-8")
            draft.rename(folder)
            print("fetched")
        except Exception as error:  # the hub's many: offline, gated, gone
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"failed, {failed[name]:.200}")
    return failed


def task_folders(data_dir: Path) -> list[Path]:
    """The folders of data sets in a folder, by name. Raises ValueError if it is none."""
    if not data_dir.is_dir():
        raise ValueError(
            f"{data_dir}: no such folder. Expected: a folder with one folder per task. Correct --data-dir."
        )
    return sorted(f for f in data_dir.iterdir() if f.is_dir() and not f.name.startswith((".", "_")))


def _class_of(folder: Path, official: Mapping[str, AbsTask]) -> AbsTask:
    """The mteb task whose class is used for a folder: that of its task.json, else that of its name."""
    name = read_task_file(folder).get("class", folder.name)
    if name in official:
        return official[name]
    known = [task_class.metadata.name for task_class in TASK_LIST]
    if name not in known:
        hint = 'A folder with a name of its own needs a task.json: {"class": "name of the task to score it as"}.'
        raise ValueError(f"{folder}: {unknown('mteb task', name, known)} {hint}")
    task = mteb.get_task(name, languages=["eng"])
    return task.filter_eval_splits(["test"]) if "test" in task.metadata.eval_splits else task


def _selected(selection: str, category_of: Mapping[str, str]) -> list[str]:
    names: dict[str, None] = {}  # a set that keeps its order
    for word in filter(None, (part.strip() for part in selection.split(","))):
        if word in category_of:
            found = [word]
        else:
            found = [name for name, kind in category_of.items() if word.lower() in ("all", kind.lower())]
        if not found:
            raise ValueError(unknown("task or category", word, ["all", *CATEGORIES, *category_of]))
        names.update(dict.fromkeys(found))
    if not names:
        raise ValueError(f"--tasks is {selection!r}: empty. Expected: all, a category, or names. Give at least one.")
    return list(names)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The text of an error about a name that is not among the known ones: it offers the nearest."""
    spelling = {candidate.lower(): candidate for candidate in known}
    near = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.5)]
    return f"unknown {what} {name!r}. Nearest: {', '.join(near) or 'none'}. Correct the name."


def _hash_of(folder: Path) -> str:
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / FETCHED))
