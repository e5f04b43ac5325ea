"""Last-token pooling: against transformers' final norm and sentence-transformers' modules, and against fp64 loops."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.models import Normalize, Pooling
from torch import Tensor
from transformers import MistralModel
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from ref.model.checkpoint import save_model
from ref.model.packing import pack_sequences
from ref.model.pooling import embed, last_token_pool
from ref.model.transformer import Mistral

LENGTHS = (3, 1, 6)
HIDDEN_SIZE = 24


def pool_by_loops(hidden_TD: Tensor, last_token_B: Tensor, norm_weight_D: Tensor, *, eps: float) -> Tensor:
    """The equation of ref/model/pooling.py in fp64, one text and one number at a time."""
    rows = []
    for row in last_token_B.tolist():
        h = [x.double() for x in hidden_TD[row]]
        root = torch.sqrt(sum(x * x for x in h) / len(h) + eps)
        n = [x / root * w.double() for x, w in zip(h, norm_weight_D, strict=True)]
        size = torch.sqrt(sum(x * x for x in n))
        rows.append(torch.stack([x / size if size > 0 else 0 * x for x in n]))
    return torch.stack(rows)


def inputs(dtype: torch.dtype = torch.float32, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of three texts, NaN in every row that is not pooled; rows of the last tokens; the norm's weight."""
    last_token_B = torch.tensor(LENGTHS).cumsum(0) - 1
    hidden_TD = torch.full((sum(LENGTHS), HIDDEN_SIZE), math.nan, dtype=dtype)
    hidden_TD[last_token_B] = (scale * torch.randn(len(LENGTHS), HIDDEN_SIZE)).to(dtype)
    return hidden_TD, last_token_B, torch.empty(HIDDEN_SIZE).uniform_(0.5, 2).to(dtype)


def pad(texts_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows as a right-padded batch with its mask: (B, longest, D) and (B, longest)."""
    texts = texts_TD.split(LENGTHS)
    mask = torch.tensor([[int(i < n) for i in range(max(LENGTHS))] for n in LENGTHS])
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=7.0), mask


@torch.no_grad()
def test_equals_final_norm_and_sentence_transformers() -> None:
    hidden_TD, last_token_B, weight_D = inputs()
    hidden_TD = hidden_TD.nan_to_num(1.0)  # their pooling multiplies the other rows by 0, which leaves NaN
    norm = MistralRMSNorm(HIDDEN_SIZE, eps=1e-3)
    norm.weight.copy_(weight_D)
    padded, mask = pad(norm(hidden_TD))
    features = Pooling(HIDDEN_SIZE, pooling_mode="lasttoken")({"token_embeddings": padded, "attention_mask": mask})
    theirs = Normalize()(features)["sentence_embedding"]
    ours = last_token_pool(hidden_TD, last_token_B, weight_D, eps=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # control: the row before and another weight are noticed
    for wrong in (last_token_pool(hidden_TD, last_token_B - 1, weight_D, eps=1e-3),
                  last_token_pool(hidden_TD, last_token_B, weight_D.flip(0), eps=1e-3)):
        assert (wrong - theirs).abs().max() > 1e-2


@torch.no_grad()
def test_embed_equals_transformers_and_sentence_transformers(
    small_model: Callable[..., Mistral], tmp_path: Path,
) -> None:
    """From token ids to embeddings: ours packed, theirs padded."""
    ours = small_model()
    save_model(ours, tmp_path, dtype=torch.float32)
    theirs = MistralModel.from_pretrained(tmp_path)
    texts = [torch.randint(61, (n,)).tolist() for n in LENGTHS]
    ids = torch.tensor([text + [2] * (max(LENGTHS) - len(text)) for text in texts])
    mask = pad(torch.ones(sum(LENGTHS), 1))[1]
    features = {"token_embeddings": theirs(ids, attention_mask=mask).last_hidden_state, "attention_mask": mask}
    truth = Normalize()(Pooling(ours.config.hidden_size, pooling_mode="lasttoken")(features))["sentence_embedding"]
    vectors = embed(ours, pack_sequences(texts, device=torch.device("cpu")))
    torch.testing.assert_close(vectors, truth, rtol=1e-5, atol=2e-6)
    half = embed(ours.bfloat16(), pack_sequences(texts, device=torch.device("cpu")))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert (half * truth).sum(1).min() > 0.995


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_loops_forward_and_backward(dtype: torch.dtype, scale: float) -> None:
    """From equal inputs of any dtype: embeddings up to fp32 rounding, gradients up to that of the input's dtype."""
    hidden_TD, last_token_B, weight_D = inputs(dtype, scale=scale)
    up_BD = torch.randn(len(LENGTHS), HIDDEN_SIZE)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden_TD, weight_D)]
        out = function(leaves[0], last_token_B, leaves[1], eps=1e-5)
        return out, *torch.autograd.grad((out * up_BD).sum(), leaves)

    (ours, *our_gradients), (truth, *gradients) = run(last_token_pool), run(pool_by_loops)
    assert ours.dtype == torch.float32 and truth.dtype == torch.float64
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=3e-7)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for gradient, expected in zip(our_gradients, gradients, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - expected).abs().max() <= rounding * expected.abs().max()
    others = torch.ones(len(hidden_TD), dtype=torch.bool).index_fill(0, last_token_B, False)
    assert not our_gradients[0][others].any()  # and not NaN either


@pytest.mark.parametrize("what", ["hidden", "weight"])
def test_zero_vectors_have_zero_gradients(what: str) -> None:
    hidden_TD, last_token_B, weight_D = inputs()
    alone = last_token_pool(hidden_TD, last_token_B, weight_D, eps=1e-5)
    if what == "hidden":
        hidden_TD[last_token_B[1]] = 0
    else:
        weight_D.zero_()
    hidden_TD.requires_grad_(), weight_D.requires_grad_()
    vectors = last_token_pool(hidden_TD, last_token_B, weight_D, eps=1e-5)
    (vectors * torch.randn_like(vectors)).sum().backward()
    zero = [1] if what == "hidden" else [0, 1, 2]
    kept = [row for row in range(3) if row not in zero]
    assert torch.equal(vectors[zero], torch.zeros(len(zero), HIDDEN_SIZE))
    assert torch.equal(vectors[kept], alone[kept])
    assert not hidden_TD.grad[last_token_B[zero]].any()
    assert hidden_TD.grad[last_token_B[kept]].abs().sum() > 0 or not kept
    assert weight_D.grad.isfinite().all()


@given(st.integers(0, 2**31), st.sampled_from((1e-3, 0.1, 3.0, 1e3)), st.integers(1, 64))
def test_embeddings_have_unit_length_and_do_not_depend_on_scale(seed: int, scale: float, hidden_size: int) -> None:
    hidden_BD = torch.randn(5, hidden_size, generator=torch.Generator().manual_seed(seed))
    row_B = torch.arange(5)
    vectors = last_token_pool(hidden_BD, row_B, torch.ones(hidden_size), eps=1e-12)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    scaled = last_token_pool(scale * hidden_BD, row_B, torch.ones(hidden_size), eps=1e-12)
    torch.testing.assert_close(scaled, vectors, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_orthogonal_to_a_unit_vector() -> None:
    """d|e|^2 = 0: scaling a hidden state does not change its embedding (eps negligible)."""
    hidden_TD, last_token_B, _ = inputs()
    hidden_TD.requires_grad_()
    vectors = last_token_pool(hidden_TD, last_token_B, torch.ones(HIDDEN_SIZE), eps=1e-12)
    [gradient] = torch.autograd.grad((vectors * torch.randn_like(vectors)).sum(), hidden_TD)
    along_B = (gradient * hidden_TD.detach())[last_token_B].sum(1)
    assert along_B.abs().max() <= 1e-5 and gradient[last_token_B].abs().max() > 1e-2
