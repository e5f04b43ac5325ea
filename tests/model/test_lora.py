"""LoRA on the model itself: B = 0, merging, gradients, dropout, targets, an fp32 adapter on a bf16 base."""

from collections.abc import Callable

import pytest
import torch
from conftest import ALL_LINEAR, SMALL, adapted, assert_close, randomize_lora
from torch import Tensor

from ref.model.lora import apply_lora, frozen_base, lora_layers, merge_lora
from ref.model.packing import pack_sequences
from ref.model.transformer import Mistral

TEXTS = [list(range(1, 15)), [3, 1, 4], [1, 5, 9]]


def hidden(model: Mistral) -> Tensor:
    """Hidden states after the final norm of all tokens of TEXTS, (T, D)."""
    return model.norm(model(pack_sequences(TEXTS, device=torch.device("cpu")), every_token=True))


@torch.no_grad()
def test_zero_b_is_bit_identical(small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    before = hidden(model)
    apply_lora(model, rank=4, alpha=6.0, dropout=0.0, target_modules=ALL_LINEAR)
    assert torch.equal(hidden(model), before)
    assert all(layer.lora_A.any() and not layer.lora_B.any() for layer in lora_layers(model).values())
    randomize_lora(model)
    assert not torch.equal(hidden(model), before)


@torch.no_grad()
def test_merged_equals_adapted(small_model: Callable[..., Mistral]) -> None:
    """And each merged weight is the frozen one plus delta_weight."""
    model = small_model()
    plain, weights = hidden(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model)
    deltas = {name: layer.delta_weight() for name, layer in lora_layers(model).items()}
    separate = hidden(model)
    merge_lora(model)
    assert not lora_layers(model) and model.state_dict().keys() == weights.keys()
    assert_close(hidden(model), separate, 1e-5)
    assert (separate - plain).abs().max() > 1e-2
    assert len(deltas) == 7 * SMALL.num_layers
    for name, delta in deltas.items():
        assert torch.equal(model.get_submodule(name).weight, weights[f"{name}.weight"] + delta)


@torch.no_grad()
def test_frozen_base_shares_the_weights_without_the_adapter(small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    plain = hidden(model)
    adapted(model)
    base = frozen_base(model)
    assert torch.equal(hidden(base), plain) and not lora_layers(base) and lora_layers(model)
    assert {p.data_ptr() for p in base.parameters()} == {
        p.data_ptr() for name, p in model.named_parameters() if ".lora_" not in name}


def test_fp32_adapter_on_a_bf16_base(small_model: Callable[..., Mistral]) -> None:
    """Trainable weights are fp32, so that a step too small for bf16 is kept; the merged model is bf16 again."""
    torch_seed = torch.initial_seed()
    model = adapted(small_model().bfloat16())
    torch.manual_seed(torch_seed)
    truth = hidden(adapted(small_model().bfloat16().float()))
    out = hidden(model)
    assert out.dtype == torch.bfloat16
    assert ((out.float() - truth).square().mean() / truth.square().mean()).sqrt() < 0.03
    out.float().square().sum().backward()
    layer = next(iter(lora_layers(model).values()))
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)
    before = layer.lora_A.detach().clone()
    with torch.no_grad():
        layer.lora_A += 1e-4 * before
    assert (layer.lora_A != before).all() and torch.equal((before.bfloat16() * 1.0001).bfloat16(), before.bfloat16())
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert ((hidden(model).float() - out).square().mean() / out.float().square().mean()).sqrt() < 0.03


@pytest.mark.parametrize(("targets", "count"), [(ALL_LINEAR, 14), (["q_proj"], 2), (["layers.1.mlp.up_proj"], 1),
                                                (["k_proj", "layers.0.self_attn.q_proj"], 3)])
def test_target_modules(targets: list[str], count: int, small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    apply_lora(model, rank=2, alpha=1.0, dropout=0.0, target_modules=targets)
    assert len(lora_layers(model)) == count
    assert sum(p.requires_grad for p in model.parameters()) == 2 * count
    randomize_lora(model)
    hidden(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("targets", "got"), [
    (["q_proj", "lm_head"], "'lm_head'"), ([], "none"), (["layers.9.mlp.up_proj"], "'layers.9.mlp.up_proj'")])
def test_unknown_target_modules(targets: list[str], got: str, small_model: Callable[..., Mistral]) -> None:
    with pytest.raises(ValueError, match=rf"some of down_proj, gate_proj, k_proj.* \(got {got}\)"):
        apply_lora(small_model(), rank=2, alpha=1.0, dropout=0.0, target_modules=targets)


@torch.no_grad()
def test_dropout_in_training_only(small_model: Callable[..., Mistral]) -> None:
    torch_seed = torch.initial_seed()
    model = adapted(small_model(), dropout=0.5)
    torch.manual_seed(torch_seed)
    truth = hidden(adapted(small_model(), dropout=0.0).eval())
    assert torch.equal(hidden(model.eval()), truth)
    model.train()
    torch.manual_seed(1)
    first, second = hidden(model), hidden(model)
    torch.manual_seed(1)
    assert torch.equal(hidden(model), first) and not torch.equal(first, second)
    assert not torch.equal(first, truth)
    layer, x_TD = next(iter(lora_layers(model).values())), torch.randn(1, SMALL.hidden_size)
    # unbiased: what dropout keeps is scaled
    mean = torch.stack([layer(x_TD) for _ in range(4000)]).mean(0)
    delta = layer.eval()(x_TD) - x_TD @ layer.weight.T
    assert (mean - layer(x_TD)).norm() < 0.3 * delta.norm()


def test_adapters_are_drawn_on_the_cpu_for_any_device(small_model: Callable[..., Mistral]) -> None:
    """Draws on a GPU depend on its model, and ranks would begin with different weights."""
    states = []
    for device in ("cpu", "meta"):
        model = small_model().to(device)
        torch.manual_seed(0)
        apply_lora(model, rank=4, alpha=6.0, dropout=0.0, target_modules=ALL_LINEAR)
        assert {layer.lora_A.device.type for layer in lora_layers(model).values()} == {device}
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
