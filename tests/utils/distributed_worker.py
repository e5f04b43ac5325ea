"""One process of a distributed, for tests/test_team.py: every case's figures and gradients, and the weights after two steps.

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

from ref.config import ModelConfig, TrainConfig
from ref.model import lora
from ref.model.transformer import init_weights
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import train_tokenizer
from ref.training.data import SoftLabelDataset
from ref.training.run_dir import _all_texts, trainable_parameters
from ref.training.trainer import Trainer
from ref.utils.distributed import Distributed

CASES = {
    "whole": {"mini_batch_tokens": 10**6},
    "chunks": {"mini_batch_tokens": 64},
    "examples": {"mini_batch_tokens": 64, "max_examples": 3},
    "examples-per-query": {"mini_batch_tokens": 10**6, "max_examples": 2, "examples_per": "query"},
    "own-negatives": {"mini_batch_tokens": 64, "in_batch": "none"},
    "adapter": {"mini_batch_tokens": 64, "train": "lora"},
    "three-queries": {"queries": 3, "mini_batch_tokens": 64},  # fewer than processes: one has nothing to do
}


def main(data: Path, output: Path, broken: bool) -> None:
    """Run all cases; the first and the last process write what they have."""
    distributed = Distributed()
    if broken:  # as a wrapper that averages, and gathers without care
        original = distributed.all_reduce_
        distributed.all_reduce_ = lambda tensors: (original(tensors), [t.div_(distributed.world_size) for t in tensors])  # type: ignore[method-assign]
    found = {}
    for name, changes in CASES.items():
        options = dataclasses.replace(TrainConfig(), **{
            "data": [str(data)], "queries": 10, "queries_symmetric": 7, "negatives": 3, "dtype": "float32",
            "kernels": "blocked", "max_examples": 0, "max_text_tokens": 30, "temperature": 0.05,
            "train": "all", **changes})
        lines = SoftLabelDataset([data], options)
        tokens = train_tokenizer(_all_texts(lines), vocab_size=200, lowercase=True)
        model = init_weights(ModelConfig(**{**SMALL.__dict__, "vocab_size": tokens.vocab_size}), seed=1)
        torch.manual_seed(2)
        scatter_weights(model)
        if options.train == "lora":
            lora.apply_lora(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
            for layer in lora.lora_layers(model).values():
                torch.nn.init.normal_(layer.lora_B, std=0.1)
        weights = trainable_parameters(model)
        optimiser = torch.optim.AdamW(weights.values(), lr=1e-3, fused=True)
        prompt_encoder = PromptEncoder(tokens, max_text_tokens=30)
        trainer = Trainer(options, lines, model, prompt_encoder, optimiser, torch.device("cpu"), distributed)
        for step, rows in enumerate(lines.batches(0)[:2]):
            figures, _ = trainer.step(trainer.prepare(rows, epoch=0, step=step))
            for key in ("loss", "hard", "soft", "masked", "label_entropy", "tokens"):
                found[f"{name}/{step}/{key}"] = figures[key].numpy().copy()
            for key, weight in weights.items():
                found[f"{name}/{step}/gradient/{key}"] = weight.grad.numpy().copy()
            trainer.update(1e-3)
        for key, weight in weights.items():
            found[f"{name}/after/{key}"] = weight.detach().numpy().copy()
    if distributed.rank in (0, distributed.world_size - 1):
        np.savez(output.with_suffix(f".{distributed.rank}.npz"), **found)
    distributed.barrier()
    distributed.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["broken"])
