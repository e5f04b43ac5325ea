"""The forward pass: against transformers' MistralModel through the production loader, and against itself cut otherwise.

Three rungs: attention as fp64 loops, attention by rectangles and by FlexAttention, the whole model. `BREAKAGES`
is the negative control: the oracle must notice each of them.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, edit_json, scatter_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import MistralConfig, MistralModel
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

import ref.attention
import ref.model
from ref.attention import KeyValue, attend_by_length, attend_flex, block_table, visible_rule
from ref.checkpoint import load_model, save_model
from ref.lora import adapters, attach
from ref.model import Block, Mistral
from ref.packing import Packed, cut_by_tokens, pack
from ref.rope import rotary_tables, rotate

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")
CONFIGURATIONS = 64
TOLERANCE = 1e-5  # of the largest number of the output, fp32

Texts = list[list[int]]


def random_texts(lengths: Sequence[int], *, vocab_size: int = SMALL.vocab_size) -> Texts:
    return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest difference, as a share of the largest number of the truth."""
    assert ours.shape == truth.shape
    return ((ours.float() - truth.float()).abs().max() / truth.float().abs().max()).item()


def hidden(model: Mistral, texts: Texts) -> Tensor:
    """Hidden states after the final norm of all tokens of the texts, packed: (T, D)."""
    return model.norm(model(pack(texts, device=CPU), every_token=True))


def hidden_by_transformers(model: MistralModel, texts: Texts) -> Tensor:
    """The same by transformers, one text at a time: no padding and no mask that could be wrong in both."""
    return torch.cat([model(torch.tensor([text])).last_hidden_state[0] for text in texts])


def gradients(model: torch.nn.Module, out: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Each to 1e-4 of its own largest number; one that is zero but for rounding is measured by the largest of all."""
    assert ours.keys() == truth.keys()
    rounding = 1e-6 * max(g.abs().max() for g in truth.values())
    for name, gradient in truth.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + rounding, name


# ----------------------------------------------------------------------------------- oracle: transformers


@dataclass
class Case:
    """A random configuration, in transformers' words, with texts; `form` and `head_dim`: how config.json is written."""

    config: dict[str, Any]
    lengths: list[int]
    form: str
    head_dim: str

    @classmethod
    def draw(cls, number: int, seed: int) -> "Case":
        """Each GQA ratio with each kind of window and each kind of head_dim, the rest by chance."""
        chance = random.Random(f"{seed} {number}")
        ratio, window = list(itertools.product((1, 2, 4, 8), ("none", "shorter", "equal", "longer")))[number % 16]
        head_dim, form = ("given", "absent", "null", "given")[number // 16], chance.choice(("old", "new"))
        kv_heads, head_width = chance.choice((1, 2, 3)), chance.choice((2, 6, 8, 10))
        heads = kv_heads * ratio
        window_keys = chance.randint(2, 12)
        longest = {
            "none": chance.randint(1, 30), "shorter": chance.randint(window_keys + 1, 3 * window_keys),
            "equal": window_keys, "longer": chance.randint(1, window_keys - 1)}[window]
        lengths = [longest, longest, *(chance.randint(1, longest) for _ in range(2))]
        chance.shuffle(lengths)
        config = {
            "vocab_size": 61, "num_hidden_layers": chance.randint(1, 3), "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": chance.choice((24, 56)),
            "hidden_size": chance.choice((20, 32, 42)) if head_dim == "given" else heads * head_width,
            "head_dim": head_width, "sliding_window": None if window == "none" else window_keys,
            "rms_norm_eps": chance.choice((1e-6, 1e-5, 1e-3)),
            "rope_parameters": {"rope_type": "default", "rope_theta": chance.choice((100.0, 10000.0, 1e6))}}
        return cls(config, lengths, form, head_dim)

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
    oracle, texts = case.write(tmp_path), random_texts(case.lengths)
    ours = hidden(load_model(tmp_path, device=CPU), texts)
    theirs = hidden_by_transformers(oracle, texts)
    if relative(ours, theirs) > TOLERANCE:  # a badly conditioned draw: what does rounding do to the oracle itself?
        rounding = 2.0**-23 * (2 * torch.randint(2, oracle.embed_tokens.weight.shape) - 1)
        oracle.embed_tokens.weight.mul_(1 + rounding)
        assert relative(ours, theirs) <= 2 * relative(hidden_by_transformers(oracle, texts), theirs), case


@pytest.mark.parametrize(("window_keys", "shard_bytes"), [(None, 10**9), (6, 10**9), (6, 5000)])
@torch.no_grad()
def test_transformers_reads_what_we_save(
    window_keys: int | None, shard_bytes: int, small_model: Callable[..., Mistral], tmp_path: Path,
) -> None:
    ours, texts = small_model(window_keys=window_keys, rope_base=500.0, norm_eps=1e-3), random_texts([15, 3, 15])
    save_model(ours, tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
    theirs, report = MistralModel.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert relative(hidden(ours, texts), hidden_by_transformers(theirs, texts)) <= TOLERANCE


def test_gradients_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    case = Case.draw(5, seed)  # ratio 2, a window shorter than the text
    theirs, texts = case.write(tmp_path), random_texts(case.lengths)
    ours = load_model(tmp_path, device=CPU)
    weight_TD = torch.randn(sum(case.lengths), case.config["hidden_size"])
    truth = gradients(theirs, hidden_by_transformers(theirs, texts), weight_TD)
    assert_same_gradients(gradients(ours, hidden(ours, texts), weight_TD), truth)


def test_bf16_is_as_close_to_fp32_as_that_of_transformers(tmp_path: Path) -> None:
    """Error budget: 1.2 times the error that transformers' bf16 makes, root mean square over 300 tokens."""
    config = MistralConfig(
        vocab_size=61, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=256, sliding_window=40, dtype="bfloat16")
    theirs = MistralModel(config).bfloat16().eval()
    with torch.no_grad():
        scatter_weights(theirs)
        theirs.save_pretrained(tmp_path)
        texts = random_texts([100, 80, 80, 40])
        ours = load_model(tmp_path, device=CPU)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        truth = hidden(load_model(tmp_path, device=CPU, dtype=torch.float32), texts)
        ours_off, theirs_off = ((out.float() - truth).square().mean().sqrt().item() for out in (
            hidden(ours, texts), hidden_by_transformers(theirs, texts)))
    assert 0 < ours_off <= 1.2 * theirs_off


# ------------------------------------------------------------------ negative control: the oracle notices


def window_of(change: int) -> Callable[[Mistral, pytest.MonkeyPatch], None]:
    def apply(model: Mistral, _: pytest.MonkeyPatch) -> None:
        for layer in model.layers:
            layer.window_keys += change
    return apply


def rotate_interleaved(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """RoPE on the pairs (x_0, x_1), (x_2, x_3), …: the other layout in use."""
    a, b = x_THK.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def swap_gate_and_up(model: Mistral, _: pytest.MonkeyPatch) -> None:
    for layer in model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def larger_eps(model: Mistral, _: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, ref.model.RMSNorm):
            module.eps *= 100


def heads_in_turn(q: Tensor, k: Tensor, v: Tensor, packed: Packed, **options: Any) -> Tensor:
    """Query head h with key/value head h mod G, where it should be h // (H / G)."""
    copies = q.shape[1] // k.shape[1]
    return attend_by_length(q, k.repeat(1, copies, 1), v.repeat(1, copies, 1), packed, **options)


def texts_as_one(q: Tensor, k: Tensor, v: Tensor, packed: Packed, **options: Any) -> Tensor:
    return attend_by_length(q, k, v, Packed(packed.ids_T, (len(packed.ids_T),)), **options)


def patch(name: str, value: Callable[..., Any]) -> Callable[[Mistral, pytest.MonkeyPatch], None]:
    return lambda _, monkeypatch: monkeypatch.setattr(ref.model, name, value)


BREAKAGES: dict[str, Callable[[Mistral, pytest.MonkeyPatch], None]] = {
    "window one key longer": window_of(+1),
    "window one key shorter": window_of(-1),
    "interleaved RoPE": patch("rotate", rotate_interleaved),
    "RoPE turned backwards": patch("rotate", lambda x, cos, sin: rotate(x, cos, -sin)),
    "other RoPE base": patch("rotary_tables", lambda position, *, head_width, base: rotary_tables(
        position, head_width=head_width, base=2 * base)),
    "key/value heads in turn": patch("attend", heads_in_turn),
    "texts see each other": patch("attend", texts_as_one),
    "gate and up swapped": swap_gate_and_up,
    "larger eps": larger_eps,
}


@pytest.mark.parametrize("name", BREAKAGES)
@torch.no_grad()
def test_oracle_notices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case({
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 6, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, [14, 14, 9], "new", "given")
    oracle, texts = case.write(tmp_path), random_texts(case.lengths)
    model, truth = load_model(tmp_path, device=CPU), hidden_by_transformers(oracle, texts)
    assert relative(hidden(model, texts), truth) <= TOLERANCE
    BREAKAGES[name](model, monkeypatch)
    assert relative(hidden(model, texts), truth) > 100 * TOLERANCE


# ------------------------------------------------------------------------------------------------- packing


@torch.no_grad()
def test_packing_and_batch_order_change_nothing(small_model: Callable[..., Mistral]) -> None:
    model, texts = small_model(), random_texts([7, 7, 1, 20, 7, 1, 6, 6])
    alone = torch.cat([model(pack([text], device=CPU)) for text in texts])
    assert relative(model(pack(texts, device=CPU)), alone) <= 1e-6
    order = torch.randperm(len(texts)).tolist()
    assert relative(model(pack([texts[i] for i in order], device=CPU)), alone[order]) <= 1e-6
    assert relative(alone.flip(0), alone) > 0.1  # the texts do differ


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 40))
def test_cut_by_tokens(lengths: list[int], budget: int) -> None:
    batches = cut_by_tokens(lengths, tokens_per_batch=budget)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)


def test_pack_says_where_texts_lie() -> None:
    packed = pack([[5, 6, 7], [8, 9]], device=CPU, prefix_tokens=4)
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 9]
    assert packed.offsets.tolist() == [0, 3, 5] and packed.last_B.tolist() == [2, 4]
    assert packed.text_T.tolist() == [0, 0, 0, 1, 1] and packed.position_T.tolist() == [4, 5, 6, 4, 5]


# ------------------------------------------------------- what the model leaves out: last layer, shared prefix


def with_prefix(model: Mistral, prefix: list[int], texts: Texts, *, every_token: bool) -> Tensor:
    shared = model.prefix_key_values(pack([prefix], device=CPU))
    return model(pack(texts, device=CPU, prefix_tokens=len(prefix)), prefix=shared, every_token=every_token)


@pytest.mark.parametrize("window_keys", [None, 1, 6, 40])
@pytest.mark.parametrize("prefix_tokens", [0, 9])
def test_last_layer_shortcut_equals_the_full_layer(
    window_keys: int | None, prefix_tokens: int, small_model: Callable[..., Mistral],
) -> None:
    model, texts = small_model(window_keys=window_keys), random_texts([13, 4, 4, 1])
    packed, shared = pack(texts, device=CPU, prefix_tokens=prefix_tokens), None
    if prefix_tokens:
        shared = model.prefix_key_values(pack(random_texts([prefix_tokens]), device=CPU))
    short, full = (model(packed, prefix=shared, every_token=every_token) for every_token in (False, True))
    assert short.shape == (4, SMALL.width) and full.shape == (22, SMALL.width)
    assert relative(short, full[packed.last_B]) <= 1e-6
    assert relative(short, full[packed.last_B - 1]) > 0.1


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("prefix_tokens", [1, 9])
@pytest.mark.parametrize("window_keys", [None, 1, 4, 9, 12, 100])
def test_shared_prefix_equals_concatenated_text(
    window_keys: int | None, prefix_tokens: int, every_token: bool, small_model: Callable[..., Mistral],
) -> None:
    """Forward and gradients; the window also shorter than the prefix, as long, and longer."""
    model = small_model(window_keys=window_keys, layers=3)
    [prefix], texts = random_texts([prefix_tokens]), random_texts([11, 3, 3, 1])
    whole = pack([prefix + text for text in texts], device=CPU)
    full_TD = model(whole, every_token=every_token)
    if every_token:
        full_TD = full_TD[whole.position_T >= prefix_tokens]
    shared_TD = with_prefix(model, prefix, texts, every_token=every_token)
    assert relative(shared_TD, full_TD) <= TOLERANCE
    weight = torch.randn_like(full_TD)
    truth, ours = gradients(model, full_TD, weight), gradients(model, shared_TD, weight)
    assert_same_gradients(ours, truth)


@torch.no_grad()
def test_a_shared_prefix_in_bf16_is_as_close_to_fp32_as_the_concatenated_text(
    small_model: Callable[..., Mistral],
) -> None:
    """Error budget: 1.2 times what the concatenated text in bf16 is off, root mean square; windows cut the prefix."""
    for window_keys in (None, 20):
        model = small_model(window_keys=window_keys, layers=4)
        [prefix], texts = random_texts([40]), random_texts([25] * 8 + [9] * 8)
        whole = [prefix + text for text in texts]
        truth = hidden(model, whole)[pack(whole, device=CPU).position_T >= 40]
        model = model.bfloat16()
        concatenated = hidden(model, whole)[pack(whole, device=CPU).position_T >= 40]
        shared = model.norm(with_prefix(model, prefix, texts, every_token=True))
        shared_off, whole_off = ((out.float() - truth).square().mean().sqrt().item() for out in (shared, concatenated))
        assert 0 < shared_off <= 1.2 * whole_off


@torch.no_grad()
def test_prefix_matters(small_model: Callable[..., Mistral]) -> None:
    """Control of the test above: a prefix at other positions, or another prefix, is noticed."""
    model, texts, [prefix] = small_model(window_keys=None), random_texts([5, 5]), random_texts([9])
    right = with_prefix(model, prefix, texts, every_token=False)
    assert relative(with_prefix(model, prefix[::-1], texts, every_token=False), right) > 1e-3
    shared = model.prefix_key_values(pack([prefix], device=CPU))
    shifted = model(pack(texts, device=CPU, prefix_tokens=9), prefix=[(k.roll(1, 0), v) for k, v in shared])
    assert relative(shifted, right) > 1e-3


# ------------------------------------------------------------------------------------------------- window


@pytest.mark.parametrize("window_keys", [None, 1, 2, 4, 5, 11, 12, 30])
@torch.no_grad()
def test_exactly_window_keys_are_seen(window_keys: int | None, small_model: Callable[..., Mistral]) -> None:
    """One layer: another token at j changes the output at i if and only if 0 <= i - j < W; the prefix is counted in."""
    model, size, prefix_tokens = small_model(window_keys=window_keys, layers=1), 12, 4
    model.layers[0].self_attn.q_proj.weight.mul_(0.2)  # no key so faint that rounding hides it
    [text] = random_texts([size])

    def run(ids: list[int]) -> Iterator[Tensor]:
        yield model(pack([ids], device=CPU), every_token=True)
        yield with_prefix(model, ids[:prefix_tokens], [ids[prefix_tokens:]], every_token=True)
        yield with_prefix(model, ids[:prefix_tokens], [ids[prefix_tokens:]], every_token=False)

    before = list(run(text))
    for j in range(size):
        after = run([*text[:j], (text[j] + 1) % SMALL.vocab_size, *text[j + 1:]])
        seen = [0 <= i - j < (window_keys or size) for i in range(size)]
        for was, now in zip(before, after, strict=True):
            change = (was - now).abs().amax(1)
            assert [c > 1e-5 for c in change] == seen[-len(change):], j
            assert all(c == 0 or c > 1e-5 for c in change), j  # not seen at all, not: seen a little


# ---------------------------------------------------------------------------------------------- attention


def attend_by_loops(
    q_NHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, packed: Packed, *,
    window_keys: int | None, prefix: KeyValue | None = None,
) -> Tensor:
    """The rule of ref/attention.py word for word, in fp64, a query at a time."""
    q, k, v = q_NHK.double(), k_TGK.double(), v_TGK.double()
    every_token, ratio = len(q) == len(k), q.shape[1] // k.shape[1]
    rows = []
    for start, stop in itertools.pairwise(packed.offsets):
        keys, values = k[start:stop], v[start:stop]
        if prefix is not None:
            keys, values = torch.cat((prefix[0].double(), keys)), torch.cat((prefix[1].double(), values))
        for i in range(packed.prefix_tokens if every_token else len(keys) - 1, len(keys)):
            query = q[len(rows)]
            first = 0 if window_keys is None else max(0, i - window_keys + 1)
            heads = []
            for h in range(q.shape[1]):
                score = keys[first : i + 1, h // ratio] @ query[h] / math.sqrt(q.shape[2])
                heads.append(score.softmax(0) @ values[first : i + 1, h // ratio])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", [attend_by_length, attend_flex])
@pytest.mark.parametrize("window_keys", [None, 1, 3, 7, 9, 50])
@pytest.mark.parametrize(("prefix_tokens", "heads", "kv_heads"), [(0, 4, 4), (0, 4, 2), (6, 8, 1), (1, 6, 3)])
@pytest.mark.parametrize("last_only", [False, True])
def test_attention_equals_loops(
    attention: Callable[..., Tensor], window_keys: int | None, prefix_tokens: int, heads: int, kv_heads: int,
    last_only: bool,
) -> None:
    """Ragged lengths, last rows only, a prefix; gradients too, which FlexAttention does not have on a CPU."""
    packed = pack([[0] * n for n in (5, 5, 1, 9, 2)], device=CPU, prefix_tokens=prefix_tokens)
    rows = 5 if last_only else 22
    shapes = [(rows, heads, 6), (22, kv_heads, 6), (22, kv_heads, 6)] + [(prefix_tokens, kv_heads, 6)] * 2
    inputs = [torch.randn(shape, requires_grad=attention is attend_by_length) for shape in shapes]
    weight = torch.randn(rows, heads, 6)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        q, k, v, *pair = inputs
        out = function(q, k, v, packed, window_keys=window_keys, prefix=tuple(pair) if prefix_tokens else None)
        used = inputs if prefix_tokens else inputs[:3]
        return out, *(torch.autograd.grad((out * weight).sum(), used) if attention is attend_by_length else ())

    for ours, truth in zip(run(attention), run(attend_by_loops), strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("attention", [attend_by_length, attend_flex])
def test_one_packed_batch_serves_two_windows(attention: Callable[..., Tensor]) -> None:
    """Nothing that is kept on the batch may remember another window."""
    packed = pack([[0] * 8], device=CPU)
    q, k, v = (torch.randn(8, 2, 4) for _ in range(3))
    for window_keys in (None, 2, 5):
        truth = attend_by_loops(q, k, v, packed, window_keys=window_keys)
        torch.testing.assert_close(attention(q, k, v, packed, window_keys=window_keys).double(), truth,
                                   rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.sampled_from((0, 1, 5, 9, 30)),
       st.sampled_from((None, 1, 3, 7, 20)), st.sampled_from((2, 3, 4, 8)), st.booleans())
def test_the_table_of_blocks_names_what_is_visible(
    lengths: list[int], prefix_tokens: int, window_keys: int | None, block: int, last_only: bool,
) -> None:
    """Every visible pair lies in a named block; a block that is named whole is visible as a whole, and not cut off."""
    packed = pack([[0] * n for n in lengths], device=CPU, prefix_tokens=prefix_tokens)
    rows, keys = len(lengths) if last_only else sum(lengths), prefix_tokens + sum(lengths)
    visible = visible_rule(packed, rows, window_keys)(
        torch.zeros(()), torch.zeros(()), torch.arange(rows)[:, None], torch.arange(keys)[None])
    some, every = block_table(packed, rows, window_keys, block=block)
    for (i, j), named in np.ndenumerate(some):
        inside = visible[i * block : (i + 1) * block, j * block : (j + 1) * block]
        assert named or not inside.any()
        assert not every[i, j] or (named and inside.all() and inside.shape == (block, block))


def test_blocks_that_see_nothing_are_skipped_and_whole_ones_known() -> None:
    """64 texts of 512 tokens: 10 of 4 x 4 blocks each hold something, 6 of them nothing else."""
    some, every = block_table(pack([[0] * 512] * 64, device=CPU), 64 * 512, 4096)
    assert (some.sum(), every.sum()) == (64 * 10, 64 * 6)
    some, _ = block_table(pack([[0] * 512] * 64, device=CPU), 64, 4096)
    assert some.sum() == 64 * 4  # the last tokens alone: one block of rows, all blocks of keys


def bytes_kept(call: Callable[[], object], model: Mistral) -> int:
    """What autograd keeps for backward, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_the_place_of_a_missing_window_fits_into_the_kernels_32_bits() -> None:
    """And is more than the positions of any model that is loaded."""
    assert 2**20 < ref.attention.NO_WINDOW <= torch.iinfo(torch.int32).max


@torch._functorch.config.patch(ban_recompute_materialized_backward=True)  # puts it back at the end
def test_a_compiled_block_keeps_what_backward_needs_and_no_more(small_model: Callable[..., Mistral]) -> None:
    """Norm inputs, q, k, v, attention output, gate and up, and the adapters' R numbers, as torch's partitioner cuts."""
    ref.attention.compiled.__wrapped__(Block.before)  # what is set there is what is tested here
    torch._dynamo.reset()
    before, after = (torch.compile(half, dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
                     for half in (Block.before, Block.after))
    model, rank = small_model(layers=1, width=64, ffn_width=224), 2
    attach(model, rank=rank, alpha=8.0, dropout=0.0, targets=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    block = model.layers[0]
    packed = pack(random_texts([64] * 4), device=CPU)
    x_TD, rotary = model.embed_tokens(packed.ids_T).requires_grad_(), model._rotary(packed.position_T)

    def compiled_block() -> None:
        q_THK, own = before(block, x_TD, rotary, None)
        after(block, x_TD, attend_by_length(q_THK, *own, packed, window_keys=None), None).sum()

    compiled_block()
    arch = model.arch
    q, kv, tokens = arch.heads * arch.head_width, arch.kv_heads * arch.head_width, 256
    needed = 4 * tokens * (2 * arch.width + 2 * q + 2 * kv + 2 * arch.ffn_width + 7 * rank)
    angles_and_norms = 4 * tokens * (arch.head_width + arch.heads + 3)
    assert needed < bytes_kept(compiled_block, model) <= needed + angles_and_norms
    plain = bytes_kept(lambda: block(x_TD, packed, rotary)[0].sum(), model)
    assert plain > needed + angles_and_norms  # eager code keeps the two normed states and silu(gate) * up as well


@pytest.mark.parametrize("prefix_tokens", [0, 9])
def test_checkpointing_keeps_the_inputs_of_blocks_alone_and_gives_the_same_gradients(
    prefix_tokens: int, small_model: Callable[..., Mistral],
) -> None:
    model, texts = small_model(layers=3), random_texts([11, 11, 30])
    [prefix] = random_texts([max(1, prefix_tokens)])

    def forward() -> Tensor:
        return with_prefix(model, prefix, texts, every_token=False) if prefix_tokens else model(pack(texts, device=CPU))
    weight = torch.randn_like(forward())
    truth, kept = gradients(model, forward(), weight), bytes_kept(forward, model)
    model.checkpointing = True
    assert_same_gradients(gradients(model, forward(), weight), truth)
    assert bytes_kept(forward, model) < kept / 3


@pytest.mark.parametrize("train", [False, True])
def test_the_halves_of_a_block_are_compiled_once_for_all_layers_and_lengths(
    train: bool, small_model: Callable[..., Mistral],
) -> None:
    """As on CUDA, but for the backend: one graph, no break, the same for every layer and token count; equal results.

    Forward and backward graph are cut apart as on CUDA: torch 2.11 lost gradients there.
    """
    torch._dynamo.reset()
    counters.clear()
    before, after = (torch.compile(half, dynamic=True, fullgraph=True, backend="aot_eager")
                     for half in (Block.before, Block.after))
    model = small_model(layers=4)
    if train:
        attach(model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
        for layer in adapters(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    with torch.set_grad_enabled(train):
        for lengths in ((5, 5, 3), (9, 2), (4, 7, 7, 1)):
            packed = pack(random_texts(lengths), device=CPU)
            rotary = model._rotary(packed.position_T)
            plain_TD = compiled_TD = model.embed_tokens(packed.ids_T).requires_grad_(train)
            for block in model.layers:
                plain_TD, _ = block(plain_TD, packed, rotary)
                q_THK, own = before(block, compiled_TD, rotary, None)
                mixed_THK = attend_by_length(q_THK, *own, packed, window_keys=block.window_keys)
                compiled_TD = after(block, compiled_TD, mixed_THK, None)
            assert relative(compiled_TD, plain_TD) <= 1e-6
            if train:
                weights = [weight for layer in adapters(model).values() for weight in layer.parameters()]
                weights = [weight for weight in weights if weight.requires_grad]
                direction_TD = torch.randn_like(plain_TD)
                for plain, ours in zip(*(torch.autograd.grad((x * direction_TD).sum(), weights)
                                         for x in (plain_TD, compiled_TD)), strict=True):
                    assert relative(ours, plain) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 2


# ------------------------------------------------------------------------------------------------- RoPE


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000), st.sampled_from((2, 8, 30, 128)),
       st.sampled_from((100.0, 10000.0, 1e6)), st.integers(0, 2**31))
def test_rope_depends_on_the_distance_alone(i: int, j: int, shift: int, width: int, base: float, seed: int) -> None:
    query, key = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))

    def score(i: int, j: int) -> Tensor:
        tables = rotary_tables(torch.tensor([i, j]), head_width=width, base=base)
        q, k = rotate(torch.stack((query, key))[:, None], *tables)[:, 0]
        return q @ k

    size = query.norm() * key.norm()
    rounding = 2**-23 * (max(i, j) + shift + 10) * size  # of an angle in fp32
    assert (score(i, j) - score(i + shift, j + shift)).abs() <= rounding
    assert (score(i, i) - query @ key).abs() <= 1e-5 * size


def test_rope_by_loops_and_its_sense_of_distance() -> None:
    width, base, x_THK = 6, 50.0, torch.randn(4, 2, 6)
    position_T = torch.tensor([0, 1, 2, 9])
    out = rotate(x_THK, *rotary_tables(position_T, head_width=width, base=base))
    for t, h, c in itertools.product(range(4), range(2), range(3)):
        turn = position_T[t].item() * base ** (-2 * c / width)
        x, y = x_THK[t, h, c].item(), x_THK[t, h, c + 3].item()
        assert out[t, h, c].item() == pytest.approx(x * math.cos(turn) - y * math.sin(turn), abs=1e-5)
        assert out[t, h, c + 3].item() == pytest.approx(y * math.cos(turn) + x * math.sin(turn), abs=1e-5)


@pytest.mark.parametrize(("width", "base"), [(128, 10000.0), (128, 1e6), (10, 12345.6)])
def test_rope_tables_are_those_of_transformers_bit_for_bit(width: int, base: float) -> None:
    """Both are off the true angle by up to 0.002 at position 32,000; trained weights have seen these."""
    position_T = torch.arange(32768)
    theirs = MistralRotaryEmbedding(MistralConfig(
        head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": base}))(torch.zeros(1), position_T[None])
    for ours, truth in zip(rotary_tables(position_T, head_width=width, base=base), theirs, strict=True):
        assert torch.equal(ours, truth[0, :, : width // 2])
