"""B9: hard negatives from given vectors: the exact top-k alone, and the whole of mining.

    top k      scores of all queries and passages, the best 100 of each query; peer: torch's product and topk, whole
    mining     a stub in the model's place gives the vectors; top k, the 95 % rule, seven negatives in plain Python;
               peer: sentence-transformers' mine_hard_negatives, from data set to data set: what makes the one and reads
               the other is not its time

Checked first: the scores of the best 100 are those of a full sort; before anything is reported: the negatives, ours and
the peer's, are those of brute force.
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

from benchmarks.measure import Contestant, Result, Target, agree, growth, measure
from labelling.candidates import TopK, on_device, ranks_of, scores_of
from ref.mining import Candidate, judge, mine

BEST, NEGATIVES, SHARE = 100, 7, 0.95
THEIRS = "sentence-transformers, mining"
BLOCK = {"cpu": 20_000, "cuda": 131_072}
INNER = 256
MINED = 20_000, 250_000  # queries and passages of mining on CUDA


def case(queries: int, passages: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors; a passage lies near its query, so that positives score high: (Q, D) and (P, D).

    They fill INNER dimensions, turned into the wider space where it is one: cosines of random vectors in thousands of
    dimensions would lie so near each other that only their rounding told them apart.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inner = min(width, INNER)
    passage_PE = normalize(torch.rand(passages, inner, device=device), dim=1)
    query_QE = passage_PE[:queries] + 0.5 * normalize(torch.rand(queries, inner, device=device), dim=1)
    if inner < width:
        turn_ED = torch.linalg.qr(torch.randn(width, inner, device=device)).Q.T
        query_QE, passage_PE = query_QE @ turn_ED, passage_PE @ turn_ED
    return normalize(query_QE, dim=1).to(dtype), passage_PE.to(dtype)


def ours_top(query_QD: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Keys of the best, by blocks of passages, (Q, BEST)."""
    best, first_row = TopK(query_QD, BEST), 0
    for passage_PD in blocks:
        rows = torch.arange(first_row, first_row + len(passage_PD), device=passage_PD.device, dtype=torch.int32)
        best.add(passage_PD, rows)
        first_row += len(passage_PD)
    return best.key_QK


def theirs_top(query_QD: Tensor, passage_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Product and topk, as many queries at a time as fit."""
    at_a_time = 1024 if query_QD.device.type == "cuda" else len(query_QD)
    parts = [(part @ passage_PD.T).topk(BEST, dim=1) for part in query_QD.split(at_a_time)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


class Stub:
    """Stands for a model: gives the vectors of all queries, or of all passages, whatever it is asked."""

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


def in_python(x_QK: Tensor) -> Iterator[Any]:
    """Row by row, as Python's own numbers: few are read, and each is made when it is."""
    width, numbers = x_QK.shape[1], x_QK.flatten().cpu().numpy().data
    return (numbers[n : n + width] for n in range(0, len(numbers), width))


def ours_mined(stub: Stub, queries: list[str], passages: list[str]) -> dict[str, list[str]]:
    """The negatives of each query that has all seven; query n's positive is passage n."""
    query, passage = stub.encode_query(queries), stub.encode_document(passages)
    query_QD, positive_QD = (torch.from_numpy(x).to(stub.device) for x in (query, passage[: len(queries)]))
    size = BLOCK[stub.device.type]
    key_QK = ours_top(query_QD, on_device(
        lambda first: passage[first : first + size], range(0, len(passages), size), stub.device))
    positive_Q = (query_QD * positive_QD).sum(1).tolist()
    found, text_at = {}, passages.__getitem__
    for n, (scores, rows) in enumerate(zip(in_python(scores_of(key_QK)), in_python(ranks_of(key_QK)), strict=True)):
        positive = Candidate(passages[n], passages[n], positive_Q[n])
        ranked = map(Candidate, map(text_at, rows), map(text_at, rows), scores)
        negatives = []
        for candidate, why in judge(queries[n], [positive], ranked, value=SHARE, negatives=NEGATIVES):
            if why == "kept":
                negatives.append(candidate.text)
                if len(negatives) == NEGATIVES:
                    found[queries[n]] = negatives
                    break
    return found


def theirs_mined(stub: Stub, pairs: Any, passages: list[str]) -> Any:
    """The same by sentence-transformers, from a data set of queries and positives to one with their negatives."""
    from sentence_transformers.util import mine_hard_negatives

    return mine_hard_negatives(
        pairs, stub, corpus=passages, relative_margin=1 - SHARE, range_max=BEST - 1,  # type: ignore[arg-type]
        num_negatives=NEGATIVES, output_format="n-tuple", verbose=False)


def by_query(pairs: Any) -> dict[str, list[str]]:
    """What a data set with negatives says, as `ours_mined` says it."""
    columns = pairs.to_dict()
    negatives = zip(*(columns[f"negative_{n + 1}"] for n in range(NEGATIVES)), strict=True)
    return dict(zip(columns["query"], map(list, negatives), strict=True))


def by_brute_force(stub: Stub, queries: list[str], passages: list[str]) -> dict[str, list[str]]:
    """The same by a full sort of every row, in fp64; queries with two scores closer than fp32 can tell are left out."""
    found = {}
    query_QD, passage_PD = (torch.from_numpy(x).to(stub.device).double() for x in (stub.query_QD, stub.passage_PD))
    for n, query in enumerate(queries):
        score_P, row_P = (passage_PD @ query_QD[n]).sort(descending=True, stable=True)
        bar = SHARE * (passage_PD[n] @ query_QD[n])
        score = score_P[: BEST + 1].tolist()
        below = [passages[row] for row, one in zip(row_P[:BEST].tolist(), score[:BEST], strict=True)
                 if row != n and one < bar][:NEGATIVES]
        gaps = np.diff(np.sort([*score, bar.item()]))
        if len(below) == NEGATIVES and gaps.min() > 1e-6:
            found[query] = below
    return found


def same(found: dict[str, list[str]], truth: dict[str, list[str]], whose: str) -> None:
    """Raise where negatives differ from brute force."""
    wrong = [query for query, negatives in truth.items() if found.get(query) != negatives]
    if wrong or not truth:
        raise RuntimeError(f"negatives, {whose}: {len(wrong)} of {len(truth)} queries differ from brute force.")


def b9(device: torch.device, *, quick: bool = False) -> Result:
    """Both, and how the time of the top-k grows with the corpus."""
    cuda = device.type == "cuda"
    queries, passages, width = (60, 500, 32) if quick else (20_000, 500_000, 4096) if cuda else (500, 20_000, 256)
    query_QD, passage_PD = case(queries, passages, width, device)
    found = top_side_by_side(query_QD, passage_PD)
    fewer = MINED if cuda else (queries, passages)  # the peer's part runs on the host
    mined, compared = mined_side_by_side(Stub(query_QD[: fewer[0]], passage_PD[: fewer[1]], device))
    found |= mined

    draw = random.Random(0)
    pool = [Candidate(f"d{n}", f"passage {n}", draw.random()) for n in range(5000)]
    start_s, rounds = time.perf_counter(), 20 if quick else 1000
    for _ in range(rounds):
        mine("query", [Candidate("p", "positive", 0.9)], draw.sample(pool, BEST))
    figures = {"selection, candidates/s": rounds * BEST / (time.perf_counter() - start_s),
               "queries compared": float(compared)}
    targets: dict[str, Target] = {}
    if not quick:
        peer = found[THEIRS]
        if not peer.missing:
            targets[f"{THEIRS} / ours, mining"] = (
                peer.median_s / found["ours, mining"].median_s, ">=", 20 if cuda else 3)
        if cuda:
            targets["torch, product and topk / ours"] = (
                found["torch, product and topk"].median_s / found["ours"].median_s, ">=", 1.3)
        sizes = [passages // 16, passages // 4, passages] if cuda else [passages, 4 * passages, 16 * passages]
        more_PD = passage_PD if cuda else case(1, sizes[-1], width, device)[1]
        figures |= growth(lambda n: ours_top(query_QD, more_PD[:n].split(BLOCK[device.type])), sizes, device)
        targets["exponent of time"] = (figures[f"exponent of time, {sizes[0]} to {sizes[-1]}"], "<=", 1.05)
    return Result("B9", {"queries": queries, "passages": passages, "width": width, "best": BEST, "queries mined":
                         fewer[0], "passages mined": fewer[1]}, found, {}, targets, figures)


def top_side_by_side(query_QD: Tensor, passage_PD: Tensor) -> dict[str, Contestant]:
    """Check the scores of our best, then time both."""
    device = passage_PD.device
    blocks = passage_PD.split(BLOCK[device.type])
    few_QD = query_QD[:200]
    exact_QK = (few_QD.float() @ passage_PD.float().T).sort(dim=1, descending=True).values[:, :BEST]
    off = (scores_of(ours_top(query_QD, blocks))[: len(few_QD)] - exact_QK).abs().max().item()
    # a tensor core cuts off what an fp32 sum cannot hold where other units round: up to 2^-24 at each of 256 steps
    agree({"scores of the best against a full sort": off}, 3e-5 if device.type == "cuda" else 1e-5)
    return measure({"ours": lambda: ours_top(query_QD, blocks),
                    "torch, product and topk": lambda: theirs_top(query_QD, passage_PD)}, device=device, rounds=7)


def mined_side_by_side(stub: Stub) -> tuple[dict[str, Contestant], int]:
    """Time both, then check their negatives; and how many queries brute force could be asked about."""
    cuda = stub.device.type == "cuda"
    queries = [f"query {n}" for n in range(len(stub.query_QD))]
    passages = [f"passage {n}" for n in range(len(stub.passage_PD))]
    few = min(100, len(queries))
    miners: dict[str, Callable[[int], Any]] = {
        "ours, mining": lambda count: ours_mined(stub, queries[:count], passages)}
    calls: dict[str, Any] = {}
    if find_spec("sentence_transformers") and find_spec("datasets"):
        from datasets import Dataset

        pairs = {n: Dataset.from_dict({"query": queries[:n], "positive": passages[:n]}) for n in (few, len(queries))}
        miners[THEIRS] = lambda count: theirs_mined(stub, pairs[count], passages)
    else:
        calls[THEIRS] = "sentence-transformers or datasets is not installed"
    mined: dict[str, Any] = {}
    for name, miner in miners.items():
        calls[name] = lambda name=name, miner=miner: mined.update({name: miner(len(queries))})
        if cuda:  # a pass takes long there: a few queries warm both up, imports included
            miner(few)
    found = measure(calls, device=torch.device("cpu"), rounds=1 if cuda else 15, warm=cuda)
    if THEIRS in mined:
        mined[THEIRS] = by_query(mined[THEIRS])
    truth = by_brute_force(stub, queries[:500], passages)
    for name, of_query in mined.items():
        same(of_query, truth, name)
    return found, len(truth)
