"""Byte-level vocabularies (SmolLM2, Tekken): begin and end tokens of the checkpoint, and the space behind a prompt."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from mistral_tokenizer import layout
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ref.text.prompts import InContextExample, PromptEncoder
from ref.text.tokenizer import Tokenizer

PIECES = ["a", "b", "river", "Z", "  ", " ", "\n", "\t", "0", "12", "3.5", "\u00e9", "\u65e5\u672c", "\ud55c",
          "\U0001f469\u200d\U0001f680", "!", "?", ".", "'s", "</s>", "<|im_end|>", "_", "-"]
EXAMPLE = InContextExample("boats  on the river", "a boat")


def texts(count: int) -> list[str]:
    """Unicode, digits, repeated spaces, newlines, control tokens as text; every fiftieth is empty."""
    draw = random.Random(0)
    return ["" if n % 50 == 0 else "".join(draw.choices(PIECES, k=draw.randrange(1, 12))) for n in range(count)]


def checkpoint(folder: Path, *, special: list[str], settings: dict, digits: bool = True, **files: dict) -> Path:
    """A folder with a small byte-level tokenizer, `settings` as tokenizer_config.json, and other JSON files."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(texts(300)), "Instruct: Find it. Query: Response: " * 9], trainer)
    if "post_processor" in files:
        bos = files.pop("post_processor")["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in {"tokenizer_config": settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


SMOLLM2 = {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
           "settings": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}
TEKKEN = {"special": ["<unk>", "<s>", "</s>"], "settings": {"bos_token": "<s>", "eos_token": "</s>"}, "digits": False,
          "post_processor": {"bos": "<s>"}}


@pytest.mark.parametrize("given", [SMOLLM2, TEKKEN], ids=["SmolLM2", "Tekken"])
@pytest.mark.parametrize("examples", [(), (EXAMPLE,)], ids=["no example", "one example"])
def test_prefix_and_text_equal_the_whole_string(tmp_path, given, examples):
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **given))
    encoder = PromptEncoder(tokenizer)
    prefix = encoder.prefix("Find it.", examples)
    before = "".join(f"Instruct: Find it.\nQuery: {e.query}\nResponse: {e.response}\n\n" for e in examples)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in texts(1000):
        whole = tokenizer.encode([f"{before}Instruct: Find it.\nQuery: {text}"], max_tokens=10**4)[0]
        assert [*prefix.ids, *encoder.encode([text], prefix)[0]] == [*bos, *whole, tokenizer.eos_id], text


def test_control_without_the_space_the_ids_differ(tmp_path):
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **SMOLLM2))
    tokenizer.has_word_start = True
    encoder = PromptEncoder(tokenizer)
    prefix = encoder.prefix("Find it.")
    whole = tokenizer.encode(["Instruct: Find it.\nQuery: river"], max_tokens=99)[0]
    assert [*prefix.ids, *encoder.encode(["river"], prefix)[0]][:-1] != whole


@pytest.mark.parametrize(("given", "bos", "eos"), [
    (SMOLLM2, None, "<|im_end|>"),
    (TEKKEN, "<s>", "</s>"),
    ({**SMOLLM2, "settings": {"eos_token": {"content": "<|im_end|>"}}}, None, "<|im_end|>"),
    ({**SMOLLM2, "settings": {}, "config": {"bos_token_id": 0, "eos_token_id": [2, 0]}}, None, "<|im_end|>"),
    ({**SMOLLM2, "settings": {}, "special_tokens_map": {"eos_token": "<|endoftext|>"}}, None, "<|endoftext|>"),
    ({**SMOLLM2, "settings": {**SMOLLM2["settings"], "add_bos_token": True}}, "<|im_start|>", "<|im_end|>"),
    ({**TEKKEN, "settings": {**TEKKEN["settings"], "add_bos_token": False}}, None, "</s>"),
    ({**SMOLLM2, "post_processor": {"bos": "<|im_start|>"}}, "<|im_start|>", "<|im_end|>"),
], ids=str)
def test_begin_and_end_token_are_the_checkpoints_own(tmp_path, given, bos, eos):
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **given))
    assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
    prefix = PromptEncoder(tokenizer).prefix(None)
    assert prefix.ids == (() if bos is None else (tokenizer.bos_id,))
    assert PromptEncoder(tokenizer).encode(["river"], prefix)[0][-1] == tokenizer.token_id(eos)


def test_a_tokenizer_without_an_end_token_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no end token"):
        Tokenizer.from_folder(checkpoint(tmp_path / "model", special=["<|x|>"], settings={}))


@pytest.mark.parametrize("given", [SMOLLM2, TEKKEN], ids=["SmolLM2", "Tekken"])
def test_a_saved_tokenizer_is_read_again_and_transformers_adds_the_same_tokens(tmp_path, given):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **given))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.bos, again.eos, again.has_word_start) == (tokenizer.bos, tokenizer.eos, tokenizer.has_word_start)
    encoder = PromptEncoder(again)
    for text in (text for text in texts(200) if "<" not in text):
        prefix = encoder.prefix(None)
        assert theirs(text)["input_ids"] == [*prefix.ids, *encoder.encode([text], prefix)[0]]


def test_digits_are_split_one_by_one_where_the_checkpoint_says_so(tmp_path):
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **SMOLLM2))
    assert tokenizer.encode(["12345"], max_tokens=9) == [[tokenizer.token_id(digit) for digit in "12345"]]


def test_control_tokens_in_a_text_are_characters(tmp_path):
    tokenizer = Tokenizer.from_folder(checkpoint(tmp_path / "model", **SMOLLM2))
    assert tokenizer.eos_id not in tokenizer.encode(["a<|im_end|>b"], max_tokens=99)[0]


# ---- what the checkpoint's own tokenizer adds ---------------------------------------------------------------


def post_processed(folder: Path, single: str, *tokens: str) -> Path:
    """Give a folder's tokenizer.json a post-processor."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, library.token_to_id(token)) for token in tokens])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("processor", [{}, {"post_processor": {"bos": "<s>"}}], ids=["none", "BOS"])
@pytest.mark.parametrize("settings", [
    {"tokenizer_class": "PreTrainedTokenizerFast"}, {"bos_token": None}, {},
    {"bos_token": None, "add_bos_token": True}, {"tokenizer_class": "GPT2Tokenizer"}], ids=str)
def test_begin_token_exactly_where_transformers_has_one(tmp_path, settings, processor):
    transformers = pytest.importorskip("transformers")
    given = {**TEKKEN, "settings": {**TEKKEN["settings"], **settings}}
    del given["post_processor"]
    folder = checkpoint(tmp_path / "model", **given, **processor)
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    ours = Tokenizer.from_folder(folder)
    assert [ours.token_id(token) for token in [ours.bos, "a"] if token is not None] == theirs


@pytest.mark.parametrize(("settings", "bos"), [
    ({"tokenizer_class": "LlamaTokenizer"}, "<s>"), ({"tokenizer_class": "LlamaTokenizerFast"}, "<s>"),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, None), ({"add_bos_token": True}, "<s>")], ids=str)
def test_begin_token_by_declaration_or_class(tmp_path, settings, bos):
    """Files converted from SentencePiece by transformers 4 have no post-processor: its Llama class adds it later."""
    (tmp_path / "tokenizer.json").write_text(layout())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.from_folder(tmp_path).bos == bos


def by_transformers(folder: Path, text: str) -> list[int]:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text)["input_ids"]


@pytest.mark.parametrize(("single", "tokens"), [
    ("<s> $A <unk>", ["<s>", "<unk>"]), ("$A </s>", ["</s>"]), ("$A <unk>", ["<unk>"]),
    ("<unk> $A </s>", ["<unk>", "</s>"])])
def test_begin_and_end_are_those_of_the_post_processor(tmp_path, single, tokens):
    """Qwen3-Embedding closes texts with another token than eos_token."""
    folder = post_processed(checkpoint(tmp_path / "model", **TEKKEN), single, *tokens)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["padding"] = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(layout))  # stored padding changes nothing
    encoder = PromptEncoder(Tokenizer.from_folder(folder))
    prefix = encoder.prefix(None)
    assert [*prefix.ids, *encoder.encode(["a river"], prefix)[0]] == by_transformers(folder, "a river")


def test_a_post_processor_that_adds_more_is_rejected(tmp_path):
    folder = post_processed(checkpoint(tmp_path / "model", **TEKKEN), "<s> <unk> $A </s>", "<s>", "<unk>", "</s>")
    with pytest.raises(ValueError, match=r"tokenizer\.json: its post-processor must add one token before .*'<unk>'"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_a_token_that_only_a_side_file_lists(tmp_path, file):
    """As older checkpoints store the names they were extended by."""
    folder = checkpoint(tmp_path / "model", **TEKKEN)
    size = Tokenizer.from_folder(folder).vocab_size
    token = {"content": "BRCA1", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
             "special": False}
    values = {"BRCA1": size} if file == "added_tokens.json" else {
        **TEKKEN["settings"], "added_tokens_decoder": {str(size): token}}
    (folder / file).write_text(json.dumps(values))
    found = Tokenizer.from_folder(folder)
    assert found.vocab_size == size + 1 and size in found.encode(["the gene BRCA1 is"], max_tokens=99)[0]
    (folder / file).write_text(json.dumps(values).replace(str(size), str(size + 7)))
    with pytest.raises(ValueError, match=rf"{file}: added token {size + 7}: 'BRCA1' must have that id \(got {size}\)"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(("file", "values", "message"), [
    ("added_tokens.json", {"x1": "5"}, r"added_tokens\.json: added token '5': 'x1' must have that id"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}, r"_config\.json: added token 5 must be a text"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"'added_tokens_decoder' must be an object"),
])
def test_malformed_lists_of_added_tokens(tmp_path, file, values, message):
    folder = checkpoint(tmp_path / "model", **TEKKEN)
    (folder / file).write_text(json.dumps({**TEKKEN["settings"], **values} if "config" in file else values))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)


def test_a_padding_token_without_a_row_changes_nothing(tmp_path):
    folder = checkpoint(tmp_path / "model", **TEKKEN)
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    (folder / "tokenizer_config.json").write_text(json.dumps({**TEKKEN["settings"], "pad_token": "<pad>"}))
    assert Tokenizer.from_folder(folder).vocab_size == size
