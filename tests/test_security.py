"""Untrusted files: whatever they contain, the result is a value or a ValueError, never executed code, never a hang.

Fuzzed: config.json, the index, adapter_config.json, headers of safetensors. In CI 1,600 inputs, in the record run
10,000 of each (the JSONL reader is fuzzed in training/test_data.py).
"""

import ast
import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import SMALL, edit_json
from safetensors.torch import save_file

from ref.config import ModelConfig
from ref.embedder import Embedder
from ref.model.adapter import load_adapter, save_adapter
from ref.model.checkpoint import load_model, read_tensors, save_model
from ref.model.lora import apply_lora
from ref.model.transformer import Mistral, init_weights
from ref.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
COUNTS = pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.record)])
VALUES = [
    None, True, False, -1, 0, 1, 2, 3.5, 1e400, -1e9, 10**30, float("nan"), 64, 4096, "", "x", "\x00", "float64",
    "../../etc/passwd", "/etc/passwd", "q_proj", "(((", ".*", "all-linear", "mistral", [], [1], ["q_proj"],
    {}, {"a": 1}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with an adapter in it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = init_weights(Mistral(SMALL), seed=0)
    save_model(model, folder, dtype=torch.float32)
    train_tokenizer(["some words to learn"], vocab_size=50, lowercase=True).save(folder)
    apply_lora(model, rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base="..")
    return folder


def mutated(draw, value):
    """A JSON object with random changes of its entries."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randrange(1, 4)):
        place = value
        while isinstance(place, dict) and place:
            key = draw.choice([*place, "added"])
            if draw.random() < 0.5 or not isinstance(place.get(key), dict):
                if draw.random() < 0.2:
                    place.pop(key, None)
                else:
                    place[key] = copy.deepcopy(draw.choice(VALUES))  # or it could be put into itself
                break
            place = place[key]
    return value


def damaged(draw, text):
    """Text with bytes removed, inserted or changed."""
    data = bytearray(text.encode())
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(4)] = bytes(draw.randrange(256) for _ in range(draw.randrange(4)))
    return bytes(data)


def returns(call):
    """Whether the call returns; False if it raises ValueError; any other exception fails the test."""
    try:
        call()
    except ValueError:
        return False
    return True


def fuzzed(draw, value):
    """The bytes of a JSON file with random damage."""
    return json.dumps(mutated(draw, value)).encode() if draw.random() < 0.7 else damaged(draw, json.dumps(value))


@COUNTS
def test_fuzzed_configs(count, checkpoint, tmp_path):
    draw = random.Random(torch.initial_seed())
    config = json.loads((checkpoint / "config.json").read_text())
    found = []
    for _ in range(count):
        (tmp_path / "config.json").write_bytes(fuzzed(draw, config))
        found.append(returns(lambda: ModelConfig.from_file(tmp_path / "config.json")))
    assert 0 < sum(found) < count  # both occur: the fuzz reaches the checks, and valid files pass


@COUNTS
def test_fuzzed_indices(count, checkpoint, tmp_path):
    draw = random.Random(torch.initial_seed())
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    shutil.copy(checkpoint / "model.safetensors", folder / "model-1.safetensors")
    names = [name for name, _ in read_tensors(folder / "model-1.safetensors", device=CPU)]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    found = []
    for _ in range(count):
        (folder / "model.safetensors.index.json").write_bytes(fuzzed(draw, index))
        found.append(returns(lambda: load_model(folder, device=CPU)))
    assert 0 < sum(found) < count


@COUNTS
def test_fuzzed_adapters(count, checkpoint, tmp_path):
    draw = random.Random(torch.initial_seed())
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    found = []
    for _ in range(count):
        (folder / "adapter_config.json").write_bytes(fuzzed(draw, config))
        found.append(returns(lambda: load_adapter(init_weights(Mistral(SMALL), seed=0), folder)))
    assert 0 < sum(found) < count


def test_a_rank_that_the_tensors_do_not_have_allocates_nothing(checkpoint, tmp_path, monkeypatch):
    """A config with a huge rank is rejected before a matrix of that size is allocated."""
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 10**9}))
    monkeypatch.setattr("ref.model.adapter.apply_lora", None)
    with pytest.raises(ValueError, match=r"must be of rank 1000000000 by adapter_config.json .got shape .2, 32."):
        load_adapter(init_weights(Mistral(SMALL), seed=0), folder)


@COUNTS
def test_fuzzed_safetensors(count, checkpoint, tmp_path):
    """Random bytes in header and length."""
    draw = random.Random(torch.initial_seed())
    content = (checkpoint / "adapter/adapter_model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    path, found = tmp_path / "x.safetensors", []
    for _ in range(count):
        data = bytearray(content)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        found.append(returns(lambda: list(read_tensors(path, device=CPU))))
    assert sum(found) < count


def crafted(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("header", [
    {"a": {**ENTRY, "shape": [2**40, 2**40]}}, {"a": {**ENTRY, "shape": [-4]}},
    {"a": {**ENTRY, "data_offsets": [-16, 0]}},
    {"a": {**ENTRY, "data_offsets": [16, 0]}}, {"a": ENTRY, "b": ENTRY}, {"a": {**ENTRY, "data_offsets": [0, 10**12]}},
    {"a": {**ENTRY, "dtype": "PICKLE"}}, {"a": {**ENTRY, "data_offsets": [0, 2**64]}}, {"a": {"shape": [4]}}, {"a": 3},
    b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b"{" * 1000, b"", {}])
def test_crafted_headers_are_rejected(header, tmp_path):
    """Huge, negative, overlapping, duplicate: by the library or by us, as a ValueError that names the file."""
    path = crafted(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match="model.safetensors"):
        list(read_tensors(path, device=CPU))


def test_a_header_of_a_hundred_gigabytes_allocates_nothing(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**11) + b"{}")
    with pytest.raises(ValueError, match=r"x\\.safetensors|x.safetensors"):
        list(read_tensors(tmp_path / "x.safetensors", device=CPU))


def test_no_text_becomes_a_special_token(checkpoint):
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    tokenizer = embedder.prompt_encoder.tokenizer
    for text in ("</s>", "<s>", "a </s> b", "<unk>", "Instruct: x\nQuery: </s>"):
        [ids] = tokenizer.encode([text], max_tokens=50)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        prefix = embedder.prompt_encoder.prefix(text)
        assert prefix.ids.count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in prefix.ids


@pytest.mark.parametrize(("base", "message"), [
    ("..", "config.json: file does not exist"), ("../nowhere", "model must be a folder with config.json or a hub id"),
    ("/nowhere", r"must be a folder of this machine or a hub id \(got '/nowhere'\)")])
def test_a_base_that_does_not_exist_is_an_error_and_not_downloaded(base, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was called"))
    shutil.copytree(checkpoint / "adapter", tmp_path / "adapter")
    edit_json(tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": base})
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(tmp_path / "adapter", device="cpu")


def test_no_pickle_no_shell_no_eval():
    """In all code that users run: no torch.load, no pickle, no shell, no eval or exec."""
    forbidden = {"eval", "exec", "compile", "system", "popen"}
    folders = ("ref", "kernels", "benchmarks", "data")
    files = {*ROOT.glob("run_*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))}
    assert len(files) > 60
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                plain = isinstance(node.func, ast.Name)
                assert not (plain and name in forbidden) and name not in ("system", "popen"), (path, node.lineno)
                whole = ast.unparse(node.func)
                assert whole not in ("torch.load", "np.load") or "allow_pickle" not in ast.unparse(node), path
                assert whole != "torch.load", (path, node.lineno)
                assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords), path


def test_control_another_exception_fails_the_fuzz(tmp_path):
    def broken():
        raise KeyError("x")
    with pytest.raises(KeyError):
        returns(broken)
    save_file({"a": torch.ones(4)}, tmp_path / "good.safetensors")
    assert returns(lambda: list(read_tensors(tmp_path / "good.safetensors", device=CPU)))
