"""LoRA against PEFT, in both directions, and against itself merged; adapters that are not plain LoRA are refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralForCausalLM, MistralModel

from ref.checkpoint import load_model
from ref.lora import CONFIG, WEIGHTS, adapters, attach, load_adapter, merge, save_adapter, unmerge
from ref.model import Mistral
from ref.packing import Packed, pack

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [list(range(1, 15)), [3, 1, 4], [1, 5, 9]]
Checkpoint = Callable[..., Path]


def packed() -> Packed:
    return pack(TEXTS, device=CPU)


def hidden(model: Mistral) -> Tensor:
    """Hidden states after the final norm of all tokens of TEXTS, (T, D)."""
    return model.norm(model(packed(), every_token=True))


def hidden_by_peft(model: torch.nn.Module) -> Tensor:
    """The same by transformers and PEFT; a causal model's transformer inside is asked."""
    inside = getattr(model, "base_model", model)
    inside = getattr(inside, "model", inside)
    inside = inside.model if isinstance(inside, MistralForCausalLM) else inside
    return torch.cat([inside(torch.tensor([text])).last_hidden_state[0] for text in TEXTS])


def assert_equal(ours: Tensor, truth: Tensor, tolerance: float = 1e-6) -> None:
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() <= tolerance * truth.abs().max()


def stir(model: Mistral, seed: int = 0) -> None:
    """Give every adapter a B that shows in the output."""
    generator = torch.Generator().manual_seed(seed + torch.initial_seed())
    for layer in adapters(model).values():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=generator)


def adapted(model: Mistral, *, rank: int = 4, alpha: float = 2.0, dropout: float = 0.0,
            targets: Sequence[str] = ALL) -> Mistral:
    attach(model, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    stir(model)
    return model


def theirs(folder: Path, kind: type = MistralModel, **config: Any) -> PeftModel:
    """PEFT's adapter with random A and B on transformers' model of a checkpoint folder."""
    base = kind.from_pretrained(folder, attn_implementation="eager")
    return get_peft_model(base, LoraConfig(**{
        "r": 4, "lora_alpha": 2.0, "target_modules": ALL, "init_lora_weights": False, **config})).eval()


# ---------------------------------------------------------------------------------------------- against PEFT


@pytest.mark.parametrize("kind", [MistralModel, MistralForCausalLM])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"], "all-linear",
                                     ["layers.1.self_attn.o_proj", "gate_proj"], r".*\.0\.mlp\.(up|down)_proj"])
@torch.no_grad()
def test_we_load_what_peft_saves(
    kind: type, targets: list[str] | str, tiny_checkpoint: Checkpoint, tmp_path: Path,
) -> None:
    """Keys of MistralModel and of MistralForCausalLM, names, ends of names, and a regular expression."""
    folder = tiny_checkpoint(spread=0.5)
    peft = theirs(folder, kind, target_modules=targets, lora_dropout=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    plain = hidden(ours)
    load_adapter(ours, tmp_path / "adapter")
    truth = hidden_by_peft(peft)
    assert_equal(hidden(ours.eval()), truth)
    assert (plain - truth).abs().max() > 1e-2  # control: the adapter shows
    assert {layer.dropout for layer in adapters(ours).values()} == {0.1}


@pytest.mark.parametrize("targets", [ALL, ["k_proj", "up_proj"], ["layers.0.mlp.up_proj", "q_proj"]])
@torch.no_grad()
def test_peft_loads_what_we_save(targets: list[str], tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    ours = adapted(load_model(folder, device=CPU), targets=targets, dropout=0.25)
    save_adapter(ours, tmp_path, base=str(folder))
    peft = PeftModel.from_pretrained(MistralModel.from_pretrained(folder, attn_implementation="eager"), tmp_path).eval()
    assert_equal(hidden(ours.eval()), hidden_by_peft(peft))
    config = peft.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 2.0, 0.25)
    held = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            for name, _ in peft.named_modules() if name.endswith("lora_A.default")}
    assert held == set(adapters(ours))


@torch.no_grad()
def test_round_trip_is_exact(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    ours = adapted(load_model(folder, device=CPU))
    save_adapter(ours, tmp_path, base="x")
    again = load_model(folder, device=CPU)
    load_adapter(again, tmp_path)
    assert torch.equal(hidden(again), hidden(ours))


def test_gradients_equal_those_of_peft(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    peft = theirs(folder)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    load_adapter(ours, tmp_path / "adapter")
    weight_TD = torch.randn(sum(map(len, TEXTS)), SMALL.width)
    (hidden(ours) * weight_TD).sum().backward()
    (hidden_by_peft(peft) * weight_TD).sum().backward()
    truth = {name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
             for name, p in peft.named_parameters() if p.grad is not None}
    learning = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert learning.keys() == truth.keys() and len(truth) == 2 * 7 * SMALL.layers
    for name, gradient in truth.items():
        assert_equal(learning[name], gradient, 1e-5)


# -------------------------------------------------------------------------------------------- against itself


@torch.no_grad()
def test_zero_b_is_bit_identical(small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    before = hidden(model)
    attach(model, rank=4, alpha=6.0, dropout=0.0, targets=ALL)
    assert torch.equal(hidden(model), before)
    assert all(layer.lora_A.any() and not layer.lora_B.any() for layer in adapters(model).values())
    stir(model)
    assert not torch.equal(hidden(model), before)


@torch.no_grad()
def test_merged_equals_unmerged_and_unmerge_restores(small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    plain, weights = hidden(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model)
    layers, apart = adapters(model), hidden(model)
    merge(model)
    assert not adapters(model) and model.state_dict().keys() == weights.keys()
    assert_equal(hidden(model), apart, 1e-5)
    assert (apart - plain).abs().max() > 1e-2
    unmerge(model, layers)
    assert_equal(hidden(model), apart, 1e-5)
    assert adapters(model).keys() == layers.keys()
    for name, layer in adapters(model).items():
        torch.testing.assert_close(layer.weight, weights[f"{name}.weight"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_merge_equals_that_of_peft(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    peft = theirs(folder)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    load_adapter(ours, tmp_path / "adapter")
    merge(ours)
    truth = peft.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, truth[name], rtol=0, atol=1e-6)


def test_fp32_adapter_on_a_bf16_base(small_model: Callable[..., Mistral]) -> None:
    """The weights that learn are fp32 and a step too small for bf16 is kept; merged, the base is bf16 again."""
    torch_seed = torch.initial_seed()
    model = adapted(small_model().bfloat16())
    torch.manual_seed(torch_seed)
    truth = hidden(adapted(small_model().bfloat16().float()))
    out = hidden(model)
    assert out.dtype == torch.bfloat16
    assert ((out.float() - truth).square().mean() / truth.square().mean()).sqrt() < 0.03
    out.float().square().sum().backward()
    layer = next(iter(adapters(model).values()))
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)
    before = layer.lora_A.detach().clone()
    with torch.no_grad():
        layer.lora_A += 1e-4 * before
    assert (layer.lora_A != before).all() and torch.equal((before.bfloat16() * 1.0001).bfloat16(), before.bfloat16())
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert ((hidden(model).float() - out).square().mean() / out.float().square().mean()).sqrt() < 0.03


@pytest.mark.parametrize(("targets", "count"), [(ALL, 14), (["q_proj"], 2), (["layers.1.mlp.up_proj"], 1),
                                            (["k_proj", "layers.0.self_attn.q_proj"], 3)])
def test_targets(targets: list[str], count: int, small_model: Callable[..., Mistral]) -> None:
    model = small_model()
    attach(model, rank=2, alpha=1.0, dropout=0.0, targets=targets)
    assert len(adapters(model)) == count
    assert sum(p.requires_grad for p in model.parameters()) == 2 * count
    stir(model)
    hidden(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("targets", "named"), [
    (["q_proj", "lm_head"], "lm_head"), ([], "empty"), (["layers.9.mlp.up_proj"], "9")])
def test_unknown_targets(targets: list[str], named: str, small_model: Callable[..., Mistral]) -> None:
    with pytest.raises(ValueError, match=rf"{named}(.|\n)*gate_proj, k_proj"):
        attach(small_model(), rank=2, alpha=1.0, dropout=0.0, targets=targets)


@torch.no_grad()
def test_dropout_in_training_only(small_model: Callable[..., Mistral]) -> None:
    torch_seed = torch.initial_seed()
    model = adapted(small_model(), dropout=0.5)
    torch.manual_seed(torch_seed)
    truth = hidden(adapted(small_model(), dropout=0.0))
    assert torch.equal(hidden(model.eval()), truth)
    model.train()
    torch.manual_seed(1)
    first, second = hidden(model), hidden(model)
    torch.manual_seed(1)
    assert torch.equal(hidden(model), first) and not torch.equal(first, second)
    assert not torch.equal(first, truth)
    layer, x_TD = next(iter(adapters(model).values())), torch.randn(1, SMALL.width)
    # of the right size on average: what is kept is scaled
    mean = torch.stack([layer(x_TD) for _ in range(4000)]).mean(0)
    delta = layer.eval()(x_TD) - x_TD @ layer.weight.T
    assert (mean - layer(x_TD)).norm() < 0.3 * delta.norm()


# ------------------------------------------------------------------------------------------- bad adapters


@pytest.fixture
def adapter(tiny_checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, Mistral]:
    """A whole adapter folder of two targets, and the model it fits."""
    folder = tiny_checkpoint("base")
    (tmp_path / "adapter").mkdir()
    whole = adapted(load_model(folder, device=CPU), targets=["q_proj", "up_proj"])
    save_adapter(whole, tmp_path / "adapter", base="base")
    return tmp_path / "adapter", load_model(folder, device=CPU)


def refused(folder: Path, model: Mistral, *parts: str) -> None:
    with pytest.raises(ValueError, match=r"(Expected|Use|Fetch)") as caught:
        load_adapter(model, folder)
    assert all(part in str(caught.value) for part in (str(folder), *parts)), caught.value
    assert not adapters(model) or "lora_" in str(caught.value)


CONFIGS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True}, "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "peft_type": {"peft_type": "IA3"}, "bias": {"bias": "all"}, "rank_pattern": {"rank_pattern": {"q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 8}}, "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True}, "trainable_token_indices": {"trainable_token_indices": [5]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]}, "init_lora_weights": {"init_lora_weights": "pissa"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "r": {"r": "four"}, "r 0": {"r": 0}, "r is None": {"r": ...}, "lora_alpha": {"lora_alpha": None},
    "lora_alpha inf": {"lora_alpha": float("inf")}, "lora_dropout": {"lora_dropout": "0.1"},
    "lora_dropout 1.0": {"lora_dropout": 1.0}, "target_modules": {"target_modules": 7},
    "target_modules is '('": {"target_modules": "("}, "target_modules is 7": {"target_modules": [7]},
}


@pytest.mark.parametrize("named", CONFIGS)
def test_not_plain_lora(named: str, adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    edit_json(folder / CONFIG, CONFIGS[named])
    refused(folder, model, CONFIG, named)
    assert not adapters(model)


A, B = (f"base_model.model.layers.1.self_attn.q_proj.lora_{m}.weight" for m in "AB")
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "without an A": (lambda state: state.pop(A), ("layers.1.self_attn.q_proj.lora_A", "missing")),
    "without a B": (lambda state: state.pop(B), ("layers.1.self_attn.q_proj.lora_B", "missing")),
    "without both": (lambda state: (state.pop(A), state.pop(B)), ("layers.1.self_attn.q_proj", "target_modules")),
    "empty": (lambda state: state.clear(), ("layers.0",)),
    "another width": (lambda state: state.update({A: torch.ones(4, 48)}),
                      ("layers.1.self_attn.q_proj.lora_A", "(4, 48)", "(4, 32)")),
    "another rank": (lambda state: state.update({A: torch.ones(3, 32), B: torch.ones(40, 3)}),
                     ("q_proj.lora_A", "(3, 32)")),
    "a layer more": (lambda state: state.update({A.replace("1", "7"): torch.ones(4, 32)}),
                     ("layers.7.self_attn.q_proj",)),
    "the head": (lambda state: state.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}),
                 ("lm_head",)),
    "whole weights": (lambda state: state.update({"base_model.model.norm.weight": torch.ones(32)}), ("norm.weight",)),
    "a magnitude": (lambda state: state.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(40)}),
                    ("lora_magnitude_vector",)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_strict_about_tensors(name: str, adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    change, parts = TENSORS[name]
    state = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    change(state)
    save_file(state, folder / WEIGHTS)
    refused(folder, model, WEIGHTS, *parts)


def test_an_adapter_of_a_wider_model(adapter: tuple[Path, Mistral], small_model: Callable[..., Mistral]) -> None:
    refused(adapter[0], small_model(width=48), WEIGHTS, "layers.0.self_attn.q_proj.lora_A", "(4, 32)", "(4, 48)")


def test_broken_files(adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-50])
    refused(folder, model, WEIGHTS, "not a whole safetensors file")
    (folder / WEIGHTS).unlink()
    refused(folder, model, WEIGHTS)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=CONFIG):
        load_adapter(model, folder)
