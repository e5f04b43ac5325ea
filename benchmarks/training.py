"""B5 and B6: training steps with LoRA of rank 32, against transformers with PEFT and sentence-transformers' loss.

    B5     forward, backward and AdamW on texts of one length, each side at the largest batch that fits (cuda)
    B6     a contrastive batch in chunks (gradient caching), mixed lengths, hard labels over the whole batch

Both sides start from the same weights and the same A matrices; what is compared before timing are gradients (B5) and
the loss (B6).
"""

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.encoding import Setting, against, matrix_rate, setting, weights_in_products
from benchmarks.measure import Result, Target, agree, difference, measure
from ref import lora
from ref.gradcache import GradientCache, Segment
from ref.loss import Groups, training_loss
from ref.model import Mistral
from ref.packing import pack
from ref.pooling import embed

RANK, ALPHA = 32, 32
MOST_TEXTS = 64  # 32,768 tokens: more make no product faster
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPERATURE = 0.02


def adapted(s: Setting) -> Mistral:
    """Our model with a fresh adapter."""
    with torch.device("meta"):
        model = Mistral(s.arch)
    model.load_state_dict(s.model.state_dict(), assign=True)  # the very same tensors: there is room for one 7B
    lora.attach(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS)
    return model


def adapted_twin(model: Mistral, base: Mistral, *, checkpointing: bool = False) -> Any:
    """transformers with PEFT on the same base weights and A matrices; a text, why not, if it is missing."""
    twin = shapes.transformers_twin(base)
    if isinstance(twin, str):
        return twin
    try:
        import peft
    except ImportError:
        return "peft is not installed"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    peer: Any = peft.get_peft_model(twin, config)
    for name, layer in lora.adapters(model).items():
        with torch.no_grad():
            peer.get_submodule(f"base_model.model.{name}.lora_A.default").weight.copy_(layer.lora_A)
    if checkpointing:
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peer.enable_input_require_grads()
    return peer.train()


def optimiser(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW over what learns; a rate of zero, so that every step does the same work on the same weights."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def largest(step: Callable[[int], object], start: int) -> int:
    """The largest power-of-two multiple of `start` texts, up to MOST_TEXTS, that a step survives on this GPU."""
    count = start
    while 2 * count <= MOST_TEXTS:
        try:
            step(2 * count)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return count
        count *= 2
    return count


def b5(device: torch.device, *, quick: bool = False) -> Result:
    """One LoRA step, in tokens a second."""
    s = setting(device, quick)
    cuda = device.type == "cuda"
    length, texts = s.sized(512, 128, 16), s.sized(8, 8, 4)
    model = adapted(s)
    peers = {"PEFT": adapted_twin(model, s.model),
             "PEFT, checkpointing": adapted_twin(model, s.model, checkpointing=True)}
    own = optimiser(model)
    ids = torch.randint(3, 7000, (MOST_TEXTS, length))
    ids_BT, lists = ids.to(device), list(ids.numpy())
    direction_BD = torch.randn(MOST_TEXTS, s.arch.width, device=device)

    def ours(count: int = texts) -> None:
        own.zero_grad(set_to_none=True)
        packed = pack(lists[:count], device=device)
        (embed(model, packed, kernels=s.embedder.kernels) * direction_BD[:count]).sum().backward()
        own.step()

    def theirs(peer: Any) -> Callable[[int], None]:
        other = optimiser(peer)

        def step(count: int) -> None:
            other.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):  # as users train: its adapters are fp32
                vector_BD = shapes.last_token(peer, ids_BT[:count])
            (vector_BD * direction_BD[:count]).sum().backward()
            other.step()
        return step

    def ours_checkpointing(count: int) -> None:
        model.checkpointing = True
        ours(count)
        model.checkpointing = False

    calls: dict[str, Callable[[int], None] | str] = {
        "ours": ours, "ours, checkpointing": ours_checkpointing,
        **{name: peer if isinstance(peer, str) else theirs(peer) for name, peer in peers.items()}}
    for call in calls.values():
        if not isinstance(call, str):
            call(texts)
    checks = {f"gradient of B, ours against {name}": max(
        difference(peer.get_submodule(f"base_model.model.{at}.lora_B.default").weight.grad, _gradient(layer.lora_B))
        for at, layer in lora.adapters(model).items()) for name, peer in peers.items() if not isinstance(peer, str)}
    agree(checks, 1e-4 if not cuda else 0.1)
    batch = {name: largest(call, texts) if cuda else texts for name, call in calls.items() if not isinstance(call, str)}
    print("  texts a step:", ", ".join(f"{name} {count}" for name, count in batch.items()), file=sys.stderr)
    found = measure({name: call if isinstance(call, str) else partial(call, batch[name])
                     for name, call in calls.items()}, device=device, rounds=s.rounds)
    rate = {name: batch[name] * length / c.median_s for name, c in found.items() if not c.missing}
    targets: dict[str, Target] = {}
    if not quick:
        for name, wanted in (("PEFT", 1.25 if cuda else 1.2), ("PEFT, checkpointing", 1.6)):
            if name in rate and (cuda or name == "PEFT"):
                targets[f"tokens/s, ours / {name}"] = (rate["ours"] / rate[name], ">=", wanted)
    figures = {f"{name}, tokens/s at {batch[name]} texts": value for name, value in rate.items()}
    cost, added = lora_cost(s, model, lists[: batch["ours"]])
    figures |= {"LoRA, time over merged, forward": cost, "LoRA, operations over merged": added}
    if not quick:
        targets["LoRA's cost over merged" + ("" if cuda else ", by its operations")] = (
            (cost, "<=", 0.05) if cuda else (cost / added, "<=", 1.1))
    if cuda:
        floor = matrix_rate(s.arch, device, s.model.norm.weight.dtype) / (4 * weights_in_products(s.model))
        targets["share of the floor of 4 P"] = (rate["ours"] / floor, ">=", 0.55)
    return Result("B5", {"tokens": length, "rank": RANK}, found, checks, targets, figures)


def lora_cost(s: Setting, model: Mistral, texts: list[Any]) -> tuple[float, float]:
    """What the adapters add to a forward pass: the share of its time, and of its operations."""
    packed = pack(texts, device=s.device)
    forward = torch.no_grad()(partial(embed, packed=packed, kernels=s.embedder.kernels))
    found = measure({"adapted": lambda: forward(model), "merged": lambda: forward(s.model)}, device=s.device,
                    rounds=s.rounds if s.device.type == "cuda" else 2 * s.rounds + 1)
    layers = lora.adapters(model).values()
    thin = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)
    return found["adapted"].median_s / found["merged"].median_s - 1, thin / sum(x.weight.numel() for x in layers)


def b6(device: torch.device, *, quick: bool = False) -> Result:
    """A contrastive batch of queries with one positive and seven negatives each, in chunks."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    queries = s.sized(64, 8, 2)
    texts = shapes.mixed_texts(queries * 9, mean=s.sized(172, 64, 10), cap=s.sized(512, 256, 30), draw=draw)
    columns = [texts[n::9] for n in range(9)]  # queries, positives, seven times negatives
    model = adapted(s)
    own = optimiser(model)
    half = sum(map(len, s.ids(texts))) // 2  # two chunks, so that gradient caching has something to do
    chunk_tokens = s.sized(16384, half, half)
    passages = [text for group in zip(*columns[1:], strict=True) for text in group]
    groups = Groups(torch.arange(8 * queries, device=device).view(queries, 8),
                    torch.full((8 * queries,), -2, device=device), torch.full((queries, 1), -1, device=device))
    no_teacher_QC = torch.full((queries, 8), torch.nan, device=device)

    def ours() -> Tensor:
        own.zero_grad(set_to_none=True)
        segments = [Segment([], s.ids(columns[0])), Segment([], s.ids(passages))]
        cache = GradientCache(model, segments, chunk_tokens=chunk_tokens, kernels=s.embedder.kernels)
        query_QD, passage_PD = cache.vectors().split([queries, 8 * queries])
        terms = training_loss(
            query_QD, passage_PD, groups, no_teacher_QC, temperature=TEMPERATURE, teacher_temperature=1.0,
            hard_weight=1.0, soft_weight=0.0, in_batch=True, margin=None, kernels=s.embedder.kernels)
        terms.total.backward()
        cache.backward()
        own.step()
        return terms.total.detach()

    peer = trainer_peer(s, model, texts_at_a_time=s.sized(32, 8, 2))
    calls: dict[str, Any] = {"ours": ours, "sentence-transformers, cached": peer if isinstance(peer, str)
                             else lambda: peer(columns)}
    checks, mine = {}, ours()
    if not isinstance(peer, str):
        checks["loss, ours against sentence-transformers"] = difference(mine, peer(columns))
    agree(checks, 1e-4 if device.type == "cpu" else 2e-2)
    found = s.measure_long(calls)
    wanted = {"sentence-transformers, cached": 2.5 if device.type == "cuda" else 2.0}
    return Result("B6", {"queries": queries, "passages": 8 * queries, "chunk tokens": chunk_tokens}, found, checks,
                  {} if quick else against(found, wanted))


def trainer_peer(s: Setting, model: Mistral, *, texts_at_a_time: int) -> Callable[[list[list[str]]], Tensor] | str:
    """CachedMultipleNegativesRankingLoss on sentence-transformers with PEFT, one step; or why not."""
    library = s.sentence_transformer()
    twin = adapted_twin(model, s.model)
    for missing in (library, twin):
        if isinstance(missing, str):
            return missing
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    library[0].model = twin
    loss = CachedMultipleNegativesRankingLoss(library, scale=1 / TEMPERATURE, mini_batch_size=texts_at_a_time)
    other = optimiser(twin)
    library.train()

    def step(columns: list[list[str]]) -> Tensor:
        other.zero_grad(set_to_none=True)
        features = [library.preprocess(column) for column in columns]
        with torch.autocast(s.device.type, torch.bfloat16, enabled=s.device.type == "cuda"):
            value = loss([{k: v.to(s.device) if isinstance(v, Tensor) else v for k, v in f.items()} for f in features],
                         torch.empty(0))
            value.backward()
        other.step()
        return value.detach()
    return step
