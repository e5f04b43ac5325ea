"""All that needs an NVIDIA GPU, in the order of a short slot: `python -m benchmarks gpu [PART …]`.

    suite       tests/test_kernels.py, natively (off a GPU: some of it, in Triton's interpreter)
    paths       tests/test_cuda.py: attention, compilation, no waits
    sanitizer   compute-sanitizer's memcheck and racecheck over every kernel at small shapes, where the tool runs
    B7 B8 B1 B5 B3 B6    see their files
    run         run_train.py on a 7B model of random weights, a few steps
    B2 B4 B9 B10

Each part writes benchmarks/results/gpu/PART.json when it ends, so that a slot that is cut short keeps what was done.
Without a GPU everything runs at small shapes on the CPU: a dry run of the script, which measures nothing.
"""

import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import run_train
from benchmarks import encoding, loss, mining, pooling, shapes, training
from benchmarks.measure import RESULTS, Result, report
from ref.export import export
from ref.prompts import Prompter
from ref.runs import machine, now

ROOT = Path(__file__).parent.parent
LIMIT_S = 520  # of one part
CASE_FOR_SANITIZER = """
import torch
from benchmarks import loss, pooling
device = torch.device("cuda")
for dtype in (torch.float32, torch.bfloat16):
    inputs = loss.case(33, 72, device=device, dtype=dtype)
    for variant in (loss.ours, loss.small):
        loss.gradients(variant, *inputs)
hidden, last, weight = pooling.inputs(5, 3, 100, device)
pooling.fused(hidden.requires_grad_(), last, weight.requires_grad_()).square().sum().backward()
torch.cuda.synchronize()
"""


def folder(cuda: bool) -> Path:
    """Where results go; those of a dry run stay out of the repository."""
    return RESULTS / ("gpu" if cuda else "dry-run")


def run_tests(file: str, cuda: bool, chosen: tuple[str, ...]) -> dict[str, Any]:
    """A file of tests in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if cuda else "1"}
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", file, *chosen]
    try:
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S,
                              check=False)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"passed": False, "last lines": [f"not done after {LIMIT_S} s", *said.strip().splitlines()[-8:]]}
    return {"passed": done.returncode == 0, "last lines": done.stdout.strip().splitlines()[-8:]}


def suite(cuda: bool) -> dict[str, Any]:
    """The kernel tests; off a GPU three of them."""
    few = ("-k", "pool_of_a_zero_row or row_that_sees or agree_bit_for_bit")
    return run_tests("tests/test_kernels.py", cuda, () if cuda else few)


def paths(cuda: bool) -> dict[str, Any]:
    """The tests of the CUDA paths; off a GPU they are skipped."""
    return run_tests("tests/test_cuda.py", cuda, ())


def sanitizer(cuda: bool) -> dict[str, Any]:
    """compute-sanitizer over a short process that launches every kernel once."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not cuda or tool is None:
        return {"not available": "no NVIDIA GPU" if not cuda else "compute-sanitizer is not installed"}
    found: dict[str, Any] = {}
    for kind in ("memcheck", "racecheck"):
        call = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", CASE_FOR_SANITIZER]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else allocations hide in large blocks
        try:
            done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S // 2,
                                  check=False)
        except subprocess.TimeoutExpired:
            found[kind] = {"not available": f"not done after {LIMIT_S // 2} s"}
            continue
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "=========" in line]
        found[kind] = {"clean": done.returncode == 0, "last lines": lines[-4:]}
    return {**found, "passed": all(tool.get("clean", True) for tool in found.values())}


def benchmark(run: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """A benchmark as a part."""
    def part(cuda: bool) -> dict[str, Any]:
        result = run(torch.device("cuda" if cuda else "cpu"), quick=not cuda)
        print(report(result, folder(cuda)), flush=True)
        content: dict[str, Any] = result.as_json()
        return content
    return part


BENCHMARKS: dict[str, Callable[..., Result]] = {
    "B1": encoding.b1, "B2": encoding.b2, "B3": encoding.b3, "B4": encoding.b4, "B5": training.b5, "B6": training.b6,
    "B7": loss.b7, "B8": pooling.b8, "B9": mining.b9, "B10": encoding.b10}


def training_run(cuda: bool) -> dict[str, Any]:
    """run_train.py itself on random weights: one step to warm up, three timed, of 128 queries x (1+7)."""
    device = torch.device("cuda" if cuda else "cpu")
    encoding.setting.cache_clear()  # the run loads weights of its own
    gc.collect()
    arch, draw = shapes.architecture(device, quick=not cuda), random.Random(0)
    queries, tokens = (128, 96) if cuda else (8, 12)
    rows = [{"query": shapes.text(draw.randrange(8, 33), draw), "prompt": "w1", "pos_scores": [0.9],
             "pos": [shapes.text(draw.randrange(tokens // 3, tokens), draw)], "neg_scores": [0.5] * 7,
             "neg": [shapes.text(draw.randrange(tokens // 3, tokens), draw) for _ in range(7)]} for _ in range(queries)]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        data, output, checkpoint = (Path(scratch) / name for name in ("soft_labels.jsonl", "run", "model"))
        model = shapes.random_model(arch, device)
        weights = encoding.weights_in_products(model)
        export(model, Prompter(shapes.tokenizer(arch)), {}, checkpoint)
        del model
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        code = run_train.main([
            "--data", str(data), "--model", str(checkpoint), "--preset", "report", "--lora-rank", "32", "--steps", "4",
            "--queries", str(queries), "--max-text-tokens", "96", "--max-examples", "0", "--output", str(output)])
        if code:
            return {"error": f"run_train.py ended with {code}"}
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
    rate = statistics.median(step["tokens_per_s"] for step in steps)
    dtype = torch.bfloat16 if cuda else torch.float32
    floor = encoding.matrix_rate(arch, device, dtype) / (6 * weights)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {"queries": queries, "tokens a step": steps[0]["tokens"], "tokens/s": [x["tokens_per_s"] for x in steps],
            "median tokens/s": rate, "peak GB": peak / 1e9, "share of the floor of 6 P": rate / floor}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "suite": suite, "paths": paths, "sanitizer": sanitizer,
    **{name: benchmark(BENCHMARKS[name]) for name in ("B7", "B8", "B1", "B5", "B3", "B6")}, "run": training_run,
    **{name: benchmark(BENCHMARKS[name]) for name in ("B2", "B4", "B9", "B10")}}


def main(names: list[str]) -> int:
    """Run the parts that are named, all of them by default; 1 if one failed."""
    cuda = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if cuda else 'none: a dry run on the CPU, which measures nothing'}")
    failed = []
    for name in names or PARTS:
        print(f"[{name}]", flush=True)
        try:
            content = PARTS[name](cuda)
        except Exception as error:  # the other parts do not depend on it
            content = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        if content.get("error") or content.get("passed") is False:
            failed.append(name)
        folder(cuda).mkdir(parents=True, exist_ok=True)
        (folder(cuda) / f"{name}.json").write_text(json.dumps(
            {"date": now(), **machine(), "dry run": not cuda, **content}, indent=1) + "\n")
        if not name.startswith("B") or content.get("error"):
            print(json.dumps(content, indent=1), flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"done: {folder(cuda)}")
    return 1 if failed else 0
