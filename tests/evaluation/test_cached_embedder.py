"""Cached embeddings: the same vectors, a size limit, blocks that another process removed."""

from pathlib import Path
from typing import Any

from sample_sets import WordHash
from tiny_mteb import sentence

from ref.evaluation.cached_embedder import CachedEmbedder
from ref.text.prompts import InContextExample
from ref.utils.block_cache import BlockCache

TASK = "Given a question, retrieve passages that answer it"


def test_cached_embeddings_are_the_same_and_only_missing_ones_are_computed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ref.evaluation.cached_embedder.TEXTS_PER_BLOCK", 10)
    texts = [sentence(n % 37) for n in range(100)]
    words = WordHash()
    plain = words.encode(texts, instruction=TASK)
    words.calls.clear()
    cached = CachedEmbedder(words, BlockCache(tmp_path), key="m", max_bytes=1e9)
    assert (cached.encode(texts, instruction=TASK) == plain).all()
    assert [len(texts) for _, texts in words.calls] == [10, 10, 10, 7]  # 37 unique texts
    assert sorted((tmp_path / "texts").glob("*"))[0].unlink() is None
    words.calls.clear()
    assert (cached.encode(texts, instruction=TASK) == plain).all() and len(words.calls) == 1
    words.calls.clear()
    for other in ({"instruction": None}, {"instruction": TASK, "examples": [InContextExample("a", "b")]},
                  {"instruction": TASK, "examples": [InContextExample("a", "b", "Another task")]}):
        cached.encode(texts, **other)  # type: ignore[arg-type]
    assert len(words.calls) == 12  # another prompt has other embeddings
    assert len(cached.encode([], instruction=TASK)) == 0


def test_the_cache_stays_below_its_limit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ref.evaluation.cached_embedder.TEXTS_PER_BLOCK", 10)
    cached = CachedEmbedder(WordHash(), BlockCache(tmp_path), key="m", max_bytes=9000)
    for start in range(0, 200, 40):
        cached.encode([f"text {n}" for n in range(start, start + 40)])
        assert sum(path.stat().st_size for path in (tmp_path / "texts").glob("*")) <= 9000


def test_a_block_that_another_process_removed_is_no_error(tmp_path: Path) -> None:
    cached = CachedEmbedder(WordHash(), BlockCache(tmp_path), key="m", max_bytes=0)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/gone.block").symlink_to(tmp_path / "nowhere")  # listed, but missing
    assert len(cached.encode(["a", "b"])) == 2
