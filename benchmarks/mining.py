"""B9: hard-negative mining from given vectors: exact top-k search alone, and mining as a whole.

    top k      the 100 best passages of each query; peer: torch's product and topk on the whole score matrix
    mining     top k, then seven negatives per query by the rule "percentage", in plain Python; a stub model returns the
               vectors; peer: sentence-transformers' mine_hard_negatives, from a data set to a data set, whose
               construction and conversion are not timed

Before timing, the scores of the top k are compared with a full sort; after timing, all negatives with brute force.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import Result, Target, Timing, check_errors, growth, measure
from ref.mining.dense import DenseTopK, on_device
from ref.mining.rules import Candidate, filter_candidates, select_hard_negatives

TOP_K, NEGATIVES, SHARE = 100, 7, 0.95
TORCH, LIBRARY = "torch, product and topk", "sentence-transformers, mining"
PASSAGES_PER_BLOCK = {"cpu": 20_000, "cuda": 131_072}
INNER_WIDTH = 256
MINING_SHAPE = 20_000, 250_000  # queries and passages of mining on CUDA


def random_vectors(queries: int, passages: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors (Q, D) and (P, D); passage n is close to query n, so that positives have high scores.

    They span INNER_WIDTH dimensions, rotated into the full width: cosines of random vectors in thousands of dimensions
    are so close to each other that rounding would decide their order.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inner = min(width, INNER_WIDTH)
    passage_PD = normalize(torch.rand(passages, inner, device=device), dim=1)
    query_QD = passage_PD[:queries] + 0.5 * normalize(torch.rand(queries, inner, device=device), dim=1)
    if inner < width:
        rotation = torch.linalg.qr(torch.randn(width, inner, device=device)).Q.T
        query_QD, passage_PD = query_QD @ rotation, passage_PD @ rotation
    return normalize(query_QD, dim=1).to(dtype), passage_PD.to(dtype)


# ---- top k -------------------------------------------------------------------------------------------------


def our_top_k(query_QD: Tensor, blocks: Iterable[Tensor]) -> DenseTopK:
    """Search blocks of passages; the ranks are the rows."""
    search, first = DenseTopK(query_QD, TOP_K), 0
    for passage_PD in blocks:
        search.add(passage_PD, torch.arange(first, first + len(passage_PD), device=query_QD.device, dtype=torch.int32))
        first += len(passage_PD)
    return search


def torch_top_k(query_QD: Tensor, passage_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and rows by one product and topk, for as many queries at a time as fit."""
    queries = 1024 if query_QD.is_cuda else len(query_QD)
    parts = [(part @ passage_PD.T).topk(TOP_K, dim=1) for part in query_QD.split(queries)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def measure_top_k(query_QD: Tensor, passage_PD: Tensor) -> dict[str, Timing]:
    """Check the scores of our top k, then time both."""
    device = passage_PD.device
    blocks = passage_PD.split(PASSAGES_PER_BLOCK[device.type])
    few_QD = query_QD[:200]
    sorted_QP = (few_QD.float() @ passage_PD.float().T).sort(dim=1, descending=True).values
    error = (our_top_k(query_QD, blocks).score_QL[: len(few_QD)] - sorted_QP[:, :TOP_K]).abs().max().item()
    # tensor cores truncate where fp32 units round: an error of up to 2^-24 at each of 256 additions
    check_errors({"scores of the top k against a full sort": error}, 3e-5 if device.type == "cuda" else 1e-5)
    return measure({"ours": lambda: our_top_k(query_QD, blocks), TORCH: lambda: torch_top_k(query_QD, passage_PD)},
                   device=device, rounds=7)


# ---- mining ------------------------------------------------------------------------------------------------


class StubModel:
    """A model for `mine_hard_negatives` that returns given vectors for all queries or all passages."""

    def __init__(self, query_QD: Tensor, passage_PD: Tensor, device: torch.device) -> None:
        self.query_QD, self.passage_PD = (x.float().cpu().numpy() for x in (query_QD, passage_PD))
        self.device = device

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.query_QD[: len(texts)]

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.passage_PD[: len(texts)]

    def similarity(self, one: Any, other: Any) -> Tensor:
        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one: Any, other: Any) -> Tensor:
        return (torch.as_tensor(one) * torch.as_tensor(other)).sum(1)


def python_rows(tensor: Tensor) -> Iterator[Any]:
    """The rows of a matrix; a number is converted to Python's when it is read, and few are."""
    width, numbers = tensor.shape[1], tensor.flatten().cpu().numpy().data
    return (numbers[n : n + width] for n in range(0, len(numbers), width))


def our_negatives(model: StubModel, queries: list[str], passages: list[str]) -> dict[str, list[str]]:
    """The negatives of each query with all seven; the positive of query n is passage n."""
    query, passage = model.encode_query(queries), model.encode_document(passages)
    query_QD, positive_QD = (torch.from_numpy(x).to(model.device) for x in (query, passage[: len(queries)]))
    size = PASSAGES_PER_BLOCK[model.device.type]
    search = our_top_k(query_QD, on_device(
        lambda first: passage[first : first + size], range(0, len(passages), size), model.device))
    positive_Q = (query_QD * positive_QD).sum(1).tolist()
    found, text = {}, passages.__getitem__
    for n, (scores, rows) in enumerate(zip(python_rows(search.score_QL), python_rows(search.id_order_QL), strict=True)):
        positive = Candidate(passages[n], passages[n], positive_Q[n])
        candidates = map(Candidate, map(text, rows), map(text, rows), scores)
        negatives = []
        for candidate, decision in filter_candidates(
                queries[n], [positive], candidates, value=SHARE, num_negatives=NEGATIVES):
            if decision == "selected":
                negatives.append(candidate.text)
                if len(negatives) == NEGATIVES:
                    found[queries[n]] = negatives
                    break
    return found


def library_negatives(model: StubModel, pairs: Any, passages: list[str]) -> Any:
    """The same by sentence-transformers: from a data set of queries and positives to one with negatives."""
    from sentence_transformers.util import mine_hard_negatives

    return mine_hard_negatives(
        pairs, model, corpus=passages, relative_margin=1 - SHARE, range_max=TOP_K - 1,  # type: ignore[arg-type]
        num_negatives=NEGATIVES, output_format="n-tuple", verbose=False)


def negatives_by_query(pairs: Any) -> dict[str, list[str]]:
    """A data set with negatives in the form of `our_negatives`."""
    columns = pairs.to_dict()
    negatives = zip(*(columns[f"negative_{n + 1}"] for n in range(NEGATIVES)), strict=True)
    return dict(zip(columns["query"], map(list, negatives), strict=True))


def brute_force_negatives(model: StubModel, queries: list[str], passages: list[str]) -> dict[str, list[str]]:
    """The same by a full sort of every row in fp64, without queries with two scores that fp32 cannot distinguish."""
    found = {}
    query_QD, passage_PD = (torch.from_numpy(x).to(model.device).double() for x in (model.query_QD, model.passage_PD))
    for n, query in enumerate(queries):
        score_P, row_P = (passage_PD @ query_QD[n]).sort(descending=True, stable=True)
        threshold = SHARE * (passage_PD[n] @ query_QD[n])
        scores = score_P[: TOP_K + 1].tolist()
        below = [passages[row] for row, score in zip(row_P[:TOP_K].tolist(), scores[:TOP_K], strict=True)
                 if row != n and score < threshold][:NEGATIVES]
        gaps = np.diff(np.sort([*scores, threshold.item()]))
        if len(below) == NEGATIVES and gaps.min() > 1e-6:
            found[query] = below
    return found


def measure_mining(model: StubModel) -> tuple[dict[str, Timing], int]:
    """Time both, then check their negatives; also the number of queries that brute force could check."""
    cuda = model.device.type == "cuda"
    queries = [f"query {n}" for n in range(len(model.query_QD))]
    passages = [f"passage {n}" for n in range(len(model.passage_PD))]
    few = min(100, len(queries))
    miners: dict[str, Callable[[int], Any]] = {
        "ours, mining": lambda count: our_negatives(model, queries[:count], passages)}
    calls: dict[str, Any] = {}
    if find_spec("sentence_transformers") and find_spec("datasets"):
        from datasets import Dataset

        pairs = {n: Dataset.from_dict({"query": queries[:n], "positive": passages[:n]}) for n in (few, len(queries))}
        miners[LIBRARY] = lambda count: library_negatives(model, pairs[count], passages)
    else:
        calls[LIBRARY] = "sentence-transformers or datasets is not installed"
    mined: dict[str, Any] = {}
    for name, miner in miners.items():
        calls[name] = lambda name=name, miner=miner: mined.update({name: miner(len(queries))})
        if cuda:  # a call takes long there: a few queries warm up, imports included
            miner(few)
    timings = measure(calls, device=torch.device("cpu"), rounds=1 if cuda else 15, warmed_up=cuda)
    if LIBRARY in mined:
        mined[LIBRARY] = negatives_by_query(mined[LIBRARY])
    truth = brute_force_negatives(model, queries[:500], passages)
    for name, negatives in mined.items():
        check_negatives(negatives, truth, name)
    return timings, len(truth)


def check_negatives(found: dict[str, list[str]], truth: dict[str, list[str]], name: str) -> None:
    """Raise RuntimeError if negatives differ from those of brute force."""
    wrong = [query for query, negatives in truth.items() if found.get(query) != negatives]
    if wrong or not truth:
        raise RuntimeError(f"{name}: negatives must equal those of brute force (got others for {len(wrong)} of "
                           f"{len(truth)} queries)")


# ---- both --------------------------------------------------------------------------------------------------


def selection_rate(rounds: int) -> float:
    """Candidates per second of `select_hard_negatives` in plain Python."""
    draw = random.Random(0)
    pool = [Candidate(f"d{n}", f"passage {n}", draw.random()) for n in range(5000)]
    start_s = time.perf_counter()
    for _ in range(rounds):
        select_hard_negatives("query", [Candidate("p", "positive", 0.9)], draw.sample(pool, TOP_K))
    return rounds * TOP_K / (time.perf_counter() - start_s)


def b9(device: torch.device, *, quick: bool = False) -> Result:
    """Top k, mining, and the growth of the search time with the corpus."""
    cuda = device.type == "cuda"
    queries, passages, width = (60, 500, 32) if quick else (20_000, 500_000, 4096) if cuda else (500, 20_000, 256)
    query_QD, passage_PD = random_vectors(queries, passages, width, device)
    timings = measure_top_k(query_QD, passage_PD)
    mined = MINING_SHAPE if cuda else (queries, passages)  # the peer's part of it runs on the host
    mining_timings, compared = measure_mining(StubModel(query_QD[: mined[0]], passage_PD[: mined[1]], device))
    timings |= mining_timings
    figures = {"selection, candidates/s": selection_rate(20 if quick else 1000), "queries compared": float(compared)}
    targets: dict[str, Target] = {}
    if not quick:
        if not timings[LIBRARY].missing:
            ratio = timings[LIBRARY].median_s / timings["ours, mining"].median_s
            targets[f"{LIBRARY} / ours, mining"] = (ratio, ">=", 20 if cuda else 1.5)
        if cuda:
            targets[f"{TORCH} / ours"] = (timings[TORCH].median_s / timings["ours"].median_s, ">=", 1.0)
        sizes = [passages // 16, passages // 4, passages] if cuda else [passages, 4 * passages, 16 * passages]
        more_PD = passage_PD if cuda else random_vectors(1, sizes[-1], width, device)[1]
        block = PASSAGES_PER_BLOCK[device.type]
        figures |= growth(lambda n: our_top_k(query_QD, more_PD[:n].split(block)), sizes, device)
        targets["exponent of time"] = (figures[f"exponent of time, {sizes[0]} to {sizes[-1]}"], "<=", 1.05)
    shape = {"queries": queries, "passages": passages, "width": width, "k": TOP_K, "queries mined": mined[0],
             "passages mined": mined[1]}
    return Result("B9", shape, timings, {}, targets, figures)
