"""The plan: counts of texts and tokens, and no effect on the scores."""

import json
from pathlib import Path
from typing import Any

import mteb
import pytest
from sample_sets import WordHash, encoder_of, world
from tiny_mteb import write_lines

import run_eval
from ref.embedder import Embedder
from ref.evaluation import plan
from ref.evaluation.results import score_task
from ref.evaluation.tasks import select_tasks

__all__ = ["world"]  # a fixture


def test_the_plan_counts_texts_and_tokens(world: Path, tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    """Texts, unique texts, and tokens as the tokenizer counts them, without an embedding of the model."""
    words = WordHash()
    encoder = encoder_of(words)
    tasks = select_tasks("BIOSSES,MyRetrieval,TwitterURLCorpus", world).tasks
    prompt_encoder = Embedder.from_pretrained(tiny_run).prompt_encoder
    plans, sample = plan.make_plan(encoder, tasks, prompt_encoder, tmp_path / "plan.json")
    assert not words.calls and sample

    for task in tasks:
        words.calls.clear()
        score_task(encoder, task, tmp_path / "results")
        found = plans[task.metadata.name]
        assert found.texts == sum(len(texts) for _, texts in words.calls)
        assert found.unique == sum(len(set(texts)) for _, texts in words.calls)
        prefixes = [prompt_encoder.prefix(instruction) for instruction, _ in words.calls]
        assert found.tokens == sum(len(prefix.ids) + sum(map(len, prompt_encoder.encode(sorted(set(texts)), prefix)))
                                   for prefix, (_, texts) in zip(prefixes, words.calls, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.mteb, "evaluate", None)  # read, not counted
        again, _ = plan.make_plan(encoder, select_tasks("BIOSSES", world).tasks, prompt_encoder, tmp_path / "plan.json")
    assert again["BIOSSES"] == plans["BIOSSES"]
    command = ["--model", str(tiny_run), "--data-dir", str(world), "--output", str(tmp_path / "out"), "--plan"]
    assert run_eval.main(command) == 0
    printed = capsys.readouterr().out
    assert "estimated: " in printed and "hours at" in printed
    assert not list((tmp_path / "out").rglob("BIOSSES.json"))


def test_a_score_is_the_same_after_a_plan_and_with_mteb_alone(world: Path, tiny_run: Path, tmp_path: Path) -> None:
    """A clustering task samples texts with its random state, which the plan has used."""
    name = "MyClusters"
    encoder = encoder_of(WordHash())
    [planned], [fresh], [theirs] = (select_tasks(name, world).tasks for _ in range(3))
    plan.make_plan(encoder, [planned], Embedder.from_pretrained(tiny_run).prompt_encoder, tmp_path / "plan.json")
    after, alone = (score_task(encoder, task, tmp_path / folder) for task, folder in (
        (planned, "after"), (fresh, "alone")))
    official = mteb.evaluate(encoder, theirs, cache=mteb.ResultCache(tmp_path / "official"), co2_tracker=False)
    assert after.score == alone.score == pytest.approx(official.task_results[0].get_score(), abs=5e-7)
    assert score_task(encoder, planned, tmp_path / "again").score == after.score


def test_a_plan_is_written_when_all_tasks_fail(tiny_run: Path, tmp_path: Path) -> None:
    """It marks the folder as this command's."""
    write_lines(tmp_path / "data/STS12/test.jsonl", [{"wrong": "columns"}])
    command = ["--model", str(tiny_run), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert run_eval.main(command) == run_eval.main(command) == 1
    assert json.loads((tmp_path / "out/plan.json").read_text()) == {}


def test_a_task_that_cannot_be_planned_does_not_keep_its_data(
    world: Path, tiny_run: Path, tmp_path: Path, monkeypatch: Any,
) -> None:
    [task], encoder = select_tasks("BIOSSES", world).tasks, encoder_of(Embedder.from_pretrained(tiny_run, device="cpu"))
    loaded = []

    def evaluate(_: Any, task: Any, **__: Any) -> None:
        task.load_data()
        loaded.append(task.dataset)
        raise MemoryError
    monkeypatch.setattr(mteb, "evaluate", evaluate)
    plans, _ = plan.make_plan(encoder, [task], encoder.embedder.prompt_encoder, tmp_path / "plan.json")
    assert plans == {}
    assert loaded[0] is not None and task.dataset is None and not task.data_loaded


# ---- estimates without data ---------------------------------------------------------------------------------


def test_all_41_tasks_are_estimated_without_a_network(
    tiny_run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any,
) -> None:
    """In-context examples would have to be drawn from the data."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    monkeypatch.setattr("ref.evaluation.few_shot.draw_examples", lambda *_, **__: pytest.fail("data were loaded"))
    command = ["--model", str(tiny_run), "--tasks", "all", "--output", str(tmp_path / "out"), "--plan"]
    assert run_eval.main([*command, "--examples", "2"]) == 0
    printed = capsys.readouterr().out
    assert "the plan is without in-context examples for tasks whose data are not local" in printed
    assert "41 tasks are estimated from mteb's statistics" in printed
    rows = [line.split() for line in printed.splitlines() if len(line.split()) == 5 and line.split()[1][0].isdigit()]
    assert len(rows) == 42 and all(int(cell.replace(",", "")) > 0 for row in rows for cell in row[1:4])


@pytest.mark.parametrize(("name", "columns"), [
    ("STS12", ("text1", "text2")), ("ArguAna", ("documents_text", "queries_text"))])
def test_an_estimate_is_unique_texts_times_their_tokens(name: str, columns: tuple[str, ...]) -> None:
    """By mteb's published counts; first with a limit that is out of reach."""
    (task,) = select_tasks(name).tasks
    counts = [task.metadata.descriptive_stats["test"][f"{column}_statistics"] for column in columns]
    unique = sum(count["unique_texts"] for count in counts)
    characters = sum(count["unique_texts"] * count["average_text_length"] for count in counts)
    found = plan.estimate_plan(task, rate=0.3, max_text_tokens=10**6)
    assert found is not None and found.unique == unique
    assert found.tokens == pytest.approx(0.3 * characters + unique, rel=1e-3)
    short = plan.estimate_plan(task, rate=0.3, max_text_tokens=5)
    assert short is not None and short.tokens == 6 * unique


def test_tokens_per_character_are_counted_by_the_models_tokenizer(tiny_run: Path) -> None:
    encoder = Embedder.from_pretrained(tiny_run).prompt_encoder
    texts = [task.metadata.description for task in select_tasks("all").tasks]
    counted = sum(len(ids) for ids in encoder.tokenizer.encode(texts, max_tokens=10**6))
    assert plan.tokens_per_character(encoder) == counted / sum(map(len, texts))
