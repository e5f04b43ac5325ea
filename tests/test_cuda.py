"""What only an NVIDIA GPU can show: the CUDA paths equal the CPU's, compile once, and do not wait for the device.

Skipped without one; `python -m benchmarks gpu paths` runs it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, scatter_weights
from torch import Tensor

from ref.attention import attend_by_length, attend_flex
from ref.config import Architecture
from ref.gradcache import GradientCache, Segment
from ref.lora import adapters, attach
from ref.loss import Groups, training_loss
from ref.model import Mistral
from ref.packing import pack
from ref.pooling import embed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ARCH = replace(SMALL, width=64, head_width=32, ffn_width=160, layers=3, vocab_size=500)


def built(arch: Architecture = ARCH, *, rank: int = 0) -> Mistral:
    model = Mistral(arch)
    scatter_weights(model)
    if rank:
        attach(model, rank=rank, alpha=8.0, dropout=0.0, targets=["q_proj", "v_proj", "down_proj"])
        for layer in adapters(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def texts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [torch.randint(3, ARCH.vocab_size, (n,)).tolist() for n in lengths]


def relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.cpu().double() - truth.cpu().double()).norm() / truth.cpu().double().norm()).item()


@pytest.mark.parametrize("window_keys", [None, 1, 40, 129, 1000])
@pytest.mark.parametrize(("prefix_tokens", "heads", "kv_heads"), [(0, 4, 4), (0, 4, 2), (150, 8, 1), (1, 6, 3)])
@pytest.mark.parametrize("last_only", [False, True])
def test_flex_attention_equals_the_cpus(window_keys, prefix_tokens, heads, kv_heads, last_only):
    """Blocks skipped, masked and whole; forward and all gradients, fp32."""
    lengths = (300, 300, 1, 90, 257)
    rows, tokens = len(lengths) if last_only else sum(lengths), sum(lengths)
    shapes = [(rows, heads, 32), (tokens, kv_heads, 32), (tokens, kv_heads, 32)] + [(prefix_tokens, kv_heads, 32)] * 2
    inputs, weight = [torch.randn(shape) for shape in shapes], torch.randn(rows, heads, 32)

    def run(attention: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
        q, k, v, *pair = leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
        packed = pack([[0] * n for n in lengths], device=device, prefix_tokens=prefix_tokens)
        out = attention(q, k, v, packed, window_keys=window_keys, prefix=tuple(pair) if prefix_tokens else None)
        used = leaves if prefix_tokens else leaves[:3]
        return [out, *torch.autograd.grad((out * weight.to(device)).sum(), used)]

    for ours, truth in zip(run(attend_flex, CUDA), run(attend_by_length, CPU), strict=True):
        torch.testing.assert_close(ours.cpu(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("texts", [1, 33, 40, 126, 127])
def test_flex_attention_for_any_number_of_last_rows(texts):
    """The last layer asks for few rows; the library's own kernel for few rows has no configuration for some numbers."""
    q, k, v = (torch.randn(rows, heads, 128) for rows, heads in ((texts, 8), (65 * texts, 2), (65 * texts, 2)))
    out = {}
    for device, attention in ((CPU, attend_by_length), (CUDA, attend_flex)):
        packed = pack([[0] * 65] * texts, device=device)
        out[device] = attention(*(x.to(device) for x in (q, k, v)), packed, window_keys=64)
    torch.testing.assert_close(out[CUDA].cpu(), out[CPU], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_vectors_equal_the_cpus(dtype, bound):
    model, lengths = built(), (70, 70, 9, 300)
    prefix, texts = texts_of((200,)), texts_of(lengths)
    vectors = {}
    for device in (CPU, CUDA):
        here = model.to(device, torch.float32 if device == CPU else dtype)
        with torch.inference_mode():
            shared = here.prefix_key_values(pack(prefix, device=device))
            packed = pack(texts, device=device, prefix_tokens=200)
            vectors[device] = embed(here, packed, prefix=shared, kernels="eager" if device == CPU else "triton")
    assert relative(vectors[CUDA], vectors[CPU]) <= bound


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prefix_tokens", [0, 70])
def test_gradients_equal_the_cpus(checkpointing, prefix_tokens):
    """Through everything that is compiled: every adapter's gradient, fp32."""
    model, direction_BD = built(replace(ARCH, window_keys=None), rank=8), torch.randn(4, ARCH.width)
    model.checkpointing = checkpointing
    prefix, texts, found = texts_of((prefix_tokens,)), texts_of((70, 70, 9, 300)), {}
    for device in (CPU, CUDA):
        here = model.to(device)
        shared = here.prefix_key_values(pack(prefix, device=device)) if prefix_tokens else None
        packed = pack(texts, device=device, prefix_tokens=prefix_tokens)
        vector_BD = embed(here, packed, prefix=shared, kernels="eager" if device == CPU else "triton")
        weights = [p for p in here.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((vector_BD * direction_BD.to(device)).sum(), weights)
        found[device] = [gradient.cpu() for gradient in gradients]
    assert len(found[CPU]) == 2 * len(adapters(model))
    for ours, truth in zip(found[CUDA], found[CPU], strict=True):
        assert relative(ours, truth) <= 1e-4


@contextmanager
def no_recompilation() -> Iterator[None]:
    """An error where torch.compile would compile again."""
    torch._dynamo.config.error_on_recompile = True
    try:
        yield
    finally:
        torch._dynamo.config.error_on_recompile = False


def gradient_step(model: Mistral, lengths: tuple[int, ...], *, chunk_tokens: int, may_wait: bool) -> None:
    """A contrastive batch in chunks behind a shared prefix, then AdamW; a wait is an error unless it may."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=0.0, fused=True)
    queries = len(lengths)
    segments = [Segment(texts_of((40,))[0], texts_of(lengths)), Segment([], texts_of(lengths * 2))]
    columns = torch.arange(2 * queries).view(2, queries).T.contiguous()
    groups = Groups(*(x.to(CUDA) for x in (columns, torch.arange(2 * queries), torch.full((queries, 1), -1))))
    teacher_QC = torch.rand(queries, 2).to(CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
    try:
        cache = GradientCache(model, segments, chunk_tokens=chunk_tokens, kernels="triton")
        query_QD, passage_PD = cache.vectors().split([queries, 2 * queries])
        training_loss(query_QD, passage_PD, groups, teacher_QC, temperature=0.05, teacher_temperature=0.05,
                      hard_weight=1.0, soft_weight=1.0, in_batch=True, margin=0.1, kernels="triton").total.backward()
        cache.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_after_a_warm_up_nothing_is_compiled_again_and_a_step_never_waits():
    """Other token counts, text counts and chunk counts than those of the warm-up; any wait is an error.

    A size of one (a chunk of one text, a table of one block) is compiled for itself, so the warm-up has each kind that
    the rest has: chunks of one block of 128 tokens, and of several.
    """
    model = built(rank=8).to(CUDA)
    for lengths in ((30,) * 6, (24,) * 8, (70,) * 6, (80,) * 8):
        for chunk_tokens in (10**6, 100, 300):  # the batch as a whole, and in chunks
            gradient_step(model, lengths, chunk_tokens=chunk_tokens, may_wait=True)
    with no_recompilation():
        gradient_step(model, (33,) * 6, chunk_tokens=100, may_wait=False)
        gradient_step(model, (75,) * 12, chunk_tokens=300, may_wait=False)


def test_blocks_on_the_device_are_those_that_were_read():
    """Copied on a stream of their own while others are used; memory is given back and taken again."""
    from labelling.candidates import on_device

    blocks = [np.random.default_rng(n).standard_normal((500, 300), np.float32) for n in range(20)]
    sums = [vectors.double().sum() for vectors in on_device(blocks.__getitem__, range(20), CUDA)]
    assert [x.item() for x in sums] == pytest.approx([block.sum(dtype=np.float64) for block in blocks], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("largest", "width"), [(3, 32), (1, 4)])  # some scores equal; so many that keys are selected
def test_dense_search_equals_that_on_the_cpu(largest, width, dtype, monkeypatch):
    """Whole numbers as vectors: scores are exact. The last block is smaller."""
    from labelling.candidates import SCORES_AT_ONCE, TopK

    monkeypatch.setitem(SCORES_AT_ONCE, "cuda", 2**15)
    query, passage = (torch.randint(-largest, largest + 1, (n, width)).to(dtype) for n in (40, 5000))
    rank = torch.randperm(5000).int()
    found = []
    for device in (CUDA, torch.device("cpu")):
        best = TopK(query.to(device), 20)
        for start in range(0, 5000, 1024):
            best.add(passage[start : start + 1024].to(device), rank[start : start + 1024].to(device))
        found.append(best.key_QK.cpu())
    assert torch.equal(*found)


def test_nccl_with_one_process_equals_no_process_group(tmp_path):
    """Gather, its gradient and the flat sum leave everything as it is, bit for bit."""
    import torch.distributed as dist

    from ref.team import Team, _Gather

    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        x_ND = torch.randn(7, 16, device=CUDA, requires_grad=True)
        weight_ND = torch.randn(7, 16, device=CUDA)
        (gradient_ND,) = torch.autograd.grad((_Gather.apply(x_ND, [7], Team()) * weight_ND).sum(), x_ND)
        assert torch.equal(gradient_ND, weight_ND)
        flat = weight_ND.flatten().clone()
        dist.all_reduce(flat)
        assert torch.equal(flat, weight_ND.flatten())
    finally:
        dist.destroy_process_group()
