"""Score a text embedder with mteb: its tasks, its metrics, its result files.

    python run_eval.py                                    the newest run, on the sample world in data/held_out
    python run_eval.py --tasks all                        MTEB(eng, v2), 41 tasks, data from the hub
    python run_eval.py --tasks STS,ArguAna --model ID     a category and a task, with a model from the hub
    python run_eval.py --data-dir DIR                     data from local folders, each named after its task
    python run_eval.py --tasks all --fetch DIR            only fetch the data, into such folders
    python run_eval.py --tasks all --plan                 only say what it will cost: texts, tokens, hours
    python run_eval.py --tasks all --examples 2           two solved examples before each query, where there are some
    torchrun --nproc-per-node 8 run_eval.py --tasks all   eight GPUs

A folder of your own needs a task.json, which names the task whose class and metric to use, and may give an
instruction: {"class": "ArguAna", "instruction": "Given a question, retrieve answers"} (see scoring/tasks.py).

Results are written in mteb's cache format and read back, so a run that stops resumes; with --vector-cache inside a
task too. A failing task is reported, and the rest goes on. At the end: a table here, report.html and report.md in the
result folder. Exit code: 0, or 1 if a task failed, or 2 for bad input, or 130 after Ctrl-C.
"""

import argparse
import datetime
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

    from ref.embedder import Embedder
    from ref.held_out import TextEmbedder
    from scoring.few_shot import FewShot
    from scoring.plan import TaskPlan
    from scoring.score import MtebEncoder, Row
    from scoring.sharding import SharedEmbedder
    from scoring.tasks import Selection

SAMPLE_WORLD = Path(__file__).resolve().parent / "data" / "held_out"
PLAN = "plan.json"  # in the result folder
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
    add("--examples", metavar="K", type=int, default=0, help="solved examples before each query, from the task's "
        "training split (default: 0, zero-shot)")
    add("--examples-file", metavar="FILE", type=Path, help='JSON {"task": [{"query": …, "response": …}]}: own examples')
    add("--seed", type=int, default=0, help="draws the examples (default: 0)")
    add("--plan", action="store_true", help="print what it will cost, and stop")
    add("--fetch", metavar="DIR", type=Path, help="fetch the tasks' data into DIR, for --data-dir, and stop")
    add("--vector-cache", metavar="DIR", type=Path, help="keep vectors there: a task that was stopped goes on")
    add("--vector-cache-gb", metavar="GB", type=float, default=50.0, help="at most this much (default: 50)")
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
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def evaluate(args: argparse.Namespace) -> int:
    """Tasks, instructions and examples are checked before the model is loaded. Raises ValueError or OSError."""
    if args.fetch is not None:
        return fetch_only(args)
    model, data_dir = args.model or str(newest_run(args.runs)), args.data_dir
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None
    say(f"model: {model}" + ("" if args.model else f", the newest complete run in {args.runs}; or choose --model"))
    if args.tasks is None and data_dir is None:
        data_dir = SAMPLE_WORLD
        say("data: the sample world in data/held_out; or choose --tasks all (from the hub), or --data-dir")
    quiet()
    from ref.team import Team
    from scoring.score import read_instructions
    from scoring.sharding import SharedEmbedder
    from scoring.tasks import task_folders, tasks_from

    selection = tasks_from(args.tasks or "all", data_dir)
    folders = [] if data_dir is None else [folder.name for folder in task_folders(data_dir)]
    overrides = read_instructions(args.instructions, folders) if args.instructions else {}

    from ref.embedder import Embedder

    team = Team()
    few_shot = {} if team.rank else examples(args, selection.tasks, folders)
    embedder = Embedder.from_pretrained(model, max_text_tokens=args.max_tokens, template=args.template)
    shared = SharedEmbedder(embedder, team)
    if team.rank:
        shared.serve()
        team.close()
        return 0
    try:
        return score(args, model, data_dir, selection, embedder, shared, overrides, few_shot)
    finally:
        shared.dismiss()
        team.close()


def fetch_only(args: argparse.Namespace) -> int:
    """--fetch: the data of the tasks, nothing else."""
    quiet()
    from scoring.tasks import fetch, tasks_from

    failed = fetch(tasks_from(args.tasks or "all").tasks, args.fetch)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries these again")
    return 1 if failed else 0


def examples(args: argparse.Namespace, tasks: Sequence["AbsTask"], folders: Sequence[str]) -> dict[str, "FewShot"]:
    """Solved examples by task: from a file, or from the training splits; none by default."""
    from scoring.few_shot import FewShot, examples_for, examples_from_file
    from scoring.tasks import benchmark_tasks

    if args.examples < 0:
        raise ValueError(f"--examples is {args.examples}. Expected is at least 0. Give another number.")
    if args.examples_file is not None and args.examples:
        raise ValueError("--examples and --examples-file are both given. Expected is one source. Leave one out.")
    if args.examples_file is not None:
        own = examples_from_file(args.examples_file, [*benchmark_tasks(), *folders])
        return {name: FewShot(some, f"the file {args.examples_file.name}") for name, some in own.items()}
    if not args.examples:
        return {}
    return {task.metadata.name: examples_for(task, args.examples, seed=args.seed) for task in tasks}


def score(
    args: argparse.Namespace, model: str, data_dir: Path | None, selection: "Selection", embedder: "Embedder",
    shared: "SharedEmbedder", overrides: dict[str, str], few_shot: dict[str, "FewShot"],
) -> int:
    """Plan, score, table, report; the first process alone."""
    from scoring import plan
    from scoring.score import MtebEncoder, table
    from scoring.tasks import benchmark_tasks, is_official

    name, revision = identity(model)
    if data_dir is not None:
        revision += "-local-data"  # never among results on the hub's data
    output = args.output or default_output(model, name)
    output.mkdir(parents=True, exist_ok=True)
    settings = {"max_tokens": args.max_tokens, "template": args.template, "computed_in": embedder.precision}
    vectors = cached(args, shared, f"{name} {revision} {settings}")
    encoder = MtebEncoder(
        vectors, name=name, revision=revision, overrides=overrides, settings=settings,
        few_shot=that_fit(few_shot, selection.tasks, embedder, overrides), progress=sys.stderr.isatty())
    plans, sample = plan.make_plan(encoder, selection.tasks, embedder.prompter, output / PLAN)
    speed = plan.measured_speed(embedder, sample) * shared.team.size
    print(plan.table(plans, speed))
    uncounted = [task.metadata.name for task in selection.tasks if task.metadata.name not in plans]
    if uncounted:
        print(f"not counted, since it fails: {', '.join(uncounted)}")
    if args.plan:
        return 1 if uncounted else 0
    rows, failed = score_all(encoder, selection.tasks, output, plans)
    required = {task.metadata.name: str(task.metadata.type) for task in benchmark_tasks().values()}
    print("\n" + table(rows, required, () if args.tasks is None else selection.missing))
    unknown = [task.metadata.name for task in selection.tasks if not is_official(task)]
    if unknown:
        print(f"data: {data_dir}; {len(unknown)} of {len(selection.tasks)} sets are not known to be official (what "
              "--fetch left is), and so not compared with public figures")
    missing = () if args.tasks is None else selection.missing
    counted = plans if args.vector_cache is None else {}  # vectors that were kept tell nothing of speed
    for path in report(encoder, selection.tasks, rows, failed, counted, missing, output, model):
        print(f"report: {path}")
    print(f"results: {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def that_fit(
    few_shot: dict[str, "FewShot"], tasks: Sequence["AbsTask"], embedder: "Embedder", overrides: dict[str, str],
) -> dict[str, "FewShot"]:
    """The examples that the prompt has room for, so that the record tells what was shown."""
    from scoring.few_shot import FewShot
    from scoring.score import instruction_for

    found = {}
    for task in tasks:
        some = few_shot.get(task.metadata.name)
        if some is None:
            continue
        room = embedder.prompter.prefix(instruction_for(task.metadata, overrides), some.examples).examples
        dropped = len(some.examples) - room
        found[task.metadata.name] = FewShot(some.examples[:room], some.source + (
            f", {dropped} left out for want of room" if dropped else ""))
        print(f"examples for {task.metadata.name}: {room} ({found[task.metadata.name].source})")
    return found


def cached(args: argparse.Namespace, shared: "SharedEmbedder", key: str) -> "TextEmbedder":
    """The embedder, behind a cache of vectors where one is asked for."""
    if args.vector_cache is None:
        return shared
    from labelling.cache import Cache, CachedEmbedder

    return CachedEmbedder(shared, Cache(args.vector_cache), key=key, max_bytes=args.vector_cache_gb * 1e9)


def report(
    encoder: "MtebEncoder", tasks: Sequence["AbsTask"], rows: Sequence["Row"], failed: dict[str, str],
    plans: dict[str, "TaskPlan"], missing: Sequence[str], output: Path, model: str,
) -> list[Path]:
    """Write report.html and report.md."""
    from leaderboard.report import write_report
    from leaderboard.results import Report, TaskResult
    from ref.runs import machine, now
    from scoring.tasks import is_official

    metadata = {task.metadata.name: task.metadata for task in tasks}
    official = {task.metadata.name: is_official(task) for task in tasks}
    results = []
    for row in rows:
        prompt = encoder.prompt_of(metadata[row.task])
        results.append(TaskResult(
            task=row.task, category=row.category, metric=row.metric, score=100 * row.score,
            instruction=prompt["instruction"], examples=len(prompt["examples"]),
            examples_source=prompt["examples_source"], seconds=row.elapsed_s,
            tokens=plans[row.task].tokens if row.task in plans else None, official=official[row.task]))
    versions = {name: version for name, version in machine()["versions"].items() if version}
    return write_report(Report(model=model, date=now(), versions=versions, tasks=results, failed=failed,
                               missing=missing), output)


def score_all(
    encoder: "MtebEncoder", tasks: Sequence["AbsTask"], output: Path, plans: dict[str, "TaskPlan"],
) -> tuple[list["Row"], dict[str, str]]:
    """Rows of the tasks that ran, and task name -> error of those that failed; prints a line for each."""
    from scoring.score import score_task

    rows: list[Row] = []
    failed: dict[str, str] = {}
    left = sum(plan.tokens for plan in plans.values())
    done, spent_s = 0, 0.0
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
        tokens = plans[name].tokens if name in plans else 0
        left -= tokens
        how = "from the result cache"
        if row.elapsed_s is not None:
            done, spent_s = done + tokens, spent_s + row.elapsed_s
            how = f"{row.elapsed_s:.1f} s, {tokens:,} tokens; left {left:,}"
            how += f", {left * spent_s / done / 60:.0f} minutes" if done and left else ""
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
    """("owner/name", revision), where results go: a hub id and its commit, or a hash of the folder's files."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        found = (huggingface_hub.try_to_load_from_cache(model, name) for name in ("config.json", "adapter_config.json"))
        return model, next((Path(path).parent.name for path in found if isinstance(path, str)), "main")
    from ref.embedder import inside_run, with_bases
    from ref.runs import hash_files

    parts = with_bases(inside_run(folder))  # not what scoring or further training writes beside the model
    hashes = [hash_files(part, (path for path in part.glob("*") if path.suffix in MODEL_FILES and path.name != PLAN))
              for part in parts]
    return f"local/{folder.resolve().name}", "-".join(one[:16] for one in hashes)


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
