"""Published checkpoints by their name: the same vectors as sentence-transformers, other vocabularies, missing files."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mistral_tokenizer import mistral
from tiny_mteb import write_json

from ref import embedder as embedder_module
from ref.embedder import Embedder
from ref.model.known_models import KNOWN_MODELS
from ref.text.prompts import TEMPLATES, PromptEncoder
from ref.text.tokenizer import train_tokenizer
from ref.training.model_source import declared_template

TASK = "Given a question, retrieve passages that answer it"
TEXTS = ["how do magnets work", "  two  spaces", "a line\nand another", "日本語の文", "x" * 3000]


def write_checkpoint(folder: Path, *, vocab_size: int, eos_by_tokenizer: bool, padding_side: str) -> None:
    """A small Mistral with random weights in the layout of a published repository, sentence-transformers' files too."""
    transformers = pytest.importorskip("transformers")
    markers = ("<instruct>", "<query>", "<response>") if vocab_size == 32003 else ()
    tokens = mistral(markers=markers)
    config = transformers.MistralConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=64, max_position_embeddings=4096)
    theirs = transformers.MistralModel(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    theirs.save_pretrained(folder)
    tokens.save(folder)
    layout = json.loads((folder / "tokenizer.json").read_text())
    if not eos_by_tokenizer:  # as in an older e5-mistral: the caller appends </s>
        layout["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": padding_side}))
    write_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 4096, "do_lower_case": False})
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode": "lasttoken"})


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize(("eos_by_tokenizer", "padding_side"), [(True, "right"), (True, "left"), (False, "left")])
def test_a_published_model_has_the_vectors_of_sentence_transformers(
        name: str, eos_by_tokenizer: bool, padding_side: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Template, `</s>` and vocabulary of each known model, whether or not the tokenizer's file adds the end token."""
    library = pytest.importorskip("sentence_transformers")
    write_checkpoint(tmp_path, vocab_size=KNOWN_MODELS[name].vocab_size, eos_by_tokenizer=eos_by_tokenizer,
                     padding_side=padding_side)
    monkeypatch.setattr(embedder_module, "resolve_checkpoint", lambda _: tmp_path)
    ours = Embedder.from_pretrained(name, max_text_tokens=3000, device="cpu")
    prompt = "<instruct>{0}\n<query>{1}\n<response>" if "bge" in name else "Instruct: {0}\nQuery: {1}"
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    end = "" if eos_by_tokenizer else "</s>"
    start = "" if eos_by_tokenizer else "<s>"
    for instruction in (TASK, None):
        strings = [start + (prompt.format(instruction, text) if instruction else text) + end for text in TEXTS]
        mine = ours.encode(TEXTS, instruction=instruction)
        other = theirs.encode(strings, normalize_embeddings=True)
        assert (mine * other).sum(1).min() >= 0.99999
    without_end = theirs.encode([prompt.format(TASK, text) for text in TEXTS], normalize_embeddings=True)
    if not eos_by_tokenizer:  # negative control: without the end token the vectors differ
        assert (ours.encode(TEXTS, instruction=TASK) * without_end).sum(1).max() < 0.999


def test_a_checkpoint_with_another_vocabulary_than_its_name_implies(tmp_path: Path, monkeypatch: Any) -> None:
    write_checkpoint(tmp_path, vocab_size=32000, eos_by_tokenizer=True, padding_side="right")
    monkeypatch.setattr(embedder_module, "resolve_checkpoint", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"bge-en-icl: the embedding must have 32003 rows \(got 32000\)"):
        Embedder.from_pretrained("BAAI/bge-en-icl", device="cpu")


def test_an_incomplete_download(tmp_path: Path, monkeypatch: Any) -> None:
    write_checkpoint(tmp_path, vocab_size=32000, eos_by_tokenizer=True, padding_side="right")
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(embedder_module, "resolve_checkpoint", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        Embedder.from_pretrained("intfloat/e5-mistral-7b-instruct", device="cpu")


@pytest.mark.parametrize(("name", "template"), [
    ("BAAI/bge-en-icl", "bge-en-icl"), ("annamodels/LGAI-Embedding-Preview", None), ("mistralai/Mistral-7B-v0.1", None),
    ("somebody/else", "bge-en-icl")])
def test_the_template_that_training_finds_declared(name: str, template: str | None, tmp_path: Path) -> None:
    """A known model's, whatever markers its vocabulary has; `paper`, the default, is nothing to note."""
    markers = TEMPLATES["bge-en-icl"].markers
    tokenizer = train_tokenizer(["a text"], vocab_size=40, lowercase=True, special_tokens=markers)
    source = SimpleNamespace(name=name, config=None, folder=tmp_path)
    assert declared_template(source, PromptEncoder(tokenizer)) == template
