"""From one GPU to 256 by arithmetic: the tables of docs/scaling.md, and the bytes of a step measured on two processes.

    python -m benchmarks.scaling              print the tables (a test compares them with the page)
    python -m benchmarks.scaling --measure    bytes per step over the loopback device, two processes on this machine

The rates are named constants with their source; all other numbers follow from the model's shape.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ref.config import TINY, ModelConfig, TrainConfig
from ref.training.data import SoftLabelDataset
from ref.training.model_source import ModelSource, build_model
from ref.training.run_dir import trainable_parameters
from ref.training.trainer import Trainer
from ref.utils.distributed import Distributed

ROOT = Path(__file__).parent.parent
MISTRAL_7B = ModelConfig()
RANK = 64
QUERIES, PASSAGES, TOKENS = 512, 8, 128  # of a step: 512 x (1 + 8) texts of 128 tokens
LINEAR_WEIGHTS = 6.979e9
MATRIX_RATE, SHARE = 790e12, 0.55  # FLOP/s measured on an H200 in bf16, and the share of it assumed for a step
FP32_RATE = 51e12  # FLOP/s in fp32, for dense search
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s of one GPU in one direction: H100 and H200, 400 Gbit/s
GPUS = (1, 8, 64, 256)


def adapter_parameters(config: ModelConfig = MISTRAL_7B, rank: int = RANK) -> int:
    """Trainable parameters: rank x (in + out) of seven matrices per layer."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    ends = 2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + config.intermediate_size)
    return config.num_layers * rank * ends


def bytes_sent(world_size: int, *, trainable: int, passages: int, width: int) -> dict[str, float]:
    """Bytes that one rank sends per step, with ring algorithms in fp32.

    all_gather of the passages' embeddings: (W - 1) / W of them; all_reduce of their gradient and of the parameters'
    gradients: twice that share.
    """
    share, embeddings = (world_size - 1) / world_size, 4 * passages * width
    return {"all_gather": share * embeddings, "all_gather, backward": 2 * share * embeddings,
            "gradients": 2 * share * 4 * trainable}


def bytes_of_a_step(world_size: int) -> dict[str, float]:
    """`bytes_sent` of the step that the tables describe."""
    return bytes_sent(world_size, trainable=adapter_parameters(), passages=QUERIES * PASSAGES,
                      width=MISTRAL_7B.hidden_size)


def step_seconds(world_size: int) -> dict[str, float]:
    """Computation, and communication at both rates, of a step whose batch is sharded."""
    tokens = QUERIES * (1 + PASSAGES) * TOKENS
    sent = sum(bytes_of_a_step(world_size).values())
    return {"compute": 6 * LINEAR_WEIGHTS * tokens / world_size / (SHARE * MATRIX_RATE), "NVLink": sent / NVLINK,
            "InfiniBand": sent / INFINIBAND}


# ---- tables ------------------------------------------------------------------------------------------------


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def tables() -> str:
    """All tables of docs/scaling.md."""
    return "\n".join([
        *markdown_table(["GPUs", "all-gather", "all-reduce of their gradient", "adapters", "compute", "NVLink",
                         "InfiniBand", "InfiniBand / step"], step_rows()),
        *markdown_table(["queries per batch", "steps per epoch", "in-batch negatives",
                         "relevant by chance, 1 in a million", "1 in 10,000"], batch_rows()),
        *markdown_table(["job", "operations or bytes", "GPU hours"], job_rows())])


def step_rows() -> list[list[str]]:
    """Communication and computation of a step by number of GPUs."""
    rows = []
    for world_size in GPUS:
        seconds = step_seconds(world_size)
        share = seconds["InfiniBand"] / (seconds["compute"] + seconds["InfiniBand"])
        rows.append([str(world_size), *(f"{value / 1e6:,.0f} MB" for value in bytes_of_a_step(world_size).values()),
                     f"{seconds['compute']:.2f} s", f"{1000 * seconds['NVLink']:.1f} ms",
                     f"{1000 * seconds['InfiniBand']:.0f} ms", f"{share:.1%}"])
    return rows


def batch_rows() -> list[list[str]]:
    """In-batch negatives, true and false ones, by batch size, for a million lines."""
    rows = []
    for queries in (512, 4096, 32768, 131072):
        others = queries * PASSAGES - PASSAGES
        rows.append([f"{queries:,}", f"{1_000_000 // queries:,}", f"{others:,}", f"{others / 1e6:.3f}",
                     f"{others / 1e4:.1f}"])
    return rows


def job_rows() -> list[list[str]]:
    """GPU hours of encoding, search and reranking."""
    width = MISTRAL_7B.hidden_size
    encode, search, rerank = 2 * LINEAR_WEIGHTS * 172e9, 2 * 1e6 * 1e9 * width, 2 * 0.568e9 * 1e6 * 50 * 250

    def hours(operations: float, rate: float) -> str:
        return f"{operations / rate / 3600:,.0f}"
    return [["encode a billion passages of 172 tokens", f"{encode:.1e}", hours(encode, 0.75 * MATRIX_RATE)],
            ["store their embeddings in fp32", f"{4e9 * width / 1e12:.1f} TB", ""],
            ["exact search of a million queries among them", f"{search:.1e}", hours(search, FP32_RATE)],
            ["rerank 50 candidates of a million queries, 568 M weights, 250 tokens per pair", f"{rerank:.1e}",
             hours(rerank, 0.4 * MATRIX_RATE)]]


# ---- measurement -------------------------------------------------------------------------------------------


def measure(steps: int = 50) -> dict[str, float]:
    """Bytes per step over the loopback device with two processes, and what the formulas expect."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "soft_labels.jsonl"  # without held-out sets beside it
        data.write_bytes((ROOT / "data/soft_labels.jsonl").read_bytes())
        call = [sys.executable, "-m", "benchmarks.scaling", "--rank", str(data), str(steps)]
        processes = [subprocess.Popen(call, cwd=ROOT, env={**environment, "RANK": rank}, stdout=subprocess.PIPE,
                                      text=True) for rank in "01"]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    found = json.loads(outputs[0].splitlines()[-1])
    measured = found.pop("bytes_per_step")
    sent = bytes_sent(2, **found)
    return {"measured": measured, "expected": 2 * sum(sent.values()), **sent}


def run_rank(data: Path, steps: int) -> None:
    """One of the two processes: training steps of the small model; rank 0 prints the bytes per step of both."""
    config = TrainConfig(data=[str(data)], batch_size=64, mini_batch_tokens=32768, max_examples=0, max_text_tokens=32,
                         train="all", dtype="float32", backend="chunked", in_batch_negatives="all", num_negatives=4)
    distributed, dataset, device = Distributed(), SoftLabelDataset([data], config), torch.device("cpu")
    source = ModelSource("tiny", "", dataclasses.replace(TINY, vocab_size=1000))
    model, prompt_encoder = build_model(source, config, dataset, device=device)
    parameters = list(trainable_parameters(model).values())
    optimiser = torch.optim.AdamW(parameters, lr=0.0)
    trainer = Trainer(config, dataset, model, prompt_encoder, optimiser, device, distributed)
    batches = [trainer.prepare(lines, epoch=0, step=0) for lines in dataset.batches(0) if len(lines) == 64][:4]
    distributed.barrier()
    before = loopback_bytes()
    for n in range(steps):
        trainer.step(batches[n % len(batches)])
        trainer.update(0.0)
    distributed.barrier()
    if distributed.rank == 0:
        print(json.dumps({"trainable": sum(p.numel() for p in parameters), "passages": len(batches[0].batch.passages),
                          "width": model.config.hidden_size, "bytes_per_step": (loopback_bytes() - before) / steps}))
    distributed.close()


def loopback_bytes() -> int:
    """Bytes received over the loopback device since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def main() -> None:
    """Print the tables, or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the bytes of a step on two processes")
    parser.add_argument("--rank", nargs=2, metavar=("DATA", "STEPS"), help=argparse.SUPPRESS)  # one of the processes
    given = parser.parse_args()
    if given.rank:
        run_rank(Path(given.rank[0]), int(given.rank[1]))
    else:
        print(json.dumps(measure(), indent=1) if given.measure else tables())


if __name__ == "__main__":
    main()
