"""B8: last token, final norm, unit length: our kernel against a chain of torch calls and sentence-transformers.

    cuda    512 texts x 512 tokens x 4096, bf16, and 4096 rows for the floor        cpu    dry run, Triton's interpreter

The floor is the bytes that must cross memory (rows in bf16, the norm's weight, vectors in fp32) over the copy rate
measured in the same run. Device time comes from replays of a CUDA graph, many launches each, so that the host's launch
is not in it; what a launch costs from Python stands apart. sentence-transformers has padded hidden states and, as
transformers does, norms every position before it pools; its figure without that norm stands beside it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Contestant, Result, Target, agree, difference, measure
from ref.pooling import last_token_pool

EPS = 1e-5
LAUNCHES = 50  # in one graph


def inputs(texts: int, tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of texts of equal length, packed (so padding would add nothing), last rows, norm weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_TD = torch.randn(texts * tokens, width, device=device, dtype=dtype)
    last_B = torch.arange(1, texts + 1, device=device) * tokens - 1
    weight_D = 1 + 0.1 * torch.randn(width, device=device)
    return hidden_TD, last_B, weight_D.to(dtype)


def chain(hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor) -> Tensor:
    """The same by torch's own functions, one after the other."""
    row_BD = F.rms_norm(hidden_TD[last_B].float(), weight_D.shape, weight_D.float(), EPS)
    return F.normalize(row_BD, dim=-1)


def padded(tokens: int, *, norm: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """sentence-transformers' Pooling and Normalize on (texts, tokens, width) with an attention mask."""
    try:
        from sentence_transformers.models import Normalize, Pooling
    except ImportError:
        return "sentence-transformers is not installed"

    def call(hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor) -> Tensor:
        hidden = hidden_TD.view(len(last_B), tokens, -1)
        if norm:
            hidden = F.rms_norm(hidden, weight_D.shape, weight_D, EPS)
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask}
        return unit(pool(features))["sentence_embedding"]
    pool, unit = Pooling(1, pooling_mode="lasttoken"), Normalize()
    mask = torch.ones(1, tokens, dtype=torch.int64)

    def prepared(hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.expand(len(last_B), tokens).to(hidden_TD.device)
        return call(hidden_TD, last_B, weight_D)
    return prepared


def fused(hidden_TD: Tensor, last_B: Tensor, weight_D: Tensor) -> Tensor:
    """Our kernel."""
    return last_token_pool(hidden_TD, last_B, weight_D, eps=EPS, kernels="triton")


def on_device(
    function: Callable[..., object], given: tuple[Tensor, Tensor, Tensor], device: torch.device, rounds: int,
) -> Contestant:
    """Seconds of one call on the device: replays of a graph of many calls. On the CPU: the calls themselves.

    Each call of the graph pools other rows, so that they come from memory and not from the cache.
    """
    hidden_TD, last_B, weight_D = given
    if device.type == "cpu":
        return measure({"": lambda: function(*given)}, device=device, rounds=rounds)[""]
    rows = [last_B - n % int(last_B[0] + 1) for n in range(LAUNCHES)]
    function(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for row_B in rows:
            function(hidden_TD, row_B, weight_D)
    found = measure({"": graph.replay}, device=device, rounds=rounds)[""]
    return Contestant([s / LAUNCHES for s in found.seconds], found.peak_bytes)


def launch_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the host spends on one call, the device not waited for."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - start_s) / LAUNCHES


def b8(device: torch.device, *, quick: bool = False) -> Result:
    """Check, then measure; on the CPU a dry run at a small shape that says nothing about speed."""
    cuda = device.type == "cuda"
    texts, tokens, width = (512, 512, 4096) if cuda and not quick else (16, 8, 256)
    given = inputs(texts, tokens, width, device)
    calls: dict[str, Any] = {"ours": fused, "torch chain": chain,
                             "sentence-transformers, every position normed": padded(tokens, norm=True),
                             "sentence-transformers, no final norm": padded(tokens, norm=False)}
    row_BD = given[0][given[1]].double()
    truth = F.normalize(row_BD * (row_BD.square().mean(-1, keepdim=True) + EPS).rsqrt() * given[2].double(), dim=-1)
    checks = {name: difference(call(*given), truth) for name, call in calls.items()
              if not isinstance(call, str) and "no final norm" not in name}
    agree({name: value for name, value in checks.items() if name in ("ours", "torch chain")}, 1e-6)
    agree(checks, 1e-2 if cuda else 1e-6)  # sentence-transformers norms in bf16
    rounds = 20 if cuda and not quick else 5
    found = {name: Contestant(missing=call) if isinstance(call, str) else
             on_device(call, given, device, rounds)
             for name, call in calls.items()}
    figures = {f"{name}, launch from Python, us": 1e6 * launch_s(lambda call=call: call(*given), device)  # type: ignore[misc]
               for name, call in calls.items() if not isinstance(call, str)}
    targets: dict[str, Target] = {}
    if cuda and not quick:
        mine = found["ours"].median_s
        targets["torch chain / ours"] = (found["torch chain"].median_s / mine, ">=", 3)
        theirs = found["sentence-transformers, every position normed"]
        if not theirs.missing:
            targets["sentence-transformers, every position normed / ours"] = (theirs.median_s / mine, ">=", 50)
        del given
        many = inputs(4096, 16, width, device)
        found["ours, 4096 rows"] = on_device(fused, many, device, rounds)
        floor_s = floor(4096, width, device)
        figures["floor at 4096 rows, us"] = 1e6 * floor_s
        targets["ours / floor, 4096 rows"] = (found["ours, 4096 rows"].median_s / floor_s, "<=", 2)
    shape = {"texts": texts, "tokens": tokens, "width": width, "dtype": "bfloat16" if cuda else "float32"}
    return Result("B8", shape, found, checks, targets, figures)


def floor(rows: int, width: int, device: torch.device) -> float:
    """Seconds for the bytes of `rows` rows at the rate of a large copy measured here."""
    source = torch.randn(2**29, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = measure({"": lambda: target.copy_(source)}, device=device, rounds=10)[""].median_s
    return (rows * width * 2 + width * 2 + rows * width * 4) / (2 * source.nbytes / copy_s)
