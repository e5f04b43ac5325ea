"""The newest run, and name and revision of a model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_mteb import write_json

from ref.evaluation.model_identity import model_identity, newest_run, trained_without_instructions


def test_the_newest_complete_run(tmp_path: Path) -> None:
    times = {"old": (True, "2026-03-01T10:00:00+00:00"), "new": (True, "2026-03-01T10:30:00+01:00")}
    for name, (complete, finished) in {**times, "stopped": (False, "2027-01-01T00:00:00+00:00")}.items():
        write_json(tmp_path / "runs" / name / "run.json", {"complete": complete, "finished": finished})
    assert newest_run(tmp_path / "runs").name == "old", "10:30 in Paris is before 10:00 in London"
    (tmp_path / "runs" / "new" / "run.json").write_text('{"complete": true')
    with pytest.raises(ValueError, match="new/run.json: invalid JSON.*--model"):
        newest_run(tmp_path / "runs")
    (tmp_path / "runs" / "new" / "run.json").write_text('{"complete": true, "finished": "noon"}')
    with pytest.raises(ValueError, match=r"new/run.json: 'finished' must be an ISO 8601 time \(got 'noon'\).*--model"):
        newest_run(tmp_path / "runs")


@pytest.mark.parametrize(("instructions", "prompts", "expected"), [
    ([None, None], {"query": "", "document": ""}, True),
    ([None, None], {}, True),  # a template with a suffix exports none
    ([None, None], {"other": "Instruct: Find it.\nQuery: "}, False),  # a smaller task has one
    (["Find it.", None], {}, False),
])
def test_a_run_without_instructions(
    instructions: list[str | None], prompts: dict[str, str], expected: bool, tmp_path: Path,
) -> None:
    write_json(tmp_path / "run.json", {"usage": {"instructions": instructions}})
    write_json(tmp_path / "adapter/config_sentence_transformers.json", {"prompts": prompts})
    for model in (tmp_path, tmp_path / "adapter"):
        assert trained_without_instructions(str(model)) == expected
    assert not trained_without_instructions("intfloat/e5-mistral-7b-instruct")


def test_other_weights_in_a_run_are_another_revision(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    name, before = model_identity(str(tmp_path / "run"))
    weights = next((tmp_path / "run/model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert name == "local/run" and model_identity(str(tmp_path / "run")) != (name, before)


def test_other_weights_under_an_adapter_are_another_revision_and_a_plan_is_not(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    before = model_identity(str(tmp_path / "adapter"))
    for part in ("adapter", "base"):
        (tmp_path / part / "plan.json").write_text("{}")
    assert model_identity(str(tmp_path / "adapter")) == before
    weights = next((tmp_path / "base").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert model_identity(str(tmp_path / "adapter")) != before


def test_the_commit_of_an_adapter_on_the_hub_is_its_revision(tmp_path: Path, monkeypatch: Any) -> None:
    """And those of its bases; another base is another revision."""
    import huggingface_hub
    commits = {name: tmp_path / f"models--{name}/snapshots" / (character * 40)
               for name, character in (("adapter", "a"), ("base", "b"), ("other", "c"))}
    for name, folder in commits.items():
        write_json(folder / ("adapter_config.json" if name == "adapter" else "config.json"), {
            "base_model_name_or_path": str(commits["base"])})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: (
        str(commits["adapter"] / name) if name == "adapter_config.json" else None))
    assert model_identity("someone/adapter") == ("someone/adapter", f"{'a' * 40}-{'b' * 40}")
    assert model_identity("someone/adapter", base=str(commits["other"]))[1] == f"{'a' * 40}-{'c' * 40}"
    commits["base"].rename(tmp_path / ("b" * 40))  # such a name elsewhere is none of a commit
    found = model_identity("someone/adapter", base=str(tmp_path / ("b" * 40)))[1]
    assert re.fullmatch(f"{'a' * 40}-[0-9a-f]{{16}}", found)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: None)
    assert model_identity("someone/adapter")[1] == "main"
