"""Checkpoint folders: the forms that load, the ones that are refused (and how), memory, and what the hub may answer.

That loaded weights compute the right thing is test_model.py's; here a folder either gives the same tensors, or a
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

import ref.checkpoint
from ref.checkpoint import INDEX, SINGLE, load_model, locate, save_model
from ref.config import Architecture
from ref.model import Mistral

CPU = torch.device("cpu")
ROOT = Path(ref.checkpoint.__file__).parents[1]
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
    """Unpickled, it writes a file: the proof that somebody unpickled it."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.marker!r}, 'w').close()",)


# ----------------------------------------------------------------------------------------- forms that load


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_single_and_sharded(shard_bytes: int, tiny_checkpoint: Checkpoint, small_model: Callable[..., Mistral]) -> None:
    folder, torch_seed = tiny_checkpoint(shard_bytes=shard_bytes), torch.initial_seed()
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9) == (folder / INDEX).exists()
    torch.manual_seed(torch_seed)
    assert same_tensors(load_model(folder, device=CPU), small_model().state_dict())


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_names_of_the_causal_model_and_its_head(max_shard_size: str, tmp_path: Path) -> None:
    theirs = MistralForCausalLM(MistralConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48))
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "20KB")
    if max_shard_size == "1GB":  # older checkpoints hold this buffer too
        rewrite(tmp_path, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
        assert "lm_head.weight" in load_file(tmp_path / SINGLE)
    assert same_tensors(load_model(tmp_path, device=CPU), theirs.model.state_dict())


def test_only_files_of_the_index_are_read(tiny_checkpoint: Checkpoint) -> None:
    """A consolidated copy, a stray single file and a broken one beside the shards do not matter."""
    folder = tiny_checkpoint(shard_bytes=20_000)
    truth = load_model(folder, device=CPU).state_dict()
    save_file({"tok_embeddings.weight": torch.ones(3, 3)}, folder / "consolidated.safetensors")
    save_file({name: tensor + 1 for name, tensor in truth.items()}, folder / SINGLE)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    assert same_tensors(load_model(folder, device=CPU), truth)
    (folder / INDEX).unlink()
    assert not same_tensors(load_model(folder, device=CPU), truth)  # now the single file is the checkpoint


@pytest.mark.parametrize(("first", "second"), [(10**9, 20_000), (20_000, 10**9)])
def test_an_older_checkpoint_in_the_folder_is_not_read(
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


def test_the_model_outlives_its_files(tiny_checkpoint: Checkpoint) -> None:
    """Tensors are copies: neither overwriting the file nor training the model reaches the other."""
    folder = tiny_checkpoint()
    truth = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    model = load_model(folder, device=CPU)
    with (folder / SINGLE).open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert same_tensors(model, truth)


# ------------------------------------------------------------------------------------- forms that are refused


def refused(folder: Path, *parts: str) -> None:
    """Loading says what is wrong, what is expected and what to do, and names the parts."""
    with pytest.raises(ValueError, match="Expected|Fetch") as caught:
        load_model(folder, device=CPU)
    message = str(caught.value)
    assert all(part in message for part in (str(folder), *parts)), message
    assert len(message) < 700


NORM, UP, Q = "norm.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "missing": (lambda state: state.pop(UP), ("1 tensors are missing", UP)),
    "all missing": (lambda state: state.clear(), ("embed_tokens.weight",)),
    "unexpected": (lambda state: state.update({"layers.0.mlp.bias": torch.ones(2)}),
                   ("layers.0.mlp.bias", "unexpected")),
    "a layer too many": (lambda state: state.update({"layers.2.mlp.up_proj.weight": state[UP].clone()}),
                         ("layers.2.mlp.up_proj.weight", "unexpected")),
    "an adapter's": (lambda state: state.update({"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}),
                     ("layers.0.self_attn.q_proj.lora_A.weight",)),
    "transposed": (lambda state: state.update({UP: state[UP].T.contiguous()}), (UP, "(32, 48)", "(48, 32)")),
    "other heads": (lambda state: state.update({Q: state[Q][:20].clone()}), (Q, "(20, 32)", "(40, 32)")),
    "flat": (lambda state: state.update({UP: state[UP].flatten()}), (UP, "(1536,)")),
    "both names": (lambda state: state.update({"model.norm.weight": state[NORM].clone()}), ("norm.weight", "twice")),
    "int8": (lambda state: state.update({UP: state[UP].to(torch.int8)}), (UP, "torch.int8", "quantised")),
    "float8": (lambda state: state.update({UP: state[UP].to(torch.float8_e4m3fn)}), (UP, "float8", "quantised")),
    "complex": (lambda state: state.update({UP: state[UP].to(torch.complex64)}), (UP, "complex64")),
}


@pytest.mark.parametrize("name", TENSORS)
def test_strict_about_tensors(name: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    change, parts = TENSORS[name]
    rewrite(folder, change)
    refused(folder, *parts)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "a classifier": ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
    "another type": ({"model_type": "mixtral"}, "mixtral"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "scaled rope, old form": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "scaled rope, new form": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    "no width": ({"hidden_size": ...}, "hidden_size"),
    "a width in words": ({"hidden_size": "32"}, "hidden_size"),
    "a boolean width": ({"hidden_size": True}, "hidden_size"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "no window": ({"sliding_window": 0}, "sliding_window"),
    "heads not divisible": ({"num_attention_heads": 5}, "5 heads"),
    "odd head": ({"head_dim": 9}, "head_dim 9"),
    "eps of nothing": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "base not finite": ({"rope_theta": float("inf")}, "rope_theta"),
    "unknown dtype": ({"torch_dtype": "int8"}, "int8"),
    "more layers than files": ({"num_hidden_layers": 3}, "layers.2."),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_strict_about_config(name: str, tiny_checkpoint: Checkpoint) -> None:
    changes, part = CONFIGS[name]
    refused(tiny_checkpoint(config=changes), part)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"text"', "[" * 100_000, "\udcff"])
def test_broken_config(content: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(folder, device=CPU)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_model(folder, device=CPU)


@pytest.mark.parametrize("where", [
    "../secret.safetensors", "sub/part.safetensors", "/etc/part.safetensors", "..", "", ".safetensors", "part.bin",
    "sub\\part.safetensors", "part.safetensors\n", "C:part.safetensors", 5, None])
def test_an_index_that_leaves_its_folder(where: object, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Even where the file it points to is there, whole, and what the model lacks."""
    folder = tiny_checkpoint(shard_bytes=20_000)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for place in (tmp_path / "secret.safetensors", folder / "part.bin"):
        shutil.copy(folder / weight_map[UP], place)
    edit_json(folder / INDEX, {"weight_map": {**weight_map, UP: where}})
    refused(folder, INDEX, UP, repr(where))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_files(index: dict[str, Any], tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, "weight_map")


def test_a_missing_shard(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(shard_bytes=20_000)
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    refused(folder, shard.name, "is missing")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_file(kept: int, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:kept])
    refused(folder, SINGLE, "not a whole safetensors file")


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}",
                                     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_a_file_that_is_something_else(content: bytes, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / SINGLE).write_bytes(content)
    refused(folder, SINGLE, "not a whole safetensors file")


@pytest.mark.parametrize("by", [pickle.dump, torch.save])
@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_and_never_run(
    name: str, by: Callable[..., None], tiny_checkpoint: Checkpoint, tmp_path: Path,
) -> None:
    folder, marker = tiny_checkpoint(), tmp_path / "unpickled"
    (folder / SINGLE).unlink()
    with (folder / name).open("wb") as file:
        by(Trap(marker), file)
    refused(folder, name, *([] if name == SINGLE else ["pickles", "never read"]))
    assert not marker.exists()
    with (folder / name).open("rb") as file:  # control: the trap does work
        pickle.load(file) if by is pickle.dump else torch.load(file, weights_only=False)
    assert marker.exists()


def test_a_folder_without_weights(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / SINGLE).unlink()
    refused(folder, SINGLE, "is missing")
    (folder / SINGLE).mkdir()
    refused(folder, SINGLE)


# ---------------------------------------------------------------------------------------------------- hub


class Answer:
    """As much of an HTTP response as the hub's errors look at."""

    headers = MappingProxyType[str, str]({})
    request, status_code, text, content = None, 500, "", b""


HUB: dict[str, tuple[Callable[[], Exception], tuple[str, ...]]] = {
    "gated": (lambda: hub.GatedRepoError("403", response=Answer()), ("licence", "HF_TOKEN")),
    "not there": (lambda: hub.RepositoryNotFoundError("404", response=Answer()),
                  ("does not exist or is private", "HF_TOKEN")),
    "no revision": (lambda: hub.RevisionNotFoundError("404 main", response=Answer()), ("404 main",)),
    "server error": (lambda: hub.HfHubHTTPError("502 Bad Gateway\nid 7", response=Answer()),
                     ("502 Bad Gateway", "network")),
    "no network, no copy": (lambda: hub.LocalEntryNotFoundError("cannot find the snapshot"),
                            ("cannot find", "network")),
    "offline": (lambda: hub.OfflineModeIsEnabled("offline mode is enabled"), ("offline mode", "HF_HUB_OFFLINE")),
    "no answer": (lambda: ConnectionError(), ("ConnectionError", "network")),
    "proxy or transport": (lambda: hub.HTTPError("proxy refused"), ("proxy refused", "network")),
    "disk full": (lambda: OSError(28, "No space left on device"), ("No space left",)),
}


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_may_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, parts = HUB[name]

    def answer(*_: object, **__: object) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(ValueError, match="owner/name could not be fetched") as caught:
        locate("owner/name")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_offline_for_real() -> None:
    """HF_HUB_OFFLINE is set for all tests: the hub's own client says so, without a network."""
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        locate("owner/never-downloaded-by-anybody")


def test_only_the_files_that_are_read_are_fetched(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(shard_bytes=20_000)
    asked: list[list[str]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "owner/name"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate("owner/name") == folder
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert not shards & set(asked[0]) and shards < set(asked[1])
    assert all("*" not in pattern and not pattern.endswith((".bin", ".pth", ".py")) for pattern in asked[1])


@pytest.mark.parametrize(
    "name", ["", "nowhere", "a/b/c", "../a/b", "./nowhere", "/nowhere/at/all", "owner/", "a b/c", ".a/b"])
def test_neither_folder_nor_hub_id(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no folder and no hub id"):
        locate(name)


# ------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
import torch
import ref.checkpoint

def resident_bytes(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

small, large, dtype, hoard = sys.argv[1:]
if hoard == "hoard":  # the negative control: all shards are kept until the model is whole
    read, kept = ref.checkpoint.read_tensors, []
    def read_and_keep(path, *, device):
        for name, tensor in read(path, device=device):
            kept.append(tensor.clone())
            yield name, tensor
    ref.checkpoint.read_tensors = read_and_keep
load = lambda folder: ref.checkpoint.load_model(Path(folder), device=torch.device("cpu"), dtype=getattr(torch, dtype))
load(small)
before = resident_bytes("VmRSS")
model = load(large)
print(resident_bytes("VmHWM") - before - sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of 200 MB, fp32, and the bytes of its largest shard."""
    folder = tmp_path_factory.mktemp("sharded")
    arch = Architecture(vocab_size=4000, width=512, layers=15, heads=8, kv_heads=2, head_width=64, ffn_width=1600)
    save_model(Mistral(arch), folder, dtype=torch.float32, shard_bytes=25 * 10**6)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) > 190 * 10**6 and len(sizes) >= 8
    return folder, max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("dtype", "hoard"), [("float32", ""), ("bfloat16", ""), ("float32", "hoard")])
def test_peak_memory(dtype: str, hoard: str, sharded: tuple[Path, int], tiny_checkpoint: Checkpoint) -> None:
    """Beyond the model: at most 1.1 of the largest shard, and 4 MB that the interpreter may have taken meanwhile."""
    folder, largest_shard = sharded
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tiny_checkpoint()), str(folder), dtype, hoard],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout)
    print(f"{beyond / 1e6:.1f} MB beyond the model, largest shard {largest_shard / 1e6:.1f} MB")
    assert (beyond <= 1.1 * largest_shard + 4e6) == (hoard == "")
