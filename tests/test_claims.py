"""The study of the report's claims: its arithmetic, its machinery in small, its cache. Not the claims."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import claims
from benchmarks.claims import ARMS, CLAIMS, changed, interval, table, verdict

ROOT = Path(__file__).parent.parent


def test_verdicts():
    assert verdict(0.1, 0.5, 1) == verdict(-0.5, -0.1, -1) == "reproduced"
    assert verdict(0.1, 0.5, -1) == verdict(-0.5, -0.1, 1) == "not reproduced"
    assert verdict(-0.1, 0.5, 1) == "cannot tell"
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4


def test_pairs_are_by_seed_and_a_claim_waits_for_both_arms():
    rows = {(arm, seed): 10.0 * seed + more for seed in range(4) for arm, more in (("full", 1), ("hard labels", 0))}
    [row] = table("world", rows, range(4))
    assert row["difference"] == row["low"] == row["high"] == 1.0  # the seeds differ by tens, the pairs by one
    assert row["verdict"] == "reproduced" and row["claim"] == "soft labels beside hard ones"
    assert table("world", rows, range(2))[0]["verdict"] == "cannot tell"  # two seeds say nothing


def test_every_claim_names_arms_that_share_a_ground():
    for claim in CLAIMS:
        assert set(ARMS[claim.arm].grounds) & set(ARMS[claim.other].grounds), claim


def test_changed_data():
    lines = [{"query": f"q{n}", "prompt": f"p{n % 2}"} for n in range(20)]
    assert {line["prompt"] for line in changed(lines, "same instruction", 0)} == {"Find texts."}
    shuffled = changed(lines, "shuffled instructions", 0)
    assert shuffled != lines and sorted(x["prompt"] for x in shuffled) == sorted(x["prompt"] for x in lines)
    assert changed(lines, "", 0) == lines


def test_another_seed_option_or_code_is_another_row(monkeypatch):
    one = claims.row_path("world", "full", 0, 10)
    assert one == claims.row_path("world", "full", 0, 10)
    others = {claims.row_path("world", "full", 1, 10), claims.row_path("world", "hard labels", 0, 10),
              claims.row_path("real", "full", 0, 10), claims.row_path("world", "full", 0, 11)}
    monkeypatch.setattr(claims, "code_hash", lambda: "other")
    others.add(claims.row_path("world", "full", 0, 10))
    assert one not in others and len(others) == 5


@pytest.mark.parametrize("arms", [["full", "fixed examples", "mined, random"]])
def test_the_study_in_small_goes_on_where_it_was(arms, tmp_path, monkeypatch, tiny_run):
    """One seed, ten steps, any retriever; the second start has nothing to do."""
    (tmp_path / "retriever").mkdir()
    shutil.copytree(tiny_run, tmp_path / "retriever" / claims.code_hash())
    call = [sys.executable, "-c", "import sys; from pathlib import Path; from benchmarks import claims; "
            f"claims.RESULTS = Path({str(tmp_path)!r}); claims.SECONDS_A_STEP['world'] = 3600.0; "
            "sys.exit(claims.main(sys.argv[1:]))"]
    plan = subprocess.run([*call, "--quick", "--plan", "--only", *arms, "--workers", "1"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert "3 arms x 1 seeds, 3 runs of 10 steps missing: about 30.0 hours with 1 at a time" in plan.stdout
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    for arm in arms:
        row = claims.run_one("world", arm, 0, 10)
        assert 0 < row["score"] < 100 and len(row["sets"]) == 3
        path = claims.row_path("world", arm, 0, 10)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row))
    again = subprocess.run([*call, "--quick", "--only", *arms], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "0 runs of 10 steps missing" in again.stdout
