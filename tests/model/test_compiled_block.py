"""The two compiled halves of a block, without a GPU: equal to Block.forward, compiled once, and what they keep."""

from collections.abc import Callable

import pytest
import torch
from conftest import bytes_kept, random_ids, relative
from torch import Tensor
from torch._dynamo.utils import counters

from ref.model import compiled_block as module
from ref.model.attention import AttentionMask, attention_mask, bucketed_attention
from ref.model.compiled_block import after_attention, before_attention, compiled_block
from ref.model.lora import apply_lora, lora_layers
from ref.model.packing import pack_sequences
from ref.model.transformer import Block, Mistral
from ref.utils.compile import compile_once

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("last_token_only", [False, True])
@pytest.mark.parametrize("prefix_length", [0, 9])
@torch.no_grad()
def test_the_halves_equal_the_plain_block(
    last_token_only: bool, prefix_length: int, small_model: Callable[..., Mistral], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not compiled: the split itself changes nothing, bit for bit."""
    monkeypatch.setattr(module, "compile_once", lambda function: function)
    model = small_model()
    block = model.layers[0]
    packed = pack_sequences(random_ids([11, 3, 3, 1]), device=CPU, prefix_length=prefix_length)
    mask = attention_mask(packed, model.config.sliding_window, last_token_only=last_token_only)
    x_TD, rotary, prefix = model.embed_tokens(packed.input_ids_T), model._rotary(packed), None
    if prefix_length:
        prefix = model.prefix_key_values(pack_sequences(random_ids([prefix_length]), device=CPU))[0]
    assert torch.equal(compiled_block(block, x_TD, rotary, mask, prefix), block(x_TD, rotary, mask, prefix))


@torch._functorch.config.patch(ban_recompute_materialized_backward=True)  # restored after the test
def test_a_compiled_block_keeps_only_what_backward_needs(small_model: Callable[..., Mistral]) -> None:
    """The norms' inputs, q, k, v, attention output, gate and up, and R numbers per adapter, by torch's partitioner."""
    compile_once.__wrapped__(before_attention)  # sets the options that are tested here
    torch._dynamo.reset()
    before, after = (torch.compile(half, dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
                     for half in (before_attention, after_attention))
    model, rank = small_model(num_layers=1, hidden_size=64, intermediate_size=224), 2
    apply_lora(model, rank=rank, alpha=8.0, dropout=0.0, target_modules=ALL)
    block = model.layers[0]
    packed = pack_sequences(random_ids([320]), device=CPU)  # longer than softmax_attention takes
    mask = AttentionMask(packed, None)
    x_TD, rotary = model.embed_tokens(packed.input_ids_T).requires_grad_(), model._rotary(packed)

    def run_compiled() -> None:
        q_THK, key_value = before(block, x_TD, rotary, None)
        after(block, x_TD, bucketed_attention(q_THK, *key_value, mask), None).sum()

    run_compiled()
    config = model.config
    q, kv, tokens = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, 320
    needed = 4 * tokens * (2 * config.hidden_size + 2 * q + 2 * kv + 2 * config.intermediate_size + 7 * rank)
    angles_and_norms = 4 * tokens * (config.head_dim + config.num_heads + 3)
    assert needed < bytes_kept(run_compiled, model.parameters()) <= needed + angles_and_norms
    plain = bytes_kept(lambda: block(x_TD, rotary, mask).sum(), model.parameters())
    assert plain > needed + angles_and_norms  # eager code also keeps both normalised states and silu(gate) * up


@pytest.mark.parametrize("train", [False, True])
def test_the_halves_are_compiled_once_for_all_layers_and_lengths(
    train: bool, small_model: Callable[..., Mistral],
) -> None:
    """As on CUDA except for the backend: one graph each, without a break, for every layer and token count.

    Forward and backward are separate graphs as on CUDA: torch 2.11 lost gradients there.
    """
    torch._dynamo.reset()
    counters.clear()
    before, after = (torch.compile(half, dynamic=True, fullgraph=True, backend="aot_eager")
                     for half in (before_attention, after_attention))
    model = small_model(num_layers=4)
    if train:
        apply_lora(model, rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "down_proj"])
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)

    def compiled(block: Block, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        q_THK, key_value = before(block, x_TD, rotary, None)
        return after(block, x_TD, bucketed_attention(q_THK, *key_value, mask), None)

    with torch.set_grad_enabled(train):
        for lengths in ((5, 5, 3), (9, 2), (4, 7, 7, 1)):
            packed = pack_sequences(random_ids(lengths), device=CPU)
            rotary, mask = model._rotary(packed), attention_mask(packed, model.config.sliding_window)
            plain_TD = compiled_TD = model.embed_tokens(packed.input_ids_T).requires_grad_(train)
            for block in model.layers:
                plain_TD = block(plain_TD, rotary, mask)
                compiled_TD = compiled(block, compiled_TD, rotary, mask)
            assert relative(compiled_TD, plain_TD) <= 1e-6
            if train:
                weights = [weight for layer in lora_layers(model).values() for weight in layer.parameters()]
                weights = [weight for weight in weights if weight.requires_grad]
                upstream_TD = torch.randn_like(plain_TD)
                for plain, ours in zip(*(torch.autograd.grad((x * upstream_TD).sum(), weights)
                                         for x in (plain_TD, compiled_TD)), strict=True):
                    assert relative(ours, plain) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 2
