"""The sample world: the files in the repository are the generator's, and its labels are what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """What the generator writes today."""
    folder = tmp_path_factory.mktemp("world")
    subprocess.run([sys.executable, ROOT / "data/make_world.py", "--output", folder], check=True, timeout=120)
    return folder


def test_the_repository_holds_what_the_generator_writes(written):
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 5
    for file in files:
        assert (written / file).read_bytes() == (ROOT / "data" / file).read_bytes(), file
    assert (written / "soft_labels.jsonl").stat().st_size <= 1_000_000


def test_the_same_query_has_other_positives_under_another_instruction():
    rows = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]
    positives: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        positives.setdefault(row["query"], {})[row["prompt"]] = set(row["pos"])
    shared = [by_prompt for by_prompt in positives.values() if len(by_prompt) > 1]
    assert len(shared) > 500
    for one, other in (list(by_prompt.values())[:2] for by_prompt in shared):
        assert not one & other


def test_false_negatives_are_planted_above_the_ninety_five_percent_bar():
    rows = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]
    above = [sum(score >= 0.95 * min(row["pos_scores"]) for score in row["neg_scores"]) for row in rows]
    assert set(above) == {0, 1}
    assert 0.2 < sum(above) / len(rows) < 0.4


def test_no_held_out_text_is_a_training_text():
    rows = [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]
    seen = {text for row in rows for text in (row["query"], *row["pos"], *row["neg"])}
    for name in ("corpus", "queries"):
        for path in (ROOT / "data/held_out").glob(f"*/{name}.jsonl"):
            assert not seen & {json.loads(line)["text"] for line in path.read_text().splitlines()}, path
