"""Selection of mteb tasks, with data from the hub or from local folders.

A local folder is named after its task and holds what mteb's class of that task loads: parquet or jsonl files, and a
README.md that declares configurations and splits (not needed for corpus, queries and qrels files of retrieval). A
folder with another name needs a task.json with the task whose class and metric are used, and optionally attributes to
set on it and the instruction; results are stored under the folder's name:

    {"class": "ArguAna", "instruction": "Given a question, retrieve answers"}
    {"class": "TwentyNewsgroupsClustering.v2", "set": {"max_fraction_of_documents_to_embed": null}}

Importing this file imports mteb (three seconds). Written for mteb 2.26.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import huggingface_hub
import mteb
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.get_tasks import TASK_LIST

from ref.evaluation.local_data import LocalDataMixin
from ref.evaluation.report.leaderboard import BENCHMARK
from ref.evaluation.retrieval import read_task_file
from ref.utils.files import hash_files

CATEGORIES = ("Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization")
DOWNLOADED = ".downloaded"  # file in a downloaded folder: repository, revision and hash of the other files


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that can run, and names of selected tasks without data."""

    tasks: list[AbsTask]
    missing: list[str]


def benchmark_tasks() -> dict[str, AbsTask]:
    """The 41 tasks of MTEB(eng, v2) by name, with English subsets and test splits only."""
    return {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}


def earlier_names(name: str) -> list[str]:
    """Other names that mteb has for a task's data: earlier versions, and collections that it is a part of."""
    names = [name]
    for later in names:  # grows: an earlier version may have earlier versions
        names += [other for other in dict.fromkeys(_direct_predecessors().get(later, ())) if other not in names]
    return names[1:]


@cache
def _direct_predecessors() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for metadata in (task.metadata for task in TASK_LIST):
        found.setdefault(metadata.name, []).extend(metadata.adapted_from or ())
        parts = [part.metadata.name for part in getattr(metadata, "tasks", None) or ()]
        for later in (metadata.superseded_by, *parts):
            found.setdefault(later or "", []).append(metadata.name)
    return found


def select_tasks(selection: str, data_dir: str | Path | None = None) -> TaskSelection:
    """Select tasks by "all", categories and names, separated by commas.

    Without `data_dir`: tasks of the benchmark, and other English text tasks by name, with data from the hub. With it:
    tasks that have a folder there (`local_task`); selected tasks of the benchmark without a folder are `missing`.

    Raises ValueError for an unknown name, a folder that is no task, a malformed task.json, and if no task can run.
    """
    official = benchmark_tasks()
    folders = [] if data_dir is None else task_folders(Path(data_dir))
    bases = {folder.name: _base_task(folder, official) for folder in folders}
    others = {} if data_dir is not None else _other_tasks(selection, official)
    category_of = {name: str(task.metadata.type) for name, task in {**official, **bases}.items()}
    names = _selected_names(selection, category_of, others)
    if data_dir is None:
        return TaskSelection([{**official, **others}[name] for name in names], [])
    tasks = [local_task(Path(data_dir) / name, bases[name]) for name in names if name in bases]
    if not tasks:
        raise ValueError(f"{data_dir}: has no folder for any of {', '.join(names)} (only "
                         f"{', '.join(sorted(bases)) or 'no folders'}); select one of these, or use --download")
    return TaskSelection(tasks, [name for name in names if name not in bases])


def local_task(folder: Path, base: AbsTask) -> AbsTask:
    """The mteb task `base` with the data of `folder`, under the folder's name.

    The revision of its data is "local-" and a hash of the files, so its results differ from those on official data and
    on older files; unchanged since `download`, it is that of the hub. A folder with another name than `base` takes its
    class and metric but not its prompt: the instruction is that of task.json, else the default of the class.

    Raises ValueError if task.json sets an attribute that the class does not have.
    """
    task_file = read_task_file(folder)
    content = _hash_of(folder)
    origin = folder / DOWNLOADED
    downloaded = folder.name == base.metadata.name and origin.is_file() and (
        origin.read_text(encoding="utf-8") == _origin(base, content))
    revision = base.metadata.revision if downloaded else f"local-{content[:16]}"
    dataset = {**base.metadata.dataset, "path": str(folder.resolve()), "revision": revision}
    prompt = base.metadata.prompt if folder.name == base.metadata.name else None
    metadata = base.metadata.model_copy(
        update={"name": folder.name, "dataset": dataset, "prompt": task_file.get("instruction") or prompt})
    task: AbsTask = type(type(base).__name__, (LocalDataMixin, type(base)), {"metadata": metadata})()
    task.hf_subsets = list(base.hf_subsets)
    task.filter_eval_splits(base.eval_splits)
    if downloaded:
        task.downloaded = base.metadata.dataset  # type: ignore[attr-defined]
    for key, value in task_file.get("set", {}).items():
        where = f"{folder / 'task.json'}: 'set'"
        if not hasattr(task, key):
            raise ValueError(f"{where}: {unknown_name('attribute', key, dir(task))}")
        try:
            setattr(task, key, value)
        except AttributeError:
            raise ValueError(f"{where}: attribute {key!r} is read-only") from None
    return task


def is_official(task: AbsTask) -> bool:
    """Whether a task's data are those of the benchmark: from the hub, or unchanged since `download`."""
    return not isinstance(task, LocalDataMixin) or task.downloaded is not None


def data_origin(task: AbsTask) -> tuple[str, str]:
    """Path and revision of a task's data: on the hub, or of a folder that is not official."""
    dataset = getattr(task, "downloaded", None) or task.metadata.dataset
    return str(dataset["path"]), str(dataset["revision"])


def _origin(task: AbsTask, content: str) -> str:
    """The content of the file DOWNLOADED."""
    return f"{task.metadata.dataset['path']}\n{task.metadata.dataset['revision']}\n{content}\n"


def download(tasks: Iterable[AbsTask], data_dir: Path) -> dict[str, str]:
    """Download the data of tasks from the hub into folders for --data-dir; return name -> error of failed tasks.

    A file in each folder records repository, revision and hash: while they match, the data count as official. Existing
    folders are skipped. Prints one line per task.
    """
    failed: dict[str, str] = {}
    for task in tasks:
        name, dataset = task.metadata.name, task.metadata.dataset
        folder = data_dir / name
        print(f"{name}: {dataset['path']} at {dataset['revision']}", end=" ", flush=True)
        if folder.is_dir():
            print("exists")
            continue
        draft = data_dir / f".{name}.draft"  # kept after a failure: the hub's client resumes in it
        try:
            huggingface_hub.snapshot_download(
                dataset["path"], repo_type="dataset", revision=dataset["revision"], local_dir=draft)
            (draft / DOWNLOADED).write_text(_origin(task, _hash_of(draft)), encoding="utf-8")
            draft.rename(folder)
            print("downloaded")
        except Exception as error:  # any error of the hub: offline, gated, removed
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"failed: {failed[name]:.200}")
    return failed


def task_folders(data_dir: Path) -> list[Path]:
    """The folders of data sets in `data_dir`, by name. Raises ValueError if it is no folder."""
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir: folder {data_dir} does not exist")
    if (data_dir / "task.json").is_file() or any(data_dir.glob("corpus.*")):
        raise ValueError(f"--data-dir {data_dir}: is a data set; give the folder that holds it")
    return sorted(f for f in data_dir.iterdir() if f.is_dir() and not f.name.startswith((".", "_")))


def _base_task(folder: Path, official: Mapping[str, AbsTask]) -> AbsTask:
    """The mteb task whose class a folder uses: that of its task.json, else that of its name."""
    name = read_task_file(folder).get("class", folder.name)
    if name in official:
        return official[name]
    known = [task_class.metadata.name for task_class in TASK_LIST]
    if name not in known:
        raise ValueError(f"{folder}: {unknown_name('mteb task', name, known)}; a folder with a name of its own needs a "
                         'task.json: {"class": "the mteb task to score it as"}')
    return _task_outside_benchmark(name, str(folder))


def _other_tasks(selection: str, official: Mapping[str, AbsTask]) -> dict[str, AbsTask]:
    """The named tasks of mteb that are not in the benchmark. Raises ValueError for one without English texts."""
    known = {task_class.metadata.name: task_class.metadata for task_class in TASK_LIST}
    found: dict[str, AbsTask] = {}
    for name in (part.strip() for part in selection.split(",")):
        if name in known and name not in official:
            metadata = known[name]
            if "text" not in metadata.modalities or not any(code.startswith("eng") for code in metadata.languages):
                raise ValueError(f"--tasks: {name} has no English texts (only {', '.join(metadata.modalities)} in "
                                 f"{', '.join(sorted(metadata.languages)[:5])})")
            found[name] = _task_outside_benchmark(name, "--tasks")
    return found


def _task_outside_benchmark(name: str, where: str) -> AbsTask:
    """A task of mteb with its English subsets, if it has some, and its test split, if it has one.

    Raises ValueError that starts with `where` for the mean of other tasks: mteb scores these, on the hub's data and
    with their own instructions.
    """
    metadata = next(task_class.metadata for task_class in TASK_LIST if task_class.metadata.name == name)
    is_english = any(code.startswith("eng") for code in metadata.languages)
    task = mteb.get_task(name, languages=["eng"] if is_english else None)
    if isinstance(task, AbsTaskAggregate):
        parts = ",".join(part.metadata.name for part in task.metadata.tasks)
        raise ValueError(f"{where}: {name} is the mean of other tasks; give these: {parts}")
    return task.filter_eval_splits(["test"]) if "test" in task.metadata.eval_splits else task


def _selected_names(selection: str, category_of: Mapping[str, str], others: Mapping[str, AbsTask]) -> list[str]:
    names: dict[str, None] = {}  # an ordered set
    for word in filter(None, (part.strip() for part in selection.split(","))):
        if word in category_of or word in others:
            found = [word]
        else:
            found = [name for name, kind in category_of.items() if word.lower() in ("all", kind.lower())]
        if not found:
            known = ["all", *CATEGORIES, *category_of]
            raise ValueError(f"--tasks: {unknown_name('task or category', word, known)}")
        names.update(dict.fromkeys(found))
    if not names:
        raise ValueError(f"--tasks must be all, a category or task names (got {selection!r})")
    return list(names)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Error text for a name that is not known, with the nearest known names."""
    spelling = {candidate.lower(): candidate for candidate in known}
    nearest = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.5)]
    return f"{kind} {name!r:.80} is unknown (nearest: {', '.join(nearest) or 'none'})"


def _hash_of(folder: Path) -> str:
    return hash_files(folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / DOWNLOADED))
