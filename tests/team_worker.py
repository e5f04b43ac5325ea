"""One process of a team, for tests/test_team.py: every case's figures and gradients, and the weights after two steps.

    RANK=0 WORLD_SIZE=3 … python tests/team_worker.py DATA OUTPUT [broken]
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from conftest import SMALL, scatter_weights

from ref import lora
from ref.config import Architecture, Options
from ref.data import SoftLabels
from ref.model import fresh
from ref.prompts import Prompter
from ref.runs import _all_texts, trainable
from ref.team import Team
from ref.tokenizer import train
from ref.trainer import Trainer

CASES = {
    "whole": {"chunk_tokens": 10**6},
    "chunks": {"chunk_tokens": 64},
    "examples": {"chunk_tokens": 64, "max_examples": 3},
    "examples-per-query": {"chunk_tokens": 10**6, "max_examples": 2, "examples_per": "query"},
    "own-negatives": {"chunk_tokens": 64, "in_batch": "none"},
    "adapter": {"chunk_tokens": 64, "train": "lora"},
    "three-queries": {"queries": 3, "chunk_tokens": 64},  # fewer than processes: one has nothing to do
}


def main(data: Path, output: Path, broken: bool) -> None:
    """Run all cases; the first and the last process write what they have."""
    team = Team()
    if broken:  # as a wrapper that averages, and gathers without care
        original = team.sum_in_place
        team.sum_in_place = lambda tensors: (original(tensors), [t.div_(team.size) for t in tensors])  # type: ignore[method-assign]
    found = {}
    for name, changes in CASES.items():
        options = dataclasses.replace(Options(), **{
            "data": [str(data)], "queries": 10, "queries_symmetric": 7, "negatives": 3, "dtype": "float32",
            "kernels": "blocked", "max_examples": 0, "max_text_tokens": 30, "temperature": 0.05,
            "train": "all", **changes})
        lines = SoftLabels([data], options)
        tokens = train(_all_texts(lines), vocab_size=200, lowercase=True)
        model = fresh(Architecture(**{**SMALL.__dict__, "vocab_size": tokens.vocab_size}), seed=1)
        torch.manual_seed(2)
        scatter_weights(model)
        if options.train == "lora":
            lora.attach(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
            for layer in lora.adapters(model).values():
                torch.nn.init.normal_(layer.lora_B, std=0.1)
        weights = trainable(model)
        optimiser = torch.optim.AdamW(weights.values(), lr=1e-3, fused=True)
        prompter = Prompter(tokens, max_text_tokens=30)
        trainer = Trainer(options, lines, model, prompter, optimiser, torch.device("cpu"), team)
        for step, rows in enumerate(lines.batches(0)[:2]):
            figures, _ = trainer.step(trainer.prepare(rows, epoch=0, step=step))
            for key in ("loss", "hard", "soft", "masked", "label_entropy", "tokens"):
                found[f"{name}/{step}/{key}"] = figures[key].numpy().copy()
            for key, weight in weights.items():
                found[f"{name}/{step}/gradient/{key}"] = weight.grad.numpy().copy()
            trainer.update(1e-3)
        for key, weight in weights.items():
            found[f"{name}/after/{key}"] = weight.detach().numpy().copy()
    if team.rank in (0, team.size - 1):
        np.savez(output.with_suffix(f".{team.rank}.npz"), **found)
    team.wait()
    team.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["broken"])
