"""Embedder: duplicates embedded once, order, windows, and a bound on the host's memory."""

import json
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL

from ref import embedder as module
from ref.embedder import Embedder, check_vocab
from ref.model.transformer import Mistral, init_weights
from ref.text.prompts import InContextExample, PromptEncoder
from ref.text.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture
def small_embedder() -> Embedder:
    tokenizer = train_tokenizer(["tea and cake", "cake and ale"] * 5, vocab_size=SMALL.vocab_size, lowercase=True)
    return Embedder(init_weights(Mistral(SMALL), seed=0), PromptEncoder(tokenizer), tokens_per_batch=64)


def test_windows_change_nothing(small_embedder, monkeypatch):
    draw = np.random.default_rng(torch.initial_seed() % 2**32)
    texts = [" ".join(draw.choice(["tea", "and", "cake", "ale"], draw.integers(0, 9))) for _ in range(60)]
    whole = small_embedder.encode(texts, instruction="cake")
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 7)
    np.testing.assert_allclose(small_embedder.encode(texts, instruction="cake"), whole, atol=2e-6)
    for n, text in enumerate(texts):
        np.testing.assert_array_equal(whole[n], whole[texts.index(text)])


def test_vectors_with_a_batch_for_each_core_are_those_with_one_thread(small_embedder: Embedder, monkeypatch):
    """And no thread keeps anything for backward."""
    embed, without_gradient = module.embed, set()

    def watched(*inputs: Any, **options: Any) -> torch.Tensor:
        without_gradient.add(torch.is_inference_mode_enabled())
        return embed(*inputs, **options)
    monkeypatch.setattr(module, "embed", watched)
    texts = [f"{'tea ' * (n % 9)}{n}" for n in range(200)]
    few, threads = texts[:3], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = small_embedder.encode(texts, instruction="cake"), small_embedder.encode(few)
        torch.set_num_threads(4)
        np.testing.assert_allclose(small_embedder.encode(texts, instruction="cake"), alone[0], atol=2e-6)
        np.testing.assert_allclose(small_embedder.encode(few), alone[1], atol=2e-6)
        assert torch.get_num_threads() == 4 and without_gradient == {True}
    finally:
        torch.set_num_threads(threads)


def test_instruction_and_examples_change_the_vectors(small_embedder, small_model):
    """The shared prefix is used; a passage has none."""
    small_embedder.model = small_model(sliding_window=None)
    texts = ["tea and ale", "cake"]
    example = InContextExample("tea", "ale and cake")
    kinds = [small_embedder.encode(texts), small_embedder.encode(texts, instruction="cake"),
             small_embedder.encode(texts, instruction="cake", examples=[example])]
    assert all(vectors.shape == (2, small_embedder.embedding_dim) for vectors in kinds)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(kinds), axis=1), 1, atol=1e-6)
    for n in range(3):
        assert np.abs(kinds[n] - kinds[n - 1]).max() > 1e-3


@pytest.mark.parametrize("texts", ["tea", [3], ["tea", None]])
def test_texts_must_be_strings(texts, small_embedder):
    with pytest.raises(ValueError, match=r"texts must be a sequence of str \(got "):
        small_embedder.encode(texts)


def test_no_texts(small_embedder):
    assert small_embedder.encode([]).shape == (0, SMALL.hidden_size)
    assert small_embedder.encode([], instruction="cake").shape == (0, SMALL.hidden_size)


@pytest.mark.parametrize("progress", [False, True])
def test_progress_counts_distinct_texts(progress, small_embedder, monkeypatch):
    bars = []

    def progress_bar(**options):
        bars.append([options, 0, "open"])
        return SimpleNamespace(update=lambda count: bars[0].__setitem__(1, bars[0][1] + count),
                               set_postfix_str=lambda text, refresh: bars[0].append(text.split()[-1]),
                               close=lambda: bars[0].__setitem__(2, "closed"))
    monkeypatch.setattr(module, "progress_bar", progress_bar)
    small_embedder.encode(["tea", "ale", "tea"], progress=progress)
    before = small_embedder.num_tokens
    assert bars[0][:3] == [{"desc": "encoding", "total": 2, "unit": "text", "enabled": progress}, 2, "closed"]
    assert set(bars[0][3:]) == {"tokens/s"}
    small_embedder.encode(["tea", "tea"])
    [ids] = small_embedder.prompt_encoder.encode(["tea"], small_embedder.prompt_encoder.prefix(None))
    assert small_embedder.num_tokens - before == 1 + len(ids)  # with <s>


def test_any_sequence_is_read_in_its_own_order(small_embedder):
    """A pandas Series answers texts[n] by label: shuffled, with gaps, with text labels."""
    pandas = pytest.importorskip("pandas")
    texts = ["tea", "ale", "a cat", "the river", "b"]
    truth = small_embedder.encode(texts)
    series = pandas.Series(texts).iloc[[3, 0, 4]]
    for given, order in ((series, [3, 0, 4]), (series.set_axis(["x", "y", "z"]), [3, 0, 4]),
                         (np.array(texts), range(5)), (tuple(texts), range(5)), ((t for t in texts), range(5))):
        np.testing.assert_allclose(small_embedder.encode(given), truth[list(order)], atol=1e-6)


@pytest.mark.parametrize("texts", [{"tea"}, {"tea": "ale"}, "tea", b"tea", 3, None, ["tea", None], ["tea", 1.5]],
                         ids=repr)
def test_what_is_no_sequence_of_texts_is_rejected(small_embedder, texts):
    with pytest.raises(ValueError, match=r"^texts must be a sequence of str \(got "):
        small_embedder.encode(texts)


def test_a_table_is_rejected(small_embedder):
    """Its iterator gives the names of the columns."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="texts must be a sequence of str"):
        small_embedder.encode(pandas.DataFrame({"text": ["tea", "ale"], "other": ["cake", "tea"]}))


@pytest.mark.parametrize(("prompt", "message"), [
    ({"instruction": ["Who?", "What?"]}, r"instruction must be a str for all texts, or None \(got \['Who"),
    ({"instruction": 5}, r"instruction must be a str"),
    ({"instruction": "Who?", "examples": [("tea", "ale")]}, r"must be InContextExample\(query, response\)"),
    ({"instruction": "Who?", "examples": [InContextExample("tea", None)]}, "of two str"),
    ({"examples": [InContextExample("tea", "ale")]}, r"examples are of a task, so they need its instruction")])
def test_what_is_no_prompt_is_rejected(small_embedder, prompt, message):
    with pytest.raises(ValueError, match=message):
        small_embedder.encode(["tea"], **prompt)


def test_a_weight_that_is_not_a_number_is_an_error_with_the_text(small_embedder):
    with torch.no_grad():
        small_embedder.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the embedding of 'tea' is not finite; check the weights"):
        small_embedder.encode(["tea"])


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(small_embedder):
    model = Mistral(replace(SMALL, vocab_size=9))
    with pytest.raises(ValueError, match=r"the tokenizer must have at most 9 tokens.* \(got \d+\)"):
        check_vocab(model, small_embedder.prompt_encoder.tokenizer)


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": "float16"}, r"dtype must be auto, bfloat16 or float32 \(got 'float16'\)"),
    ({"device": "tpu"}, r"--device must be cpu or cuda \(got 'tpu'\)"),
    ({"template": "e5"}, r"template must be one of paper, bge-en-icl \(got 'e5'\)"),
    ({"tokens_per_batch": 0}, r"tokens_per_batch must be an integer >= 1 \(got 0\)"),
    ({"tokens_per_batch": 1.5}, r"tokens_per_batch must be an integer >= 1 \(got 1.5\)"),
    ({"max_text_tokens": 0}, r"max_text_tokens must be a number of tokens >= 1 \(got 0\)")])
def test_bad_options(options, message, tiny_checkpoint, small_embedder):
    folder = tiny_checkpoint()
    small_embedder.prompt_encoder.tokenizer.save(folder)
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(folder, **{"device": "cpu", **options})


def test_the_token_limit_that_only_sentence_transformers_file_declares(tiny_checkpoint, small_embedder):
    """It includes begin and end token."""
    folder = tiny_checkpoint()
    small_embedder.prompt_encoder.tokenizer.save(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert embedder.prompt_encoder.max_text_tokens == 3
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    with pytest.raises(ValueError, match=r"config\.json: 'max_seq_length' must be an integer >= 3 \(got 2"):
        Embedder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(("declared", "tokens"), [(100, 98), (10**30, 510), (None, 512)])
def test_the_token_limit_of_sentence_transformers_6(tiny_checkpoint, small_embedder, declared, tokens):
    """The tokenizer's, at most the model's; not that of a folder without modules.json."""
    folder = tiny_checkpoint()
    small_embedder.prompt_encoder.tokenizer.save(folder)
    for name, changes in (("config.json", {"max_position_embeddings": 512}),
                          ("tokenizer_config.json", {"model_max_length": declared})):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    assert Embedder.from_pretrained(folder, device="cpu").prompt_encoder.max_text_tokens == 512
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}]')
    assert Embedder.from_pretrained(folder, device="cpu").prompt_encoder.max_text_tokens == tokens
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "model_max_length": "512"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: 'model_max_length' must be an integer >= 3"):
        Embedder.from_pretrained(folder, device="cpu")


def test_a_folder_that_pools_the_last_word(tiny_checkpoint, small_embedder):
    """sentence-transformers, whose folder it is, adds no end token there: its vectors are others."""
    folder = tiny_checkpoint()
    small_embedder.prompt_encoder.tokenizer.save(folder)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer"}]')
    Embedder.from_pretrained(folder, device="cpu")
    layout = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**layout, "post_processor": None}))
    with pytest.raises(ValueError, match="pools the last word, which is not supported: neither the post-processor"):
        Embedder.from_pretrained(folder, device="cpu")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_eos_token": True}))
    Embedder.from_pretrained(folder, device="cpu")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "modules.json").unlink()
    Embedder.from_pretrained(folder, device="cpu")  # a language model, which gets an end token here


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_padding_token_needs_no_row(tmp_path, small_embedder, file):
    """The usual form of a Llama to which one was added without resizing; another token needs one."""
    small_embedder.prompt_encoder.tokenizer.save(tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    rows = len(layout["model"]["vocab"])
    layout["added_tokens"].append({**layout["added_tokens"][0], "id": rows, "content": "[PAD]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    model = Mistral(replace(SMALL, vocab_size=rows))
    with pytest.raises(ValueError, match=rf"the tokenizer must have at most {rows} tokens.* \(got {rows + 1}\)"):
        check_vocab(model, Tokenizer.from_folder(tmp_path))
    settings = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps({**settings, "pad_token": {"content": "[PAD]"}}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    check_vocab(model, tokenizer)
    assert max(tokenizer.encode(["[PAD] tea"], max_tokens=99)[0]) < rows
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")  # its padding token is EOS
    copy = Tokenizer.from_folder(tmp_path / "copy")
    check_vocab(model, copy)
    assert copy.encode(["tea and [PAD]"], max_tokens=99) == tokenizer.encode(["tea and [PAD]"], max_tokens=99)
    layout["model"]["vocab"]["[PAD]"] = rows  # listed there too
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    Tokenizer.from_folder(tmp_path).save(tmp_path / "copy")
    check_vocab(model, Tokenizer.from_folder(tmp_path / "copy"))


def test_an_export_counts_the_vocabulary_once(tmp_path, small_embedder, monkeypatch):
    """Not once per token: with 49,152 tokens that took ten minutes."""
    calls, tokenizer = [], small_embedder.prompt_encoder.tokenizer
    monkeypatch.setattr(Tokenizer, "num_ids", property(lambda self: calls.append(1) or self.vocab_size))
    tokenizer.save(tmp_path)
    assert calls == [1]


def test_a_name_that_is_too_long_for_a_path_is_no_model():
    with pytest.raises(ValueError, match=r"model must be a folder with config\.json or a hub id"):
        Embedder.from_pretrained("x" * 5000, device="cpu")


def test_from_pretrained(tiny_checkpoint, small_embedder):
    folder = tiny_checkpoint()
    small_embedder.prompt_encoder.tokenizer.save(folder)
    embedder = Embedder.from_pretrained(folder, device="cpu", max_text_tokens=7)
    assert embedder.prompt_encoder.max_text_tokens == 7 and embedder.precision == "torch.float32 cpu"
    assert (embedder.backend, embedder.device.type, embedder.model.training) == ("chunked", "cpu", False)
    assert Embedder.from_pretrained(folder, device="cpu", dtype="bfloat16").precision == "torch.bfloat16 cpu"


def test_memory_besides_the_vectors_is_32_bytes_a_text_and_two_windows(small_embedder, monkeypatch):
    """200,000 short texts, a third of them duplicates; without the model, which is not measured."""
    monkeypatch.setattr(module, "embed", lambda model, packed, **_: torch.ones(len(packed.lengths), SMALL.hidden_size))
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 2000)
    texts = [f"tea {n % 130_000}" for n in range(200_000)]
    tracemalloc.start()
    vectors = small_embedder.encode(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    two_windows = 2 * 2000 * 400
    assert vectors.nbytes < peak <= vectors.nbytes + 32 * len(texts) + two_windows


def test_control_token_ids_of_all_texts_at_once_exceed_the_bound(small_embedder, monkeypatch):
    monkeypatch.setattr(module, "embed", lambda model, packed, **_: torch.ones(len(packed.lengths), SMALL.hidden_size))
    monkeypatch.setattr(module, "TEXTS_PER_WINDOW", 10**9)
    texts = [f"tea {n}" for n in range(20_000)]
    tracemalloc.start()
    vectors = small_embedder.encode(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > vectors.nbytes + 32 * len(texts) + 2 * 2000 * 400
