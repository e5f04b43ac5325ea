"""From one GPU to 256, as arithmetic: the tables of docs/scaling.md, and the bytes of a step measured on two processes.

    python -m benchmarks.scaling              prints the tables (a test holds them against the page)
    python -m benchmarks.scaling --measure    two processes on this machine: bytes over the loopback device, per step

Rates that are not ours are named where they stand; everything else follows from the model's shape.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from ref.config import Architecture

ROOT = Path(__file__).parent.parent
ARCH = Architecture()  # Mistral-7B
RANK = 64
QUERIES, PASSAGES, TOKENS = 512, 8, 128  # of a step: 512 x (1+8) texts of 128 tokens
WEIGHTS = 6.979e9  # in matrix products
MATRIX_RATE, SHARE = 790e12, 0.55  # measured on an H200 in bf16, and what a step is assumed to reach of it
WIDE_RATE = 51e12  # the same in fp32, which dense search uses
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s of one GPU in one direction: H100 and H200, 400 Gbit/s
SIZES = (1, 8, 64, 256)


def adapter_weights(arch: Architecture = ARCH, rank: int = RANK) -> int:
    """Numbers that learn: rank x (in + out) of seven matrices a layer."""
    q, kv = arch.heads * arch.head_width, arch.kv_heads * arch.head_width
    ends = 2 * (arch.width + q) + 2 * (arch.width + kv) + 3 * (arch.width + arch.ffn_width)
    return arch.layers * rank * ends


def bytes_sent(size: int, *, learning: int, passages: int, width: int) -> dict[str, float]:
    """Bytes that one process sends in a step: ring algorithms, fp32.

    all-gather of the passages' vectors: (W - 1) / W of them; all-reduce of their gradient and of the weights'
    gradients: twice that share.
    """
    share, vectors = (size - 1) / size, 4 * passages * width
    return {"gather": share * vectors, "gather, backward": 2 * share * vectors, "gradients": 2 * share * 4 * learning}


def step_seconds(size: int) -> dict[str, float]:
    """Compute, and communication at both rates, of a step whose batch is shared out."""
    tokens = QUERIES * (1 + PASSAGES) * TOKENS
    sent = sum(bytes_sent(size, learning=adapter_weights(), passages=QUERIES * PASSAGES, width=ARCH.width).values())
    return {"compute": 6 * WEIGHTS * tokens / size / (SHARE * MATRIX_RATE), "NVLink": sent / NVLINK,
            "InfiniBand": sent / INFINIBAND}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def tables() -> str:
    """All tables of the page, in its own words."""
    steps = []
    for size in SIZES:
        sent = bytes_sent(size, learning=adapter_weights(), passages=QUERIES * PASSAGES, width=ARCH.width)
        spent = step_seconds(size)
        share = spent["InfiniBand"] / (spent["compute"] + spent["InfiniBand"])
        steps.append([str(size), *(f"{value / 1e6:,.0f} MB" for value in sent.values()), f"{spent['compute']:.2f} s",
                      f"{1000 * spent['NVLink']:.1f} ms", f"{1000 * spent['InfiniBand']:.0f} ms", f"{share:.1%}"])
    batches = []
    for queries in (512, 4096, 32768, 131072):
        others = queries * PASSAGES - PASSAGES
        batches.append([f"{queries:,}", f"{1_000_000 // queries:,}", f"{others:,}", f"{others / 1e6:.3f}",
                        f"{others / 1e4:.1f}"])
    encode, search = 2 * WEIGHTS * 172e9, 2 * 1e6 * 1e9 * ARCH.width
    rerank = 2 * 0.568e9 * 1e6 * 50 * 250

    def hours(operations: float, rate: float) -> str:
        return f"{operations / rate / 3600:,.0f}"
    jobs = [["encode a billion passages of 172 tokens", f"{encode:.1e}", hours(encode, 0.75 * MATRIX_RATE)],
            ["keep their vectors, fp32", f"{4e9 * ARCH.width / 1e12:.1f} TB", ""],
            ["exact search of a million queries among them", f"{search:.1e}", hours(search, WIDE_RATE)],
            ["rerank 50 candidates of a million queries, 568 M weights, 250 tokens a pair", f"{rerank:.1e}",
             hours(rerank, 0.4 * MATRIX_RATE)]]
    return "\n".join([
        *table(["GPUs", "gather", "its gradient", "adapters", "compute", "NVLink", "InfiniBand", "InfiniBand's share"],
               steps),
        *table(["queries a batch", "steps an epoch", "in-batch negatives", "right by chance, 1 in a million",
                "1 in 10,000"], batches),
        *table(["job", "operations or bytes", "GPU hours"], jobs)])


WORKER = """
import dataclasses, sys, torch
from pathlib import Path
from ref import runs, tokenizer
from ref.config import TINY, Options
from ref.data import SoftLabels
from ref.model import fresh
from ref.prompts import Prompter
from ref.team import Team
from ref.trainer import Trainer
data, steps = Path(sys.argv[1]), int(sys.argv[2])
options = dataclasses.replace(Options(), data=[str(data)], queries=64, max_examples=0, max_text_tokens=32, train="all",
                              dtype="float32", kernels="blocked", in_batch="all", negatives=4)
team, lines = Team(), SoftLabels([data], options)
tokens = tokenizer.train(runs._all_texts(lines), vocab_size=1000, lowercase=True)
model = fresh(dataclasses.replace(TINY, vocab_size=tokens.vocab_size), seed=0)
weights = list(runs.trainable(model).values())
optimiser = torch.optim.AdamW(weights, lr=0.0)
trainer = Trainer(options, lines, model, Prompter(tokens, max_text_tokens=32), optimiser, torch.device("cpu"), team)
works = [trainer.prepare(rows, epoch=0, step=0) for rows in lines.batches(0) if len(rows) == 64][:4]
def lo():
    line = next(x for x in open("/proc/net/dev") if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])
team.wait()
before = lo()
for n in range(steps):
    trainer.step(works[n % len(works)])
    trainer.update(0.0)
team.wait()
if team.rank == 0:
    print(sum(w.numel() for w in weights), len(works[0].batch.passages), model.arch.width, (lo() - before) / steps)
team.close()
"""


def measure(steps: int = 50) -> dict[str, float]:
    """Bytes a step over the loopback device with two processes, and what the arithmetic says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "soft_labels.jsonl"
        data.write_bytes((ROOT / "data/soft_labels.jsonl").read_bytes())
        started = [subprocess.Popen([sys.executable, "-c", WORKER, str(data), str(steps)], cwd=ROOT,
                                    env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
                   for rank in range(2)]
        said = [process.communicate(timeout=600)[0] for process in started]
    learning, passages, width, measured = (float(x) for x in said[0].split()[-4:])
    sent = bytes_sent(2, learning=int(learning), passages=int(passages), width=int(width))
    return {"measured": measured, "expected": 2 * sum(sent.values()), **sent}


def main() -> None:
    """Print the tables, or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="bytes of a step on two processes")
    print(json.dumps(measure(), indent=1) if parser.parse_args().measure else tables())


if __name__ == "__main__":
    main()
