"""Shared by all tests: a new random seed in each run, tiny checkpoints, the folder of real data.

    python -m pytest                     a new seed; the first line of the output names it
    python -m pytest --seed 12345        repeat the run of that seed
    python -m pytest -n 2                in two processes (pytest-xdist), each test with one thread
    LG_ANNA_DATA=DIR python -m pytest    also the tests on real data
"""

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# read at import, by torch, by triton and by huggingface_hub
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # no bf16 in hardware: `auto` is float32 on any machine

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

from ref.config import ModelConfig
from ref.model.checkpoint import save_model
from ref.model.lora import apply_lora, lora_layers
from ref.model.transformer import Mistral

ROOT = Path(__file__).parents[1]
hypothesis.settings.register_profile("here", deadline=None, database=None)
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat the run of this seed (default: a new one)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    hypothesis.core.global_force_seed = config.option.seed


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # pytest_report_header is not printed with -q
        reporter.write_line(f"seed: {session.config.option.seed} (repeat with --seed {session.config.option.seed})")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This run's seed; torch, random and numpy are seeded with it before each test."""
    number = request.config.option.seed
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)
    return number


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data that LG_ANNA_DATA names; without it the test is skipped."""
    folder = os.environ.get("LG_ANNA_DATA")
    if not folder:
        pytest.skip("LG_ANNA_DATA is not set: it names the folder with the real data sets")
    return Path(folder)


SMALL = ModelConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10,
                    intermediate_size=48, sliding_window=6, dtype="float32")


@pytest.fixture
def small_model() -> Callable[..., Mistral]:
    """`small_model(sliding_window=None, …)`: SMALL with these changes and weights of `scatter_weights`."""
    def build(*, spread: float = 1.0, **changes: Any) -> Mistral:
        model = Mistral(dataclasses.replace(SMALL, **changes))
        scatter_weights(model, spread=spread)
        return model
    return build


def scatter_weights(model: torch.nn.Module, *, spread: float = 1.0) -> None:
    """Random weights in place, such that every part of the model affects its output: no flat softmax, no norm at one.

    A smaller `spread` gives smaller rounding errors.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=spread * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, small_model: Callable[..., Mistral]) -> Callable[..., Path]:
    """`tiny_checkpoint("name", shard_bytes=…, config={…}, **changes)`: write a checkpoint and return its folder.

    `changes` are fields of ModelConfig, `config` entries of config.json; the value ... removes an entry.
    """
    def write(name: str = "model", *, shard_bytes: int = 10**9, config: dict[str, Any] | None = None,
              dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_model(small_model(**changes), folder, dtype=dtype, shard_bytes=shard_bytes)
        edit_json(folder / "config.json", config or {})
        return folder
    return write


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of a JSON object in a file; the value ... removes an entry."""
    merged = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: Mistral, *, rank: int = 4, alpha: float = 2.0, dropout: float = 0.0,
            targets: Sequence[str] = ALL_LINEAR) -> Mistral:
    """The model with LoRA layers whose B is random, in place."""
    apply_lora(model, rank=rank, alpha=alpha, dropout=dropout, target_modules=targets)
    randomize_lora(model)
    return model


def randomize_lora(model: Mistral) -> None:
    """Give every LoRA layer a B that affects the output; the same for equal seeds."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=generator)


def random_ids(lengths: Sequence[int], *, vocab_size: int = SMALL.vocab_size) -> list[list[int]]:
    """Random token ids: one list for each length."""
    return [torch.randint(vocab_size, (length,)).tolist() for length in lengths]


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest difference divided by the largest absolute value of the truth."""
    assert ours.shape == truth.shape
    return ((ours.float() - truth.float()).abs().max() / truth.float().abs().max()).item()


def assert_close(ours: Tensor, truth: Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to `tolerance` times the largest absolute value of the truth."""
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() <= tolerance * truth.abs().max()


def bytes_kept(call: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward, each storage once, without those of `parameters`."""
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the reference prevents reuse of the address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(size for size, _ in kept.values())


@pytest.fixture(scope="module")
def nan_in_uninitialised_memory() -> Iterator[None]:
    """torch.empty gives NaN while the tests of a module run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def guarded(x: Tensor, band: int = 8) -> Tensor:
    """`x` in the middle of a larger tensor of NaN (integers: of a number out of range)."""
    fill = torch.nan if x.is_floating_point() else 2**40
    around = x.new_full((x.numel() + 2 * band,), fill)
    around[band:-band] = x.flatten()
    return around[band:-band].view(x.shape)


@pytest.fixture
def bands_intact(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Every tensor that is allocated lies between bands of NaN; the call says whether all bands are unchanged."""
    around: list[tuple[Tensor, np.ndarray]] = []

    def bits(x: Tensor) -> np.ndarray:
        return x.detach().cpu().view(torch.uint8).numpy().reshape(x.numel(), -1).copy()

    def between_bands(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.numel() == 0 or not x.is_contiguous():
                return x
            inside = guarded(x)
            around.append((inside._base, bits(inside._base)))
            return inside
        return call
    allocators = [(torch, name) for name in ("empty", "empty_like", "zeros_like", "full_like")]
    for place, name in [*allocators, (Tensor, "new_empty"), (Tensor, "clone")]:
        monkeypatch.setattr(place, name, between_bands(getattr(place, name)))

    def intact(band: int = 8) -> bool:
        assert around
        return all(np.array_equal(bits(now)[part], then[part])
                   for now, then in around for part in (slice(band), slice(-band, None)))
    return intact


WORDS = ["river", "boat", "stone", "house", "night", "baker", "tower", "island", "fisher", "lamp", "grain", "storm"]


def a_text(draw: random.Random, words: int = 8) -> str:
    """Random words of WORDS."""
    return " ".join(draw.choices(WORDS, k=words))


def draw_training_lines(words: Sequence[str], instructions: dict[str, str], count: int) -> list[dict[str, Any]]:
    """Lines of the tasks in turn, made of a few words, the same at every call; a third have no teacher scores."""
    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(3, 9)))
    lines = []
    for i in range(count):
        task = list(instructions)[i % len(instructions)]
        line = {"query": text(), "pos": [text(), text()], "neg": [text() for _ in range(3)],
                "prompt": instructions[task], "task": task}
        if i % 3:
            line |= {"pos_scores": [0.9, 0.8], "neg_scores": [0.6, 0.3, 0.1]}
        lines.append(line)
    return lines


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one training step from random initialisation."""
    import run_train

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps({**SMALL.to_json(), "vocab_size": 300}))
    draw = random.Random(0)
    lines = [{"query": a_text(draw), "pos": [a_text(draw)], "neg": [a_text(draw)], "prompt": "Find it."}
             for _ in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_train.main(["--data", str(folder / "data.jsonl"), "--model", str(folder / "config.json"), "--steps", "1",
                           "--output", str(folder / "run")]) == 0
    return folder / "run"
