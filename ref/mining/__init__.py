"""From raw pairs to soft labels: the paper's mining, with a teacher of your choice. run_label.py runs it.

    rules.py         which candidates become hard negatives: the page to read
    sources.py       pairs and corpus, in the layouts in use
    teachers.py      a retriever (texts -> unit vectors) and a reranker (query, passage -> logit)
    bm25.py          lexical search
    dense.py         exact search by dot products
    fusion.py        reciprocal rank fusion of ranked lists
    pipeline.py      encoding, retrieval and scoring, each cached in blocks
    labels.py        scored pairs -> soft_labels.jsonl and its description
    statistics.py    entropy and quantiles of the labels, comparison of rules, histogram
"""
