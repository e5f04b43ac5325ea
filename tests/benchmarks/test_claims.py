"""The study of the paper's claims: statistics, changes of the data, cache, a small run. Not the claims themselves."""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import claims, claims_report, experiment, experiment_data, experiment_scores
from benchmarks.arms import ARMS, CLAIMS, MEDQUAD, TEACHER, Arm, arms_on, trained_alike
from benchmarks.claims import GPU_MODEL
from benchmarks.claims_report import compare, detectable_difference, student_interval, verdict
from benchmarks.experiment import Setting, row_path
from benchmarks.experiment_data import apply_change
from benchmarks.world import bootstrap_interval
from ref import Embedder
from ref.config import TrainConfig
from ref.training.data import SoftLabelDataset
from ref.utils.device import resolve_dtype

ROOT = Path(__file__).parents[2]


MODULES = (claims, claims_report, experiment, experiment_data)  # that have the folder of the results


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty folder of results."""
    for module in MODULES:
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_verdicts():
    assert verdict(0.1, 0.5, 1) == verdict(-0.5, -0.1, -1) == "as expected"
    assert verdict(0.1, 0.5, -1) == verdict(-0.5, -0.1, 1) == "opposite"
    assert verdict(-0.1, 0.5, 1) == "inconclusive"
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_differences_are_paired_by_seed_and_a_claim_needs_both_arms():
    rows = {(arm, seed): {"score": 10.0 * seed + more, "task_scores": {}}
            for seed in range(4) for arm, more in (("default", 1), ("contrastive term only", 0))}
    [row] = compare(rows)
    assert row["difference"] == row["low"] == row["high"] == 1.0  # the seeds differ by tens, the pairs by one
    assert row["verdict"] == "as expected" and row["claim"] == "soft labels added to hard labels"
    two = {(arm, seed): row for (arm, seed), row in rows.items() if seed < 2}
    assert compare(two)[0]["verdict"] == "inconclusive"  # two seeds are too few
    del rows["default", 3]
    assert compare(rows)[0]["seeds"] == 3  # the pairs that are complete


def test_a_difference_that_seeds_can_detect_is_found_in_four_of_five_studies():
    """By simulation: independent arms whose runs have a standard deviation of 1."""
    draw = np.random.default_rng(0)
    for seeds in (3, 10):
        effect = detectable_difference([-1.0, 0.0, 1.0], seeds)
        gains = effect + draw.normal(size=(4000, seeds)) - draw.normal(size=(4000, seeds))
        found = np.mean([student_interval(gain)[0] > 0 for gain in gains])
        assert 0.75 < found < 0.85


def test_the_difference_of_one_seed_is_shown_without_an_interval():
    for seeds, shown in ((1, "+2.00"), (2, "+2.00 (+2.00 to +2.00)")):
        rows = {(arm, seed): {"score": score, "task_scores": {}} for seed in range(seeds)
                for arm, score in (("default", 7.0), ("contrastive term only", 5.0))}
        line = f"| soft labels added to hard labels | {shown} | {seeds} | +0.63 | inconclusive |"
        assert claims_report.as_markdown(compare(rows)).splitlines()[2] == line


def test_a_claim_on_one_task_uses_its_score_if_there_is_one():
    arms = ("mined, percentage 0.95", 7.0), ("mined, none", 5.0)
    rows = {(arm, seed): {"score": 0.0, "task_scores": {MEDQUAD: 10.0 * seed + more}}
            for seed in range(3) for arm, more in arms}
    mean, task = compare(rows)
    assert mean["difference"] == 0 and task["difference"] == 2.0 and task["claim"].endswith(MEDQUAD)
    for row in rows.values():
        row["task_scores"] = {"IsleHome": 1.0}
    assert len(compare(rows)) == 1


def test_intervals_over_queries_are_paired_and_of_the_mean_over_seeds():
    draw = np.random.default_rng(0)
    easy_Q = draw.uniform(0, 100, 400)  # queries differ by tens, the arms by two
    rows = {(arm, seed): {"score": 0.0, "task_scores": {}, "query_scores": {
        MEDQUAD: (easy_Q + gain + 4 * seed + draw.normal(size=400)).tolist()}}
        for seed in range(2) for arm, gain in (("default", 2.0), ("contrastive term only", 0.0))}
    rows["default", 2] = {"score": 0.0, "task_scores": {}, "query_scores": {MEDQUAD: [0.0] * 400}}  # without a pair
    [result] = compare(rows)
    difference, low, high = result["by_query"][MEDQUAD]
    assert 1.6 < low < difference < high < 2.4
    half = 1.96 * 2**0.5 / 2**0.5 / 400**0.5  # two draws per arm and query
    assert high - low == pytest.approx(2 * half, rel=0.15)
    assert f"| soft labels added to hard labels | {difference:+.2f} (" in claims_report.query_table([result])
    del rows["contrastive term only", 0], rows["contrastive term only", 1]["query_scores"]
    assert compare(rows)[0]["by_query"] == {} and claims_report.query_table(compare(rows)) == ""


def test_the_student_is_compared_with_the_teacher_by_task():
    rows = {("default", seed): {"task_scores": {"STS12": 70.0 + seed}} for seed in range(3)}
    assert claims_report.against_teacher(rows) == [] and claims_report.teacher_table([]) == ""
    rows[TEACHER, 0] = {"task_scores": {"STS12": 72.5}}
    [one] = claims_report.against_teacher(rows)
    assert (one["student"], one["teacher"]) == (71.0, 72.5)
    assert claims_report.teacher_table([one]).splitlines()[-1] == "| STS12 | 71.00 (68.52 to 73.48) | 72.50 | -1.50 |"


def test_random_negatives_are_any_passages_but_known_positives(tmp_path, monkeypatch, tiny_run):
    """With the retriever's scores; another seed draws others."""
    monkeypatch.setattr(experiment_data, "world_retriever", lambda: tiny_run)
    lines = experiment_data.mine("world", "random", "0", tmp_path / "one", 0)
    others = experiment_data.mine("world", "random", "0", tmp_path / "two", 1)
    best = experiment_data.mine("world", "none", "0", tmp_path / "three", 0)
    assert {len(line["neg"]) for line in lines} == {7}
    assert all(not {*line["neg"]} & {*line["pos"]} and len({*line["neg"]}) == 7 for line in lines)
    assert [line["query"] for line in lines] == [line["query"] for line in best]
    assert [line["neg"] for line in lines] != [line["neg"] for line in others]
    corpus = {json.loads(line)["text"] for line in (tmp_path / "one/corpus.jsonl").read_text().splitlines()}
    assert {text for line in lines for text in line["neg"]} == corpus  # 900 lines draw from 600 passages: all occur
    mean = [np.mean([line["neg_scores"] for line in given]) for given in (lines, best)]
    assert mean[0] < mean[1]
    embedder = Embedder.from_pretrained(tiny_run, device="cpu")
    for line in lines[:5]:
        query = embedder.encode([line["query"]], instruction=line["prompt"])
        assert line["neg_scores"] == pytest.approx((embedder.encode(line["neg"]) @ query[0]).tolist(), abs=2e-6)


def test_every_claim_has_two_arms_and_every_arm_is_in_a_claim():
    assert {arm for claim in CLAIMS for arm in (claim.arm, claim.baseline)} | {TEACHER} == ARMS.keys()
    assert {*arms_on("llm"), TEACHER} == ARMS.keys() > set(arms_on("real")) == set(arms_on("world"))
    assert all(claim.arm != claim.baseline for claim in CLAIMS)


def test_arms_that_differ_in_evaluation_only_are_trained_once():
    three = ["random examples", "random examples, 2 at evaluation", "random examples, 5 at evaluation"]
    assert all(trained_alike(arm) == three for arm in three)
    assert trained_alike("fixed examples") == ["fixed examples"]
    items = [(arm, seed) for seed in range(2) for arm in ("default", *three[1:], "fixed examples")]
    assert claims.one_per_training(items) == [(arm, seed) for seed in range(2)
                                              for arm in ("default", three[1], "fixed examples")]


def test_a_run_writes_the_rows_of_all_arms_that_are_trained_alike(results, monkeypatch):
    monkeypatch.setattr(claims, "run_arms", lambda setting, arms, seed: [{"score": arm.num_examples} for arm in arms])
    setting = Setting("world", 7, "tiny")
    claims.run_and_store(setting, "random examples, 2 at evaluation", 1)
    rows = {name: json.loads(row_path(setting, ARMS[name], 1).read_text()) for name in trained_alike("random examples")}
    assert {name: row["score"] for name, row in rows.items()} == {name: ARMS[name].num_examples for name in rows}
    assert len(rows) == 3 and all(row["arm"] == name for name, row in rows.items())


@pytest.mark.parametrize(("ground", "stored"), [("world", 1), ("llm", 3)])
def test_a_run_evaluates_the_arms_of_its_ground_only(results, monkeypatch, ground, stored):
    """Models trained without in-context examples are evaluated with them only on the pretrained model."""
    monkeypatch.setattr(claims, "run_arms", lambda setting, arms, seed: [{"score": arm.num_examples} for arm in arms])
    monkeypatch.setattr(experiment, "data_hash", lambda ground, model: "")
    setting = Setting(ground, 7, "tiny")
    claims.run_and_store(setting, "default", 0)
    alike = ["default", "default, 2 at evaluation", "default, 5 at evaluation"]
    assert trained_alike("default") == alike
    assert [row_path(setting, ARMS[name], 0).exists() for name in alike] == [n < stored for n in range(3)]


def test_changes_of_the_instructions():
    before = [{"query": f"q{n}", "prompt": f"p{n // 10}"} for n in range(20)]
    same, shuffled, untouched = ([dict(line) for line in before] for _ in range(3))
    apply_change(same, "same instruction", 0)
    assert {line["prompt"] for line in same} == {"Find texts."}
    apply_change(shuffled, "shuffled instructions", 0)
    assert shuffled != before and sorted(x["prompt"] for x in shuffled) == sorted(x["prompt"] for x in before)
    apply_change(untouched, "", 0)
    assert untouched == before


def test_another_seed_arm_setting_code_or_data_is_another_row(monkeypatch, tmp_path):
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path))
    for name in ("soft_labels", "pairs", "mteb"):
        (tmp_path / name).mkdir()
    usual = Setting("world", 10, "tiny")
    one = row_path(usual, ARMS["default"], 0)
    assert one == row_path(Setting("world", 10, "tiny"), Arm(), 0)  # the name of the arm does not count
    others = {row_path(usual, ARMS["default"], 1), row_path(usual, ARMS["contrastive term only"], 0),
              *(row_path(setting, ARMS["default"], 0) for setting in (
                  Setting("real", 10, "tiny"), Setting("world", 11, "tiny"), Setting("world", 10, GPU_MODEL["world"]),
                  Setting("world", 10, "tiny", "cuda")))}
    (tmp_path / "pairs/some.jsonl").write_text("x")
    experiment.data_hash.cache_clear()
    others.add(row_path(Setting("real", 10, "tiny"), ARMS["default"], 0))
    assert row_path(usual, ARMS["default"], 0) == one
    monkeypatch.setattr(experiment, "code_hash", lambda: "other")
    others.add(row_path(usual, ARMS["default"], 0))
    experiment.data_hash.cache_clear()
    assert one not in others and len(others) == 8


def test_fixed_examples_are_as_many_as_random_ones():
    """At the study's batch size: never a text of the batch, and mostly the same five per task."""
    config = replace(TrainConfig(), max_examples=5, batch_size=64)
    data = SoftLabelDataset([ROOT / "data/soft_labels.jsonl"], config)
    numbers = (data.batches(0) + data.batches(1))[:40]
    random = [data.batch(lines, epoch=0, step=step) for step, lines in enumerate(numbers)]
    with experiment_data.fixed_examples():
        fixed = [data.batch(lines, epoch=0, step=step) for step, lines in enumerate(numbers)]
    counts = [[len(batch.in_context_examples[0]) for batch in batches] for batches in (random, fixed)]
    assert set(counts[0]) == set(range(6)) and counts[0] == counts[1]
    shown = [Counter((batch.task, example) for batch in batches for example in batch.in_context_examples[0])
             for batches in (random, fixed)]
    share = [sum(n for _, n in uses.most_common(5 * len({task for task, _ in uses}))) / uses.total() for uses in shown]
    assert share[0] < 0.5 < 0.7 < share[1]
    for batch in fixed:
        texts = {text for example in batch.in_context_examples[0] for text in (example.query, example.response)}
        assert not texts & {*batch.queries, *batch.passages}


def test_a_verdict_needs_more_than_the_bootstrap():
    gain = [0.1, 0.2, 0.9]
    assert bootstrap_interval(gain)[0] > 0 > student_interval(gain)[0]
    rows = {(arm, n): {"score": score, "task_scores": {}}
            for n, one in enumerate(gain) for arm, score in (("default", one), ("contrastive term only", 0.0))}
    assert compare(rows)[0]["verdict"] == "inconclusive"
    assert student_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 2.0540, 2.5 + 2.0540), abs=1e-3)


@pytest.mark.parametrize("arms", [["default", "fixed examples", "mined, random"]])
def test_a_small_study_continues_where_it_stopped(arms, results, tiny_run):
    """One seed, ten steps, any retriever; the second start has nothing left to run."""
    shutil.copytree(tiny_run, results / "retriever" / experiment_data.code_hash())
    code = (f"import sys; from importlib import import_module; from pathlib import Path\n"
            f"for name in {[module.__name__ for module in MODULES]}:\n"
            f"    import_module(name).RESULTS = Path({str(results)!r})\n"
            "from benchmarks import claims\n"
            "claims.SECONDS['world'] = 3000.0, 6000.0\n"
            "sys.exit(claims.main(sys.argv[1:]))")
    call = [sys.executable, "-c", code]
    plan = subprocess.run([*call, "--quick", "--plan", "--only", *arms, "--workers", "1"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "3 arms x 1 seeds, missing: 3 runs of 10 steps, about 30.0 hours, 1 in parallel" in plan.stdout
    setting = Setting("world", 10, "tiny")
    for arm in arms:
        row = {"arm": arm, **experiment.run_arms(setting, [ARMS[arm]], 0)[0]}
        assert 0 < row["score"] < 100 and len(row["task_scores"]) == 3
        assert row["score"] == pytest.approx(np.mean(list(row["task_scores"].values())))
        path = row_path(setting, ARMS[arm], 0)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row))
    again = subprocess.run([*call, "--quick", "--only", *arms], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "missing: 0 runs of 10 steps" in again.stdout and not list(results.glob("*.json"))
    assert "| trained with fixed instead" not in again.stdout  # its baseline has not run


def test_the_tables_in_the_repository_follow_from_the_rows(results):
    stored = sorted((ROOT / "benchmarks/results/claims").glob("*.json"))
    for file in stored:
        claims.write_report(file.stem, json.loads(file.read_text()))
    claims.write_overview()
    assert stored and {file.name for file in results.glob("*.md")} == {"overview.md", *(f"{f.stem}.md" for f in stored)}
    for file in results.glob("*.md"):
        assert file.read_text() == (stored[0].parent / file.name).read_text(), file.name
    with pytest.raises(SystemExit):
        claims.main(["--table", "--steps", "7"])


def test_what_has_run_is_written_but_never_over_more_rows(results, monkeypatch, capsys):
    def run(*_, **__):
        return SimpleNamespace(returncode=0, stdout="some output")  # succeeds and writes no row
    no_row = SimpleNamespace(run=run, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(claims, "subprocess", no_row)
    two_arms = ["--only", "default", "contrastive term only"]
    assert claims.main([*two_arms, "--seeds", "1"]) == 1
    assert capsys.readouterr().out.count("some output") == 2 and not list(results.glob("*.*"))
    (results / "world").mkdir()
    for arm, seed in itertools.product(("default", "contrastive term only"), range(10)):
        path = row_path(Setting("world", 400, "tiny"), ARMS[arm], seed)
        path.write_text(json.dumps({"seed": seed, "score": float(arm == "default"), "task_scores": {}}))
    assert claims.main(two_arms) == 0
    assert "| soft labels added to hard labels | +1.00" in capsys.readouterr().out
    assert len(json.loads((results / "world.json").read_text())["rows"]) == 20
    assert "+1.00" in (results / "world.md").read_text()
    assert claims.main([*two_arms, "--seeds", "9"]) == 0  # fewer seeds: the stored ones stay
    assert "not written" not in capsys.readouterr().out
    assert len(json.loads((results / "world.json").read_text())["rows"]) == 20
    shutil.rmtree(results / "world")  # another clone: the rows come back from the stored study, unless the code changed
    assert claims.main(two_arms) == 0 and "missing: 0 runs" in capsys.readouterr().out
    shutil.rmtree(results / "world")
    monkeypatch.setattr(experiment, "code_hash", lambda: "other")
    assert claims.main([*two_arms, "--plan"]) == 0 and "missing: 20 runs" in capsys.readouterr().out
    assert claims.main([*two_arms, "--plan", "--seeds", "3"]) == 0 and "missing: 6 runs" in capsys.readouterr().out
    written = (results / "world.json").read_bytes()
    (results / "world").mkdir()
    row_path(Setting("world", 400, "tiny"), ARMS["default"], 0).write_text('{"seed": 0, "score": 1, "task_scores": {}}')
    claims.main([*two_arms, "--seeds", "1"])
    assert "not written: 1 rows of 400 steps; 20 are stored" in capsys.readouterr().out
    assert (results / "world.json").read_bytes() == written


def test_every_processor_runs_a_study_in_float32(monkeypatch):
    """A processor with fast bfloat16 must not add rows of another precision."""
    used = []
    cpu = torch.device("cpu")
    monkeypatch.setattr("ref.utils.device.bfloat16_rate", lambda: 9.0)
    monkeypatch.setattr(claims, "run_and_store", lambda *_: used.append(resolve_dtype("auto", cpu)[0]))
    claims.main(["--ground", "llm", "--one", "default", "0"])
    assert (used, resolve_dtype("auto", cpu)[0]) == (["float32"], "bfloat16")


def test_the_pages_show_the_results():
    """docs/evidence.md has the table of all studies, and the README's rows are among the results."""
    found = {file.stem: file.read_text().splitlines() for file in (ROOT / "benchmarks/results/claims").glob("*.md")}
    evidence = (ROOT / "docs/evidence.md").read_text().splitlines()
    assert len(found["overview"]) > 20 and all(line in evidence for line in found["overview"])
    section = (ROOT / "README.md").read_text().split("## The paper's claims")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ") and " to " in line]
    assert len(shown) > 5 and all(any(line in lines for lines in found.values()) for line in shown)


def test_all_real_tasks_are_scored_with_the_instructions_of_training(tmp_path, monkeypatch, tiny_run):
    """An arm trained with one instruction is scored with it; the mean is over all tasks."""
    instructions, few_shot, tasks = [], {}, json.loads((ROOT / "configs/real_instructions.json").read_text())

    def scored(encoder, task, output):
        instructions.append(encoder.overrides[task.metadata.name])
        few_shot.update(encoder.few_shot)
        return SimpleNamespace(score=0.25)
    monkeypatch.setattr("ref.evaluation.results.score_task", scored)
    monkeypatch.setattr("ref.evaluation.tasks.select_tasks", lambda names, folder: SimpleNamespace(missing=[], tasks=[
        SimpleNamespace(metadata=SimpleNamespace(name=name)) for name in names.split(",")]))
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path))
    (tmp_path / "mteb").mkdir()
    embedder = Embedder.from_pretrained(tiny_run, device="cpu")
    scores, _ = experiment_scores.evaluate_real(embedder, Arm(), tmp_path)
    assert scores == dict.fromkeys(tasks, 25.0) and instructions == list(tasks.values())
    assert not few_shot
    instructions.clear()
    (tmp_path / "soft_labels").mkdir()
    lines = [{"query": f"q{n}", "pos": [f"p{n}", "other"], "prompt": tasks["BIOSSES"]} for n in range(4)]
    (tmp_path / "soft_labels/some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment_scores.evaluate_real(embedder, ARMS["random examples, 2 at evaluation"], tmp_path)
    assert [(e.query, e.response) for e in few_shot["STS12"].examples] == [("q0", "p0"), ("q1", "p1")]
    assert not few_shot["MedQuADRetrieval"].examples  # no line has its instruction
    instructions.clear()
    experiment_scores.evaluate_real(embedder, ARMS["no instructions"], tmp_path)
    assert set(instructions) == {"Find texts."} and len(instructions) == 10
    monkeypatch.setattr("ref.evaluation.tasks.select_tasks", lambda *_: SimpleNamespace(missing=["STS12"], tasks=[]))
    with pytest.raises(SystemExit, match="missing STS12"):
        experiment_scores.evaluate_real(embedder, Arm(), tmp_path)
