"""B1 to B4 and B10: encoding texts, against transformers and sentence-transformers on the same weights.

    B1     texts of one length, from token ids              B2    texts of mixed lengths
    B3     queries behind one prefix of in-context examples B4    the last layer for the pooled tokens only
    B10    texts of which three in ten are duplicates

Operations of matrix products are counted as 2 x weights x tokens, with a full last layer: savings there count as speed.
"""

import copy
import random
import tempfile
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.measure import Result, Target, Timing, check_errors, growth, measure, relative_error, speed_targets
from ref.config import ModelConfig
from ref.embedder import Embedder
from ref.model.packing import pack_sequences
from ref.model.pooling import embed, last_token_pool
from ref.model.transformer import Mistral
from ref.text.prompts import InContextExample, PromptEncoder
from ref.training.export import export_model


class Setting:
    """Random weights of one configuration, our embedder, and the peers on the same tensors."""

    def __init__(self, device: torch.device, *, quick: bool, bf16: bool = False) -> None:
        self.device, self.quick, self.cuda = device, quick, device.type == "cuda"
        config = shapes.model_config(device, quick=quick)
        self.config = replace(config, dtype="bfloat16") if bf16 else config
        self.bf16 = self.config.dtype == "bfloat16"
        self.model = shapes.random_model(self.config, device)
        self.transformers = shapes.transformers_model(self.model)
        self.tokenizer = shapes.word_tokenizer(self.config)
        self.embedder = Embedder(self.model, PromptEncoder(self.tokenizer))
        self.rounds = 3 if self.cuda else 5
        self.num_checked = 64 if self.bf16 and not self.cuda else 16  # texts; a mean over more of them is steadier
        self.bound = 4.5e-2 if self.bf16 else 1e-5  # relative error; in bf16 that of a cosine of 0.999

    def by_device(self, gpu: int, cpu: int, quick: int) -> int:
        """A number of the shape: on a GPU (where `quick` reduces only the layers), on a CPU, in a quick run there."""
        return gpu if self.cuda else quick if self.quick else cpu

    @cached_property
    def folder(self) -> Path:
        """The weights as a checkpoint, written on first use."""
        self.scratch = tempfile.TemporaryDirectory(prefix="benchmarks-")
        export_model(self.model, PromptEncoder(self.tokenizer), {}, Path(self.scratch.name) / "model")
        return Path(self.scratch.name) / "model"

    @cached_property
    def _sentence_transformer(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            return "sentence-transformers is not installed"
        dtype = self.model.norm.weight.dtype
        return SentenceTransformer(str(self.folder), device=str(self.device), model_kwargs={"dtype": dtype})

    def sentence_transformer(self) -> Any:
        """sentence-transformers on the same weights; a string if it is not installed."""
        peer = self._sentence_transformer
        if not isinstance(peer, str):
            peer[0].model = self.transformers  # shares our tensors: a GPU has room for one 7B model
        return peer

    def measure_long(self, calls: dict[str, Any]) -> dict[str, Timing]:
        """Measure calls that take up to a minute on a GPU: one round there, without a warm-up, which the check was."""
        return measure(calls, device=self.device, rounds=1 if self.cuda else self.rounds, warmed_up=self.cuda)

    def check(self, texts: list[str], peers: dict[str, Tensor], ours: Tensor) -> dict[str, float]:
        """Compare our embeddings of `texts` with the peers'; raises RuntimeError above the bound.

        fp32: |ours - peer| / |peer| <= 1e-5. bf16: cosine to the peer >= 0.999, and the mean of 1 - cosine to
        transformers in fp32 on the same weights at most 1.2 times the peer's: two bf16 runs differ by that much.
        """
        if not self.bf16:
            errors = {f"ours against {name}": relative_error(ours, peer) for name, peer in peers.items()}
            check_errors(errors, 1e-5)
            return errors
        in_fp32 = copy.deepcopy(self.transformers).float()
        with torch.inference_mode():
            truth = shapes.transformers_embed(in_fp32, *shapes.pad(self.ids(texts), self.device)).cpu()
        del in_fp32
        error = {name: cosine_errors(vectors.cpu(), truth) for name, vectors in {**peers, "ours": ours}.items()}
        for name, peer in peers.items():
            check_errors({f"ours against {name}, 1 - cosine": cosine_error(ours.cpu(), peer.cpu())}, 1e-3)
            ratio = (error["ours"].mean() / error[name].mean()).item()
            check_errors({f"ours against fp32, over {name} against fp32, mean": ratio}, 1.2)
        return {f"1 - cosine to fp32, {name}": value.max().item() for name, value in error.items()}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids with `<s>` and `</s>`."""
        tokenizer = self.tokenizer
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [[*bos, *ids, tokenizer.eos_id] for ids in tokenizer.encode(texts, max_tokens=4096)]


def cosine_errors(left: Tensor, right: Tensor) -> Tensor:
    """1 - cosine of corresponding vectors; those that a peer has normalised in bf16 have no exact unit length."""
    return 1 - torch.cosine_similarity(left.double(), right.double(), dim=-1)


def cosine_error(left: Tensor, right: Tensor) -> float:
    """The largest of them."""
    return cosine_errors(left, right).max().item()


def setting(device: torch.device, quick: bool, bf16: bool = False) -> Setting:
    """A setting of this process, built once; with `bf16` in bf16 on a CPU too, as on a GPU always."""
    return _setting(device, quick, bf16 and device.type == "cpu")


@cache
def _setting(device: torch.device, quick: bool, bf16: bool) -> Setting:
    return Setting(device, quick=quick, bf16=bf16)


def linear_weights(model: Mistral) -> int:
    """Weights of all linear layers: P in the floors 2 P and 4 P or 6 P operations per token."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def matrix_rate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of the model's largest matrix product."""
    rows, hidden, intermediate = 8192, config.hidden_size, config.intermediate_size
    x_TD, weight_ID = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (rows, intermediate))
    timing = measure({"": lambda: x_TD @ weight_ID.T}, device=device, rounds=7)[""]
    return 2 * rows * hidden * intermediate / timing.median_s


def b1(device: torch.device, *, quick: bool = False) -> Result:
    """Texts of one length: no library pads, so the forward pass alone is compared."""
    s = setting(device, quick)
    num_texts, length = s.by_device(128, 64, 4), s.by_device(512, 128, 16)
    draw = random.Random(torch.initial_seed())
    texts = [shapes.random_text(length - 2, draw) for _ in range(num_texts)]
    ids = s.ids(texts)
    input_ids, packed = torch.tensor(ids, device=device), pack_sequences(ids, device=device)

    @torch.inference_mode()
    def ours() -> Tensor:
        return embed(s.model, packed, backend=s.embedder.backend)

    @torch.inference_mode()
    def eager() -> Tensor:
        return shapes.transformers_embed(s.transformers, input_ids)

    compiled: Any = "GPU only"
    if s.cuda:
        compiled_model = shapes.transformers_model(s.model)
        for layer in compiled_model.layers:
            layer.compile(dynamic=False)  # one graph for all layers: compiling the model as a whole takes minutes
        compiled = torch.inference_mode()(lambda: shapes.transformers_embed(compiled_model, input_ids))
    checks = s.check(texts[:16], {"transformers": eager()[:16]}, ours()[:16])
    timings = measure({"ours": ours, "transformers, SDPA": eager, "transformers, layers compiled": compiled},
                      device=device, rounds=s.rounds)
    rate = matrix_rate(s.config, device, s.model.norm.weight.dtype)
    share = 2 * linear_weights(s.model) * num_texts * length / timings["ours"].median_s / rate
    targets: dict[str, Target] = {} if quick else {
        **speed_targets(timings, {"transformers, SDPA": 1.2 if s.cuda else 1.1, "transformers, layers compiled": 1.05}),
        "share of the matrix rate": (share, ">=", 0.75 if s.cuda else 0.7)}
    figures = {"ours, tokens/s": num_texts * length / timings["ours"].median_s, "matrix rate, GFLOP/s": rate / 1e9,
               "share of the matrix rate": share}
    return Result("B1", {"texts": num_texts, "tokens": length}, timings, checks, targets, figures)


def b2(device: torch.device, *, quick: bool = False, bf16: bool = False) -> Result:
    """Texts of mixed lengths: the cost of padding."""
    s = setting(device, quick, bf16)
    draw = random.Random(torch.initial_seed())
    mean, cap = s.by_device(172, 172, 20), s.by_device(512, 512, 60)
    texts = shapes.mixed_texts(s.by_device(4096, 256, 24), mean=mean, cap=cap, draw=draw)
    peer = s.sentence_transformer()

    @torch.inference_mode()
    def loop(texts: list[str] = texts) -> Tensor:
        return torch.cat([shapes.transformers_embed(s.transformers, *shapes.pad(s.ids(batch), device)).cpu()
                          for batch in shapes.batches(texts, 32)])

    calls: dict[str, Any] = {"ours": lambda: s.embedder.encode(texts), "padded loop, unsorted": loop,
                             "sentence-transformers": peer if isinstance(peer, str) else lambda: peer.encode(texts)}
    few = texts[: s.num_checked]
    peers = {"the padded loop": loop(few)}
    if not isinstance(peer, str):
        peers["sentence-transformers"] = torch.from_numpy(peer.encode(few)).float()
    checks = s.check(few, peers, torch.from_numpy(s.embedder.encode(few)))
    timings = s.measure_long(calls)
    tokens = sum(map(len, s.ids(texts)))
    figures = {"ours, tokens/s": tokens / timings["ours"].median_s, "mean tokens": tokens / len(texts)}
    if not quick:
        sizes = [1024, 4096, 16384] if s.cuda else [64, 256, 1024]
        figures |= growth(lambda n: s.embedder.encode(
            shapes.mixed_texts(n, mean=60, cap=256, draw=random.Random(n))), sizes, device)
    wanted = {"padded loop, unsorted": 2.5, "sentence-transformers": 1.35 if s.cuda else 2.0}
    return Result("B2-bf16" if bf16 else "B2", {"texts": len(texts), "mean": mean, "cap": cap}, timings, checks,
                  {} if quick else speed_targets(timings, wanted), figures)


def b3(device: torch.device, *, quick: bool = False) -> Result:
    """Queries behind one prefix: computed once by ours, with every query by a model without prefixes."""
    s = setting(device, quick)
    draw = random.Random(torch.initial_seed())
    queries, length = s.by_device(512, 64, 6), s.by_device(64, 32, 6)
    texts = [shapes.random_text(length - 1, draw) for _ in range(queries)]  # and </s>
    each = (s.by_device(1024, 256, 40) - 4) // 8  # tokens of each side of four examples
    examples = [InContextExample(shapes.random_text(each - 2, draw), shapes.random_text(each - 2, draw))
                for _ in range(4)]
    prefix = s.embedder.prompt_encoder.prefix("w1", examples)
    rows = [[*prefix.ids, *ids] for ids in s.embedder.prompt_encoder.encode(texts, prefix)]
    input_ids = torch.tensor(rows, device=device)

    def ours() -> Any:
        return s.embedder.encode(texts, instruction="w1", examples=examples)

    @torch.inference_mode()
    def full_prompts() -> Tensor:
        return torch.cat([shapes.transformers_embed(s.transformers, part).cpu() for part in input_ids.split(16)])

    checks = {"ours against full prompts": relative_error(torch.from_numpy(ours()), full_prompts())}
    check_errors(checks, s.bound)
    timings = s.measure_long({"ours": ours, "prefix and query for each query": full_prompts})
    gain = timings["prefix and query for each query"].median_s / timings["ours"].median_s
    ideal = queries * len(rows[0]) / (len(prefix.ids) + queries * (len(rows[0]) - len(prefix.ids)))
    targets: dict[str, Target] = {} if quick else {"gain": (gain, ">=", 10 if s.cuda else 5)}
    if s.cuda and not quick:
        targets["share of the ideal gain"] = (gain / ideal, ">=", 0.6)
    return Result("B3", {"prefix": len(prefix.ids), "query": length, "queries": queries}, timings, checks, targets,
                  {"gain": gain, "ideal gain": ideal})


def b4(device: torch.device, *, quick: bool = False) -> Result:
    """The last layer for the pooled tokens only, against our model with a full last layer."""
    s = setting(device, quick)
    num_texts, length = s.by_device(128, 64, 4), s.by_device(512, 128, 16)
    packed = pack_sequences([list(range(3, 3 + length))] * num_texts, device=device)
    norm, backend = s.model.norm, s.embedder.backend

    @torch.inference_mode()
    def ours() -> Tensor:
        return embed(s.model, packed, backend=backend)

    @torch.inference_mode()
    def full() -> Tensor:
        hidden_TD = s.model(packed, every_token=True)
        return last_token_pool(hidden_TD, packed.last_token_B, norm.weight, eps=norm.eps, backend=backend)

    checks = {"ours against a full last layer": relative_error(ours(), full())}
    check_errors(checks, s.bound)
    timings = measure({"ours": ours, "full last layer": full}, device=device, rounds=s.rounds)
    wanted = {"full last layer": 1.025 if s.cuda else 1.10}
    return Result("B4", {"texts": num_texts, "tokens": length}, timings, checks,
                  {} if quick else speed_targets(timings, wanted))


def b10(device: torch.device, *, quick: bool = False, bf16: bool = False) -> Result:
    """Texts to vectors on the host, with three in ten texts repeated."""
    s = setting(device, quick, bf16)
    draw = random.Random(torch.initial_seed())
    count = s.by_device(20_000, 500, 20)
    mean, cap = s.by_device(172, 100, 12), s.by_device(512, 256, 40)
    unique = shapes.mixed_texts(count * 7 // 10, mean=mean, cap=cap, draw=draw)
    texts = unique + draw.choices(unique, k=count - len(unique))
    draw.shuffle(texts)
    peer = s.sentence_transformer()
    few, checks = texts[: s.num_checked], {}
    ours = torch.from_numpy(s.embedder.encode(few))
    if not isinstance(peer, str):
        checks = s.check(few, {"sentence-transformers": torch.from_numpy(peer.encode(few)).float()}, ours)
    timings = s.measure_long({
        "ours": lambda: s.embedder.encode(texts),
        "sentence-transformers": peer if isinstance(peer, str) else lambda: peer.encode(texts)})
    wanted = {"sentence-transformers": 1.6 if s.cuda else 2.0}
    return Result("B10-bf16" if bf16 else "B10", {"texts": count, "unique": len(unique)}, timings, checks,
                  {} if quick else speed_targets(timings, wanted), {"ours, texts/s": count / timings["ours"].median_s})
