"""Exact dense search: ties, blocks, shards, negative zero, denormal numbers and bfloat16, against a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ref.mining import dense
from ref.mining.dense import DenseTopK, on_device, top_k

FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])


def by_sorting(score_P, id_order_P, k):
    """Scores and ranks of the k best passages of one query, by a full sort."""
    order = sorted(range(len(id_order_P)), key=lambda j: (-score_P[j].item(), id_order_P[j].item()))[:k]
    return score_P[order].tolist(), id_order_P[order].tolist()


def search(query_QD, passage_PD, id_order_P, k, block):
    """Dense search with blocks of `block` passages."""
    best = DenseTopK(query_QD, k)
    for start in range(0, len(passage_PD), block):
        best.add(passage_PD[start : start + block], id_order_P[start : start + block])
    return best


@given(hits=st.lists(FLOATS, min_size=1, max_size=30), k=st.integers(1, 31), split=st.integers(0, 30), data=st.data())
def test_results_are_sorted_by_score_then_rank(hits, k, split, data):
    """Given as two parts to merge, as scores of one block, and as dot products."""
    score_P = torch.tensor(hits)
    id_order_P = torch.tensor(data.draw(st.permutations(range(len(hits)))), dtype=torch.int32)
    expected = by_sorting(score_P, id_order_P, k)
    merged, scored = DenseTopK(torch.zeros(1, 1), k), DenseTopK(torch.zeros(1, 1), k)
    for part in (slice(split), slice(split, None)):
        merged.merge(score_P[None, part], id_order_P[None, part])
    scored.merge(*top_k(score_P[None], id_order_P, k))
    searched = search(torch.ones(1, 1), score_P[:, None], id_order_P, k, block=7)
    for best in (merged, scored, searched):
        assert (best.score_QL[0].tolist(), best.id_order_QL[0].tolist()) == expected


@pytest.mark.parametrize("columns", [16, 48, 112, 640, 643])
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("levels", [1, 3, 50, 10**6, "in some rows"])
def test_ties_at_the_cut_off_go_to_the_smaller_ranks(columns, k, levels):
    """Few levels of scores: ties everywhere, at the cut-off too."""
    score_QP, id_order_P = torch.rand(17, columns), torch.randperm(columns).int()
    score_QP = torch.where(torch.arange(17)[:, None] % 5 == 0, 0.5, score_QP) if levels == "in some rows" else (
        levels * score_QP).floor()
    best = DenseTopK(torch.zeros(17, 1), k)
    best.merge(*top_k(score_QP, id_order_P, k))
    for score_P, score_L, id_order_L in zip(score_QP, best.score_QL, best.id_order_QL, strict=True):
        assert (score_L.tolist(), id_order_L.tolist()) == by_sorting(score_P, id_order_P, k)


def test_negative_zero_ties_with_zero():
    score_P = torch.tensor([0.0, -0.0]).repeat(20)
    id_order_P = torch.randperm(40).int()
    best = DenseTopK(torch.zeros(1, 1), 10)
    best.merge(*top_k(score_P[None], id_order_P, 10))
    assert best.id_order_QL[0].tolist() == list(range(10))


@pytest.mark.parametrize("descending", [False, True])
def test_each_block_is_better_or_worse_than_all_before(descending):
    """Every passage of a new block replaces those before, or none does."""
    query_QD, order = torch.ones(4, 1), torch.arange(600.0)
    passage_PD = (order.flip(0) if descending else order)[:, None]
    best = search(query_QD, passage_PD, torch.arange(600).int(), 5, block=200)
    assert best.id_order_QL.tolist() == [[0, 1, 2, 3, 4] if descending else [599, 598, 597, 596, 595]] * 4


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("max_scores", [700, 10**6])
@pytest.mark.parametrize("block", [7, 64, 200, 500, 1000])
def test_blocks_and_shards_equal_brute_force_with_ties(block, max_scores, negative, monkeypatch):
    """Whole numbers as vectors: scores are exact, and many are equal. A small MAX_SCORES splits the queries.

    Some queries find much in the last passages, others little. Three processes merge what each found in its blocks.
    """
    monkeypatch.setitem(dense.MAX_SCORES, "cpu", max_scores)
    query_QD, passage_PD = torch.randint(-2, 3, (23, 6)).float(), torch.randint(-2, 3, (1000, 6)).float()
    passage_PD[600:, 0], query_QD[::5, 0] = 3, 2
    if negative:
        query_QD, passage_PD = query_QD.abs(), -passage_PD.abs() - 1
    id_order_P = torch.randperm(1000).int()
    best = search(query_QD, passage_PD, id_order_P, 12, block)
    shards = [DenseTopK(query_QD, 12) for _ in range(3)]
    for n, start in enumerate(range(0, 1000, block)):
        shards[n % 3].add(passage_PD[start : start + block], id_order_P[start : start + block])
    for other in shards[1:]:
        shards[0].merge(other.score_QL, other.id_order_QL)
    for row, score_P in enumerate(query_QD @ passage_PD.T):
        expected = by_sorting(score_P, id_order_P, 12)
        for found in (best, shards[0]):
            assert (found.score_QL[row].tolist(), found.id_order_QL[row].tolist()) == expected


def test_bfloat16_vectors_have_fp32_scores():
    """The scores equal those of the same values in fp32; in bfloat16 many would be equal."""
    query_QD, passage_PD = (torch.randn(count, 16).bfloat16() for count in (5, 300))
    id_order_P = torch.randperm(300).int()
    best, wide = (search(q, p, id_order_P, 20, 100) for q, p in (
        (query_QD, passage_PD), (query_QD.float(), passage_PD.float())))
    assert torch.equal(best.score_QL, wide.score_QL) and torch.equal(best.id_order_QL, wide.id_order_QL)


def test_fewer_passages_than_k_are_all_found():
    best = search(torch.randn(3, 4), torch.randn(10, 4), torch.randperm(10).int(), 50, block=4)
    assert best.id_order_QL.sort(dim=1).values.tolist() == [list(range(10))] * 3


def test_without_the_choice_by_rank_ties_would_be_noticed():
    """Control: torch.topk's own choice between equal scores is another."""
    score_QP, id_order_P = torch.zeros(1, 640), torch.arange(639, -1, -1).int()
    assert sorted(top_k(score_QP, id_order_P, 5)[1][0].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(id_order_P[score_QP.topk(5).indices[0]].tolist()) != [0, 1, 2, 3, 4]


def test_blocks_on_a_cpu_are_read_as_they_are_used_and_cuda_is_not_touched(monkeypatch):
    """A CUDA stream does not exist on a Mac, and asking for it starts CUDA elsewhere."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    read = []
    vectors = on_device(lambda n: read.append(n) or np.full(2, n), range(3), torch.device("cpu"))
    assert [(next(vectors).tolist(), len(read)) for _ in range(2)] == [([0, 0], 1), ([1, 1], 2)]
