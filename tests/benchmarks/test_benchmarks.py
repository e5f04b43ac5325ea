"""The measurement itself: wrong results are not timed, peak memory is measured, the commands run at small shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loss, mining
from benchmarks.measure import Result, check_errors, measure, relative_error, write_result

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


# In a process of its own: in the heap of one that has run other tests, freed blocks below others are used again or not.
PEAKS = """
import torch
from benchmarks import loss
from benchmarks.measure import peak_bytes
CPU = torch.device("cpu")
torch.set_num_threads(1)
"""


def peaks_in_a_fresh_process(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PEAKS + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(peak) for peak in done.stdout.split()]


@linux
def test_the_loss_on_a_cpu_needs_a_quarter_of_the_memory_of_eager_code():
    """Both terms at the shape of B7, the gradients included, which both must return."""
    ours, eager = peaks_in_a_fresh_process("""
inputs = loss.random_inputs(1024, 256, device=CPU, dtype=torch.float32)
for variant in (loss.ours, loss.eager):
    loss.gradients(variant, *inputs)
    print(peak_bytes(lambda: loss.gradients(variant, *inputs), CPU))
""")
    assert 0 < ours <= eager / 4


@pytest.mark.parametrize("mean", [loss.both_terms, loss.contrastive_term])
def test_the_eager_peer_computes_the_loss_of_training(mean):
    inputs = loss.random_inputs(40, 16, device=CPU, dtype=torch.float64)
    truth = loss.gradients(lambda *given: mean(loss.eager_loss(*given)), *inputs)
    for variant in (loss.ours, loss.eager):
        found = loss.gradients(lambda *given, variant=variant: variant(*given, mean=mean), *inputs)
        assert max(relative_error(a, b) for a, b in zip(found, truth, strict=True)) < 1e-5  # eager casts to fp32
    masked_Q = loss.eager_loss(*inputs).num_masked_Q
    assert masked_Q.min() > 0
    assert loss.eager_loss(*inputs[:2], loss.without_mask(inputs[2])).num_masked_Q.max() == 0


@linux
def test_peak_memory_is_what_a_call_holds_at_once():
    megabytes = 10**6  # blocks of 40: above 32 the C library gives memory back when it is freed
    one_by_one, at_once = peaks_in_a_fresh_process("""
print(peak_bytes(lambda: [torch.ones(10**7).sum() for _ in range(4)], CPU))
print(peak_bytes(lambda: [torch.ones(10**7) for _ in range(4)], CPU))
""")
    assert 36 * megabytes < one_by_one < 60 * megabytes < 156 * megabytes < at_once < 180 * megabytes


def test_a_wrong_result_is_not_timed():
    exact = torch.ones(4)
    check_errors({"right": relative_error(exact * (1 + 1e-7), exact)}, 1e-5)
    for wrong in (exact + 1e-3, exact * torch.nan):
        with pytest.raises(RuntimeError, match="wrong: error must be <= 1e-05"):
            check_errors({"wrong": relative_error(wrong, exact)}, 1e-5)


def test_calls_are_timed_in_turn_and_a_missing_one_has_a_reason():
    order = []
    timings = measure({"a": lambda: order.append("a"), "b": "not installed", "c": lambda: order.append("c")},
                      device=CPU, rounds=3)
    assert order == list("aacc") + list("ac") * 3
    assert timings["b"].missing == "not installed" and len(timings["a"].seconds) == 3


def test_warmed_up_calls_run_once_per_round_and_their_memory_is_not_reported(tmp_path):
    order = []
    timings = measure({name: lambda name=name: order.append(name) for name in "ab"}, device=CPU, rounds=2,
                      warmed_up=True)
    assert order == list("abab")
    assert "MB" not in write_result(Result("B0", {}, timings, {}, {}), tmp_path)
    assert json.loads((tmp_path / "B0.json").read_text())["timings"]["a"]["peak_bytes"] is None


@pytest.mark.parametrize("wrong", ["our_negatives", "negatives_by_query"])
def test_negatives_that_differ_from_brute_force_are_not_reported(wrong, monkeypatch):
    pytest.importorskip("sentence_transformers")
    model = mining.StubModel(*mining.random_vectors(20, 300, 16, CPU), CPU)
    assert mining.measure_mining(model)[1] > 0
    function = getattr(mining, wrong)
    monkeypatch.setattr(mining, wrong, lambda *given: {
        query: negatives[::-1] for query, negatives in function(*given).items()})
    with pytest.raises(RuntimeError, match="must equal those of brute force"):
        mining.measure_mining(model)


@pytest.mark.parametrize(("arguments", "written"), [(["B7", "--quick"], ["B7"]), (["gpu", "B7", "B8"], ["B7", "B8"])])
def test_the_command_at_small_shapes(arguments, written):
    """Without a GPU: with one, the second command would be the real measurement."""
    if torch.cuda.is_available():
        pytest.skip("dry runs are for machines without a GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    call = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300, check=False)
    assert call.returncode == 0, call.stdout[-1000:] + call.stderr[-2000:]
    for name in written:
        result = json.loads((ROOT / f"benchmarks/results/dry-run/{name}.json").read_text())
        assert result["timings"]["ours"]["rounds"] >= 5 and not result["targets"]


@pytest.mark.parametrize("arguments", [["B99"], ["gpu", "B99"]])
def test_an_unknown_benchmark_is_named(arguments):
    call = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)
    assert call.returncode == 2 and "(got 'B99')" in call.stderr
