"""All parts that need an NVIDIA GPU, the most important first: `python -m benchmarks gpu [PART …]`.

    suite       the tests of both kernels, compiled (without a GPU: a few of them, interpreted)
    paths       tests/model/test_cuda.py: attention, compilation, no waiting for the device
    sanitizer   compute-sanitizer's memcheck and racecheck over all kernels at small shapes, if the tool is installed
    B7 B8 B1 B5 B3 B6    benchmarks
    run         run_train.py on a 7B model with random weights, a few steps
    B2 B4 B9 B10         benchmarks
    smollm2     ten minutes of training SmolLM2-135M, then the evaluation sets; needs checkpoints/smollm2 and the data
                in the folder LG_ANNA_DATA

Each part writes benchmarks/results/gpu/PART.json when it ends, so that an interrupted run keeps the finished parts.
Without a GPU all parts run at small shapes on the CPU: a dry run that tests the script.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import run_train
from benchmarks import encoding, loss, mining, pooling, shapes, small_llm, training
from benchmarks.measure import RESULTS, Result, write_result
from ref.text.prompts import PromptEncoder
from ref.training.export import export_model
from ref.utils.environment import environment_info, utc_now

ROOT = Path(__file__).parent.parent
LIMIT_S = 520  # of one part
KERNEL_TESTS = ("tests/loss", "tests/model/test_pooling_kernel.py")
INTERPRETED_TESTS = ("-k", "pool_of_a_zero_row or positive_alone or agree_bit_for_bit")

BENCHMARKS: dict[str, Callable[..., Result]] = {
    "B1": encoding.b1, "B2": encoding.b2, "B3": encoding.b3, "B4": encoding.b4, "B5": training.b5, "B6": training.b6,
    "B7": loss.b7, "B8": pooling.b8, "B9": mining.b9, "B10": encoding.b10,
    "B11": small_llm.b11, "B12": small_llm.b12,
    "B2-bf16": partial(encoding.b2, bf16=True), "B10-bf16": partial(encoding.b10, bf16=True)}


def result_folder(cuda: bool) -> Path:
    """The folder of the results; git ignores those of a dry run."""
    return RESULTS / ("gpu" if cuda else "dry-run")


def run_tests(arguments: Sequence[str], cuda: bool) -> dict[str, Any]:
    """Run pytest in its own process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if cuda else "1"}
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    try:
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S,
                              check=False)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"passed": False, "last_lines": [f"not finished after {LIMIT_S} s", *output.strip().splitlines()[-8:]]}
    return {"passed": done.returncode == 0, "last_lines": done.stdout.strip().splitlines()[-8:]}


def run_kernel_tests(cuda: bool) -> dict[str, Any]:
    """The kernel tests; without a GPU a few of them."""
    return run_tests(KERNEL_TESTS if cuda else (*KERNEL_TESTS, *INTERPRETED_TESTS), cuda)


def run_cuda_tests(cuda: bool) -> dict[str, Any]:
    """The tests of the CUDA paths; skipped without a GPU."""
    return run_tests(["tests/model/test_cuda.py"], cuda)


def run_sanitizer(cuda: bool) -> dict[str, Any]:
    """compute-sanitizer over a short process that launches every kernel once."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not cuda or tool is None:
        return {"not_available": "no NVIDIA GPU" if not cuda else "compute-sanitizer is not installed"}
    found: dict[str, Any] = {}
    for kind in ("memcheck", "racecheck"):
        call = [tool, "--tool", kind, "--error-exitcode", "9",
                sys.executable, "-c", "from benchmarks import gpu; gpu.launch_kernels()"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each allocation separately, to be checked
        try:
            done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S // 2,
                                  check=False)
        except subprocess.TimeoutExpired:
            found[kind] = {"not_available": f"not finished after {LIMIT_S // 2} s"}
            continue
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "=========" in line]
        found[kind] = {"clean": done.returncode == 0, "last_lines": lines[-4:]}
    return {**found, "passed": all(check.get("clean", True) for check in found.values())}


def launch_kernels() -> None:
    """Launch every kernel once, at shapes that are no multiples of a block."""
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        loss.gradients(loss.ours, *loss.random_inputs(33, 72, device=device, dtype=dtype))
    hidden_TD, last_token_B, weight_D = pooling.random_inputs(5, 3, 100, device)
    pooling.ours(hidden_TD.requires_grad_(), last_token_B, weight_D.requires_grad_()).square().sum().backward()
    torch.cuda.synchronize()


def run_benchmark(benchmark: Callable[..., Result]) -> Callable[[bool], dict[str, Any]]:
    """A benchmark as a part."""
    def part(cuda: bool) -> dict[str, Any]:
        result = benchmark(torch.device("cuda" if cuda else "cpu"), quick=not cuda)
        print(write_result(result, result_folder(cuda)), flush=True)
        return result.to_json()
    return part


def run_training(cuda: bool) -> dict[str, Any]:
    """run_train.py on random weights: one warm-up step and three measured ones of 128 queries x (1 + 7)."""
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    encoding._setting.cache_clear()  # the run loads its own weights
    gc.collect()
    config = shapes.model_config(device, quick=not cuda)
    queries, tokens = (128, 96) if cuda else (8, 12)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        data, output, checkpoint = (Path(scratch) / name for name in ("soft_labels.jsonl", "run", "model"))
        model = shapes.random_model(config, device)
        weights = encoding.linear_weights(model)
        export_model(model, PromptEncoder(shapes.word_tokenizer(config)), {}, checkpoint)
        del model
        data.write_text("".join(json.dumps(line) + "\n" for line in random_lines(queries, tokens)))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        code = run_train.main([
            "--data", str(data), "--model", str(checkpoint), "--preset", "paper", "--lora-rank", "32", "--steps", "4",
            "--batch-size", str(queries), "--max-text-tokens", "96", "--max-examples", "0", "--output", str(output)])
        if code:
            return {"error": f"run_train.py failed with exit code {code}"}
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
        chosen = json.loads((output / "run.json").read_text())["options"]["mini_batch_tokens"]
    rates = [step["tokens_per_s"] for step in steps]
    floor = encoding.matrix_rate(config, device, dtype) / (6 * weights)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {"queries": queries, "tokens_per_step": steps[0]["tokens"], "mini_batch_tokens": chosen,
            "tokens_per_s": rates, "median_tokens_per_s": statistics.median(rates), "peak_gb": peak / 1e9,
            "share_of_floor_6p": statistics.median(rates) / floor}


def run_smollm2(cuda: bool) -> dict[str, Any]:
    """The README's run on real data: LoRA on SmolLM2-135M for ten minutes, then all local evaluation sets."""
    model, data = ROOT / "checkpoints/smollm2", Path(os.environ.get("LG_ANNA_DATA", ""))
    files = sorted(data.glob("soft_labels/*.jsonl")) if os.environ.get("LG_ANNA_DATA") else []
    if not files or not model.is_dir():
        return {"skipped": "needs checkpoints/smollm2 (data/smollm2.py) and LG_ANNA_DATA"}
    length = ("--minutes", "10") if cuda else ("--steps", "1")
    sets = () if cuda else ("--tasks", "BIOSSES")
    run = ROOT / "runs" / f"smollm2-{utc_now().replace(':', '')}"  # stays, should the evaluation fail
    commands = [
        ["run_train.py", "--model", model, "--data", *files, *length, "--output", run],
        ["run_eval.py", "--model", run, "--data-dir", data / "mteb",
         "--instructions", ROOT / "configs/real_instructions.json", *sets]]
    for command in commands:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              check=False)
        if done.returncode:
            said = (done.stdout + done.stderr)[-500:]
            return {"run": run.name, "error": f"{command[0]} failed with exit code {done.returncode}: {said}"}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run / "scores.json").read_text())
    return {"run": run.name, "steps": len(steps),
            "median_tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps),
            "scores": {task: score["value"] for task, score in scores.items()}}


def random_lines(queries: int, tokens: int) -> list[dict[str, Any]]:
    """Lines of soft_labels.jsonl with a positive and seven negatives of at most `tokens` tokens."""
    draw = random.Random(0)
    return [{"query": shapes.random_text(draw.randrange(8, 33), draw), "prompt": "w1", "pos_scores": [0.9],
             "pos": [shapes.random_text(draw.randrange(tokens // 3, tokens), draw)], "neg_scores": [0.5] * 7,
             "neg": [shapes.random_text(draw.randrange(tokens // 3, tokens), draw) for _ in range(7)]}
            for _ in range(queries)]


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "suite": run_kernel_tests, "paths": run_cuda_tests, "sanitizer": run_sanitizer,
    **{name: run_benchmark(BENCHMARKS[name]) for name in ("B7", "B8", "B1", "B5", "B3", "B6")}, "run": run_training,
    **{name: run_benchmark(BENCHMARKS[name]) for name in ("B2", "B4", "B9", "B10")},
    "smollm2": run_smollm2}


def main(names: list[str]) -> int:
    """Run the named parts, by default all; returns 1 if one failed."""
    cuda = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if cuda else 'CPU, a dry run without valid measurements'}")
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
        result_folder(cuda).mkdir(parents=True, exist_ok=True)
        (result_folder(cuda) / f"{name}.json").write_text(json.dumps(
            {"date": utc_now(), **environment_info(), "dry_run": not cuda, **content}, indent=1) + "\n")
        if not name.startswith("B") or content.get("error"):
            print(json.dumps(content, indent=1), flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"done: {result_folder(cuda)}")
    return 1 if failed else 0
