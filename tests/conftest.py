"""What all tests share: a fresh seed each run (printed, replayed with --seed N), tiny checkpoints, the real data.

    python -m pytest                 a new seed; the header says which
    python -m pytest --seed 12345    the same run again
    LG_ANNA_DATA=DIR python -m pytest    also the tests on real data
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# both are read at import: by triton, by huggingface_hub
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest
import torch

from ref.checkpoint import save_model
from ref.config import Architecture
from ref.model import Mistral, fresh

hypothesis.settings.register_profile("here", deadline=None, database=None)
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay the run of this seed (default: a fresh one)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    hypothesis.core.global_force_seed = config.option.seed


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # not pytest_report_header: -q leaves that out
        reporter.write_line(f"seed: {session.config.option.seed} (replay with --seed {session.config.option.seed})")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This run's seed; torch, random and numpy start from it in every test."""
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


SMALL = Architecture(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_width=10, ffn_width=48,
                     window_keys=6, dtype="float32")


@pytest.fixture
def small_model() -> Callable[..., Mistral]:
    """`small_model(window_keys=None, …)`: SMALL with these changes, weights large enough that attention is not flat."""
    def build(*, spread: float = 1.0, **changes: Any) -> Mistral:
        model = fresh(Architecture(**{**SMALL.__dict__, **changes}), seed=torch.initial_seed())
        scatter_weights(model, spread=spread)
        return model
    return build


def scatter_weights(model: torch.nn.Module, *, spread: float = 1.0) -> None:
    """Random weights, in place, such that every part of the model shows in its output: no flat softmax, no norm at one.

    A smaller `spread` makes the model gentler, and its rounding errors smaller.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=spread * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, small_model: Callable[..., Mistral]) -> Callable[..., Path]:
    """`tiny_checkpoint("name", shard_bytes=…, config={…}, **architecture)`: a checkpoint folder, and its path.

    `config` lays entries over config.json; a value of ... takes the entry out.
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
    """Lay `changes` over a JSON object in a file; a value of ... takes the entry out."""
    merged = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


WORDS = ["river", "boat", "stone", "house", "night", "baker", "tower", "island", "fisher", "lamp", "grain", "storm"]


def a_text(draw: random.Random, words: int = 8) -> str:
    """Some words."""
    return " ".join(draw.choices(WORDS, k=words))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step: a fresh small model that gives some vector to every text."""
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
