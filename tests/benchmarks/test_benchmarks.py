"""The measuring itself: what is wrong is not timed, memory is seen, the commands run to their end in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loss, mining
from benchmarks.measure import Result, agree, difference, measure, peak_bytes, report

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@linux
def test_the_loss_on_a_cpu_needs_a_quarter_of_eagers_memory():
    """At the shape of B7; what both must return, the gradients, counts in."""
    inputs = loss.case(1024, 256, device=CPU, dtype=torch.float32)
    peak = {}
    for path in (loss.ours, loss.eager):
        loss.gradients(path, *inputs)
        peak[path] = peak_bytes(lambda path=path: loss.gradients(path, *inputs), CPU)
    assert 0 < peak[loss.ours] <= peak[loss.eager] / 4


@linux
def test_peak_memory_is_what_a_call_holds_at_once():
    megabytes = 10**6
    one_by_one = peak_bytes(lambda: [torch.ones(5 * megabytes).sum() for _ in range(4)], CPU)
    at_once = peak_bytes(lambda: [torch.ones(5 * megabytes) for _ in range(4)], CPU)
    assert 18 * megabytes < one_by_one < 30 * megabytes < 78 * megabytes < at_once < 90 * megabytes


def test_a_wrong_result_is_not_timed():
    exact = torch.ones(4)
    agree({"right": difference(exact * (1 + 1e-7), exact)}, 1e-5)
    for wrong in (exact + 1e-3, exact * torch.nan):
        with pytest.raises(RuntimeError, match="differs"):
            agree({"wrong": difference(wrong, exact)}, 1e-5)


def test_contestants_are_called_in_turn_and_a_missing_one_says_why():
    order = []
    found = measure({"a": lambda: order.append("a"), "b": "not installed", "c": lambda: order.append("c")},
                    device=CPU, rounds=3)
    assert order == list("aacc") + list("ac") * 3
    assert found["b"].missing == "not installed" and len(found["a"].seconds) == 3


def test_warm_calls_are_made_once_a_round_and_their_memory_is_not_reported(tmp_path):
    order = []
    found = measure({name: lambda name=name: order.append(name) for name in "ab"}, device=CPU, rounds=2, warm=True)
    assert order == list("abab")
    assert "MB" not in report(Result("B0", {}, found, {}, {}), tmp_path)
    assert json.loads((tmp_path / "B0.json").read_text())["contestants"]["a"]["peak_bytes"] is None


@pytest.mark.parametrize("wrong", ["ours_mined", "by_query"])
def test_mined_negatives_that_brute_force_does_not_find_are_not_reported(wrong, monkeypatch):
    pytest.importorskip("sentence_transformers")
    stub = mining.Stub(*mining.case(20, 300, 16, CPU), CPU)
    assert mining.mined_side_by_side(stub)[1] > 0
    miner = getattr(mining, wrong)
    monkeypatch.setattr(mining, wrong, lambda *given: {
        query: negatives[::-1] for query, negatives in miner(*given).items()})
    with pytest.raises(RuntimeError, match="differ from brute force"):
        mining.mined_side_by_side(stub)


@pytest.mark.parametrize(("arguments", "written"), [(["B7", "--quick"], ["B7"]), (["gpu", "B7", "B8"], ["B7", "B8"])])
def test_the_command_in_small(arguments, written):
    """On a GPU the second one is the real thing: there it is left out."""
    if torch.cuda.is_available():
        pytest.skip("dry runs are for machines without a GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    call = subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300, check=False)
    assert call.returncode == 0, call.stdout[-1000:] + call.stderr[-2000:]
    for name in written:
        result = json.loads((ROOT / f"benchmarks/results/dry-run/{name}.json").read_text())
        assert result["contestants"]["ours"]["rounds"] >= 5 and not result["targets"]


def test_an_unknown_benchmark_is_named():
    call = subprocess.run([sys.executable, "-m", "benchmarks", "B99"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)
    assert call.returncode == 2 and "B99" in call.stderr
