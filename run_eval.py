"""Score a text embedder with mteb: its tasks, its metrics, its result files.

    python run_eval.py                                    the newest run, on the sample world in data/held_out
    python run_eval.py --tasks all                        MTEB(eng, v2), 41 tasks, data from the hub
    python run_eval.py --tasks STS,ArguAna --model ID     a category and a task, with a model from the hub
    python run_eval.py --data-dir DIR                     data from local folders, each named after its task

A folder of your own needs a task.json, which names the task whose class and metric to use, and may give an
instruction: {"class": "ArguAna", "instruction": "Given a question, retrieve answers"} (see ref/tasks.py).

Results are written in mteb's cache format and read back, so a run that stops resumes. A failing task is
reported, and the rest goes on. Exit code: 0, or 1 if a task failed, or 2 for bad input.
"""

import argparse
import datetime
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask

    from ref.scoring import MtebEncoder, Row

SAMPLE_WORLD = Path(__file__).resolve().parent / "data" / "held_out"
MODEL_FILES = (".safetensors", ".json", ".model")  # what decides the vectors of a model in a folder


def build_parser() -> argparse.ArgumentParser:
    """The command line; `--help` imports neither torch nor mteb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", metavar="all|CATEGORY|NAME,…", help="what to score (default: everything in --data-dir)")
    add("--model", metavar="FOLDER|HUB-ID", help="run, checkpoint folder or hub id (default: the newest run)")
    add("--data-dir", metavar="DIR", type=Path, help="data sets as local folders (default: the sample world; "
        "with --tasks: from the hub)")
    add("--template", choices=("report", "bge-en-icl"), help="prompt template (default: the model's own, else report)")
    add("--output", metavar="DIR", type=Path, help="result folder (default: RUN/mteb, or results/MODEL)")
    add("--instructions", metavar="FILE", type=Path, help='JSON {"task": "instruction"} in place of mteb\'s')
    add("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where runs are (default: %(default)s)")
    add("--max-tokens", metavar="N", type=int, help="cut texts to N tokens (default: the model's, else 512)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def evaluate(args: argparse.Namespace) -> int:
    """Tasks and instructions are checked before the model is loaded. Raises ValueError or OSError for bad input."""
    model, data_dir = args.model or str(newest_run(args.runs)), args.data_dir
    print(f"model: {model}" + ("" if args.model else f", the newest complete run in {args.runs}; or choose --model"))
    if args.tasks is None and data_dir is None:
        data_dir = SAMPLE_WORLD
        print("data: the sample world in data/held_out; or choose --tasks all (from the hub), or --data-dir")
    quiet()
    from ref.scoring import MtebEncoder, read_instructions, table
    from ref.tasks import benchmark_tasks, task_folders, tasks_from

    selection = tasks_from(args.tasks or "all", data_dir)
    folders = [] if data_dir is None else [folder.name for folder in task_folders(data_dir)]
    overrides = read_instructions(args.instructions, folders) if args.instructions else {}

    from ref.embedder import Embedder

    embedder = Embedder.from_pretrained(model, max_text_tokens=args.max_tokens, template=args.template)
    name, revision = identity(model)
    if data_dir is not None:
        revision += "-local-data"  # never among results on the hub's data
    output = args.output or default_output(model, name)
    output.mkdir(parents=True, exist_ok=True)
    encoder = MtebEncoder(
        embedder,
        name=name,
        revision=revision,
        overrides=overrides,
        settings={"max_tokens": args.max_tokens, "template": args.template},
        progress=sys.stderr.isatty(),
    )
    rows, failed = score_all(encoder, selection.tasks, output)
    required = {task.metadata.name: str(task.metadata.type) for task in benchmark_tasks().values()}
    print("\n" + table(rows, required, () if args.tasks is None else selection.missing))
    if data_dir is not None:
        print(f"data: {data_dir}; comparable with public figures only where it holds the official data")
    print(f"results: {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def score_all(encoder: "MtebEncoder", tasks: Sequence["AbsTask"], output: Path) -> tuple[list["Row"], dict[str, str]]:
    """Rows of the tasks that ran, and task name -> error of those that failed; prints a line for each."""
    from ref.scoring import score_task

    rows: list[Row] = []
    failed: dict[str, str] = {}
    for number, task in enumerate(tasks, start=1):
        name = task.metadata.name
        print(f"[{number}/{len(tasks)}] {name} ({task.metadata.type})", flush=True)
        try:
            row = score_task(encoder, task, output)
        except Exception as error:  # whatever it is, the other tasks do not depend on it
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"  failed, {failed[name]}")
            continue
        rows.append(row)
        how = "from the result cache" if row.elapsed_s is None else f"{row.elapsed_s:.1f} s"
        print(f"  {100 * row.score:.2f} ({how})")
    return rows, failed


def newest_run(runs: Path) -> Path:
    """The run folder whose run.json is complete and was finished last.

    Raises: ValueError if there is none, or a run.json is broken.
    """
    finished: dict[datetime.datetime, Path] = {}
    for path in sorted(runs.glob("*/run.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if run.get("complete"):
                finished[datetime.datetime.fromisoformat(run["finished"])] = path.parent
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f'{path}: {error!r}. Expected: JSON with "complete" and an ISO time "finished". '
                "Remove the folder, or choose a run with --model."
            ) from None
    if not finished:
        raise ValueError(
            f"{runs}: no complete run. Expected: a folder that run_train.py has finished. "
            "Train one (python run_train.py --data data/soft_labels.jsonl), or choose a model with --model."
        )
    return finished[max(finished)]


def identity(model: str) -> tuple[str, str]:
    """("owner/name", revision), where results go: a hub id and its commit, or a hash of the folder's files.

    An adapter's hash covers the name of its base model, not the base's weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(model, "config.json")
        return model, Path(cached).parent.name if isinstance(cached, str) else "main"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix in MODEL_FILES and path.name != "run.json":
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"local/{folder.resolve().name}", digest.hexdigest()[:16]


def default_output(model: str, name: str) -> Path:
    """Beside the weights of a run of ours, else under results/."""
    folder = Path(model)
    return folder / "mteb" if (folder / "run.json").is_file() else Path("results") / name.replace("/", "__")


def quiet() -> None:
    """Leave the terminal to the lines printed here: no bars of mteb and `datasets`, no warnings."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, by the next line
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("mteb").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
