"""What a checkpoint declares about its embeddings is computed so, or rejected by file, name and value."""

import json

import pytest
import torch

from ref.model.adapter import load_model_chain

CPU = torch.device("cpu")


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def modules(*kinds):
    return [{"idx": n, "name": str(n), "path": "" if n == 0 else f"{n}_{kind}",
             "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(("files", "message"), [
    ({"modules.json": modules("Transformer", "Pooling", "Dense", "Normalize")},
     r"modules\.json: module 'sentence_transformers\.models\.Dense' is not supported "
     r"\(only sentence_transformers' Transformer, Pooling, Normalize\)"),
    ({"modules.json": [{"type": "custom_st.Head"}]}, "module 'custom_st.Head' is not supported"),
    ({"modules.json": [{"type": "custom_st.Transformer"}]}, "module 'custom_st.Transformer' is not supported"),
    ({"modules.json": {}}, r"modules\.json: must be a JSON list \(got dict\)"),
    ({"modules.json": [3]}, r"modules\.json must be a list of objects"),
    ({"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}},
     r"1_Pooling/config\.json: pooling 'mean_tokens' is not supported \(only 'lasttoken'\)"),
    ({"1_Pooling/config.json": {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}}, "'cls_token'"),
    ({"1_Pooling/config.json": {"pooling_mode": "mean"}}, "pooling 'mean' is not supported"),
    ({"1_Pooling/config.json": {"pooling_mode": "lasttoken+max"}}, "pooling 'max' is not supported"),
    ({"1_Pooling/config.json": {"pooling_mode": ["mean", "lasttoken"]}}, "pooling 'mean' is not supported"),
    ({"1_Pooling/config.json": {"embedding_dimension": 32}}, "pooling 'mean, the default,' is not supported"),
    ({}, r"1_Pooling/config\.json: file does not exist, but modules\.json names its folder"),
    ({"config_sentence_transformers.json": {"truncate_dim": 16}},
     r"config_sentence_transformers\.json: truncate_dim 16 is not supported \(only None\)"),
    ({"sentence_bert_config.json": {"do_lower_case": True}},
     r"sentence_bert_config\.json: do_lower_case True is not supported \(only False\)"),
    ({"config_sentence_transformers.json": {"default_prompt_name": "query"}},
     r"config_sentence_transformers\.json: default_prompt_name 'query' is not supported \(only None\)"),
    ({"tokenizer_config.json": {"truncation_side": "left"}}, "truncation_side 'left' is not supported"),
    ({"llm2vec_config.json": {"pooling_mode": "mean"}}, r"llm2vec_config\.json: LLM2Vec's bidirectional models are"),
])
def test_modules_and_pooling(tiny_checkpoint, files, message):
    folder = tiny_checkpoint()
    for name, value in {"modules.json": modules("Transformer", "Pooling", "Normalize"), **files}.items():
        write(folder / name, value)
    with pytest.raises(ValueError, match=message):
        load_model_chain(folder, device=CPU, dtype=None)


@pytest.mark.parametrize("pooling", [
    {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "lasttoken"}])
def test_last_token_pooling_loads(tiny_checkpoint, pooling):
    folder = tiny_checkpoint()
    write(folder / "modules.json", modules("Transformer", "Pooling", "Normalize"))
    write(folder / "1_Pooling/config.json", pooling)
    load_model_chain(folder, device=CPU, dtype=None)


@pytest.mark.parametrize(("field", "value"), [
    ("is_causal", False), ("use_bidirectional_attention", True), ("auto_map", {"AutoModel": "modeling.MyModel"})])
def test_other_attention_and_custom_classes(tiny_checkpoint, field, value):
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {field} .* is not supported"):
        load_model_chain(folder, device=CPU, dtype=None)


def test_the_class_that_an_adapter_was_trained_with(tiny_checkpoint, tmp_path):
    """LLM2Vec's adapters have a config.json of their own, with a bidirectional class."""
    base, folder = tiny_checkpoint(), tmp_path / "adapter"
    config = json.loads((base / "config.json").read_text())
    write(folder / "adapter_config.json", {"base_model_name_or_path": str(base), "peft_type": "LORA"})
    write(folder / "config.json", {**config, "architectures": ["MistralBiModel"]})
    with pytest.raises(ValueError, match=r"adapter/config\.json: architecture 'MistralBiModel' is not supported"):
        load_model_chain(folder, device=CPU, dtype=None)
    (folder / "config.json").unlink()
    write(folder / "adapter_config.json", {"base_model_name_or_path": str(base), "peft_type": "LORA",
                                           "auto_mapping": {"base_model_class": "MistralBiModel"}})
    with pytest.raises(ValueError, match=r"adapter_config\.json: 'auto_mapping' names the class 'MistralBiModel'"):
        load_model_chain(folder, device=CPU, dtype=None)
