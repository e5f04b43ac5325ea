"""The arithmetic of docs/scaling.md: the page has its tables, and two processes send the bytes that it expects."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from ref.config import ModelConfig, TrainConfig
from ref.model.lora import apply_lora
from ref.model.transformer import Mistral

ROOT = Path(__file__).parents[2]


def test_the_page_on_scaling_has_the_tables_of_the_arithmetic():
    page = (ROOT / "docs/scaling.md").read_text()
    for table in scaling.tables().strip().split("\n\n"):
        assert table in page
    assert f"{scaling.adapter_parameters():,}" in page
    model = Mistral(replace(ModelConfig(), num_layers=1, vocab_size=10))
    apply_lora(model, rank=64, alpha=32, dropout=0.0, target_modules=TrainConfig().lora_target_modules)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert scaling.adapter_parameters() == 32 * trainable


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted by /proc/net/dev")
def test_the_bytes_of_a_step_are_those_of_the_formulas():
    found = scaling.measure(20)
    assert 0.98 * found["expected"] <= found["measured"] <= 1.1 * found["expected"], found
