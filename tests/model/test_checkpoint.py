"""Checkpoint folders: forms that load, forms that are rejected and the messages, the hub's errors, peak memory.

That loaded weights compute the right thing is shown in test_transformer.py; here a folder gives the same tensors, or a
ValueError that names file and tensor.
"""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import edit_json
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from ref.config import ModelConfig
from ref.model.checkpoint import ADAPTER_CONFIG, INDEX, SINGLE, load_model, resolve_checkpoint, save_model
from ref.model.transformer import Mistral

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
Checkpoint = Callable[..., Path]


def same_tensors(model: Mistral, truth: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == truth.keys() and all(torch.equal(state[name], truth[name]) for name in truth)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = SINGLE) -> None:
    """Change the tensors of a file in place."""
    state = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(state)
    save_file(state, folder / file, metadata={"format": "pt"})


class Trap:
    """Writes a file when it is unpickled: the proof that code of a pickle was executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.marker!r}, 'w').close()",)


# ---- forms that load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_single_and_sharded(shard_bytes: int, tiny_checkpoint: Checkpoint, small_model: Callable[..., Mistral]) -> None:
    folder, torch_seed = tiny_checkpoint(shard_bytes=shard_bytes), torch.initial_seed()
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9) == (folder / INDEX).exists()
    torch.manual_seed(torch_seed)
    assert same_tensors(load_model(folder, device=CPU), small_model().state_dict())


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_tensor_names_of_the_causal_model_and_its_head(max_shard_size: str, tmp_path: Path) -> None:
    theirs = MistralForCausalLM(MistralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "20KB")
    if max_shard_size == "1GB":  # older checkpoints contain this buffer too
        rewrite(tmp_path, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        assert "lm_head.weight" in load_file(tmp_path / SINGLE)
    assert same_tensors(load_model(tmp_path, device=CPU), theirs.model.state_dict())


def test_only_files_of_the_index_are_read(tiny_checkpoint: Checkpoint) -> None:
    """A consolidated copy and a broken file are ignored; a single file goes first, as in transformers."""
    folder = tiny_checkpoint(shard_bytes=20_000)
    truth = load_model(folder, device=CPU).state_dict()
    save_file({"tok_embeddings.weight": torch.ones(3, 3)}, folder / "consolidated.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    assert same_tensors(load_model(folder, device=CPU), truth)
    other = {name: tensor + 1 for name, tensor in truth.items()}
    save_file(other, folder / SINGLE, metadata={"format": "pt"})
    assert same_tensors(load_model(folder, device=CPU), other)
    theirs = pytest.importorskip("transformers").AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(("first", "second"), [(10**9, 20_000), (20_000, 10**9)])
def test_an_older_checkpoint_in_the_folder_is_replaced(
    first: int, second: int, tmp_path: Path, small_model: Callable[..., Mistral],
) -> None:
    for shard_bytes in (first, second):
        model = small_model()
        save_model(model, tmp_path, dtype=torch.float32, shard_bytes=shard_bytes)
    assert same_tensors(load_model(tmp_path, device=CPU), model.state_dict())
    assert (tmp_path / SINGLE).exists() != (tmp_path / INDEX).exists()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_dtype_and_device(stored: torch.dtype, wanted: torch.dtype | None, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(dtype=stored)
    model = load_model(folder, device=CPU, dtype=wanted)
    file = load_file(folder / SINGLE)
    assert {tensor.dtype for tensor in file.values()} == {stored}
    assert same_tensors(model, {name: tensor.to(wanted or stored) for name, tensor in file.items()})
    assert {(p.dtype, p.device.type, p.requires_grad) for p in model.parameters()} == {(wanted or stored, "cpu", True)}


def test_tensors_are_copies_of_the_file(tiny_checkpoint: Checkpoint) -> None:
    """Overwriting the file does not change the model."""
    folder = tiny_checkpoint()
    truth = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    model = load_model(folder, device=CPU)
    with (folder / SINGLE).open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert same_tensors(model, truth)


# ---- forms that are rejected --------------------------------------------------------------------------------


def assert_rejected(folder: Path, *parts: str) -> None:
    """Loading raises a one-line ValueError that begins with a path in the folder and contains all `parts`."""
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_model(folder, device=CPU)
    message = str(caught.value)
    assert message.startswith(str(folder)) and all(part in message for part in parts), message
    assert len(message) < 700 and "\n" not in message


NORM, UP, Q = "norm.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "missing": (lambda state: state.pop(UP), ("1 of 20 tensors are missing", UP)),
    "all missing": (lambda state: state.clear(), ("embed_tokens.weight",)),
    "unexpected": (lambda state: state.update({"layers.0.mlp.bias": torch.ones(2)}),
                   ("layers.0.mlp.bias", "is not part of a plain Mistral or Llama model")),
    "one layer more": (lambda state: state.update({"layers.2.mlp.up_proj.weight": state[UP].clone()}),
                         ("layers.2.mlp.up_proj.weight", "is not part of a plain Mistral or Llama model")),
    "an adapter's": (lambda state: state.update({"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}),
                     ("layers.0.self_attn.q_proj.lora_A.weight",)),
    "transposed": (lambda state: state.update({UP: state[UP].T.contiguous()}), (UP, "(32, 48)", "(48, 32)")),
    "fewer heads": (lambda state: state.update({Q: state[Q][:20].clone()}), (Q, "(20, 32)", "(40, 32)")),
    "flat": (lambda state: state.update({UP: state[UP].flatten()}), (UP, "(1536,)")),
    "both names": (lambda state: state.update({"model.norm.weight": state[NORM].clone()}),
                   ("norm.weight", "is stored twice")),
    "int8": (lambda state: state.update({UP: state[UP].to(torch.int8)}), (UP, "torch.int8", "quantised")),
    "float8": (lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)}), (UP, "float8", "quantised")),
    "complex": (lambda state: state.update({UP: state[UP].to(torch.complex64)}), (UP, "complex64")),
}


@pytest.mark.parametrize("name", TENSORS)
def test_strict_about_tensors(name: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    change, parts = TENSORS[name]
    rewrite(folder, change)
    assert_rejected(folder, *parts)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM'"),
    "a classifier": ({"architectures": ["MistralForSequenceClassification"]}, "'MistralForSequenceClassification'"),
    "another type": ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported (only 'mistral', 'llama')"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (only 'silu')"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config {'quant_method': 'gptq'}"),
    "scaled RoPE, old form": ({"rope_scaling": {"type": "yarn", "factor": 4.0}},
                              "rope_type 'yarn' is not supported (only 'default')"),
    "scaled RoPE in one of both fields": ({"rope_scaling": {"type": "linear", "factor": 4.0},
                                           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
                                          "rope_scaling: rope_type 'linear' is not supported"),
    "scaled RoPE, new form": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
                              "rope_type 'linear' is not supported"),
    "no hidden size": ({"hidden_size": ...}, "'hidden_size' must be an integer >= 1 (got None)"),
    "hidden size in quotes": ({"hidden_size": "32"}, "'hidden_size' must be an integer >= 1 (got '32')"),
    "a boolean hidden size": ({"hidden_size": True}, "'hidden_size' must be an integer >= 1 (got True)"),
    "negative layers": ({"num_hidden_layers": -1}, "'num_hidden_layers' must be an integer >= 1 (got -1)"),
    "a window of 0": ({"sliding_window": 0}, "'sliding_window' must be an integer >= 1 (got 0)"),
    "heads not divisible": ({"num_attention_heads": 5},
                            "'num_attention_heads' must be a multiple of 'num_key_value_heads' (got 5 and 2)"),
    "an odd head": ({"head_dim": 9}, "'head_dim' must be even (got 9)"),
    "eps 0": ({"rms_norm_eps": 0}, "'rms_norm_eps' must be a finite number > 0 (got 0)"),
    "infinite theta": ({"rope_theta": float("inf")}, "'rope_theta' must be a finite number > 0 (got inf)"),
    "unknown dtype": ({"torch_dtype": "int8"}, "'dtype' must be one of bfloat16, float16, float32 (got 'int8')"),
    "more layers than files": ({"num_hidden_layers": 3}, "layers.2."),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_strict_about_config(name: str, tiny_checkpoint: Checkpoint) -> None:
    changes, part = CONFIGS[name]
    folder = tiny_checkpoint(config=changes)
    assert_rejected(folder, part, *(["config.json: "] if name != "more layers than files" else []))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"', "[" * 100_000, "\udcff"])
def test_broken_config(content: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder, device=CPU)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: file does not exist"):
        load_model(folder, device=CPU)


@pytest.mark.parametrize("where", [
    "../secret.safetensors", "sub/part.safetensors", "/etc/part.safetensors", "..", "", ".safetensors", "part.bin",
    "sub\\part.safetensors", "part.safetensors\n", "C:part.safetensors", 5, None])
def test_an_index_that_points_outside_its_folder(
    where: object, tiny_checkpoint: Checkpoint, tmp_path: Path,
) -> None:
    """Even if the file exists and holds the tensor."""
    folder = tiny_checkpoint(shard_bytes=20_000)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for place in (tmp_path / "secret.safetensors", folder / "part.bin"):
        shutil.copy(folder / weight_map[UP], place)
    edit_json(folder / INDEX, {"weight_map": {**weight_map, UP: where}})
    assert_rejected(folder, INDEX, UP, repr(where))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_files(index: dict[str, Any], tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    assert_rejected(folder, INDEX, "weight_map")


def test_a_missing_shard(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(shard_bytes=20_000)
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    assert_rejected(folder, shard.name, "is missing")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_file(kept: int, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:kept])
    assert_rejected(folder, SINGLE, "not a complete safetensors file")


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}",
                                     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_a_file_that_is_something_else(content: bytes, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / SINGLE).write_bytes(content)
    assert_rejected(folder, SINGLE, "not a complete safetensors file")


@pytest.mark.parametrize("by", [pickle.dump, torch.save])
@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_rejected_and_never_executed(
    name: str, by: Callable[..., None], tiny_checkpoint: Checkpoint, tmp_path: Path,
) -> None:
    folder, marker = tiny_checkpoint(), tmp_path / "unpickled"
    (folder / SINGLE).unlink()
    with (folder / name).open("wb") as file:
        by(Trap(marker), file)
    assert_rejected(folder, name, *([] if name == SINGLE else ["pickles can execute code and are not read"]))
    assert not marker.exists()
    with (folder / name).open("rb") as file:  # control: the trap works
        pickle.load(file) if by is pickle.dump else torch.load(file, weights_only=False)
    assert marker.exists()


def test_the_model_in_a_run_folder(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """model/ or adapter/ of a folder with run.json; a run without either is an error that says how to continue."""
    run = tmp_path / "run"
    run.mkdir()
    assert resolve_checkpoint(str(run)) == run  # an ordinary folder
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{run}: the run has no model yet.*--resume --output {run}"):
        resolve_checkpoint(str(run))
    (run / "adapter").mkdir()
    assert resolve_checkpoint(str(run)) == run / "adapter"
    (run / "model").mkdir()
    assert resolve_checkpoint(str(run)) == run / "model"
    (run / ADAPTER_CONFIG).write_text("{}")
    assert resolve_checkpoint(str(run)) == run  # a model beside run.json


def test_a_folder_without_weights(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / SINGLE).unlink()
    assert_rejected(folder, SINGLE, "is missing")
    (folder / SINGLE).mkdir()
    assert_rejected(folder, SINGLE)


# ---- the hub ------------------------------------------------------------------------------------------------


class Response:
    """The attributes of an HTTP response that the hub's errors read."""

    headers = MappingProxyType[str, str]({})
    request, status_code, text, content = None, 500, "", b""


HUB: dict[str, tuple[Callable[[], Exception], tuple[str, ...]]] = {
    "gated": (lambda: hub.GatedRepoError("403", response=Response()), ("licence", "HF_TOKEN")),
    "missing": (lambda: hub.RepositoryNotFoundError("404", response=Response()),
                  ("does not exist on the hub, or is private", "HF_TOKEN")),
    "no revision": (lambda: hub.RevisionNotFoundError("404 main", response=Response()), ("404 main",)),
    "server error": (lambda: hub.HfHubHTTPError("502 Bad Gateway\nid 7", response=Response()),
                     ("502 Bad Gateway", "network")),
    "no network, no copy": (lambda: hub.LocalEntryNotFoundError("cannot find the snapshot"),
                            ("cannot find", "network")),
    "offline": (lambda: hub.OfflineModeIsEnabled("offline mode is enabled"), ("offline mode", "HF_HUB_OFFLINE")),
    "no answer": (lambda: ConnectionError(), ("ConnectionError", "network")),
    "proxy or transport": (lambda: hub.HTTPError("proxy refused"), ("proxy refused", "network")),
    "disk full": (lambda: OSError(28, "No space left on device"), ("No space left",)),
}


@pytest.mark.parametrize("name", HUB)
def test_errors_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, parts = HUB[name]

    def answer(*_: object, **__: object) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(ValueError, match="^owner/name: ") as caught:
        resolve_checkpoint("owner/name")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_offline() -> None:
    """HF_HUB_OFFLINE is set for all tests: the hub's own client raises, without a network."""
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        resolve_checkpoint("owner/never-downloaded-by-anybody")


def test_only_files_that_are_read_are_downloaded(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(shard_bytes=20_000)
    requested: list[list[str]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "owner/name"
        requested.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_checkpoint("owner/name") == folder
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert not shards & {*requested[0], *requested[1]} and shards < set(requested[2])
    assert all("*" not in pattern and not pattern.endswith((".bin", ".pth", ".py")) for pattern in requested[2])


def test_the_single_file_of_a_repository_wins_over_its_index(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a folder, and in transformers; an older upload may have left the index."""
    repository = tiny_checkpoint(shard_bytes=20_000)
    (repository / SINGLE).write_bytes(b"")

    def snapshot_download(_: str, *, allow_patterns: list[str]) -> str:
        for name in allow_patterns:
            if (repository / name).is_file() and "/" not in name:
                shutil.copy(repository / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve_checkpoint("owner/name")
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {SINGLE}


@pytest.mark.parametrize(
    "name", ["", "nowhere", "a/b/c", "../a/b", "./nowhere", "/nowhere/at/all", "owner/", "a b/c", ".a/b", "~/a",
             "file.safetensors", "folder/file.safetensors", "./folder/file.safetensors"])
def test_neither_folder_nor_hub_id(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was called"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for file in ("file.safetensors", "folder/file.safetensors"):
        (tmp_path / file).touch()
    what = "which is a file" if "file" in name else "no such folder"
    with pytest.raises(ValueError, match=rf"^model must be a folder .* or a hub id .*got '{name}', {what}\)$"):
        resolve_checkpoint(name)


@pytest.mark.parametrize("kind", ["missing", "offline"])
def test_a_typo_that_looks_like_a_hub_id(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(*_: object, **__: object) -> str:
        raise HUB[kind][0]()

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"^runs/typo: .*, and is no local folder"):
        resolve_checkpoint("runs/typo")


# ---- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from ref.model import checkpoint

def resident_bytes(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

small, large, dtype, keep_shards = sys.argv[1:]
if keep_shards == "keep":  # the negative control: all shards stay in memory until the model is complete
    read, kept = checkpoint.read_tensors, []
    def read_and_keep(path, *, device):
        for name, tensor in read(path, device=device):
            kept.append(tensor.clone())
            yield name, tensor
    checkpoint.read_tensors = read_and_keep
load = lambda folder: checkpoint.load_model(Path(folder), device=torch.device("cpu"), dtype=getattr(torch, dtype))
load(small)
before = resident_bytes("VmRSS")
model = load(large)
print(resident_bytes("VmHWM") - before - sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of 200 MB, fp32, and the bytes of its largest shard."""
    folder = tmp_path_factory.mktemp("sharded")
    config = ModelConfig(vocab_size=4000, hidden_size=512, num_layers=15, num_heads=8, num_kv_heads=2, head_dim=64,
                         intermediate_size=1600)
    save_model(Mistral(config), folder, dtype=torch.float32, shard_bytes=25 * 10**6)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) > 190 * 10**6 and len(sizes) >= 8
    return folder, max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("dtype", "keep_shards"), [("float32", ""), ("bfloat16", ""), ("float32", "keep")])
def test_peak_memory(dtype: str, keep_shards: str, sharded: tuple[Path, int], tiny_checkpoint: Checkpoint) -> None:
    """Besides the model at most 1.1 times the largest shard, and 4 MB that the interpreter may have allocated."""
    folder, largest_shard = sharded
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tiny_checkpoint()), str(folder), dtype, keep_shards],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    besides = int(done.stdout)
    print(f"{besides / 1e6:.1f} MB besides the model, largest shard {largest_shard / 1e6:.1f} MB")
    assert (besides <= 1.1 * largest_shard + 4e6) == (keep_shards == "")
