"""The scores of an evaluation in the model cards of a run."""

from collections.abc import Sequence
from pathlib import Path

from mteb.abstasks.abstask import AbsTask

from ref.evaluation.results import TaskScore
from ref.evaluation.tasks import benchmark_tasks, data_origin, is_official
from ref.model.card import Score, add_scores, run_folder
from ref.model.checkpoint import resolve_checkpoint
from ref.utils.files import read_json


def time_of_completion(model: Path) -> str | None:
    """When the run that a model is, or whose result it is, was completed; None for one that is not complete, and for
    anything else.
    """
    run = run_folder(model.resolve())
    facts = {} if run is None else read_json(run / "run.json")
    return facts.get("finished") if facts.get("complete") else None


def update_cards(
    model: Path, tasks: Sequence[AbsTask], scores: Sequence[TaskScore], finished: str | None, changed: Sequence[str],
) -> None:
    """Put the scores into the model cards of a run that was complete when the evaluation began, and still is the same.

    Only scores of the model as it is: `changed` are the options with which it was evaluated otherwise, such as
    in-context examples; and only if `model` is the run, or the folder of it that is scored for the run. What cannot be
    written there is only reported.
    """
    run = run_folder(model.resolve()) or model
    by_name, official = {task.metadata.name: task for task in tasks}, benchmark_tasks()
    found = {}
    for score in scores:
        task = by_name[score.task]
        found[score.task] = Score(
            score.category, score.metric, round(100 * score.score, 2), *data_origin(task), ", ".join(task.eval_splits),
            is_official(task) and score.task in official, ", ".join(task.hf_subsets))
    if finished is None or not found:
        return
    try:
        if changed:
            print(f"model card: not updated (--{changed[0].replace('_', '-')} is not the model's own)")
        elif (result := resolve_checkpoint(str(run)).resolve()) != resolve_checkpoint(str(model)).resolve():
            print(f"model card: not updated (a run's scores are those of its {result.name}/)")
        elif time_of_completion(model) != finished:
            print("model card: not updated (the run has changed)")
        else:
            for path in add_scores(run, found):
                print(f"model card: {path} was edited and is left as it is")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"model card: not updated ({str(error).splitlines()[0]:.200})")
