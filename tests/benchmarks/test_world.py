"""The sample data: the files in the repository are the generator's, and the labels have the stated properties."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """The files that the generator writes now."""
    folder = tmp_path_factory.mktemp("world")
    subprocess.run([sys.executable, ROOT / "data/make_world.py", "--output", folder], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """The lines of soft_labels.jsonl."""
    return [json.loads(line) for line in (ROOT / "data/soft_labels.jsonl").read_text().splitlines()]


def test_the_repository_has_the_files_of_the_generator(generated):
    files = sorted(path.relative_to(generated) for path in generated.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 5
    for file in files:
        assert (generated / file).read_bytes() == (ROOT / "data" / file).read_bytes(), file
    assert (generated / "soft_labels.jsonl").stat().st_size <= 1_000_000


def test_a_query_has_other_positives_under_another_instruction(lines):
    positives: dict[str, dict[str, set[str]]] = {}
    for line in lines:
        positives.setdefault(line["query"], {})[line["prompt"]] = set(line["pos"])
    shared = [by_prompt for by_prompt in positives.values() if len(by_prompt) > 1]
    assert len(shared) > 500
    for one, other in (list(by_prompt.values())[:2] for by_prompt in shared):
        assert not one & other


def test_planted_false_negatives_are_above_the_threshold_of_the_95_percent_rule(lines):
    above = [sum(score >= 0.95 * min(line["pos_scores"]) for score in line["neg_scores"]) for line in lines]
    assert set(above) == {0, 1}
    assert 0.2 < sum(above) / len(lines) < 0.4


def test_no_held_out_text_is_a_training_text(lines):
    seen = {text for line in lines for text in (line["query"], *line["pos"], *line["neg"])}
    for name in ("corpus", "queries"):
        for path in (ROOT / "data/held_out").glob(f"*/{name}.jsonl"):
            assert not seen & {json.loads(line)["text"] for line in path.read_text().splitlines()}, path


def test_raw_files_of_others_are_not_overwritten(tmp_path):
    """Nothing is written then; its own files, here truth.jsonl, are no obstacle."""
    command = [sys.executable, str(ROOT / "data/make_world.py"), "--raw", str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0
    (tmp_path / "corpus.jsonl").write_text("mine")
    (tmp_path / "pairs.jsonl").unlink()
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "corpus.jsonl exists and holds something else" in done.stderr
    assert (tmp_path / "corpus.jsonl").read_text() == "mine" and not (tmp_path / "pairs.jsonl").exists()
    assert subprocess.run([*command, "--output", str(tmp_path)], check=False, capture_output=True,
                          timeout=120).returncode == 2
