"""Llama checkpoints without biases and with default RoPE: the forward pass of transformers' LlamaModel, and exports."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import edit_json, scatter_weights
from safetensors.torch import load_file, save_file

from ref import Embedder
from ref.config import ModelConfig
from ref.model.checkpoint import load_model
from ref.model.packing import pack_sequences
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import train_tokenizer
from ref.training.export import export_model

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def random_llama(folder: Path, draw: random.Random, **changes) -> torch.nn.Module:
    """A random configuration of transformers' Llama, saved; tied or untied head, or none."""
    kv_heads, head_dim = draw.choice([1, 2, 3]), draw.choice([4, 6, 10])
    heads = kv_heads * draw.choice([1, 2, 3])
    config = transformers.LlamaConfig(**{
        "vocab_size": 61, "hidden_size": heads * draw.choice([4, 6, 10]), "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": draw.choice([24, 48]), "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "rope_theta": draw.choice([1e4, 1e5]), "tie_word_embeddings": draw.random() < 0.5, **changes})
    kind = draw.choice([transformers.LlamaModel, transformers.LlamaForCausalLM])
    model = kind(config).eval()
    scatter_weights(model, spread=0.7)
    model.save_pretrained(folder)
    return model if kind is transformers.LlamaModel else model.model


@pytest.mark.parametrize("case", range(24))
def test_hidden_states_equal_transformers(tmp_path, seed, case):
    draw = random.Random(f"{seed} {case}")
    theirs = random_llama(tmp_path / "model", draw)
    ours = load_model(tmp_path / "model", device=CPU, dtype=torch.float32)
    assert ours.config.sliding_window is None and ours.config.model_type == "llama"
    assert ours.config.num_parameters == sum(parameter.numel() for parameter in ours.parameters())
    texts = [[draw.randrange(61) for _ in range(draw.randrange(1, 30))] for _ in range(5)]
    with torch.no_grad():
        hidden_TD = ours.norm(ours(pack_sequences(texts, device=CPU), every_token=True))
        truth_TD = torch.cat([theirs(torch.tensor([text])).last_hidden_state[0] for text in texts])
    assert (hidden_TD - truth_TD).abs().max() <= 1e-5 * truth_TD.abs().max()


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_embeddings_that_are_stored_as_the_head_alone(tmp_path, is_tied):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        tie_word_embeddings=is_tied))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    assert torch.equal(again, theirs.model.embed_tokens.weight) == is_tied
    if is_tied:
        assert torch.equal(load_model(tmp_path, device=CPU).embed_tokens.weight, again)
    else:
        with pytest.raises(ValueError, match=r"1 of 11 tensors are missing, the first is embed_tokens\.weight"):
            load_model(tmp_path, device=CPU)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention_bias": True}, "attention_bias True is not supported"),
    ({"mlp_bias": True}, "mlp_bias True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": ...}, "rope_type 'llama3' is not"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}, "rope_type 'linear' is not"),
    ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification' is not supported"),
    ({"architectures": ["MistralModel"]}, "architecture 'MistralModel' is not supported"),
    ({"eos_token_id": "2"}, "'eos_token_id' must be a token id"),
], ids=lambda value: str(value)[:40])
def test_other_variants_are_rejected_with_field_and_value(tmp_path, changes, message):
    random_llama(tmp_path / "model", random.Random(0))
    edit_json(tmp_path / "model/config.json", changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        ModelConfig.from_file(tmp_path / "model/config.json")


def test_an_export_loads_in_transformers_and_sentence_transformers_with_equal_embeddings(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    texts = ["the river", "a much longer text about the river and the boats on it", "x"]
    tokenizer = train_tokenizer(texts * 20, vocab_size=60, lowercase=True)
    random_llama(tmp_path / "model", random.Random(3), vocab_size=tokenizer.vocab_size, hidden_size=36)
    tokenizer.save(tmp_path / "model")
    model = load_model(tmp_path / "model", device=CPU, dtype=torch.float32)
    export_model(model, PromptEncoder(tokenizer), {"task": "Find it."}, tmp_path / "exported")
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["architectures"] == ["LlamaModel"] and "sliding_window" not in config
    ours = Embedder.from_pretrained(tmp_path / "exported", device="cpu")
    theirs = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=2e-6)
    queries = ours.encode(texts, instruction="Find it.")
    np.testing.assert_allclose(queries, theirs.encode(texts, prompt_name="task"), atol=2e-6)
    assert transformers.AutoModel.from_pretrained(tmp_path / "exported").config.model_type == "llama"


def test_a_llama_config_is_written_and_read_alike():
    config = SimpleNamespace(**ModelConfig(model_type="llama", sliding_window=None, bos_token_id=None).to_json())
    assert (config.model_type, config.bos_token_id, config.eos_token_id) == ("llama", None, 2)
