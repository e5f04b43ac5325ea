"""An evaluation from options to report: what run_eval.py runs.

Importing this file imports mteb (three seconds).
"""

import logging
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
from mteb.abstasks.abstask import AbsTask

from ref.embedder import Embedder
from ref.evaluation import plan, results
from ref.evaluation.cached_embedder import CachedEmbedder
from ref.evaluation.card_scores import time_of_completion, update_cards
from ref.evaluation.distributed_embedder import DistributedEmbedder
from ref.evaluation.encoder import MtebEncoder, instruction_for, published_instructions, read_instructions
from ref.evaluation.few_shot import FewShotExamples, load_examples
from ref.evaluation.local_data import LocalDataMixin
from ref.evaluation.model_identity import (
    PLAN_FILE,
    default_output,
    local_checkpoint,
    model_identity,
    trained_without_instructions,
)
from ref.evaluation.plan import TaskPlan
from ref.evaluation.report.run_results import Report, TaskResult
from ref.evaluation.report.write import write_report
from ref.evaluation.results import TaskScore, score_task
from ref.evaluation.retrieval import NO_INSTRUCTION, TextEmbedder, read_task_file
from ref.evaluation.tasks import TaskSelection, benchmark_tasks, is_official, select_tasks, task_folders
from ref.evaluation.training_data import tasks_in_training_data
from ref.model.checkpoint import resolve_checkpoint
from ref.model.known_models import defaults_for
from ref.text.prompts import PROMPT_FILE
from ref.utils.block_cache import BlockCache
from ref.utils.device import keep_freed_memory, resolve_device, resolve_dtype
from ref.utils.distributed import Distributed, RankFailure
from ref.utils.environment import environment_info, utc_now
from ref.utils.files import hash_file, hash_files
from ref.utils.outputs import check_outside, claim_output

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class EvalConfig:
    """The options of run_eval.py; see its `--help` for what None means."""

    model: str
    tasks: str | None = None
    data_dir: Path | None = None
    template: str | None = None
    output: Path | None = None
    instructions: Path | None = None
    examples: int = 0
    examples_file: Path | None = None
    seed: int = 0
    plan: bool = False
    embedding_cache: Path | None = None
    embedding_cache_gb: float = 50.0
    max_text_tokens: int | None = None
    dtype: str = "auto"
    base: str | None = None

    @property
    def changed(self) -> list[str]:
        """The given options with which a model is not scored as it is."""
        flags = ("examples", "examples_file", "template", "max_text_tokens", "base")
        return [flag for flag in flags if getattr(self, flag)]

    @property
    def experiment(self) -> dict[str, Any]:
        """The same with their values, by which results are kept apart; `base` is part of the revision."""
        values = {flag: getattr(self, flag) for flag in self.changed if flag != "base"}
        if (path := self.examples_file) is not None:
            content = hash_files(path, path.glob("*.json")) if path.is_dir() else hash_file(path)
            values["examples_file"] = f"{path.resolve().name:.60}-{content[:8]}"
        return values | ({"seed": self.seed} if self.seed else {})  # of --examples

    @property
    def report_stem(self) -> str:
        """Name of the report's files without ending, such as report, or report-examples-2."""
        options = {**self.experiment, **({"base": Path(self.base).name[:60]} if self.base else {})}
        return "-".join(["report", *(f"{flag.replace('_', '-')}-{value}" for flag, value in options.items())])


def silence_libraries() -> None:
    """Disable the progress bars of datasets, the log of mteb, and warnings."""
    datasets.disable_progress_bars()
    logging.getLogger("mteb").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")


def evaluate(config: EvalConfig) -> int:
    """Score the selected tasks; returns the exit code: 0, or 1 if a task failed.

    Tasks, instructions and examples are checked before the model is loaded. Rank 0 runs mteb, all ranks embed. Raises
    ValueError or OSError for invalid input.
    """
    silence_libraries()
    selection = select_tasks("all" if config.tasks is None else config.tasks, config.data_dir)
    folders = [] if config.data_dir is None else [folder.name for folder in task_folders(config.data_dir)]
    known = [*folders, *(task.metadata.name for task in selection.tasks)]
    given = read_instructions(config.instructions, known) if config.instructions else {}
    published = published_instructions(config.model)
    published = {name: published[name] for name in (task.metadata.name for task in selection.tasks)
                 if name in published and not has_own_instruction(config, name)}
    distributed = Distributed()
    if published and distributed.rank == 0:
        print(f"instructions: mteb has one for this model and {', '.join(published)}")
    if trained_without_instructions(config.model):
        published = dict.fromkeys(known, NO_INSTRUCTION)
        if distributed.rank == 0:
            print("instructions: none, as in the run's training (see --instructions)")
    if distributed.rank == 0 and not config.plan:
        read_caches_if_offline(selection.tasks)
    with claim_results(config) if distributed.rank == 0 else nullcontext(Path()) as output:
        return _evaluate(config, selection, known, published | given, distributed, output)


def has_own_instruction(config: EvalConfig, task: str) -> bool:
    """Whether a task's local folder has a task.json with an instruction."""
    return config.data_dir is not None and "instruction" in read_task_file(config.data_dir / task)


def claim_results(config: EvalConfig) -> AbstractContextManager[Path]:
    """Hold the output folder; results of an earlier call stay and are used. The embedding cache is checked too."""
    output = config.output or default_output(config.model)
    inputs = [path for path in (config.data_dir, config.instructions, config.examples_file) if path is not None]
    if config.embedding_cache is not None:
        model = [resolve_checkpoint(config.model)] if Path(config.model).is_dir() else []
        check_outside(config.embedding_cache, [*inputs, *model], f"--embedding-cache {config.embedding_cache}")
    return claim_output(output, inputs=inputs, is_ours=lambda: plan.is_plan_file(output / PLAN_FILE))


def _evaluate(
    config: EvalConfig, selection: TaskSelection, known: list[str], instructions: Mapping[str, str],
    distributed: Distributed, output: Path,
) -> int:
    # a plan estimates tasks of the hub without their data, so without examples too
    drawn_from = [task for task in selection.tasks if isinstance(task, LocalDataMixin) or not config.plan]
    few_shot = {} if distributed.rank else load_examples(
        drawn_from if config.examples else selection.tasks, known, count=config.examples, path=config.examples_file,
        seed=config.seed)
    device = resolve_device()
    keep_freed_memory(device)
    dtype, why = resolve_dtype(config.dtype, device)
    if distributed.rank == 0:
        print(f"dtype: {dtype} ({why})")
    embedder = Embedder.from_pretrained(
        config.model, dtype=dtype, max_text_tokens=config.max_text_tokens, template=config.template,
        base=config.base)
    if distributed.rank == 0:
        print(f"template: {template_reason(config, embedder)}")
    sharded = DistributedEmbedder(embedder, distributed)
    if distributed.rank:
        sharded.worker_loop()
        distributed.close()
        return 0
    if len(drawn_from) < len(selection.tasks) and config.examples:
        print("the plan is without in-context examples for tasks whose data are not local")
    try:
        few_shot = fit_examples(few_shot, selection.tasks, embedder, instructions)
        encoder = make_encoder(config, sharded, precision=embedder.precision, overrides=instructions, few_shot=few_shot)
        return score_selection(config, selection, encoder, embedder, output, world_size=distributed.world_size)
    finally:
        with suppress(RuntimeError):  # another rank has ended before, after Ctrl-C
            sharded.shutdown()
        distributed.close()


def estimated_plans(tasks: Sequence[AbsTask], embedder: Embedder) -> dict[str, plan.TaskPlan]:
    """Plans of tasks whose data would have to be downloaded."""
    rate, limit = plan.tokens_per_character(embedder.prompt_encoder), embedder.prompt_encoder.max_text_tokens
    found = {task.metadata.name: plan.estimate_plan(task, rate=rate, max_text_tokens=limit)
             for task in tasks if not isinstance(task, LocalDataMixin)}
    return {name: each for name, each in found.items() if each is not None}


def read_caches_if_offline(tasks: Sequence[AbsTask]) -> None:
    """Without a network let the libraries read their caches at once, instead of after many attempts; says so."""
    if all(isinstance(task, LocalDataMixin) for task in tasks):
        return
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLError):
            return  # an answer, whose certificate the libraries may know
        print(f"offline: {endpoint} cannot be reached ({reason}); only data in the caches of this machine are used "
              "(--data-dir reads local folders)", flush=True)
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def template_reason(config: EvalConfig, embedder: Embedder) -> str:
    """The prompt template, and where it comes from."""
    name, folder = embedder.prompt_encoder.template_name, local_checkpoint(config.model)
    if config.template:
        return f"{name} (as given)"
    if defaults_for(config.model) or (folder is not None and (folder / PROMPT_FILE).exists()):
        return f"{name} (the model's own)"
    return f"{name} ({'default' if name == 'paper' else 'its markers are tokens of the vocabulary'}; see --template)"


def make_encoder(
    config: EvalConfig, embedder: TextEmbedder, *, precision: str, overrides: Mapping[str, str],
    few_shot: Mapping[str, FewShotExamples],
) -> MtebEncoder:
    """The encoder for mteb, with an embedding cache if the options name one."""
    name, revision = model_identity(config.model, base=config.base)
    # not "precision", which mteb interprets
    settings = {"max_text_tokens": config.max_text_tokens, "template": config.template, "weights": precision}
    if config.embedding_cache is not None:
        embedder = CachedEmbedder(embedder, BlockCache(config.embedding_cache), key=f"{name} {revision} {settings}",
                                  max_bytes=config.embedding_cache_gb * 1e9)
    return MtebEncoder(embedder, name=name, revision=revision, overrides=overrides, settings=settings,
                       few_shot=few_shot, experiment=config.experiment, progress=True)


def score_selection(
    config: EvalConfig, selection: TaskSelection, encoder: MtebEncoder, embedder: Embedder, output: Path, *,
    world_size: int,
) -> int:
    """Print the plan, score the tasks, print the table and write the report; returns the exit code."""
    finished = time_of_completion(Path(config.model))
    tasks, missing = selection.tasks, selection.missing if config.tasks else []
    estimates = estimated_plans(tasks, embedder) if config.plan else {}
    planned = [task for task in tasks if task.metadata.name not in estimates]
    plans, sample = plan.make_plan(encoder, planned, embedder.prompt_encoder, output / PLAN_FILE)
    if estimates:
        texts, tokens = (sum(getattr(each, key) for each in estimates.values()) for key in ("unique", "tokens"))
        rate = plan.tokens_per_character(embedder.prompt_encoder)
        sample += plan.english_sample(tokens / texts / rate)
        print(f"{len(estimates)} tasks are estimated from mteb's statistics and {rate:.3f} tokens per character; exact "
              "counts need their data (--download)")
    plans = {**estimates, **plans}
    trained = tasks_in_training_data(config.model, (task.metadata.name for task in tasks))
    print(plan.table(plans, plan.measure_speed(embedder, sample) * world_size, trained))
    unplanned = [task.metadata.name for task in tasks if task.metadata.name not in plans]
    if unplanned:
        print(f"not in the plan because of an error: {', '.join(unplanned)}")
    if config.plan:
        return 1 if unplanned else 0

    scores, failed = score_tasks(encoder, tasks, output, plans)
    required = {name: str(task.metadata.type) for name, task in benchmark_tasks().items()}
    unofficial = [task for task in tasks if not is_official(task)]
    print("\n" + results.table(scores, required, missing, unofficial=[task.metadata.name for task in unofficial]))
    if unofficial:
        print(f"unofficial data: not compared with published scores ({len(unofficial)} of {len(tasks)} tasks, from "
              f"{config.data_dir})")
    timed = plans if config.embedding_cache is None else {}  # with cached embeddings the speed means nothing
    if scores or not (output / f"{config.report_stem}.html").exists():  # else it stays that of an earlier evaluation
        for path in write_run_report(encoder, tasks, scores, output, config.report_stem, model=config.model,
                                     plans=timed, failed=failed, missing=missing, training_data=trained):
            print(f"report: {path}")
    update_cards(Path(config.model), tasks, scores, finished, config.changed)
    print(f"results: {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def fit_examples(
    few_shot: Mapping[str, FewShotExamples], tasks: Sequence[AbsTask], embedder: Embedder, overrides: Mapping[str, str],
) -> dict[str, FewShotExamples]:
    """Keep the examples that fit into the prompt, so that the records state what was used; prints a line per task."""
    fitted = {}
    for task in tasks:
        name = task.metadata.name
        if name not in few_shot:
            continue
        examples, source = few_shot[name].examples, few_shot[name].source
        instruction = instruction_for(task.metadata, overrides)
        if examples and instruction is None:
            raise ValueError(f"{name}: in-context examples need an instruction (got none); give it in --instructions")
        kept = embedder.prompt_encoder.prefix(instruction, examples).num_examples
        if kept < len(examples):
            source += f", {len(examples) - kept} dropped (prompt limit)"
        fitted[name] = FewShotExamples(examples[:kept], source)
        print(f"examples for {name}: {kept} ({source})")
    return fitted


def score_tasks(
    encoder: MtebEncoder, tasks: Sequence[AbsTask], output: Path, plans: Mapping[str, TaskPlan],
) -> tuple[list[TaskScore], dict[str, str]]:
    """Score tasks one after the other; a task that fails does not stop the others. Prints two lines per task.

    Returns the scores, and task name -> error of failed tasks.
    """
    scores: list[TaskScore] = []
    failed: dict[str, str] = {}
    progress = plan.TokenProgress(sum(task_plan.tokens for task_plan in plans.values()))
    for number, task in enumerate(tasks, start=1):
        name = task.metadata.name
        print(f"[{number}/{len(tasks)}] {name} ({task.metadata.type})", flush=True)
        tokens = plans[name].tokens if name in plans else 0
        try:
            score = score_task(encoder, task, output)
        except (torch.cuda.OutOfMemoryError, RankFailure):
            raise  # an exit code of its own; finished results stay
        except Exception as error:  # any error: the other tasks do not depend on it
            task.unload_data()  # as mteb does after a success
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"
            print(f"  failed: {failed[name]}")
            progress.remaining_tokens -= tokens
            continue
        scores.append(score)
        print(f"  {100 * score.score:.2f} ({progress.update(tokens, score.elapsed_s)})")
    return scores, failed


def write_run_report(
    encoder: MtebEncoder, tasks: Sequence[AbsTask], scores: Sequence[TaskScore], output: Path, stem: str, *, model: str,
    plans: Mapping[str, TaskPlan], failed: Mapping[str, str], missing: Sequence[str], training_data: Mapping[str, str],
) -> list[Path]:
    """Write `stem`.html and `stem`.md into `output`; returns their paths. Tasks without a plan have no token count."""
    by_name = {task.metadata.name: task for task in tasks}
    task_results = []
    for score in scores:
        task, prompt = by_name[score.task], encoder.prompt_settings(by_name[score.task].metadata)
        task_results.append(TaskResult(
            task=score.task, category=score.category, metric=score.metric, score=100 * score.score,
            instruction=prompt["instruction"] or "", examples=len(prompt["examples"]),
            examples_source=prompt["examples_source"], seconds=score.elapsed_s,
            tokens=plans[score.task].tokens if score.task in plans else None, official=is_official(task),
            training_data=training_data.get(score.task, "")))
    versions = {name: version for name, version in environment_info()["versions"].items() if version}
    report = Report(
        model=model.rstrip("/"), date=utc_now(), versions=versions, tasks=task_results, failed=failed, missing=missing)
    return write_report(report, output, stem)
