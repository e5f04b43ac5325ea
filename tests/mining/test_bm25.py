"""BM25: the formula by hand and bm25s' own ranking."""

import math
import random

import bm25s
import numpy as np
import pytest
from conftest import a_text
from hypothesis import given
from hypothesis import strategies as st

from ref.mining.bm25 import BM25Index, make_tokeniser, top_k
from ref.text.tokenizer import train_tokenizer


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=30), k=st.integers(1, 31), seed=st.integers(0, 9))
def test_top_k_is_sorted_by_score_then_rank(scores, k, seed):
    rank = np.random.default_rng(seed).permutation(len(scores))
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], rank[j]))[:k]
    assert top_k(np.array(scores, np.float32), k, rank).tolist() == order


def test_bm25_is_the_lucene_formula_and_bm25s_own_ranking(tmp_path):
    import bm25s

    draw = random.Random(3)
    texts = [a_text(draw, draw.randrange(3, 15)) for _ in range(50)]
    queries = [a_text(draw, 3) for _ in range(10)] + ["unheard words", "river river boat"]
    index = BM25Index(texts, stemmer=None)
    rows = index.search(queries, 50, np.arange(50))
    words, lengths = [text.split() for text in texts], [len(text.split()) for text in texts]

    def by_hand(query, n):
        total = 0.0
        for word in query.split():
            frequency, holders = words[n].count(word), sum(word in w for w in words)
            idf = math.log(1 + (50 - holders + 0.5) / (holders + 0.5))
            total += idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * lengths[n] / np.mean(lengths)))
        return total

    library = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    library.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    index.save(tmp_path / "index")
    again = BM25Index.load(tmp_path / "index", stemmer=None).search(queries, 50, np.arange(50))
    assert (again == rows).all()
    for query, hits in zip(queries, rows, strict=True):
        hits = hits[hits >= 0].tolist()
        score = [by_hand(query, n) for n in range(50)]
        assert len(hits) == sum(s > 0 for s in score)
        assert [score[n] for n in hits] == pytest.approx(sorted((s for s in score if s > 0), reverse=True), rel=1e-5)
        if hits:
            theirs, their_scores = library.retrieve(bm25s.tokenize([query], show_progress=False), k=10,
                                                    show_progress=False)
            assert their_scores[0][their_scores[0] > 0] == pytest.approx([score[n] for n in hits[:10]], rel=1e-5)
            assert score[theirs[0][0]] == pytest.approx(score[hits[0]], rel=1e-5)


def test_a_corpus_of_nothing_but_stop_words_is_an_error():
    with pytest.raises(ValueError, match="BM25 needs a passage with words other than stop words"):
        BM25Index(["the", "!!!", "a"], stemmer=None)


LANGUAGES = {"zh": ["\u7f8e\u4e3d\u7684\u6cb3\u6d41\u5f88\u957f", "\u5927\u6811\u5728\u5c71\u4e0a"],
             "ja": ["\u732b\u304c\u9b5a\u3092\u98df\u3079\u308b", "\u96e8\u304c\u964d\u308b"],
             "th": ["\u0e41\u0e21\u0e27\u0e01\u0e34\u0e19\u0e1b\u0e25\u0e32", "\u0e1d\u0e19\u0e15\u0e01"],
             "hi": ["\u092c\u093f\u0932\u094d\u0932\u0940 \u092e\u091b\u0932\u0940",
                    "\u092a\u093e\u0928\u0940 \u0917\u093f\u0930\u093e"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_subwords_find_parts_of_sentences_without_spaces(language, tmp_path):
    """The first characters of each sentence; as words a whole sentence is one, and nothing is found."""
    texts = [text for sentences in LANGUAGES.values() for text in sentences]
    train_tokenizer(texts, vocab_size=400, lowercase=True).save(tmp_path)
    queries = [text[: len(text) // 2].strip() for text in LANGUAGES[language]]
    index = BM25Index(texts, stemmer=None, subwords=tmp_path / "tokenizer.json")
    index.save(tmp_path / "index")
    again = BM25Index.load(tmp_path / "index", stemmer=None, subwords=tmp_path / "tokenizer.json")
    for found in (index, again):
        best = found.search(queries, 3, np.arange(len(texts)))[:, 0]
        assert best.tolist() == [texts.index(text) for text in LANGUAGES[language]]
    if language in ("zh", "ja"):
        assert (BM25Index(texts, stemmer=None).search(queries, 3, np.arange(len(texts))) < 0).all()


@pytest.mark.parametrize("text", [
    "\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e\u0928\u0940",  # Hindi
    "\u0b87\u0ba8\u0bcd\u0ba4\u0bbf\u0baf\u0bbe\u0bb5\u0bbf\u0ba9\u0bcd \u0ba4\u0bb2\u0bc8",  # Tamil
    "Cafe\u0301 ole\u0301"])  # letters with separate accents
def test_a_combining_mark_does_not_end_a_word(text):
    assert make_tokeniser(None, None)([text], return_ids=False) == [text.lower().split()]


def test_texts_without_combining_marks_are_split_as_bm25s_does():
    texts = ["It's 3.5 x_y na\u00efve \u7f8e\u4e3d a b2", "state-of-the-art (C++) e-mail@x.org"]
    assert make_tokeniser(None, None)(texts, return_ids=False) == bm25s.tokenize(
        texts, return_ids=False, show_progress=False)
