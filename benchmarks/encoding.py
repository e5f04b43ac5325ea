"""B1 to B4 and B10: texts to vectors, against transformers and sentence-transformers on the same weights.

    B1     equal lengths, token ids given                     B2    mixed lengths, from texts
    B3     queries behind one prefix of solved examples       B4    the last layer for pooled tokens only
    B10    texts to vectors, three in ten of them repeated

Matrix products are counted as 2 x weights x tokens, the last layer as if it were full: its saving counts as speed.
"""

import copy
import random
import tempfile
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import Contestant, Result, Target, agree, difference, growth, measure
from ref.embedder import Embedder
from ref.export import export
from ref.model import Mistral
from ref.packing import pack
from ref.pooling import embed, last_token_pool
from ref.prompts import Example, Prompter

NOT_THERE = "sentence-transformers is not installed"


class Setting:
    """One shape: random weights, our embedder on them, and the peers on the very same."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.arch = shapes.architecture(device, quick=quick)
        self.model = shapes.random_model(self.arch, device)
        self.twin = shapes.transformers_twin(self.model)
        self.tokens = shapes.tokenizer(self.arch)
        self.embedder = Embedder(self.model, Prompter(self.tokens))
        self.rounds = 3 if device.type == "cuda" else 5
        self.bound = 1e-5 if device.type == "cpu" else 4.5e-2  # of two bf16 runs: a cosine of 0.999

    def sized(self, gpu: int, cpu: int, quick: int) -> int:
        """A number of the shape: on a GPU (whose `quick` run differs in its layers alone), on a CPU, in a dry run."""
        return gpu if self.device.type == "cuda" else quick if self.quick else cpu

    @cached_property
    def folder(self) -> Path:
        """The weights as a checkpoint, written when it is asked for."""
        self.scratch = tempfile.TemporaryDirectory(prefix="benchmarks-")
        export(self.model, Prompter(self.tokens), {}, Path(self.scratch.name) / "model")
        return Path(self.scratch.name) / "model"

    @cached_property
    def _library(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            return NOT_THERE
        dtype = self.model.norm.weight.dtype
        return SentenceTransformer(str(self.folder), device=str(self.device), model_kwargs={"dtype": dtype})

    def sentence_transformer(self) -> Any:
        """sentence-transformers on the same folder and weights; a text, why not, if it is missing."""
        library = self._library
        if not isinstance(library, str):
            library[0].model = self.twin  # the very same tensors: there is room for one 7B
        return library

    def measure_long(self, calls: dict[str, Any]) -> dict[str, Contestant]:
        """`measure` calls that take up to a minute on a GPU, and that checks have warmed up: there a round each."""
        cuda = self.device.type == "cuda"
        return measure(calls, device=self.device, rounds=1 if cuda else self.rounds, warm=cuda)

    def check(self, texts: list[str], peers: dict[str, Tensor], ours: Tensor) -> dict[str, float]:
        """Compare vectors of texts, then raise where a bound does not hold.

        fp32: |ours - peer| / |peer| <= 1e-5. bf16: cosine to the peer >= 0.999, and 1 - cosine to transformers in fp32
        on the same weights at most 1.2 times the peer's: two correct bf16 runs differ by that much.
        """
        if self.device.type == "cpu":
            found = {f"ours against {name}": difference(ours, peer) for name, peer in peers.items()}
            agree(found, 1e-5)
            return found
        wide = copy.deepcopy(self.twin).float()
        with torch.inference_mode():
            exact = shapes.last_token(wide, *shapes.padded(self.ids(texts), self.device)).cpu()
        del wide
        error = {name: far(vectors.cpu(), exact) for name, vectors in {**peers, "ours": ours}.items()}
        for name, peer in peers.items():
            agree({f"ours from {name}": far(ours.cpu(), peer.cpu())}, 1e-3)
            agree({f"ours from fp32, over {name}": error["ours"] / error[name]}, 1.2)
        return {f"1 - cosine to fp32, {name}": value for name, value in error.items()}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids with `<s>` and `</s>`."""
        return [[self.tokens.begin, *ids, self.tokens.end] for ids in self.tokens.encode(texts, max_tokens=4096)]


def far(one: Tensor, other: Tensor) -> float:
    """The largest 1 - cosine of two sets of unit vectors."""
    return 1 - (one.double() * other.double()).sum(-1).min().item()


@cache
def setting(device: torch.device, quick: bool) -> Setting:
    """The one setting of a process."""
    return Setting(device, quick=quick)


def weights_in_products(model: Mistral) -> int:
    """P of the floors: the weights of all linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def matrix_rate(arch: Any, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the model's largest matrix product, measured now."""
    rows = 8192
    x_TD, weight_FD = (torch.randn(n, arch.width, device=device, dtype=dtype) for n in (rows, arch.ffn_width))
    found = measure({"": lambda: x_TD @ weight_FD.T}, device=device, rounds=7)[""]
    return 2 * rows * arch.width * arch.ffn_width / found.median_s


def b1(device: torch.device, *, quick: bool = False) -> Result:
    """Equal lengths: no padding for anyone, sorting does nothing; what is left is the forward pass."""
    s = setting(device, quick)
    texts, length = s.sized(128, 64, 4), s.sized(512, 128, 16)
    draw = random.Random(torch.initial_seed())
    strings = [shapes.text(length - 2, draw) for _ in range(texts)]
    ids = s.ids(strings)
    ids_BT, packed = torch.tensor(ids, device=device), pack(ids, device=device)

    @torch.inference_mode()
    def ours() -> Tensor:
        return embed(s.model, packed, kernels=s.embedder.kernels)

    @torch.inference_mode()
    def theirs() -> Tensor:
        return shapes.last_token(s.twin, ids_BT)

    compiled: Any = "left out on the CPU"
    if device.type == "cuda":
        other = shapes.transformers_twin(s.model)
        for layer in other.layers:
            layer.compile(dynamic=False)  # one graph for all layers: compiled as a whole it takes minutes
        compiled = torch.inference_mode()(lambda: shapes.last_token(other, ids_BT))
    checks = s.check(strings[:16], {"transformers": theirs()[:16]}, ours()[:16])
    found = measure({"ours": ours, "transformers, SDPA": theirs, "transformers, layers compiled": compiled},
                    device=device, rounds=s.rounds)
    mine = found["ours"].median_s
    flop = 2 * weights_in_products(s.model) * texts * length
    rate = matrix_rate(s.arch, device, s.model.norm.weight.dtype)
    share = flop / mine / rate
    targets: dict[str, Target] = {}
    if not quick:
        cuda = device.type == "cuda"
        targets = against(found, {"transformers, SDPA": 1.2 if cuda else 1.1, "transformers, layers compiled": 1.05})
        targets["share of the matrix rate"] = (share, ">=", 0.75 if cuda else 0.7)
    figures = {"ours, tokens/s": texts * length / mine, "matrix rate, GFLOP/s": rate / 1e9,
               "share of the matrix rate": share}
    return Result("B1", {"texts": texts, "tokens": length}, found, checks, targets, figures)


def b2(device: torch.device, *, quick: bool = False) -> Result:
    """Mixed lengths: what padding costs."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    mean, cap = s.sized(172, 172, 20), s.sized(512, 512, 60)
    texts = shapes.mixed_texts(s.sized(4096, 256, 24), mean=mean, cap=cap, draw=draw)
    peer = s.sentence_transformer()

    @torch.inference_mode()
    def loop(texts: list[str] = texts) -> Tensor:
        parts = []
        for batch in shapes.by_batch(texts, 32):
            ids_BT, mask_BT = shapes.padded(s.ids(batch), device)
            parts.append(shapes.last_token(s.twin, ids_BT, mask_BT).cpu())
        return torch.cat(parts)

    calls: dict[str, Any] = {"ours": lambda: s.embedder.encode(texts), "padded loop, unsorted": loop,
                             "sentence-transformers": peer if isinstance(peer, str) else lambda: peer.encode(texts)}
    few = texts[:16]
    peers = {"the padded loop": loop(few)}
    if not isinstance(peer, str):
        peers["sentence-transformers"] = torch.from_numpy(peer.encode(few)).float()
    checks = s.check(few, peers, torch.from_numpy(s.embedder.encode(few)))
    found = s.measure_long(calls)
    tokens = sum(map(len, s.ids(texts)))
    figures = {"ours, tokens/s": tokens / found["ours"].median_s, "mean tokens": tokens / len(texts)}
    if not quick:
        sizes = [64, 256, 1024] if device.type == "cpu" else [1024, 4096, 16384]
        figures |= growth(lambda n: s.embedder.encode(
            shapes.mixed_texts(n, mean=60, cap=256, draw=random.Random(n))), sizes, device)
    cuda = device.type == "cuda"
    return Result("B2", {"texts": len(texts), "mean": mean, "cap": cap}, found, checks, {} if quick else against(
        found, {"padded loop, unsorted": 2.5, "sentence-transformers": 1.35 if cuda else 2.0}), figures)


def against(found: dict[str, Contestant], wanted: dict[str, float]) -> dict[str, Target]:
    """Targets "peer / ours >= wanted" for the peers that ran."""
    mine = found["ours"].median_s
    return {f"{name} / ours": (found[name].median_s / mine, ">=", factor)
            for name, factor in wanted.items() if not found[name].missing}


def b3(device: torch.device, *, quick: bool = False) -> Result:
    """Queries behind one prefix: computed once here, with every query by the peers that have no prefix."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    queries, length = s.sized(512, 64, 6), s.sized(64, 32, 6)
    wanted = s.sized(1024, 256, 40)
    texts = [shapes.text(length - 1, draw) for _ in range(queries)]  # and </s>
    each = (wanted - 4) // 8  # of each side of four examples
    examples = [Example(shapes.text(each - 2, draw), shapes.text(each - 2, draw)) for _ in range(4)]
    embedder = Embedder(s.model, Prompter(s.tokens))
    prefix = embedder.prompter.prefix("w1", examples)
    rows = [[*prefix.ids, *ids] for ids in embedder.prompter.texts(texts, prefix)]
    ids_BT = torch.tensor(rows, device=device)

    def ours() -> Any:
        return embedder.encode(texts, instruction="w1", examples=examples)

    @torch.inference_mode()
    def theirs() -> Tensor:
        return torch.cat([shapes.last_token(s.twin, part).cpu() for part in ids_BT.split(16)])

    checks = {"ours against prefix and query in full": difference(torch.from_numpy(ours()), theirs())}
    agree(checks, s.bound)
    found = s.measure_long({"ours": ours, "prefix and query for each query": theirs})
    gain = found["prefix and query for each query"].median_s / found["ours"].median_s
    ideal = queries * len(rows[0]) / (len(prefix.ids) + queries * (len(rows[0]) - len(prefix.ids)))
    targets: dict[str, Target] = {}
    if not quick:
        targets["gain"] = (gain, ">=", 10 if device.type == "cuda" else 5)
        if device.type == "cuda":
            targets["share of the ideal gain"] = (gain / ideal, ">=", 0.6)
    return Result("B3", {"prefix": len(prefix.ids), "query": length, "queries": queries}, found, checks, targets,
                  {"gain": gain, "ideal gain": ideal})


def b4(device: torch.device, *, quick: bool = False) -> Result:
    """The last layer for pooled tokens only, against our own path with a full last layer."""
    s = setting(device, quick)
    texts, length = s.sized(128, 64, 4), s.sized(512, 128, 16)
    packed = pack([list(range(3, 3 + length))] * texts, device=device)
    norm = s.model.norm

    @torch.inference_mode()
    def ours() -> Tensor:
        return embed(s.model, packed, kernels=s.embedder.kernels)

    @torch.inference_mode()
    def full() -> Tensor:
        hidden_TD = s.model(packed, every_token=True)
        return last_token_pool(hidden_TD, packed.last_B, norm.weight, eps=norm.eps, kernels=s.embedder.kernels)

    checks = {"ours against a full last layer": difference(ours(), full())}
    agree(checks, s.bound)
    found = measure({"ours": ours, "full last layer": full}, device=device, rounds=s.rounds)
    wanted = 1.025 if device.type == "cuda" else 1.10
    return Result("B4", {"texts": texts, "tokens": length}, found, checks,
                  {} if quick else against(found, {"full last layer": wanted}))


def b10(device: torch.device, *, quick: bool = False) -> Result:
    """From texts to vectors on the host, three in ten texts repeated."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    count = s.sized(20_000, 500, 20)
    different = shapes.mixed_texts(count * 7 // 10, mean=s.sized(172, 100, 12), cap=s.sized(512, 256, 40), draw=draw)
    texts = different + draw.choices(different, k=count - len(different))
    draw.shuffle(texts)
    peer = s.sentence_transformer()
    few, checks = texts[:16], {}
    mine = torch.from_numpy(s.embedder.encode(few))
    if not isinstance(peer, str):
        checks = s.check(few, {"sentence-transformers": torch.from_numpy(peer.encode(few)).float()}, mine)
    found = s.measure_long({
        "ours": lambda: s.embedder.encode(texts),
        "sentence-transformers": peer if isinstance(peer, str) else lambda: peer.encode(texts)})
    wanted = {"sentence-transformers": 1.6 if device.type == "cuda" else 2.0}
    return Result("B10", {"texts": count, "different": len(different)}, found, checks,
                  {} if quick else against(found, wanted), {"ours, texts/s": count / found["ours"].median_s})
