"""What only an NVIDIA GPU can show: CUDA paths equal the CPU's, are compiled once, and do not synchronise.

Skipped without a GPU; `python -m benchmarks gpu paths` runs it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, random_ids, randomize_lora, scatter_weights
from torch import Tensor

from ref.loss.contrastive import CandidateIndex
from ref.loss.training_loss import training_loss
from ref.model.attention import attention, attention_mask
from ref.model.lora import apply_lora, lora_layers
from ref.model.packing import pack_sequences
from ref.model.pooling import embed
from ref.model.transformer import Mistral
from ref.training.grad_cache import GradientCache, PromptedTexts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = replace(SMALL, hidden_size=64, head_dim=32, intermediate_size=160, num_layers=3, vocab_size=500)


def build(config=CONFIG, *, rank: int = 0) -> Mistral:
    model = Mistral(config)
    scatter_weights(model)
    if rank:
        apply_lora(model, rank=rank, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
        randomize_lora(model)
    return model


def texts_of(lengths: Sequence[int]) -> list[list[int]]:
    return random_ids(lengths, vocab_size=CONFIG.vocab_size)


def relative_norm(ours: Tensor, truth: Tensor) -> float:
    """|ours - truth| / |truth|."""
    return ((ours.cpu().double() - truth.cpu().double()).norm() / truth.cpu().double().norm()).item()


@pytest.mark.parametrize("sliding_window", [None, 1, 40, 129, 1000])
@pytest.mark.parametrize(("prefix_length", "num_heads", "num_kv_heads"),
                         [(0, 4, 4), (0, 4, 2), (150, 8, 1), (1, 6, 3)])
@pytest.mark.parametrize("last_token_only", [False, True])
def test_flex_attention_equals_sdpa_on_the_cpu(
    sliding_window, prefix_length, num_heads, num_kv_heads, last_token_only,
):
    """Blocks that are skipped, masked and full; forward and all gradients, fp32."""
    lengths = (300, 300, 1, 90, 257)
    tokens = sum(lengths)
    queries = len(lengths) if last_token_only else tokens
    shapes = [(queries, num_heads, 32), *[(tokens, num_kv_heads, 32)] * 2, *[(prefix_length, num_kv_heads, 32)] * 2]
    inputs, weight = [torch.randn(shape) for shape in shapes], torch.randn(queries, num_heads, 32)

    def run(device: torch.device) -> list[Tensor]:
        q, k, v, *prefix = leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
        packed = pack_sequences([[0] * n for n in lengths], device=device, prefix_length=prefix_length)
        mask = attention_mask(packed, sliding_window, last_token_only=last_token_only)
        assert (mask.block_mask is not None) == (device == CUDA)
        out = attention(q, k, v, mask, tuple(prefix) if prefix_length else None)
        used = leaves if prefix_length else leaves[:3]
        return [out, *torch.autograd.grad((out * weight.to(device)).sum(), used)]

    for ours, truth in zip(run(CUDA), run(CPU), strict=True):
        torch.testing.assert_close(ours.cpu(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("texts", [1, 33, 40, 126, 127])
def test_flex_attention_for_any_number_of_last_tokens(texts):
    """The last layer has few queries; the library's kernel for few queries has no configuration for some numbers."""
    q, k, v = (torch.randn(rows, heads, 128) for rows, heads in ((texts, 8), (65 * texts, 2), (65 * texts, 2)))
    out = {}
    for device in (CPU, CUDA):
        packed = pack_sequences([[0] * 65] * texts, device=device)
        mask = attention_mask(packed, 64, last_token_only=True)
        out[device] = attention(*(x.to(device) for x in (q, k, v)), mask)
    torch.testing.assert_close(out[CUDA].cpu(), out[CPU], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_embeddings_equal_those_of_the_cpu(dtype, bound):
    model, lengths = build(), (70, 70, 9, 300)
    prefix, texts = texts_of((200,)), texts_of(lengths)
    vectors = {}
    for device in (CPU, CUDA):
        here = model.to(device, torch.float32 if device == CPU else dtype)
        with torch.inference_mode():
            shared = here.prefix_key_values(pack_sequences(prefix, device=device))
            packed = pack_sequences(texts, device=device, prefix_length=200)
            vectors[device] = embed(here, packed, prefix=shared, backend="eager" if device == CPU else "triton")
    assert relative_norm(vectors[CUDA], vectors[CPU]) <= bound


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("prefix_length", [0, 70])
def test_gradients_equal_those_of_the_cpu(gradient_checkpointing, prefix_length):
    """Through all compiled functions: every adapter's gradient, fp32."""
    model, upstream_BD = build(replace(CONFIG, sliding_window=None), rank=8), torch.randn(4, CONFIG.hidden_size)
    model.gradient_checkpointing = gradient_checkpointing
    prefix, texts, found = texts_of((prefix_length,)), texts_of((70, 70, 9, 300)), {}
    for device in (CPU, CUDA):
        here = model.to(device)
        shared = here.prefix_key_values(pack_sequences(prefix, device=device)) if prefix_length else None
        packed = pack_sequences(texts, device=device, prefix_length=prefix_length)
        vector_BD = embed(here, packed, prefix=shared, backend="eager" if device == CPU else "triton")
        weights = [p for p in here.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((vector_BD * upstream_BD.to(device)).sum(), weights)
        found[device] = [gradient.cpu() for gradient in gradients]
    assert len(found[CPU]) == 2 * len(lora_layers(model))
    for ours, truth in zip(found[CUDA], found[CPU], strict=True):
        assert relative_norm(ours, truth) <= 1e-4


@pytest.mark.parametrize("in_batch_negatives", [True, False])
def test_both_loss_terms_equal_those_of_the_cpu(in_batch_negatives):
    """Value, terms and gradients of the Triton backend against eager code, fp32."""
    queries, candidates = 40, 5
    vectors = [torch.nn.functional.normalize(torch.randn(n, 64), dim=1) for n in (queries, queries * candidates)]
    columns = torch.arange(queries * candidates).view(queries, candidates)
    teacher_QC, known_QX = torch.randn(queries, candidates), torch.randint(0, queries * candidates, (queries, 3))
    teacher_QC[::3] = torch.nan
    found = []
    for device, backend in ((CUDA, "triton"), (CPU, "eager")):
        query_QD, passage_PD = (x.to(device, copy=True).requires_grad_() for x in vectors)
        index = CandidateIndex(*(x.to(device) for x in (columns, torch.arange(queries * candidates), known_QX)))
        terms = training_loss(
            query_QD, passage_PD, index, teacher_QC.to(device), temperature=0.05, teacher_temperature=0.5,
            contrastive_weight=0.7, soft_label_weight=0.4, in_batch_negatives=in_batch_negatives,
            false_negative_margin=0.1, backend=backend)
        terms.total.backward()
        found.append([terms.total.detach(), terms.contrastive, terms.soft_label, query_QD.grad, passage_PD.grad])
        assert in_batch_negatives == (terms.num_masked > 0)
    for ours, truth in zip(*found, strict=True):
        assert relative_norm(ours, truth) <= 1e-4


@contextmanager
def no_recompilation() -> Iterator[None]:
    """Raise where torch.compile would compile again."""
    torch._dynamo.config.error_on_recompile = True
    try:
        yield
    finally:
        torch._dynamo.config.error_on_recompile = False


def training_step(
    model: Mistral, lengths: tuple[int, ...], *, mini_batch_tokens: int, may_synchronise: bool,
    in_batch_negatives: bool = True,
) -> None:
    """A batch in mini-batches behind a shared prefix, then AdamW; synchronisation is an error unless allowed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=0.0, fused=True)
    queries = len(lengths)
    groups = [PromptedTexts(texts_of((40,))[0], texts_of(lengths)), PromptedTexts([], texts_of(lengths * 2))]
    columns = torch.arange(2 * queries).view(2, queries).T.contiguous()
    candidates = CandidateIndex(*(x.to(CUDA) for x in (
        columns, torch.arange(2 * queries), torch.full((queries, 1), -1))))
    teacher_QC = torch.rand(queries, 2).to(CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if may_synchronise else "error")
    try:
        cache = GradientCache(model, groups, mini_batch_tokens=mini_batch_tokens, backend="triton")
        query_QD, passage_PD = cache.embeddings().split([queries, 2 * queries])
        terms = training_loss(
            query_QD, passage_PD, candidates, teacher_QC, temperature=0.05, teacher_temperature=0.05,
            contrastive_weight=1.0, soft_label_weight=1.0, in_batch_negatives=in_batch_negatives,
            false_negative_margin=0.1, backend="triton")
        terms.total.backward()
        cache.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_after_a_warm_up_nothing_is_compiled_again_and_a_step_does_not_synchronise():
    """Other numbers of tokens, texts and mini-batches than in the warm-up; any synchronisation is an error.

    A size of one (a mini-batch of one text, a block table of one block) is compiled separately, so the warm-up has each
    kind that the other steps have: mini-batches of one block of 128 tokens, and of several.
    """
    model = build(rank=8).to(CUDA)
    for lengths in ((30,) * 6, (24,) * 8, (70,) * 6, (80,) * 8):
        for mini_batch_tokens in (10**6, 100, 300):  # the batch as a whole, and in mini-batches
            training_step(model, lengths, mini_batch_tokens=mini_batch_tokens, may_synchronise=True)
    with no_recompilation():
        training_step(model, (33,) * 6, mini_batch_tokens=100, may_synchronise=False)
        training_step(model, (75,) * 12, mini_batch_tokens=300, may_synchronise=False)
        training_step(model, (75,) * 12, mini_batch_tokens=300, may_synchronise=False, in_batch_negatives=False)


def test_blocks_arrive_on_the_device_unchanged():
    """They are copied on a stream of their own while others are used; memory is freed and reused."""
    from ref.mining.dense import on_device

    blocks = [np.random.default_rng(n).standard_normal((500, 300), np.float32) for n in range(20)]
    sums = [vectors.double().sum() for vectors in on_device(blocks.__getitem__, range(20), CUDA)]
    assert [x.item() for x in sums] == pytest.approx([block.sum(dtype=np.float64) for block in blocks], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("largest", "hidden_size"), [(3, 32), (1, 4)])  # some equal scores, and very many
def test_dense_search_equals_that_on_the_cpu(largest, hidden_size, dtype, monkeypatch):
    """Vectors of integers: scores are exact. The last block is smaller."""
    from ref.mining.dense import MAX_SCORES, DenseTopK

    monkeypatch.setitem(MAX_SCORES, "cuda", 2**15)
    query, passage = (torch.randint(-largest, largest + 1, (n, hidden_size)).to(dtype) for n in (40, 5000))
    rank = torch.randperm(5000).int()
    found = []
    for device in (CUDA, CPU):
        best = DenseTopK(query.to(device), 20)
        for start in range(0, 5000, 1024):
            best.add(passage[start : start + 1024].to(device), rank[start : start + 1024].to(device))
        found.append((best.score_QL.cpu(), best.id_order_QL.cpu()))
    assert all(torch.equal(ours, truth) for ours, truth in zip(*found, strict=True))


def test_nccl_with_one_process_equals_no_process_group(tmp_path):
    """All-gather, its gradient and the flat sum change nothing, bit for bit."""
    import torch.distributed as dist

    from ref.utils.distributed import Distributed

    alone = Distributed()
    alone.world_size = 2  # or the collectives would be skipped
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        x_PD = torch.randn(7, 16, device=CUDA, requires_grad=True)
        weight_PD = torch.randn(7, 16, device=CUDA)
        gathered_PD = alone.all_gather(x_PD, [len(x_PD)])
        assert torch.equal(gathered_PD, x_PD)
        (gradient_PD,) = torch.autograd.grad((gathered_PD * weight_PD).sum(), x_PD)
        assert torch.equal(gradient_PD, weight_PD)
        total_PD = weight_PD.clone()
        alone.all_reduce_([total_PD])
        assert torch.equal(total_PD, weight_PD)
    finally:
        dist.destroy_process_group()
