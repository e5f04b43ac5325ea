"""B8: last-token pooling, final norm and unit length: our kernel against torch functions and sentence-transformers.

    cuda    512 texts x 512 tokens x 4096, bf16; 4096 rows for the floor        cpu    dry run in Triton's interpreter

The floor is the number of bytes that must cross memory (rows in bf16, the norm's weight, embeddings in fp32) divided by
the copy rate measured in the same run. Device time is measured by replays of a CUDA graph of many launches, so that it
excludes the host's launch latency, which is reported separately. sentence-transformers pools padded hidden states and,
like transformers, normalises every position first; it is also measured without that norm.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Result, Target, Timing, check_errors, measure, relative_error
from ref.model.pooling import last_token_pool

EPS = 1e-5
LAUNCHES = 50  # in one graph
ALL_NORMED, NOT_NORMED = "sentence-transformers, all positions normed", "sentence-transformers, no final norm"
Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(texts: int, tokens: int, width: int, device: torch.device) -> Inputs:
    """Hidden states of texts of one length (packed, so that padding would add nothing), last rows, norm weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.randn(texts * tokens, width, device=device, dtype=dtype)
    last_token_B = torch.arange(1, texts + 1, device=device) * tokens - 1
    weight_D = 1 + 0.1 * torch.randn(width, device=device)
    return hidden_TD, last_token_B, weight_D.to(dtype)


def ours(hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor) -> Tensor:
    """Our kernel."""
    return last_token_pool(hidden_TD, last_token_B, weight_D, eps=EPS, backend="triton")


def torch_functions(hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor) -> Tensor:
    """The same with rms_norm and normalize of torch."""
    row_BD = F.rms_norm(hidden_TD[last_token_B].float(), weight_D.shape, weight_D.float(), EPS)
    return F.normalize(row_BD, dim=-1)


def in_fp64(hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor) -> Tensor:
    """The same in fp64."""
    row_BD = hidden_TD[last_token_B].double()
    normed_BD = row_BD * (row_BD.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_D.double()
    return F.normalize(normed_BD, dim=-1)


def sentence_transformers_pool(tokens: int, *, norm: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """sentence-transformers' Pooling and Normalize on (texts, tokens, width) with an attention mask."""
    try:
        from sentence_transformers.models import Normalize, Pooling
    except ImportError:
        return "sentence-transformers is not installed"
    pool, normalize = Pooling(1, pooling_mode="lasttoken"), Normalize()
    mask = torch.ones(1, tokens, dtype=torch.int64)

    def call(hidden_TD: Tensor, last_token_B: Tensor, weight_D: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.expand(len(last_token_B), tokens).to(hidden_TD.device)
        hidden = hidden_TD.view(len(last_token_B), tokens, -1)
        if norm:
            hidden = F.rms_norm(hidden, weight_D.shape, weight_D, EPS)
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask}
        return normalize(pool(features))["sentence_embedding"]
    return call


def device_time(function: Callable[..., object], inputs: Inputs, device: torch.device, rounds: int) -> Timing:
    """Seconds of one call on the device, by replays of a graph of many calls; on a CPU of the calls themselves.

    Each call of the graph pools other rows, so that they are read from memory and not from the cache.
    """
    hidden_TD, last_token_B, weight_D = inputs
    if device.type == "cpu":
        return measure({"": lambda: function(*inputs)}, device=device, rounds=rounds)[""]
    rows = [last_token_B - n % int(last_token_B[0] + 1) for n in range(LAUNCHES)]
    function(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for row_B in rows:
            function(hidden_TD, row_B, weight_D)
    timing = measure({"": graph.replay}, device=device, rounds=rounds)[""]
    return Timing([s / LAUNCHES for s in timing.seconds], timing.peak_bytes)


def launch_time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the host spends on one call without waiting for the device."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - start_s) / LAUNCHES


def b8(device: torch.device, *, quick: bool = False) -> Result:
    """Check, then measure; on a CPU a dry run at a small shape."""
    cuda = device.type == "cuda"
    texts, tokens, width = (512, 512, 4096) if cuda and not quick else (16, 8, 256)
    inputs = random_inputs(texts, tokens, width, device)
    calls: dict[str, Any] = {"ours": ours, "torch functions": torch_functions,
                             ALL_NORMED: sentence_transformers_pool(tokens, norm=True),
                             NOT_NORMED: sentence_transformers_pool(tokens, norm=False)}
    truth = in_fp64(*inputs)
    checks = {name: relative_error(call(*inputs), truth) for name, call in calls.items()
              if not isinstance(call, str) and name != NOT_NORMED}
    check_errors({name: value for name, value in checks.items() if name in ("ours", "torch functions")}, 1e-6)
    check_errors(checks, 1e-2 if cuda else 1e-6)  # sentence-transformers normalises in bf16
    rounds = 20 if cuda and not quick else 5
    timings = {name: Timing(missing=call) if isinstance(call, str) else device_time(call, inputs, device, rounds)
               for name, call in calls.items()}
    figures = {
        f"{name}, launch from Python, us": 1e6 * launch_time(lambda call=call: call(*inputs), device)  # type: ignore[misc]
        for name, call in calls.items() if not isinstance(call, str)}
    targets: dict[str, Target] = {}
    if cuda and not quick:
        del inputs
        timings["ours, 4096 rows"] = device_time(ours, random_inputs(4096, 16, width, device), device, rounds)
        floor_s = copy_floor(4096, width, device)
        figures["floor at 4096 rows, us"] = 1e6 * floor_s
        targets = b8_targets(timings, floor_s)
    shape = {"texts": texts, "tokens": tokens, "width": width, "dtype": "bfloat16" if cuda else "float32"}
    return Result("B8", shape, timings, checks, targets, figures)


def b8_targets(timings: dict[str, Timing], floor_s: float) -> dict[str, Target]:
    """Targets on the time against the peers and against the floor."""
    ours_s = timings["ours"].median_s
    targets: dict[str, Target] = {
        "torch functions / ours": (timings["torch functions"].median_s / ours_s, ">=", 3),
        "ours / floor, 4096 rows": (timings["ours, 4096 rows"].median_s / floor_s, "<=", 2)}
    if not timings[ALL_NORMED].missing:
        targets[f"{ALL_NORMED} / ours"] = (timings[ALL_NORMED].median_s / ours_s, ">=", 50)
    return targets


def copy_floor(rows: int, width: int, device: torch.device) -> float:
    """Seconds for the bytes of `rows` rows at the rate of a large copy measured here."""
    source = torch.randn(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = measure({"": lambda: target.copy_(source)}, device=device, rounds=10)[""].median_s
    return (rows * width * 2 + width * 2 + rows * width * 4) / (2 * source.nbytes / copy_s)
