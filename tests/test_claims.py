"""The study of the report's claims: its arithmetic, its machinery in small, its cache. Not the claims."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import claims, experiment
from benchmarks.claims import ARMS, CLAIMS, LARGER, interval, table, verdict
from benchmarks.experiment import Arm, Setting, changed, row_path

ROOT = Path(__file__).parent.parent


def test_verdicts():
    assert verdict(0.1, 0.5, 1) == verdict(-0.5, -0.1, -1) == "reproduced"
    assert verdict(0.1, 0.5, -1) == verdict(-0.5, -0.1, 1) == "not reproduced"
    assert verdict(-0.1, 0.5, 1) == "cannot tell"
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_pairs_are_by_seed_and_a_claim_waits_for_both_arms():
    rows = {(arm, seed): 10.0 * seed + more for seed in range(4) for arm, more in (("full", 1), ("hard labels", 0))}
    [row] = table(rows, range(4))
    assert row["difference"] == row["low"] == row["high"] == 1.0  # the seeds differ by tens, the pairs by one
    assert row["verdict"] == "reproduced" and row["claim"] == "soft labels beside hard ones"
    assert table(rows, range(2))[0]["verdict"] == "cannot tell"  # two seeds say nothing


def test_every_claim_names_arms_that_share_a_ground():
    for claim in CLAIMS:
        assert set(ARMS[claim.arm].grounds) & set(ARMS[claim.other].grounds), claim


def test_changed_data():
    before = [{"query": f"q{n}", "prompt": f"p{n // 10}"} for n in range(20)]
    same, shuffled, untouched = ([dict(line) for line in before] for _ in range(3))
    changed(same, "same instruction", 0)
    assert {line["prompt"] for line in same} == {"Find texts."}
    changed(shuffled, "shuffled instructions", 0)
    assert shuffled != before and sorted(x["prompt"] for x in shuffled) == sorted(x["prompt"] for x in before)
    changed(untouched, "", 0)
    assert untouched == before


def test_another_seed_line_setting_or_code_is_another_row(monkeypatch):
    usual = Setting("world", 10, "tiny")
    one = row_path(usual, ARMS["full"], 0)
    assert one == row_path(Setting("world", 10, "tiny"), Arm(), 0)  # by its line, not by its name
    others = {row_path(usual, ARMS["full"], 1), row_path(usual, ARMS["hard labels"], 0),
              *(row_path(setting, ARMS["full"], 0) for setting in (
                  Setting("real", 10, "tiny"), Setting("world", 11, "tiny"), Setting("world", 10, LARGER),
                  Setting("world", 10, "tiny", "cuda")))}
    monkeypatch.setattr(experiment, "code_hash", lambda: "other")
    others.add(row_path(usual, ARMS["full"], 0))
    assert one not in others and len(others) == 7


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
        shutil.copy(file, tmp_path / file.name)
        assert claims.main(["--table", "--ground", file.stem]) == 0
        for written in (file.name, f"{file.stem}.md"):
            assert (tmp_path / written).read_text() == (file.parent / written).read_text()
    assert list(tmp_path.glob("*.md"))


def test_real_sets_behind_one_instruction(tmp_path, monkeypatch):
    """An arm that learned without instructions is scored without them."""
    asked = []

    def scored(arguments):
        asked.append(json.loads(Path(arguments[arguments.index("--instructions") + 1]).read_text()))
        folder = Path(arguments[arguments.index("--output") + 1]) / "results/x/r-local-data"
        folder.mkdir(parents=True)
        (folder / "A.json").write_text(json.dumps({"task_name": "A", "scores": {"test": [{"main_score": 0.25}]}}))
        (folder / "B.json").write_text(json.dumps({"task_name": "B", "scores": {"test": [{"main_score": 0.5}]}}))
    monkeypatch.setattr("run_eval.main", scored)
    monkeypatch.setenv("LG_ANNA_DATA", str(tmp_path))
    (tmp_path / "mteb").mkdir()
    for number, arm in enumerate((Arm(), ARMS["no instructions"])):
        (tmp_path / f"run{number}").mkdir()
        row = experiment.real_score(tmp_path / f"run{number}", arm)
        assert row == {"score": 37.5, "sets": {"A": 25.0, "B": 50.0}}
    assert len(set(asked[0].values())) > 1 and set(asked[1].values()) == {"Find texts."}
    assert asked[0].keys() == asked[1].keys()
