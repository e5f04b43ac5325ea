"""B5 and B6: training steps with LoRA of rank 32, against transformers with PEFT and sentence-transformers' loss.

    B5     forward, backward and AdamW on texts of one length; on CUDA each side at the largest batch that fits
    B6     a contrastive batch with gradient caching, texts of mixed lengths, in-batch negatives, no soft labels

Both sides start from the same weights and the same A matrices. Before timing the gradients (B5) or the loss (B6) are
compared.
"""

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.encoding import Setting, linear_weights, matrix_rate, setting
from benchmarks.measure import Result, Target, check_errors, measure, relative_error, speed_targets
from ref.loss.contrastive import CandidateIndex
from ref.loss.training_loss import training_loss
from ref.model.lora import apply_lora, lora_layers
from ref.model.packing import pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.training.grad_cache import GradientCache, PromptedTexts

RANK, ALPHA = 32, 32
MAX_TEXTS = 64  # 32,768 tokens on a GPU: a larger batch makes no matrix product faster
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPERATURE = 0.02

Step = Callable[[int], None]  # one optimiser step on that many texts


def model_with_lora(s: Setting) -> Mistral:
    """Our model with a new adapter, on the tensors of the setting: a GPU has room for one 7B model."""
    with torch.device("meta"):
        model = Mistral(s.config)
    model.load_state_dict(s.model.state_dict(), assign=True)
    apply_lora(model, rank=RANK, alpha=ALPHA, dropout=0.0, target_modules=TARGET_MODULES)
    return model


def peft_model(model: Mistral, base: Mistral, *, rank: int = RANK, checkpointing: bool = False) -> Any:
    """transformers with PEFT on the same base weights and A matrices; a string if it is not installed."""
    library = shapes.transformers_model(base)
    if isinstance(library, str):
        return library
    try:
        import peft
    except ImportError:
        return "peft is not installed"
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=TARGET_MODULES)
    peer: Any = peft.get_peft_model(library, config)
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            peer.get_submodule(f"base_model.model.{name}.lora_A.default").weight.copy_(layer.lora_A)
    if checkpointing:
        library.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peer.enable_input_require_grads()
    return peer.train()


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with a rate of zero: every step does equal work on equal weights."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)


# ---- B5 ----------------------------------------------------------------------------------------------------


def b5(device: torch.device, *, quick: bool = False) -> Result:
    """One LoRA step, in tokens per second."""
    s = setting(device, quick)
    length, num_texts = s.by_device(512, 128, 16), s.by_device(8, 8, 4)
    model = model_with_lora(s)
    peers = {"PEFT": peft_model(model, s.model),
             "PEFT, checkpointing": peft_model(model, s.model, checkpointing=True)}
    ids = torch.randint(3, 7000, (MAX_TEXTS, length))
    steps = lora_steps(s, model, peers, ids)
    for step in steps.values():
        if not isinstance(step, str):
            step(num_texts)
    checks = {f"gradient of B, ours against {name}": max(
        relative_error(peer.get_submodule(f"base_model.model.{layer_name}.lora_B.default").weight.grad,
                       gradient(layer.lora_B)) for layer_name, layer in lora_layers(model).items())
        for name, peer in peers.items() if not isinstance(peer, str)}
    check_errors(checks, 0.1 if s.cuda else 1e-4)
    batch = {name: largest_batch(step, num_texts) if s.cuda else num_texts
             for name, step in steps.items() if not isinstance(step, str)}
    print("  texts per step:", ", ".join(f"{name} {count}" for name, count in batch.items()), file=sys.stderr)
    timings = measure({name: step if isinstance(step, str) else partial(step, batch[name])
                       for name, step in steps.items()}, device=device, rounds=s.rounds)
    rate = {name: batch[name] * length / t.median_s for name, t in timings.items() if not t.missing}
    figures = {f"{name}, tokens/s at {batch[name]} texts": value for name, value in rate.items()}
    cost, added = lora_cost(s, model, list(ids[: batch["ours"]].numpy()))
    figures |= {"LoRA, time over merged, forward": cost, "LoRA, operations over merged": added}
    return Result("B5", {"tokens": length, "rank": RANK}, timings, checks,
                  {} if quick else b5_targets(s, rate, cost, added), figures)


def lora_steps(s: Setting, model: Mistral, peers: dict[str, Any], ids: Tensor) -> dict[str, Step | str]:
    """A step of ours and of each peer on the first texts of `ids`; the loss is a random direction of the embeddings."""
    input_ids, lists = ids.to(s.device), list(ids.numpy())
    direction_BD = torch.randn(MAX_TEXTS, s.config.hidden_size, device=s.device)
    optimiser = adamw(model)

    def ours(count: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        packed = pack_sequences(lists[:count], device=s.device)
        (embed(model, packed, backend=s.embedder.backend) * direction_BD[:count]).sum().backward()
        optimiser.step()

    def ours_checkpointing(count: int) -> None:
        model.gradient_checkpointing = True
        ours(count)
        model.gradient_checkpointing = False

    def step_of(peer: Any) -> Step:
        peer_optimiser = adamw(peer)

        def step(count: int) -> None:
            peer_optimiser.zero_grad(set_to_none=True)
            with torch.autocast(s.device.type, torch.bfloat16, enabled=s.cuda):  # usual with PEFT's fp32 adapters
                embedding_BD = shapes.transformers_embed(peer, input_ids[:count])
            (embedding_BD * direction_BD[:count]).sum().backward()
            peer_optimiser.step()
        return step

    return {"ours": ours, "ours, checkpointing": ours_checkpointing,
            **{name: peer if isinstance(peer, str) else step_of(peer) for name, peer in peers.items()}}


def gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient, which must exist."""
    assert parameter.grad is not None
    return parameter.grad


def largest_batch(step: Step, start: int) -> int:
    """The largest power-of-two multiple of `start` texts, at most MAX_TEXTS, for which this GPU has the memory."""
    count = start
    while 2 * count <= MAX_TEXTS:
        try:
            step(2 * count)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return count
        count *= 2
    return count


def b5_targets(s: Setting, rate: dict[str, float], cost: float, added: float) -> dict[str, Target]:
    """Targets on tokens per second, on LoRA's cost, and on CUDA on the share of the floor of 4 P operations."""
    targets: dict[str, Target] = {}
    for name, wanted in (("PEFT", 1.25 if s.cuda else 1.2), ("PEFT, checkpointing", 1.6)):
        if name in rate and (s.cuda or name == "PEFT"):
            targets[f"tokens/s, ours / {name}"] = (rate["ours"] / rate[name], ">=", wanted)
    if not s.cuda:
        return {**targets, "LoRA's cost over merged, by its operations": (cost / added, "<=", 1.1)}
    floor = matrix_rate(s.config, s.device, s.model.norm.weight.dtype) / (4 * linear_weights(s.model))
    return {**targets, "LoRA's cost over merged": (cost, "<=", 0.05),
            "share of the floor of 4 P": (rate["ours"] / floor, ">=", 0.55)}


def lora_cost(s: Setting, model: Mistral, texts: list[Any]) -> tuple[float, float]:
    """The share of time, and of operations, that the adapters add to a forward pass."""
    packed = pack_sequences(texts, device=s.device)
    forward = torch.no_grad()(partial(embed, batch=packed, backend=s.embedder.backend))
    timings = measure({"adapted": lambda: forward(model), "merged": lambda: forward(s.model)}, device=s.device,
                      rounds=s.rounds if s.cuda else 2 * s.rounds + 1)
    layers = lora_layers(model).values()
    low_rank = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    return (timings["adapted"].median_s / timings["merged"].median_s - 1,
            low_rank / sum(layer.weight.numel() for layer in layers))


# ---- B6 ----------------------------------------------------------------------------------------------------


def b6(device: torch.device, *, quick: bool = False) -> Result:
    """A contrastive batch with gradient caching: queries with one positive and seven hard negatives each."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    queries = s.by_device(64, 8, 2)
    texts = shapes.mixed_texts(queries * 9, mean=s.by_device(172, 64, 10), cap=s.by_device(512, 256, 30), draw=draw)
    columns = [texts[n::9] for n in range(9)]  # queries, positives, then seven columns of negatives
    model = model_with_lora(s)
    half = sum(map(len, s.ids(texts))) // 2  # two mini-batches, so that gradient caching embeds twice
    mini_batch_tokens = s.by_device(16384, half, half)
    ours = cached_step(s, model, columns, mini_batch_tokens)
    peer = sentence_transformers_step(s, model, texts_per_batch=s.by_device(32, 8, 2))
    calls: dict[str, Any] = {"ours": ours, "sentence-transformers, cached": peer if isinstance(peer, str)
                             else lambda: peer(columns)}
    checks, own_loss = {}, ours()
    if not isinstance(peer, str):
        checks["loss, ours against sentence-transformers"] = relative_error(own_loss, peer(columns))
    check_errors(checks, 2e-2 if s.cuda else 1e-4)
    timings = s.measure_long(calls)
    wanted = {"sentence-transformers, cached": 2.5 if s.cuda else 2.0}
    shape = {"queries": queries, "passages": 8 * queries, "mini-batch tokens": mini_batch_tokens}
    return Result("B6", shape, timings, checks, {} if quick else speed_targets(timings, wanted))


def cached_step(s: Setting, model: Mistral, columns: list[list[str]], mini_batch_tokens: int) -> Callable[[], Tensor]:
    """Our step: gradient caching, the contrastive term, AdamW; returns the loss."""
    optimiser, queries, backend = adamw(model), len(columns[0]), s.embedder.backend
    passages = [text for candidates in zip(*columns[1:], strict=True) for text in candidates]
    index = CandidateIndex(torch.arange(8 * queries, device=s.device).view(queries, 8),
                           torch.full((8 * queries,), -2, device=s.device),
                           torch.full((queries, 1), -1, device=s.device))
    no_teacher_QC = torch.full((queries, 8), torch.nan, device=s.device)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        groups = [PromptedTexts([], s.ids(columns[0])), PromptedTexts([], s.ids(passages))]
        cached = GradientCache(model, groups, mini_batch_tokens=mini_batch_tokens, backend=backend)
        query_QD, passage_PD = cached.embeddings().split([queries, 8 * queries])
        terms = training_loss(
            query_QD, passage_PD, index, no_teacher_QC, temperature=TEMPERATURE, teacher_temperature=1.0,
            contrastive_weight=1.0, soft_label_weight=0.0, in_batch_negatives=True, false_negative_margin=None,
            backend=backend)
        terms.total.backward()
        cached.backward()
        optimiser.step()
        return terms.total.detach()
    return step


def sentence_transformers_step(
    s: Setting, model: Mistral, *, texts_per_batch: int,
) -> Callable[[list[list[str]]], Tensor] | str:
    """A step of CachedMultipleNegativesRankingLoss with PEFT; a string if a library is not installed."""
    library, peer = s.sentence_transformer(), peft_model(model, s.model)
    for missing in (library, peer):
        if isinstance(missing, str):
            return missing
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    library[0].model = peer
    loss = CachedMultipleNegativesRankingLoss(library, scale=1 / TEMPERATURE, mini_batch_size=texts_per_batch)
    optimiser = adamw(peer)
    library.train()

    def step(columns: list[list[str]]) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        features = [{key: value.to(s.device) if isinstance(value, Tensor) else value for key, value in column.items()}
                    for column in map(library.preprocess, columns)]
        with torch.autocast(s.device.type, torch.bfloat16, enabled=s.cuda):
            value = loss(features, torch.empty(0))
            value.backward()
        optimiser.step()
        return value.detach()
    return step
