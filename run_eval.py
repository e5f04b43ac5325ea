"""Score a text embedder with mteb: its tasks, metrics and result files.

    python run_eval.py                                    the newest run on the sample data in data/held_out
    python run_eval.py --tasks all                        MTEB(eng, v2), 41 tasks, data from the hub
    python run_eval.py --tasks STS,ArguAna --model ID     a category and a task, a model from the hub
    python run_eval.py --data-dir DIR                     data from local folders, each named after its task
    python run_eval.py --tasks all --download DIR         only download the data into such folders
    python run_eval.py --tasks all --plan                 only print the cost: texts, tokens, hours
    python run_eval.py --tasks all --examples 2           two in-context examples, for tasks with a training split
    torchrun --nproc-per-node 8 run_eval.py --tasks all   eight GPUs

A folder that is not named after a task of mteb needs a task.json with the task whose class and metric are used, and
optionally the instruction: {"class": "ArguAna", "instruction": "Given a question, retrieve answers"} (see
ref/evaluation/tasks.py).

Results are written in mteb's format and read again by the next run, so an interrupted evaluation continues; with
--embedding-cache also inside a task. If a task fails, the others are scored. At the end a table is printed, and
report.html and report.md are written to the result folder (report-OPTIONS with other options than the model's own).
Exit code: 0, 1 if a task failed, 2 for invalid input, 3 if GPU memory runs out, 4 if a process cannot join the others,
130 after Ctrl-C, or SIGTERM to a single process.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

SAMPLE_DATA = Path(__file__).resolve().parent / "data" / "held_out"


def build_parser() -> argparse.ArgumentParser:
    """The command line. Neither torch nor mteb is imported for `--help` and for errors in options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", metavar="all|CATEGORY|NAME,…", help="tasks to score (default: all in --data-dir)")
    add("--model", metavar="FOLDER|HUB-ID", help="run, checkpoint folder or hub id (default: the newest run)")
    add("--base", metavar="FOLDER|HUB-ID", help="the model under an adapter (default: the one that the adapter names)")
    add("--data-dir", metavar="DIR", type=Path, help="folder of data sets (default: the sample data; with --tasks: the "
        "hub)")
    add("--template", help="prompt template, a key of TEMPLATES in ref/text/prompts.py (default: the model's own)")
    add("--output", metavar="DIR", type=Path, help="result folder (default: RUN/mteb, or results/MODEL)")
    add("--instructions", metavar="FILE", type=Path, help='JSON {"task": "instruction"}, instead of mteb\'s')
    add("--runs", metavar="DIR", type=Path, help="folder of runs (default: runs)")
    add("--examples", metavar="K", type=int, default=0, help="in-context examples from each task's training split "
        "(default: 0, zero-shot)")
    add("--examples-file", metavar="FILE|DIR", type=Path, help='JSON {"task": [{"query": …, "response": …}]}, or a '
        "folder of TASK.json with such a list each, instead of --examples")
    add("--seed", type=int, help="random seed of --examples (default: 0)")
    add("--plan", action="store_true", help="print texts, tokens and hours, and stop")
    add("--download", metavar="DIR", type=Path, help="download the tasks' data into DIR, for --data-dir, and stop")
    add("--embedding-cache", metavar="DIR", type=Path, help="store embeddings in DIR: an interrupted task continues")
    add("--embedding-cache-gb", metavar="GB", type=float, help="maximum size (default: 50)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="precision of the forward pass "
        "(default: auto, bfloat16 where the processor is faster in it)")
    add("--max-text-tokens", metavar="N", type=int, help="truncate texts to N tokens (default: the model's, else 512)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of the libraries; read when tqdm is imported
    try:
        if args.examples < 0:
            raise ValueError(f"--examples must be >= 0 (got {args.examples})")
        if args.examples and args.examples_file is not None:
            raise ValueError("--examples and --examples-file exclude each other; give one")
        if args.embedding_cache_gb is not None and not 0 < args.embedding_cache_gb < math.inf:
            raise ValueError(f"--embedding-cache-gb must be a finite number > 0 (got {args.embedding_cache_gb})")
        check_used(args)
        return evaluate(args) if args.download is None else download_data(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except RuntimeError as error:
        codes = {"OutOfMemoryError": 3, "RankFailure": 4}  # by name: torch is not imported before it is needed
        if type(error).__name__ not in codes:
            raise
        print(f"error: {str(error).splitlines()[0]:.300}", file=sys.stderr)
        return codes[type(error).__name__]


def check_used(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that the run would not use."""
    default = build_parser().parse_args([])
    uses = {"seed": (args.examples, "--examples"), "embedding_cache_gb": (args.embedding_cache, "--embedding-cache"),
            "runs": (args.model is None, "the newest run, without --model")}
    if args.download is not None:
        scoring = (False, "scoring, not for --download")
        uses = {name: scoring for name in vars(args) if name not in ("tasks", "download")}
    for name, (is_used, use) in uses.items():
        if getattr(args, name) != getattr(default, name) and not is_used:
            raise ValueError(f"--{name.replace('_', '-')} is for {use} (got {getattr(args, name)})")


def download_data(args: argparse.Namespace) -> int:
    """Download the data of the tasks; returns the exit code."""
    from ref.utils.outputs import check_cache

    check_cache("MTEB_CACHE", ".cache/mteb")
    from ref.evaluation.run import silence_libraries
    from ref.evaluation.tasks import download, select_tasks

    silence_libraries()
    failed = download(select_tasks("all" if args.tasks is None else args.tasks).tasks, args.download)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries these again")
    return 1 if failed else 0


def evaluate(args: argparse.Namespace) -> int:
    """Choose model and data where none are given, then score; returns the exit code. Raises ValueError or OSError."""
    from ref.evaluation.model_identity import newest_run
    from ref.utils.files import read_json
    from ref.utils.outputs import check_cache
    from ref.utils.progress import escape_unprintable

    escape_unprintable()
    runs = args.runs or Path("runs")
    model, data_dir = args.model or str(newest_run(runs)), args.data_dir
    log = print if os.environ.get("RANK", "0") == "0" else lambda *_: None
    log(f"model: {model}" + ("" if args.model else f", the newest complete run in {runs} (see --model)"))
    if (Path(model) / "run.json").is_file() and not read_json(Path(model) / "run.json").get("complete"):
        log("note: this run is not complete; the model is that of its last stop")
    if args.tasks is None and data_dir is None:
        data_dir = SAMPLE_DATA
        log("data: the sample data in data/held_out (see --tasks and --data-dir)")

    check_cache("MTEB_CACHE", ".cache/mteb")  # mteb creates it when it is imported
    from ref.evaluation import run

    options = {key: value for key, value in vars(args).items() if key not in ("runs", "download") and value is not None}
    return run.evaluate(run.EvalConfig(**{**options, "model": model, "data_dir": data_dir}))


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":  # ranks wait for each other where no handler interrupts
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half-written stays
    sys.exit(main())
