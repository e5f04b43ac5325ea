"""The block cache: keys, and what is found or computed."""

import numpy as np

from ref.utils.block_cache import BlockCache, hash_key


def test_different_lists_have_different_keys():
    assert hash_key("ab", "c") != hash_key("a", "bc") and hash_key(b"1") == hash_key(1) and len(hash_key()) == 40


def test_a_block_is_computed_once_and_found_again(tmp_path):
    cache = BlockCache(tmp_path)
    made = cache.block("kind", "key", lambda: {"x": np.arange(3)})
    again = BlockCache(tmp_path).block("kind", "key", lambda: {})
    assert (made["x"] == again["x"]).all()
    assert cache.num_computed == 1 and BlockCache(tmp_path).read(cache.path("kind", "other")) is None
