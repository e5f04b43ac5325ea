"""B11 and B12: encoding and LoRA steps at the shape of SmolLM2-135M, on a CPU, against transformers and PEFT.

    B11    encoding texts of 10 to 40 tokens, and of 128
    B12    a LoRA step of rank 16 on the same texts, and with compiled blocks (run_train.py --compile)

Each in bf16 and fp32, with one and two threads; weights are random. Both sides get the texts sorted by length: ours
packed, transformers in batches of 16, padded on the right, with scaled_dot_product_attention.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.encoding import cosine_error
from benchmarks.measure import Result, Target, Timing, check_errors, measure, relative_error
from benchmarks.training import TARGET_MODULES, adamw, gradient, peft_model
from ref.config import ModelConfig
from ref.embedder import TOKENS_PER_BATCH
from ref.model.lora import apply_lora, lora_layers
from ref.model.packing import batch_by_tokens, pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.utils.prefetch import map_on_cores

CPU = torch.device("cpu")
SMOLLM2 = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    intermediate_size=1536, rope_theta=100_000.0, sliding_window=None, dtype="float32")
RANK, PEER_BATCH, ROUNDS = 16, 16, 3
WANTED = {("B11", "bf16"): 2.0, ("B11", "fp32"): 1.4, ("B12", "bf16"): 2.5, ("B12", "fp32"): 1.4}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS = ("ours", "ours, compiled")

Texts = list[list[int]]  # token ids, longest text first
Calls = dict[str, Callable[[], Any] | str]  # ours and the peer


def b11(device: torch.device, *, quick: bool = False) -> Result:
    """Embeddings of token ids."""
    return _compare("B11", _encoders, quick=quick)


def b12(device: torch.device, *, quick: bool = False) -> Result:
    """Forward, backward and AdamW on LoRA's parameters."""
    return _compare("B12", partial(_lora_steps, compiled=not quick), quick=quick)


def _compare(name: str, make: Callable[[Mistral, Texts], tuple[Calls, dict[str, float]]], *, quick: bool) -> Result:
    config = replace(SMOLLM2, num_layers=2, vocab_size=4096) if quick else SMOLLM2
    timings: dict[str, Timing] = {}
    checks: dict[str, float] = {}
    figures: dict[str, float] = {}
    targets: dict[str, Target] = {}
    for dtype in DTYPES:
        model = shapes.random_model(config, CPU).to(DTYPES[dtype])
        for what, texts in _texts(quick=quick).items():
            calls, errors = make(model, texts)
            checks |= {f"{key}, {dtype}, {what}": value for key, value in errors.items()}
            for threads in (1, 2):
                case = f"{dtype}, {threads} thread{'s' * (threads > 1)}, {what}"
                with _threads(threads):
                    found = measure(calls, device=CPU, rounds=ROUNDS, warmed_up=True)
                timings |= {f"{side}, {case}": timing for side, timing in found.items()}
                rate = {side: sum(map(len, texts)) / t.median_s for side, t in found.items() if not t.missing}
                figures |= {f"{side}, {case}, tokens/s": value for side, value in rate.items()}
                targets |= {f"{peer} / {side}, {case}": (rate[side] / rate[peer], ">=", WANTED[name, dtype])
                            for peer in rate for side in OURS if peer not in OURS and side in rate and not quick}
    return Result(name, {"hidden size": config.hidden_size, "layers": config.num_layers}, timings, checks, targets,
                  figures)


def _texts(*, quick: bool) -> dict[str, Texts]:
    """Texts of both kinds, about 1,600 tokens each."""
    draw = random.Random(0)
    lengths = {"10 to 40 tokens": sorted((draw.randint(10, 40) for _ in range(4 if quick else 64)), reverse=True),
               "128 tokens": [128] * (1 if quick else 12)}
    return {what: [[draw.randrange(3, 4000) for _ in range(n)] for n in each] for what, each in lengths.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(texts: Texts) -> list[list[int]]:
    return batch_by_tokens(list(map(len, texts)), tokens_per_batch=TOKENS_PER_BATCH["cpu"])


def _embed(model: Mistral, texts: Texts, batch: list[int]) -> Tensor:
    return embed(model, pack_sequences([texts[i] for i in batch], device=CPU), backend="chunked")


def _encode(model: Mistral, texts: Texts) -> Tensor:
    """As Embedder.encode does."""
    embed_batch = torch.inference_mode()(partial(_embed, model, texts))
    return torch.cat(list(map_on_cores(embed_batch, _batches(texts), CPU)))


def _peer(model: Any, texts: Texts) -> Tensor:
    parts = [texts[start : start + PEER_BATCH] for start in range(0, len(texts), PEER_BATCH)]
    return torch.cat([shapes.transformers_embed(model, *shapes.pad(part, CPU)) for part in parts])


def _encoders(model: Mistral, texts: Texts) -> tuple[Calls, dict[str, float]]:
    """Both encoders and the error between them, which the first calls give."""
    peer = shapes.transformers_model(model)
    ours = partial(_encode, model, texts)
    if isinstance(peer, str):
        return {"ours": ours, "transformers": peer}, {}
    theirs = torch.inference_mode()(partial(_peer, peer, texts))
    if model.norm.weight.dtype == torch.float32:
        errors, bound = {"relative error": relative_error(ours(), theirs())}, 1e-5
    else:
        errors, bound = {"1 - cosine": cosine_error(ours(), theirs())}, 1e-3
    check_errors(errors, bound)
    return {"ours": ours, "transformers": theirs}, errors


def _lora_steps(base: Mistral, texts: Texts, *, compiled: bool) -> tuple[Calls, dict[str, float]]:
    """The steps and the errors of the gradients of B; the loss is a random direction of the embeddings."""
    low_precision = base.norm.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        model = Mistral(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    apply_lora(model, rank=RANK, alpha=RANK, dropout=0.0, target_modules=TARGET_MODULES)
    direction_BD = torch.randn(len(texts), base.config.hidden_size)
    peer, optimiser = peft_model(model, base, rank=RANK), adamw(model)

    def step(*, compiled: bool) -> None:
        model.compile_on_cpu = compiled
        optimiser.zero_grad(set_to_none=True)
        embedding_BD = torch.cat([_embed(model, texts, batch) for batch in _batches(texts)])
        (embedding_BD * direction_BD).sum().backward()
        optimiser.step()

    calls: Calls = {side: partial(step, compiled=side != "ours") for side in OURS[: 1 + compiled]}
    gradients: dict[str, dict[str, Tensor]] = {}
    for side in calls:
        step(compiled=side != "ours")
        gradients[side] = {name: gradient(layer.lora_B).clone() for name, layer in lora_layers(model).items()}
    if isinstance(peer, str):
        return {**calls, "PEFT": peer}, {}
    peer_optimiser = adamw(peer)

    def theirs() -> None:
        peer_optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):  # usual with PEFT's fp32 adapters
            embedding_BD = _peer(peer, texts)
        (embedding_BD * direction_BD).sum().backward()
        peer_optimiser.step()

    theirs()
    truth = {name: gradient(peer.get_submodule(f"base_model.model.{name}.lora_B.default").weight).clone()
             for name in lora_layers(model)}
    errors = {f"gradient of B, {side}": max(relative_error(truth[name], grad) for name, grad in found.items())
              for side, found in gradients.items()}
    check_errors(errors, 0.1 if low_precision else 1e-4)
    return {**calls, "PEFT": theirs}, errors
