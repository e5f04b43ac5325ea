"""One rank of tests/utils/test_distributed.py: metrics and gradients of every case, and the weights after two steps.

    PYTHONPATH=.:tests RANK=0 WORLD_SIZE=3 … python tests/utils/distributed_worker.py DATA OUTPUT [averaged]
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from conftest import SMALL, randomize_lora, scatter_weights

from ref.config import TrainConfig
from ref.model.lora import apply_lora
from ref.model.transformer import Mistral
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import Tokenizer, train_tokenizer
from ref.training.data import SoftLabelDataset
from ref.training.run_dir import trainable_parameters
from ref.training.trainer import Trainer
from ref.utils.distributed import Distributed

CASES = {
    "whole": {"mini_batch_tokens": 10**6},
    "mini-batches": {"mini_batch_tokens": 64},
    "examples": {"mini_batch_tokens": 64, "max_examples": 3},
    "examples-per-query": {"mini_batch_tokens": 10**6, "max_examples": 2, "examples_per": "query"},
    "own-negatives": {"mini_batch_tokens": 64, "in_batch_negatives": "none"},
    "contrastive-only": {"mini_batch_tokens": 10**6, "soft_label_weight": 0.0},
    "soft-labels-only": {"mini_batch_tokens": 10**6, "contrastive_weight": 0.0},
    "adapter": {"mini_batch_tokens": 64, "train": "lora"},
    "three-queries": {"batch_size": 3, "mini_batch_tokens": 64},  # fewer than ranks: one has nothing to do
}
METRICS = ("loss", "contrastive_loss", "soft_label_loss", "num_masked", "label_entropy", "tokens")


def texts(data: SoftLabelDataset) -> Iterator[str]:
    for number in range(len(data)):
        example = data[number]
        yield from (example.task.instruction, example.query, *example.positives, *example.negatives)


def model_of(tokenizer: Tokenizer, config: TrainConfig) -> Mistral:
    """The same random weights on every rank, in fp64."""
    torch.manual_seed(2)
    model = Mistral(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size))
    scatter_weights(model)
    if config.train == "lora":
        apply_lora(model, rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "down_proj"])
        randomize_lora(model)
    return model.double()


def run_case(name: str, data_path: Path, distributed: Distributed) -> dict[str, np.ndarray]:
    """Two steps of a case."""
    config = dataclasses.replace(TrainConfig(), **{
        "data": [str(data_path)], "batch_size": 10, "batch_size_symmetric": 7, "num_negatives": 3, "dtype": "float32",
        "backend": "chunked", "max_examples": 0, "max_text_tokens": 30, "temperature": 0.05, "train": "all",
        **CASES[name]})
    data = SoftLabelDataset([data_path], config)
    tokenizer = train_tokenizer(texts(data), vocab_size=200, lowercase=True)
    model = model_of(tokenizer, config)
    parameters = trainable_parameters(model)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)
    trainer = Trainer(config, data, model, PromptEncoder(tokenizer, max_text_tokens=30), optimiser,
                      torch.device("cpu"), distributed)
    found = {}
    for step, lines in enumerate(data.batches(0)[:2]):
        metrics, _ = trainer.step(trainer.prepare(lines, epoch=0, step=step))
        found |= {f"{name}/{step}/{key}": metrics[key].numpy().copy() for key in METRICS}
        found |= {f"{name}/{step}/gradient/{key}": p.grad.numpy().copy() for key, p in parameters.items()}
        trainer.update(1e-3)
    return found | {f"{name}/after/{key}": p.detach().numpy().copy() for key, p in parameters.items()}


def main(data_path: Path, output: Path, averaged: bool) -> None:
    """Run all cases; the first and the last rank write their results."""
    distributed = Distributed()
    if averaged:  # as wrappers do that average gradients over the ranks
        all_reduce_ = distributed.all_reduce_

        def average_(tensors: list[torch.Tensor]) -> None:
            all_reduce_(tensors)
            for tensor in tensors:
                tensor.div_(distributed.world_size)
        distributed.all_reduce_ = average_  # type: ignore[method-assign]
    found = {}
    for name in CASES:
        found |= run_case(name, data_path, distributed)
    if distributed.rank in (0, distributed.world_size - 1):
        np.savez(output.with_suffix(f".{distributed.rank}.npz"), **found)
    distributed.barrier()
    distributed.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  # the code's fp32 is fp64 here
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] == ["averaged"])
