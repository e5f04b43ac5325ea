"""From raw pairs to soft labels: the teacher of the report, as run_label.py runs it.

    sources.py       pairs and corpus, in the layouts that people have
    models.py        the two teachers: a retriever (texts -> unit vectors) and a reranker (query, passage -> logit)
    candidates.py    BM25 and exact dense search
    cache.py         what was computed, by content: another threshold costs seconds
    pipeline.py      the stages, block of queries by block of queries; both lists fused
    report.py        what the labels look like: entropy, quantiles, rejected share, a histogram

The rule that decides is ref/mining.py. The teachers are other people's models, so sentence-transformers runs them.
"""
