"""Reciprocal rank fusion by hand."""

from ref.mining.fusion import reciprocal_rank_fusion


def test_fusion_by_hand():
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["b", "d"]])
    assert fused == [("b", 1 / 62 + 1 / 61), ("a", 1 / 61), ("d", 1 / 62), ("c", 1 / 63)]
    assert [name for name, _ in reciprocal_rank_fusion([["y"], ["x"]])] == ["x", "y"]  # ties by id
    assert reciprocal_rank_fusion([[], []]) == []
