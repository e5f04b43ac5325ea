"""The forward pass against transformers' MistralModel, loaded from files, and against itself in other packings.

`BREAKAGES` is the negative control: the comparison with transformers must notice each of them.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, bytes_kept, edit_json, random_ids, relative, scatter_weights
from torch import Tensor
from transformers import MistralConfig, MistralModel

from ref.model import transformer
from ref.model.attention import AttentionMask, KeyValue, bucketed_attention
from ref.model.checkpoint import load_model, save_model
from ref.model.packing import PackedBatch, pack_sequences
from ref.model.rope import apply_rotary, rotary_cos_sin
from ref.model.transformer import Mistral, RMSNorm

CPU = torch.device("cpu")
CONFIGURATIONS = 64
TOLERANCE = 1e-5  # relative to the largest value of the output, fp32

Texts = list[list[int]]


def hidden(model: Mistral, texts: Texts) -> Tensor:
    """Hidden states after the final norm of all tokens of the texts in one packed batch, (T, D)."""
    return model.norm(model(pack_sequences(texts, device=CPU), every_token=True))


def hidden_by_transformers(model: MistralModel, texts: Texts) -> Tensor:
    """The same by transformers, one text at a time: no padding and no mask that could be wrong in both."""
    return torch.cat([model(torch.tensor([text])).last_hidden_state[0] for text in texts])


def with_prefix(model: Mistral, prefix: list[int], texts: Texts, *, every_token: bool) -> Tensor:
    """Hidden states of the texts behind a shared prefix."""
    shared = model.prefix_key_values(pack_sequences([prefix], device=CPU))
    return model(pack_sequences(texts, device=CPU, prefix_length=len(prefix)), prefix=shared, every_token=every_token)


def gradients(model: torch.nn.Module, out: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Gradients of sum(out * weight) by parameter name."""
    model.zero_grad()
    (out * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Each to 1e-4 of its own largest value, plus rounding relative to the largest of all."""
    assert ours.keys() == truth.keys()
    rounding = 1e-6 * max(g.abs().max() for g in truth.values())
    for name, gradient in truth.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + rounding, name


# ---- oracle: transformers ----------------------------------------------------------------------------------


@dataclass
class Case:
    """A random configuration in transformers' words, text lengths, and the forms that config.json is written in."""

    config: dict[str, Any]
    lengths: list[int]
    form: str
    head_dim: str

    @classmethod
    def draw(cls, number: int, seed: int) -> "Case":
        """Every GQA ratio with every kind of window and every form of head_dim, the rest at random."""
        rng = random.Random(f"{seed} {number}")
        ratio, window = list(itertools.product((1, 2, 4, 8), ("none", "shorter", "equal", "longer")))[number % 16]
        form_of_head_dim, form = ("given", "absent", "null", "given")[number // 16], rng.choice(("old", "new"))
        num_kv_heads, head_dim = rng.choice((1, 2, 3)), rng.choice((2, 6, 8, 10))
        num_heads = num_kv_heads * ratio
        sliding_window = rng.randint(2, 12)
        longest = {
            "none": rng.randint(1, 30), "shorter": rng.randint(sliding_window + 1, 3 * sliding_window),
            "equal": sliding_window, "longer": rng.randint(1, sliding_window - 1)}[window]
        lengths = [longest, longest, *(rng.randint(1, longest) for _ in range(2))]
        rng.shuffle(lengths)
        config = {
            "vocab_size": 61, "num_hidden_layers": rng.randint(1, 3), "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads, "intermediate_size": rng.choice((24, 56)),
            "hidden_size": rng.choice((20, 32, 42)) if form_of_head_dim == "given" else num_heads * head_dim,
            "head_dim": head_dim, "sliding_window": None if window == "none" else sliding_window,
            "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3)),
            "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice((100.0, 10000.0, 1e6))}}
        return cls(config, lengths, form, form_of_head_dim)

    def write(self, folder: Path) -> MistralModel:
        """transformers' model with random weights, saved by transformers, config.json in the case's form."""
        model = MistralModel(MistralConfig(**self.config, attn_implementation="eager")).eval()
        scatter_weights(model)
        model.save_pretrained(folder)
        if self.form == "old":
            theta = self.config["rope_parameters"]["rope_theta"]
            edit_json(folder / "config.json", {
                "rope_parameters": ..., "rope_theta": theta, "dtype": ..., "torch_dtype": "float32"})
        if self.head_dim != "given":
            edit_json(folder / "config.json", {"head_dim": ... if self.head_dim == "absent" else None})
        return model


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
@torch.no_grad()
def test_equals_transformers(number: int, seed: int, tmp_path: Path) -> None:
    case = Case.draw(number, seed)
    oracle, texts = case.write(tmp_path), random_ids(case.lengths)
    ours = hidden(load_model(tmp_path, device=CPU), texts)
    theirs = hidden_by_transformers(oracle, texts)
    if relative(ours, theirs) > TOLERANCE:  # an ill-conditioned draw: compare with the effect of rounding on the oracle
        assert relative(ours, theirs) <= 2 * effect_of_rounding(oracle, texts, theirs), case


def effect_of_rounding(oracle: MistralModel, texts: Texts, truth: Tensor) -> float:
    """The largest relative change in eight draws that round every number of the embedding up or down."""
    weight, effects = oracle.embed_tokens.weight.clone(), []
    for _ in range(8):
        rounding = 2.0**-23 * (2 * torch.randint(2, weight.shape) - 1)
        oracle.embed_tokens.weight.copy_(weight * (1 + rounding))
        effects.append(relative(hidden_by_transformers(oracle, texts), truth))
    return max(effects)


@pytest.mark.parametrize(("sliding_window", "shard_bytes"), [(None, 10**9), (6, 10**9), (6, 5000)])
@torch.no_grad()
def test_transformers_reads_what_we_save(
    sliding_window: int | None, shard_bytes: int, small_model: Callable[..., Mistral], tmp_path: Path,
) -> None:
    ours, texts = small_model(sliding_window=sliding_window, rope_theta=500.0, norm_eps=1e-3), random_ids([15, 3, 15])
    save_model(ours, tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
    theirs, info = MistralModel.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert relative(hidden(ours, texts), hidden_by_transformers(theirs, texts)) <= TOLERANCE


def test_gradients_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    case = Case.draw(5, seed)  # ratio 2, a window shorter than the text
    theirs, texts = case.write(tmp_path), random_ids(case.lengths)
    ours = load_model(tmp_path, device=CPU)
    weight_TD = torch.randn(sum(case.lengths), case.config["hidden_size"])
    truth = gradients(theirs, hidden_by_transformers(theirs, texts), weight_TD)
    assert_same_gradients(gradients(ours, hidden(ours, texts), weight_TD), truth)


def test_bf16_is_as_close_to_fp32_as_that_of_transformers(tmp_path: Path) -> None:
    """Error budget: 1.2 times the error of transformers' bf16, root mean square over 300 tokens."""
    config = MistralConfig(
        vocab_size=61, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=256, sliding_window=40, dtype="bfloat16")
    theirs = MistralModel(config).bfloat16().eval()
    with torch.no_grad():
        scatter_weights(theirs)
        theirs.save_pretrained(tmp_path)
        texts = random_ids([100, 80, 80, 40])
        ours = load_model(tmp_path, device=CPU)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        truth = hidden(load_model(tmp_path, device=CPU, dtype=torch.float32), texts)
        our_error, their_error = ((out.float() - truth).square().mean().sqrt().item() for out in (
            hidden(ours, texts), hidden_by_transformers(theirs, texts)))
    assert 0 < our_error <= 1.2 * their_error


# ---- negative control: the comparison notices each of these -------------------------------------------------


def change_window(by: int) -> Callable[[Mistral, pytest.MonkeyPatch], None]:
    def apply(model: Mistral, _: pytest.MonkeyPatch) -> None:
        model.config = replace(model.config, sliding_window=model.config.sliding_window + by)
    return apply


def rotate_interleaved(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """RoPE on the pairs (x_0, x_1), (x_2, x_3), …: the other common layout."""
    a, b = x_THK.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TJ[:, None], sin_TJ[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def swap_gate_and_up(model: Mistral, _: pytest.MonkeyPatch) -> None:
    for layer in model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def larger_eps(model: Mistral, _: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps *= 100


def interleaved_heads(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, prefix: KeyValue | None) -> Tensor:
    """Query head h with key/value head h mod G instead of h // (H / G)."""
    copies = q.shape[1] // k.shape[1]
    return bucketed_attention(q, k.repeat(1, copies, 1), v.repeat(1, copies, 1), mask, prefix)


def texts_as_one(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, prefix: KeyValue | None) -> Tensor:
    ids_T = mask.batch.input_ids_T
    return bucketed_attention(q, k, v, replace(mask, batch=PackedBatch(ids_T, (len(ids_T),))), prefix)


def patch(name: str, value: Callable[..., Any]) -> Callable[[Mistral, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setattr(transformer, name, value)


BREAKAGES: dict[str, Callable[[Mistral, pytest.MonkeyPatch], None]] = {
    "window one key longer": change_window(+1),
    "window one key shorter": change_window(-1),
    "interleaved RoPE": patch("apply_rotary", rotate_interleaved),
    "RoPE by the opposite angle": patch("apply_rotary", lambda x, cos, sin: apply_rotary(x, cos, -sin)),
    "another RoPE theta": patch("rotary_cos_sin", lambda position, *, head_dim, theta: rotary_cos_sin(
        position, head_dim=head_dim, theta=2 * theta)),
    "interleaved key/value heads": patch("attention", interleaved_heads),
    "texts attend to each other": patch("attention", texts_as_one),
    "gate and up swapped": swap_gate_and_up,
    "larger eps": larger_eps,
}


@pytest.mark.parametrize("name", BREAKAGES)
@torch.no_grad()
def test_control_the_comparison_notices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case({
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 6, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, [14, 14, 9], "new", "given")
    oracle, texts = case.write(tmp_path), random_ids(case.lengths)
    model, truth = load_model(tmp_path, device=CPU), hidden_by_transformers(oracle, texts)
    assert relative(hidden(model, texts), truth) <= TOLERANCE
    BREAKAGES[name](model, monkeypatch)
    assert relative(hidden(model, texts), truth) > 100 * TOLERANCE


# ---- packing, last layer, shared prefix ---------------------------------------------------------------------


@torch.no_grad()
def test_packing_and_batch_order_change_nothing(small_model: Callable[..., Mistral]) -> None:
    model, texts = small_model(), random_ids([7, 7, 1, 20, 7, 1, 6, 6])
    alone = torch.cat([model(pack_sequences([text], device=CPU)) for text in texts])
    assert relative(model(pack_sequences(texts, device=CPU)), alone) <= 1e-6
    order = torch.randperm(len(texts)).tolist()
    assert relative(model(pack_sequences([texts[i] for i in order], device=CPU)), alone[order]) <= 1e-6
    assert relative(alone.flip(0), alone) > 0.1  # the texts do differ


@pytest.mark.parametrize("sliding_window", [None, 1, 6, 40])
@pytest.mark.parametrize("prefix_length", [0, 9])
def test_last_tokens_alone_equal_the_full_last_layer(
    sliding_window: int | None, prefix_length: int, small_model: Callable[..., Mistral],
) -> None:
    model, texts = small_model(sliding_window=sliding_window), random_ids([13, 4, 4, 1])
    packed, shared = pack_sequences(texts, device=CPU, prefix_length=prefix_length), None
    if prefix_length:
        shared = model.prefix_key_values(pack_sequences(random_ids([prefix_length]), device=CPU))
    short, full = (model(packed, prefix=shared, every_token=every_token) for every_token in (False, True))
    assert short.shape == (4, SMALL.hidden_size) and full.shape == (22, SMALL.hidden_size)
    assert relative(short, full[packed.last_token_B]) <= 1e-6
    assert relative(short, full[packed.last_token_B - 1]) > 0.1


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("prefix_length", [1, 9])
@pytest.mark.parametrize("sliding_window", [None, 1, 4, 9, 12, 100])
def test_shared_prefix_equals_concatenated_text(
    sliding_window: int | None, prefix_length: int, every_token: bool, small_model: Callable[..., Mistral],
) -> None:
    """Forward and gradients; windows shorter than the prefix, as long, and longer."""
    model = small_model(sliding_window=sliding_window, num_layers=3)
    [prefix], texts = random_ids([prefix_length]), random_ids([11, 3, 3, 1])
    whole = pack_sequences([prefix + text for text in texts], device=CPU)
    full_TD = model(whole, every_token=every_token)
    if every_token:
        full_TD = full_TD[whole.position_ids_T >= prefix_length]
    shared_TD = with_prefix(model, prefix, texts, every_token=every_token)
    assert relative(shared_TD, full_TD) <= TOLERANCE
    weight = torch.randn_like(full_TD)
    truth, ours = gradients(model, full_TD, weight), gradients(model, shared_TD, weight)
    assert_same_gradients(ours, truth)


@torch.no_grad()
def test_shared_prefix_in_bf16_is_as_close_to_fp32_as_concatenated_text(small_model: Callable[..., Mistral]) -> None:
    """Error budget: 1.2 times the error of the concatenated text in bf16, root mean square; with and without window."""
    for sliding_window in (None, 20):
        model = small_model(sliding_window=sliding_window, num_layers=4)
        [prefix], texts = random_ids([40]), random_ids([25] * 8 + [9] * 8)
        whole = [prefix + text for text in texts]
        after_prefix_T = pack_sequences(whole, device=CPU).position_ids_T >= 40
        truth = hidden(model, whole)[after_prefix_T]
        model = model.bfloat16()
        concatenated = hidden(model, whole)[after_prefix_T]
        shared = model.norm(with_prefix(model, prefix, texts, every_token=True))
        shared_error, whole_error = (
            (out.float() - truth).square().mean().sqrt().item() for out in (shared, concatenated))
        assert 0 < shared_error <= 1.2 * whole_error


@torch.no_grad()
def test_control_another_prefix_or_other_positions_are_noticed(small_model: Callable[..., Mistral]) -> None:
    model, texts, [prefix] = small_model(sliding_window=None), random_ids([5, 5]), random_ids([9])
    right = with_prefix(model, prefix, texts, every_token=False)
    assert relative(with_prefix(model, prefix[::-1], texts, every_token=False), right) > 1e-3
    shared = model.prefix_key_values(pack_sequences([prefix], device=CPU))
    shifted = model(pack_sequences(texts, device=CPU, prefix_length=9), prefix=[(k.roll(1, 0), v) for k, v in shared])
    assert relative(shifted, right) > 1e-3


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 4, 5, 11, 12, 30])
@torch.no_grad()
def test_a_query_attends_to_exactly_window_keys(
    sliding_window: int | None, small_model: Callable[..., Mistral],
) -> None:
    """One layer: another token at j changes the output at i if and only if 0 <= i - j < W, the prefix included."""
    model, size, prefix_length = small_model(sliding_window=sliding_window, num_layers=1), 12, 4
    model.layers[0].self_attn.q_proj.weight.mul_(0.2)  # no attention weight so small that rounding hides it
    [text] = random_ids([size])

    def run(ids: list[int]) -> Iterator[Tensor]:
        yield model(pack_sequences([ids], device=CPU), every_token=True)
        yield with_prefix(model, ids[:prefix_length], [ids[prefix_length:]], every_token=True)
        yield with_prefix(model, ids[:prefix_length], [ids[prefix_length:]], every_token=False)

    before = list(run(text))
    for j in range(size):
        after = run([*text[:j], (text[j] + 1) % SMALL.vocab_size, *text[j + 1:]])
        attended = [0 <= i - j < (sliding_window or size) for i in range(size)]
        for old, new in zip(before, after, strict=True):
            change = (old - new).abs().amax(1)
            assert [c > 1e-5 for c in change] == attended[-len(change):], j
            assert all(c == 0 or c > 1e-5 for c in change), j  # masked keys have no effect at all


# ---- gradient checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 9])
def test_gradient_checkpointing_keeps_only_block_inputs_and_gives_the_same_gradients(
    prefix_length: int, small_model: Callable[..., Mistral],
) -> None:
    model, texts = small_model(num_layers=3), random_ids([11, 11, 30])
    [prefix] = random_ids([max(1, prefix_length)])

    def forward() -> Tensor:
        if prefix_length:
            return with_prefix(model, prefix, texts, every_token=False)
        return model(pack_sequences(texts, device=CPU))
    weight = torch.randn_like(forward())
    truth, kept = gradients(model, forward(), weight), bytes_kept(forward, model.parameters())
    model.gradient_checkpointing = True
    assert_same_gradients(gradients(model, forward(), weight), truth)
    assert bytes_kept(forward, model.parameters()) < kept / 3
