"""RoPE: against loops, against transformers, and its dependence on relative position."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from ref.model.rope import apply_rotary, rotary_cos_sin


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000), st.sampled_from((2, 8, 30, 128)),
       st.sampled_from((100.0, 10000.0, 1e6)), st.integers(0, 2**31))
def test_scores_depend_only_on_relative_position(
    i: int, j: int, shift: int, head_dim: int, theta: float, seed: int,
) -> None:
    query, key = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(seed))

    def score(i: int, j: int) -> Tensor:
        cos_sin = rotary_cos_sin(torch.tensor([i, j]), head_dim=head_dim, theta=theta)
        q, k = apply_rotary(torch.stack((query, key))[:, None], *cos_sin)[:, 0]
        return q @ k

    size = query.norm() * key.norm()
    rounding = 2**-23 * (max(i, j) + shift + 10) * size  # of an angle in fp32
    assert (score(i, j) - score(i + shift, j + shift)).abs() <= rounding
    assert (score(i, i) - query @ key).abs() <= 1e-5 * size


def test_equals_loops() -> None:
    """Also the direction of the rotation."""
    head_dim, theta, x_THK = 6, 50.0, torch.randn(4, 2, 6)
    position_ids_T = torch.tensor([0, 1, 2, 9])
    out = apply_rotary(x_THK, *rotary_cos_sin(position_ids_T, head_dim=head_dim, theta=theta))
    for t, h, c in itertools.product(range(4), range(2), range(3)):
        angle = position_ids_T[t].item() * theta ** (-2 * c / head_dim)
        x, y = x_THK[t, h, c].item(), x_THK[t, h, c + 3].item()
        assert out[t, h, c].item() == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-5)
        assert out[t, h, c + 3].item() == pytest.approx(y * math.cos(angle) + x * math.sin(angle), abs=1e-5)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 10000.0), (128, 1e6), (10, 12345.6)])
def test_cos_and_sin_equal_those_of_transformers_bit_for_bit(head_dim: int, theta: float) -> None:
    """Both differ from the exact angle by up to 0.002 at position 32,000; trained weights have learned with these."""
    position_ids_T = torch.arange(32768)
    config = MistralConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    theirs = MistralRotaryEmbedding(config)(torch.zeros(1), position_ids_T[None])
    for ours, truth in zip(rotary_cos_sin(position_ids_T, head_dim=head_dim, theta=theta), theirs, strict=True):
        assert torch.equal(ours, truth[0, :, : head_dim // 2])
