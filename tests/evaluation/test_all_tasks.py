"""All 41 tasks of MTEB(eng, v2) with the command run_eval.py: each class of mteb loads and scores tiny local data.

    python -m pytest -m record tests/evaluation/test_all_tasks.py

One class of each of the seven task types, in seconds: test_encoder.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from tiny_mteb import TRAINED, sentence, write_all

import run_eval
from ref.config import ModelConfig
from ref.model.checkpoint import save_model
from ref.model.transformer import Mistral, init_weights
from ref.text.tokenizer import train_tokenizer


def write_model(folder: Path) -> Path:
    """A randomly initialised model of two layers with a vocabulary of the tiny data."""
    words = train_tokenizer([sentence(n) for n in range(400)], vocab_size=400, lowercase=True)
    folder.mkdir()
    config = ModelConfig(**{**SMALL.__dict__, "vocab_size": words.vocab_size, "sliding_window": None})
    save_model(init_weights(Mistral(config), seed=0), folder, dtype=torch.float32)
    words.save(folder)
    return folder


@pytest.mark.record
def test_all_41_tasks_run_with_examples_where_there_is_a_training_split(tmp_path: Path, capsys: Any) -> None:
    names = write_all(tmp_path / "data")
    command = ["--model", str(write_model(tmp_path / "model")), "--data-dir", str(tmp_path / "data"), "--tasks", "all",
               "--output", str(tmp_path / "out")]
    assert run_eval.main([*command, "--examples", "2"]) == 0
    text = capsys.readouterr().out
    assert len(names) == 41 and all(f"{name} (" in text for name in names) and "failed" not in text
    assert "Mean (Task) of MTEB(eng, v2): " in text and "not available" not in text
    (settings,) = (tmp_path / "out").rglob("run_settings.jsonl")
    recorded = [json.loads(line) for line in settings.read_text().splitlines()]
    shown = {row["task"]: row["encode_kwargs"]["examples"] for row in recorded}
    assert shown.keys() == set(names)
    assert {name for name, examples in shown.items() if len(examples) == 2} == set(TRAINED)
    assert run_eval.main([*command, "--examples", "2"]) == 0
    assert capsys.readouterr().out.count("from the result cache") == 41
