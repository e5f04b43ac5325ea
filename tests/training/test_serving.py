"""What other programs do with an exported folder: sentence-transformers itself, and the fields that servers read.

vLLM and text-embeddings-inference are not installed here. The two readers below follow their documentation and the
structures that their code parses: docs/serving.md.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_training_lines

import run_train
from ref import Embedder
from ref.config import ModelConfig
from ref.model.transformer import Mistral, init_weights
from ref.text.prompts import PromptEncoder
from ref.text.tokenizer import Tokenizer
from ref.training.export import export_model

WORDS = "anna bert carl dora baker smith tailor miner lisbon oslo turin ghent sings paints".split()  # noqa: SIM905
LIMIT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    """A retrieval task and another one, texts of at most LIMIT tokens; an adapter on random weights, and merged."""
    folder = tmp_path_factory.mktemp("serving")
    rows = draw_training_lines(WORDS, {"Jobs": "Find the passage.", "Towns": "Same town."}, 32)
    rows = [{**row, "type": "normal" if row["task"] == "Jobs" else "symmetric_sts"} for row in rows]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_type": "mistral", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_train.main(["--data", str(folder / "some.jsonl"), "--model", str(folder / "config.json"), "--steps", "2",
                           "--output", str(folder / "run"), "--train", "lora", "--merge", "--device", "cpu",
                           "--max-text-tokens", str(LIMIT)]) == 0
    return folder / "run"


def test_sentence_transformers(run: Path) -> None:
    """Queries, documents, similarity, prompts and shorter vectors."""
    library = pytest.importorskip("sentence_transformers")
    model, ours = library.SentenceTransformer(str(run / "merged"), device="cpu"), Embedder.from_pretrained(run)
    queries, passages = WORDS[:4], [" ".join(WORDS), "anna", ""]
    query_QD, passage_PD = ours.encode(queries, instruction="Find the passage."), ours.encode(passages)
    np.testing.assert_allclose(model.encode_query(queries), query_QD, atol=2e-6)
    np.testing.assert_allclose(model.encode_document(passages), passage_PD, atol=2e-6)
    np.testing.assert_allclose(model.similarity(query_QD, passage_PD), query_QD @ passage_PD.T, atol=2e-6)
    np.testing.assert_allclose(model.encode(queries, prompt_name="Towns"),
                               ours.encode(queries, instruction="Same town."), atol=2e-6)
    short = query_QD[:, :8], passage_PD[:, :8]
    np.testing.assert_allclose(model.encode_document(passages, truncate_dim=8), short[1], atol=2e-6)
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in short]
    np.testing.assert_allclose(model.similarity(*short), units[0] @ units[1].T, atol=2e-6)
    np.testing.assert_allclose(
        model.encode_document(passages, truncate_dim=8, normalize_embeddings=True), units[1], atol=2e-6)


@pytest.mark.parametrize("bos", [True, False])
def test_the_library_truncates_where_we_do(bos: bool, tmp_path: Path) -> None:
    """A text of more tokens than the limit, with and without a begin token."""
    library = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = ["<s>", "</s>", "<unk>", *WORDS]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(inner, bos="<s>" if bos else None, eos="</s>")
    config = ModelConfig(vocab_size=len(vocabulary), hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2,
                         head_dim=8, intermediate_size=48, dtype="float32", bos_token_id=0 if bos else None,
                         eos_token_id=1)
    model = init_weights(Mistral(config), seed=0)
    export_model(model, PromptEncoder(tokenizer, max_text_tokens=LIMIT), {}, tmp_path / "model")
    ours = Embedder.from_pretrained(tmp_path / "model", device="cpu")
    peer = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [" ".join((WORDS * 3)[:count]) for count in (LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT)]
    np.testing.assert_allclose(ours.encode(texts), peer.encode(texts), atol=2e-6)
    assert np.abs(ours.encode(texts[:1]) - ours.encode(texts[1:2])).max() > 1e-3  # control: one token more shows
    (tmp_path / "model/embedder.json").unlink()  # as any sentence-transformers model: the limit is read back
    assert Embedder.from_pretrained(tmp_path / "model").prompt_encoder.max_text_tokens == LIMIT


def vllm_reads(folder: Path) -> dict[str, Any]:
    """Pooling, normalisation and length: modules.json, the true fields of the pooling module, sentence_bert_config."""
    modules = json.loads((folder / "modules.json").read_text())
    [pooling] = [module for module in modules if module["type"] == "sentence_transformers.models.Pooling"]
    fields = json.loads((folder / pooling["path"] / "config.json").read_text())
    modes = [name.removeprefix("pooling_mode_") for name, value in fields.items()
             if value is True and name.startswith("pooling_mode_")]
    lengths = json.loads((folder / "sentence_bert_config.json").read_text())
    return {"pooling": modes, "normalise": any(module["type"].endswith(".Normalize") for module in modules),
            "length": lengths["max_seq_length"], "lowercase": lengths["do_lower_case"]}


def test_the_fields_that_vllm_reads(run: Path) -> None:
    for folder in (run / "merged", run / "adapter"):
        assert vllm_reads(folder) == {"pooling": ["lasttoken"], "normalise": True, "length": LIMIT + 2,
                                      "lowercase": False}
    config = json.loads((run / "merged/config.json").read_text())
    assert config["architectures"] == ["MistralModel"] and config["max_position_embeddings"] >= LIMIT + 2


def test_the_fields_that_text_embeddings_inference_reads(run: Path) -> None:
    """Its structures have no default for most fields: a missing one is an error there."""
    config = json.loads((run / "merged/config.json").read_text())
    assert isinstance(config["architectures"], list) and not config["architectures"][0].endswith("Classification")
    assert isinstance(config["max_position_embeddings"], int) and config["model_type"] == "mistral"
    assert "pad_token_id" not in config  # must be a number where it is present
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "hidden_act", "initializer_range", "rms_norm_eps", "rope_theta"):
        assert config[field], field
    pooling = json.loads((run / "merged/1_Pooling/config.json").read_text())
    modes = {mode: pooling[f"pooling_mode_{mode}"] for mode in (
        "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")}
    assert [mode for mode, value in modes.items() if value] == ["lasttoken"]
    assert json.loads((run / "merged/sentence_bert_config.json").read_text())["max_seq_length"] == LIMIT + 2
    tokenizer = json.loads((run / "merged/tokenizer.json").read_text())
    assert tokenizer["post_processor"], "adds the begin and end tokens"
    prompts = json.loads((run / "merged/config_sentence_transformers.json").read_text())["prompts"]
    assert all(isinstance(text, str) for text in prompts.values())
    assert {path.suffix for path in run.joinpath("merged").glob("model*")} == {".safetensors"}
