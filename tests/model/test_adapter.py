"""Adapter files: exchanged with PEFT in both directions, the chain of bases, and the files that are rejected."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_LINEAR, SMALL, adapted, assert_close, edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralForCausalLM, MistralModel

from ref.model.adapter import adapter_base, adapter_chain, load_adapter, load_model_chain, save_adapter
from ref.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_model
from ref.model.lora import lora_layers, merge_lora
from ref.model.packing import pack_sequences
from ref.model.transformer import Mistral

CPU = torch.device("cpu")
TEXTS = [list(range(1, 15)), [3, 1, 4], [1, 5, 9]]
Checkpoint = Callable[..., Path]


def hidden(model: Mistral) -> Tensor:
    """Hidden states after the final norm of all tokens of TEXTS, (T, D)."""
    return model.norm(model(pack_sequences(TEXTS, device=CPU), every_token=True))


def hidden_by_peft(model: torch.nn.Module) -> Tensor:
    """The same by transformers and PEFT; for a causal model by the transformer inside it."""
    inside = getattr(model, "base_model", model)
    inside = getattr(inside, "model", inside)
    inside = inside.model if isinstance(inside, MistralForCausalLM) else inside
    return torch.cat([inside(torch.tensor([text])).last_hidden_state[0] for text in TEXTS])


def by_peft(folder: Path, kind: type = MistralModel, **config: Any) -> PeftModel:
    """PEFT's adapter with random A and B on transformers' model of a checkpoint folder."""
    base = kind.from_pretrained(folder, attn_implementation="eager")
    return get_peft_model(base, LoraConfig(**{
        "r": 4, "lora_alpha": 2.0, "target_modules": ALL_LINEAR, "init_lora_weights": False, **config})).eval()


# ---- against PEFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MistralModel, MistralForCausalLM])
@pytest.mark.parametrize("targets", [ALL_LINEAR, ["q_proj", "v_proj"], ["down_proj"], "all-linear",
                                     ["layers.1.self_attn.o_proj", "gate_proj"], r".*\.0\.mlp\.(up|down)_proj"])
@torch.no_grad()
def test_we_load_what_peft_saves(
    kind: type, targets: list[str] | str, tiny_checkpoint: Checkpoint, tmp_path: Path,
) -> None:
    """Tensor names of MistralModel and MistralForCausalLM; targets as names, suffixes and a regular expression."""
    folder = tiny_checkpoint(spread=0.5)
    peft = by_peft(folder, kind, target_modules=targets, lora_dropout=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    plain = hidden(ours)
    load_adapter(ours, tmp_path / "adapter")
    truth = hidden_by_peft(peft)
    assert_close(hidden(ours.eval()), truth)
    assert (plain - truth).abs().max() > 1e-2  # control: the adapter has an effect
    assert {layer.dropout for layer in lora_layers(ours).values()} == {0.1}


@torch.no_grad()
def test_rank_stabilised_lora(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its scale is alpha / sqrt(R)."""
    folder = tiny_checkpoint(spread=0.5)
    peft = by_peft(folder, use_rslora=True)
    peft.save_pretrained(tmp_path)
    ours = load_model(folder, device=CPU)
    load_adapter(ours, tmp_path)
    assert_close(hidden(ours.eval()), hidden_by_peft(peft))


@pytest.mark.parametrize("targets", [ALL_LINEAR, ["k_proj", "up_proj"], ["layers.0.mlp.up_proj", "q_proj"]])
@torch.no_grad()
def test_peft_loads_what_we_save(targets: list[str], tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    ours = adapted(load_model(folder, device=CPU), targets=targets, dropout=0.25)
    save_adapter(ours, tmp_path, base=str(folder))
    peft = PeftModel.from_pretrained(MistralModel.from_pretrained(folder, attn_implementation="eager"), tmp_path).eval()
    assert_close(hidden(ours.eval()), hidden_by_peft(peft))
    config = peft.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 2.0, 0.25)
    held = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            for name, _ in peft.named_modules() if name.endswith("lora_A.default")}
    assert held == set(lora_layers(ours))


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
    peft = by_peft(folder)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    load_adapter(ours, tmp_path / "adapter")
    weight_TD = torch.randn(sum(map(len, TEXTS)), SMALL.hidden_size)
    (hidden(ours) * weight_TD).sum().backward()
    (hidden_by_peft(peft) * weight_TD).sum().backward()
    truth = {name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
             for name, p in peft.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == truth.keys() and len(truth) == 2 * 7 * SMALL.num_layers
    for name, gradient in truth.items():
        assert_close(found[name], gradient, 1e-5)


@torch.no_grad()
def test_merge_equals_that_of_peft(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(spread=0.5)
    peft = by_peft(folder)
    peft.save_pretrained(tmp_path / "adapter")
    ours = load_model(folder, device=CPU)
    load_adapter(ours, tmp_path / "adapter")
    merge_lora(ours)
    truth = peft.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, truth[name], rtol=0, atol=1e-6)


# ---- the chain of bases -------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_on_an_adapter(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Both are merged, the inner one first; a base beginning with ../ is relative to the adapter's folder."""
    folder = tiny_checkpoint("base", spread=0.5)
    model = load_model(folder, device=CPU)
    for name, base in (("inner", "../base"), ("outer", str(tmp_path / "inner"))):
        (tmp_path / name).mkdir()
        save_adapter(adapted(model, targets=["q_proj"]), tmp_path / name, base=base)
        merge_lora(model)
    loaded, root = load_model_chain(tmp_path / "outer", device=CPU, dtype=None)
    assert root == folder and not lora_layers(loaded)
    assert_close(hidden(loaded), hidden(model), 1e-6)
    assert adapter_chain(tmp_path / "outer") == [tmp_path / "outer", tmp_path / "inner", folder]
    assert adapter_base(folder) is None and adapter_chain(folder) == [folder]


def test_a_trained_embedding_in_an_adapter_is_named_with_the_remedy(adapter: tuple[Path, Mistral]) -> None:
    """As PEFT saves it after resize_token_embeddings."""
    folder, model = adapter
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), "base_model.model.model.embed_tokens.weight": model.embed_tokens.weight.clone()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"contains a trained embedding .*merge_and_unload"):
        load_adapter(Mistral(SMALL), folder)


@pytest.mark.parametrize(("base", "message"), [
    (7, "'base_model_name_or_path' must be a folder or hub id (got 7)"), (None, "(got None)"),
    (".", "must be the model under the adapter"), ("/nowhere", "must be a folder of this machine or a hub id (got"),
    ("nowhere", "model must be a folder with config.json or a hub id")])
def test_a_base_that_is_none(base: object, message: str, adapter: tuple[Path, Mistral]) -> None:
    folder, _ = adapter
    edit_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": str(folder) if base == "." else base})
    with pytest.raises(ValueError, match="must be") as caught:
        adapter_chain(folder)
    assert message in str(caught.value) and str(folder / ADAPTER_CONFIG) in str(caught.value)


def test_a_revision_of_the_base_is_not_ignored(adapter: tuple[Path, Mistral], tmp_path: Path) -> None:
    folder, _ = adapter
    edit_json(folder / ADAPTER_CONFIG, {"revision": "abc"})
    with pytest.raises(ValueError, match=r"'revision' of the base must be null or \"main\" \(got 'abc'\)"):
        adapter_chain(folder)
    assert adapter_chain(folder, base=str(tmp_path)) == [folder, tmp_path]


def test_adapters_that_name_each_other_are_rejected(adapter: tuple[Path, Mistral], tmp_path: Path) -> None:
    folder, _ = adapter
    shutil.copytree(folder, tmp_path / "other")
    edit_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": str(tmp_path / "other")})
    edit_json(tmp_path / "other" / ADAPTER_CONFIG, {"base_model_name_or_path": str(folder)})
    with pytest.raises(ValueError, match=r"other/adapter_config\.json: .* must be the model under the adapter"):
        adapter_chain(folder)


def test_a_copied_run_has_its_own_base(adapter: tuple[Path, Mistral], tmp_path: Path) -> None:
    """Another run may be in the place that it was copied from."""
    folder, _ = adapter
    run = tmp_path / "copy"
    shutil.copytree(folder, run / "adapter")
    shutil.copytree(tmp_path / "base", run / "base")
    edit_json(run / "adapter" / ADAPTER_CONFIG, {"base_model_name_or_path": str(tmp_path / "base")})
    assert adapter_base(run / "adapter") == tmp_path / "base"  # no run: the folder that is named
    (run / "run.json").write_text("{}")
    assert adapter_base(run / "adapter") == run / "base"


@torch.no_grad()
def test_a_base_that_has_moved_can_be_given(adapter: tuple[Path, Mistral], tmp_path: Path) -> None:
    folder, model = adapter
    (tmp_path / "base").rename(tmp_path / "moved")
    edit_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": str(tmp_path / "base")})
    with pytest.raises(ValueError, match="must be a folder of this machine .*give --base to run_eval.py"):
        load_model_chain(folder, device=CPU, dtype=None)
    load_adapter(model, folder)
    merge_lora(model)
    loaded, root = load_model_chain(folder, device=CPU, dtype=None, base=str(tmp_path / "moved"))
    assert root == tmp_path / "moved"
    assert_close(hidden(loaded), hidden(model), 1e-6)
    with pytest.raises(ValueError, match=r"--base is for adapters, but .* has no adapter_config\.json"):
        adapter_chain(root, base=str(folder))


# ---- files that are rejected --------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, Mistral]:
    """A complete adapter folder with two targets, and the model it fits."""
    folder = tiny_checkpoint("base")
    (tmp_path / "adapter").mkdir()
    model = adapted(load_model(folder, device=CPU), targets=["q_proj", "up_proj"])
    save_adapter(model, tmp_path / "adapter", base="base")
    return tmp_path / "adapter", load_model(folder, device=CPU)


def assert_rejected(folder: Path, model: Mistral, *parts: str) -> None:
    """Loading raises a one-line ValueError that names the folder and all `parts`."""
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_adapter(model, folder)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert not lora_layers(model) or "lora_" in message


# What is changed in adapter_config.json, and what the message says: the field, and the value it has.
CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "DoRA": ({"use_dora": True}, "'use_dora' must be False", "(got True)"),
    "full modules": ({"modules_to_save": ["norm"]}, "'modules_to_save' must be None", "(got ['norm'])"),
    "IA3": ({"peft_type": "IA3"}, "'peft_type' must be 'LORA'", "(got 'IA3')"),
    "trained biases": ({"bias": "all"}, "'bias'", "(got 'all')"),
    "rank pattern": ({"rank_pattern": {"q_proj": 8}}, "'rank_pattern'", "(got {'q_proj': 8})"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 8}}, "'alpha_pattern'", "(got {'q_proj': 8})"),
    "bias of B": ({"lora_bias": True}, "'lora_bias'", "(got True)"),
    "transposed weights": ({"fan_in_fan_out": True}, "'fan_in_fan_out'", "(got True)"),
    "trainable tokens": ({"trainable_token_indices": [5]}, "'trainable_token_indices'", "(got [5])"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication'", "(got [[0, 2], [1, 2]])"),
    "changed base": ({"init_lora_weights": "pissa"}, "'init_lora_weights'", "(got 'pissa')"),
    "activated LoRA": ({"alora_invocation_tokens": [3, 4]}, "'alora_invocation_tokens'", "(got [3, 4])"),
    "rank in words": ({"r": "four"}, "'r' must be an integer >= 1", "(got 'four')"),
    "rank 0": ({"r": 0}, "'r' must be >= 1", "(got 0, "),
    "no rank": ({"r": ...}, "'r' must be an integer >= 1", "(got None)"),
    "no alpha": ({"lora_alpha": None}, "'lora_alpha' must be a number", "(got None)"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "'lora_alpha' finite", "inf"),
    "dropout in quotes": ({"lora_dropout": "0.1"}, "'lora_dropout' must be a number in [0, 1)", "(got '0.1')"),
    "dropout 1": ({"lora_dropout": 1.0}, "'lora_dropout' in [0, 1)", "1.0)"),
    "a number as targets": ({"target_modules": 7}, "'target_modules' must be a list", "(got 7)"),
    "a broken pattern": ({"target_modules": "("}, "'target_modules'", "(got '(': "),
    "a number in the targets": ({"target_modules": [7]}, "'target_modules'", "(got 7)"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_plain_lora(name: str, adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    change, *parts = CONFIGS[name]
    edit_json(folder / ADAPTER_CONFIG, change)
    assert_rejected(folder, model, ADAPTER_CONFIG, *parts)
    assert not lora_layers(model)


A, B = (f"base_model.model.layers.1.self_attn.q_proj.lora_{m}.weight" for m in "AB")
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "without an A": (lambda state: state.pop(A), ("layers.1.self_attn.q_proj.lora_A", "is missing")),
    "without a B": (lambda state: state.pop(B), ("layers.1.self_attn.q_proj.lora_B", "is missing")),
    "without both": (lambda state: (state.pop(A), state.pop(B)),
                     ("layers.1.self_attn.q_proj", "neither lora_A nor lora_B", ADAPTER_CONFIG)),
    "empty": (lambda state: state.clear(), ("layers.0",)),
    "another hidden size": (lambda state: state.update({A: torch.ones(4, 48)}),
                            ("layers.1.self_attn.q_proj.lora_A", "(4, 48)", "(4, 32)")),
    "another rank": (lambda state: state.update({A: torch.ones(3, 32), B: torch.ones(40, 3)}),
                     ("q_proj.lora_A", "rank 4", "(3, 32)")),
    "one layer more": (lambda state: state.update({A.replace("1", "7"): torch.ones(4, 32)}),
                       ("layers.7.self_attn.q_proj",)),
    "a trained head": (lambda state: state.update({"base_model.model.lm_head.weight": torch.ones(4, 32)}),
                       ("lm_head", "trained embedding")),
    "a full weight": (lambda state: state.update({"base_model.model.norm.weight": torch.ones(32)}), ("norm.weight",)),
    "a magnitude": (lambda state: state.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(40)}),
                    ("lora_magnitude_vector",)),
}


def test_an_adapted_head_is_skipped_as_the_head_is(adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    state = {key: tensor.clone() for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    head = {f"base_model.model.lm_head.lora_{m}.weight": torch.ones(4, 32) for m in "AB"}
    save_file({**state, **head}, folder / ADAPTER_WEIGHTS)
    load_adapter(model, folder)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_B, state[f"base_model.model.{name}.lora_B.weight"].float())


@pytest.mark.parametrize("name", TENSORS)
def test_strict_about_tensors(name: str, adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    change, parts = TENSORS[name]
    state = {key: tensor.clone() for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}
    change(state)
    save_file(state, folder / ADAPTER_WEIGHTS)
    assert_rejected(folder, model, ADAPTER_WEIGHTS, *parts)


def test_an_adapter_of_a_wider_model(adapter: tuple[Path, Mistral], small_model: Callable[..., Mistral]) -> None:
    assert_rejected(adapter[0], small_model(hidden_size=48), ADAPTER_WEIGHTS, "layers.0.self_attn.q_proj.lora_A",
                    "(4, 32)", "(4, 48)")


def test_broken_files(adapter: tuple[Path, Mistral]) -> None:
    folder, model = adapter
    content = (folder / ADAPTER_WEIGHTS).read_bytes()
    (folder / ADAPTER_WEIGHTS).write_bytes(content[:-50])
    assert_rejected(folder, model, ADAPTER_WEIGHTS, "not a complete safetensors file")
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    assert_rejected(folder, model, f"has no {ADAPTER_WEIGHTS} (pickles")
    (folder / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(ValueError, match=ADAPTER_CONFIG):
        load_adapter(model, folder)
