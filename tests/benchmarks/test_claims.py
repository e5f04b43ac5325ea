"""The study of the report's claims: its arithmetic, its machinery in small, its cache. Not the claims."""

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

from benchmarks import claims, experiment
from benchmarks.claims import ARMS, CLAIMS, LARGER, interval, table, verdict
from benchmarks.experiment import Arm, Setting, changed, row_path
from ref import Embedder
from ref.config import TrainConfig
from ref.training.data import SoftLabelDataset

ROOT = Path(__file__).parent.parent


def test_verdicts():
    assert verdict(0.1, 0.5, 1) == verdict(-0.5, -0.1, -1) == "reproduced"
    assert verdict(0.1, 0.5, -1) == verdict(-0.5, -0.1, 1) == "not reproduced"
    assert verdict(-0.1, 0.5, 1) == "cannot tell"
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_pairs_are_by_seed_and_a_claim_waits_for_both_arms():
    rows = {(arm, seed): {"score": 10.0 * seed + more, "sets": {}}
            for seed in range(4) for arm, more in (("full", 1), ("hard labels", 0))}
    [row] = table(rows, range(4))
    assert row["difference"] == row["low"] == row["high"] == 1.0  # the seeds differ by tens, the pairs by one
    assert row["verdict"] == "reproduced" and row["claim"] == "soft labels beside hard ones"
    assert table(rows, range(2))[0]["verdict"] == "cannot tell"  # two seeds say nothing


def test_a_claim_on_one_set_takes_its_score_where_there_is_such_a_set():
    arms = ("mined, percentage 0.95", 7.0), ("mined, none", 5.0)
    rows = {(arm, seed): {"score": 0.0, "sets": {claims.MINED: 10.0 * seed + more}}
            for seed in range(3) for arm, more in arms}
    both, alone = table(rows, range(3))
    assert both["difference"] == 0 and alone["difference"] == 2.0 and alone["claim"].endswith(claims.MINED)
    for row in rows.values():
        row["sets"] = {"IsleHome": 1.0}
    assert len(table(rows, range(3))) == 1


def test_random_negatives_are_any_passages_but_known_ones(tmp_path, monkeypatch, tiny_run):
    """Scored as the retriever scores them; another seed draws others."""
    monkeypatch.setattr(experiment, "retriever", lambda: tiny_run)
    lines = experiment.mined("world", "random", "0", tmp_path / "one", 0)
    others = experiment.mined("world", "random", "0", tmp_path / "two", 1)
    best = experiment.mined("world", "none", "0", tmp_path / "three", 0)
    assert {len(line["neg"]) for line in lines} == {7}
    assert all(not {*line["neg"]} & {*line["pos"]} and len({*line["neg"]}) == 7 for line in lines)
    assert [line["query"] for line in lines] == [line["query"] for line in best]
    assert [line["neg"] for line in lines] != [line["neg"] for line in others]
    corpus = {json.loads(line)["text"] for line in (tmp_path / "one/corpus.jsonl").read_text().splitlines()}
    assert {text for line in lines for text in line["neg"]} == corpus  # 900 lines draw from 600: each is hit
    mean = [np.mean([line["neg_scores"] for line in some]) for some in (lines, best)]
    assert mean[0] < mean[1]
    embedder = Embedder.from_pretrained(tiny_run, device="cpu")
    for line in lines[:5]:
        query = embedder.encode([line["query"]], instruction=line["prompt"])
        assert line["neg_scores"] == pytest.approx((embedder.encode(line["neg"]) @ query[0]).tolist(), abs=2e-6)


def test_every_claim_names_two_arms_and_every_arm_is_in_a_claim():
    assert {arm for claim in CLAIMS for arm in (claim.arm, claim.other)} == ARMS.keys()
    assert all(claim.arm != claim.other for claim in CLAIMS)


def test_changed_data():
    before = [{"query": f"q{n}", "prompt": f"p{n // 10}"} for n in range(20)]
    same, shuffled, untouched = ([dict(line) for line in before] for _ in range(3))
    changed(same, "same instruction", 0)
    assert {line["prompt"] for line in same} == {"Find texts."}
    changed(shuffled, "shuffled instructions", 0)
    assert shuffled != before and sorted(x["prompt"] for x in shuffled) == sorted(x["prompt"] for x in before)
    changed(untouched, "", 0)
    assert untouched == before


def test_another_seed_line_setting_code_or_data_is_another_row(monkeypatch, tmp_path):
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path))
    for name in ("soft_labels", "pairs", "mteb"):
        (tmp_path / name).mkdir()
    usual = Setting("world", 10, "tiny")
    one = row_path(usual, ARMS["full"], 0)
    assert one == row_path(Setting("world", 10, "tiny"), Arm(), 0)  # by its line, not by its name
    others = {row_path(usual, ARMS["full"], 1), row_path(usual, ARMS["hard labels"], 0),
              *(row_path(setting, ARMS["full"], 0) for setting in (
                  Setting("real", 10, "tiny"), Setting("world", 11, "tiny"), Setting("world", 10, LARGER),
                  Setting("world", 10, "tiny", "cuda")))}
    (tmp_path / "pairs/some.jsonl").write_text("x")
    experiment.data_hash.cache_clear()
    others.add(row_path(Setting("real", 10, "tiny"), ARMS["full"], 0))
    assert row_path(usual, ARMS["full"], 0) == one
    monkeypatch.setattr(experiment, "code_hash", lambda: "other")
    others.add(row_path(usual, ARMS["full"], 0))
    experiment.data_hash.cache_clear()
    assert one not in others and len(others) == 8


def test_fixed_examples_differ_from_drawn_ones_in_nothing_but_which():
    """As many in each batch of the study's size, never a text of the batch, and mostly the same five of a task."""
    data = SoftLabelDataset([ROOT / "data/soft_labels.jsonl"], replace(TrainConfig(), max_examples=5, queries=64))
    numbers = (data.batches(0) + data.batches(1))[:40]
    drawn = [data.batch(lines, epoch=0, step=step) for step, lines in enumerate(numbers)]
    with experiment.fixed_examples():
        fixed = [data.batch(lines, epoch=0, step=step) for step, lines in enumerate(numbers)]
    counts = [[len(batch.examples[0]) for batch in some] for some in (drawn, fixed)]
    assert set(counts[0]) == set(range(6)) and counts[0] == counts[1]
    shown = [Counter((batch.task, example) for batch in some for example in batch.examples[0])
             for some in (drawn, fixed)]
    share = [sum(n for _, n in some.most_common(5 * len({task for task, _ in some}))) / some.total() for some in shown]
    assert share[0] < 0.5 < 0.7 < share[1]
    for batch in fixed:
        texts = {text for example in batch.examples[0] for text in (example.query, example.response)}
        assert not texts & {*batch.queries, *batch.passages}


def test_words_ask_more_than_the_bootstrap():
    gain = [0.1, 0.2, 0.9]
    assert interval(gain)[0] > 0 > claims.student(gain)[0]
    rows = {(arm, n): {"score": score, "sets": {}}
            for n, one in enumerate(gain) for arm, score in (("full", one), ("hard labels", 0.0))}
    assert table(rows, range(3))[0]["verdict"] == "cannot tell"
    assert claims.student([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 2.0540, 2.5 + 2.0540), abs=1e-3)


@pytest.mark.parametrize("arms", [["full", "fixed examples", "mined, random"]])
def test_the_study_in_small_goes_on_where_it_was(arms, tmp_path, monkeypatch, tiny_run):
    """One seed, ten steps, any retriever; the second start has nothing to do."""
    (tmp_path / "retriever").mkdir()
    shutil.copytree(tiny_run, tmp_path / "retriever" / experiment.code_hash())
    call = [sys.executable, "-c", "import sys; from pathlib import Path; from benchmarks import claims, experiment; "
            f"claims.RESULTS = experiment.RESULTS = Path({str(tmp_path)!r}); "
            "claims.SECONDS_A_STEP['world'] = 3600.0; sys.exit(claims.main(sys.argv[1:]))"]
    plan = subprocess.run([*call, "--quick", "--plan", "--only", *arms, "--workers", "1"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "3 arms x 1 seeds, 3 runs of 10 steps missing: about 30.0 hours, 1 at a time" in plan.stdout
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    setting = Setting("world", 10, "tiny")
    for arm in arms:
        row = {"arm": arm, **experiment.run_one(setting, ARMS[arm], 0)}
        assert 0 < row["score"] < 100 and len(row["sets"]) == 3
        path = row_path(setting, ARMS[arm], 0)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row))
    again = subprocess.run([*call, "--quick", "--only", *arms], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "0 runs of 10 steps missing" in again.stdout and not list(tmp_path.glob("*.json"))
    assert "| fixed examples against drawn ones" not in again.stdout  # its other arm has not run


def test_the_table_is_made_again_from_the_rows(tmp_path, monkeypatch):
    """As in the repository: what is written there is what its rows say."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for file in (ROOT / "benchmarks/results/claims").glob("*.json"):
        claims.report(file.stem, json.loads(file.read_text()))
        assert (tmp_path / f"{file.stem}.md").read_text() == file.with_suffix(".md").read_text()
    assert list(tmp_path.glob("*.md"))
    with pytest.raises(SystemExit):
        claims.main(["--table", "--steps", "7"])


def test_a_part_of_the_study_overwrites_nothing(tmp_path, monkeypatch, capsys):
    """Fewer arms, fewer seeds, or runs that all fail: a table is printed at most."""
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    def run(*_, **__):
        return SimpleNamespace(returncode=0, stdout="what it said")  # ends well and leaves no row
    nothing = SimpleNamespace(run=run, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(claims, "subprocess", nothing)
    assert claims.main(["--only", "full", "hard labels", "--seeds", "1"]) == 1
    assert capsys.readouterr().out.count("what it said") == 2
    setting = Setting("world", 400, "tiny")
    (tmp_path / "world").mkdir()
    for arm, seed in itertools.product(("full", "hard labels"), range(10)):
        path = row_path(setting, ARMS[arm], seed)
        path.write_text(json.dumps({"seed": seed, "score": float(arm == "full"), "sets": {}}))
    assert claims.main(["--only", "full", "hard labels"]) == 0
    assert "| soft labels beside hard ones | +1.00" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.*"))


def test_the_pages_show_what_was_found():
    """Every row of docs/evidence.md, and those that README picks, are rows of the results."""
    found = {file.stem: file.read_text().splitlines() for file in (ROOT / "benchmarks/results/claims").glob("*.md")}
    evidence = (ROOT / "docs/evidence.md").read_text().splitlines()
    assert found and all(line in evidence for lines in found.values() for line in lines)
    section = (ROOT / "README.md").read_text().split("## The report's claims")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ") and " to " in line]
    assert len(shown) > 5 and all(any(line in lines for lines in found.values()) for line in shown)


def test_real_sets_are_scored_as_trained_and_all_of_them(tmp_path, monkeypatch, tiny_run):
    """An arm that learned without instructions is scored without them; a mean lacks no set."""
    asked, shown, tasks = [], {}, json.loads((ROOT / "configs/real_instructions.json").read_text())

    def scored(encoder, task, output):
        asked.append(encoder.overrides[task.metadata.name])
        shown.update(encoder.few_shot)
        return SimpleNamespace(score=0.25)
    monkeypatch.setattr("scoring.score.score_task", scored)
    monkeypatch.setattr("scoring.tasks.select_tasks", lambda names, folder: SimpleNamespace(missing=[], tasks=[
        SimpleNamespace(metadata=SimpleNamespace(name=name)) for name in names.split(",")]))
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path))
    (tmp_path / "mteb").mkdir()
    row = experiment.real_score(tiny_run, Arm(), "cpu")
    assert row["score"] == 25.0 and row["sets"].keys() == tasks.keys() and asked == list(tasks.values())
    assert not shown
    asked.clear()
    (tmp_path / "soft_labels").mkdir()
    lines = [{"query": f"q{n}", "pos": [f"p{n}", "other"], "prompt": tasks["BIOSSES"]} for n in range(4)]
    (tmp_path / "soft_labels/some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment.real_score(tiny_run, ARMS["examples 0 to 5, 2 shown"], "cpu")
    assert [(e.query, e.response) for e in shown["STS12"].examples] == [("q0", "p0"), ("q1", "p1")]
    assert not shown["MedQuADRetrieval"].examples  # no line has its instruction
    asked.clear()
    experiment.real_score(tiny_run, ARMS["no instructions"], "cpu")
    assert set(asked) == {"Find texts."} and len(asked) == 10
    monkeypatch.setattr("scoring.tasks.select_tasks", lambda *_: SimpleNamespace(missing=["STS12"], tasks=[]))
    with pytest.raises(SystemExit, match="no data for STS12"):
        experiment.real_score(tiny_run, Arm(), "cpu")
