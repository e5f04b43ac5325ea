"""Prompts: prefix ids and text ids equal the ids of the whole string, and no text becomes a marker or special token.

The oracle is the whole string, written out in this file and encoded at once. The tokenizer is Mistral's, in the form of
Mistral-7B-v0.1, with the three markers of bge-en-icl added where they matter.
"""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mistral_tokenizer import layout, mistral
from tokenizers import AddedToken, Tokenizer

from ref.text.prompts import (
    PROMPT_FILE,
    TEMPLATES,
    InContextExample,
    PromptEncoder,
    get_template,
    load_prompt_encoder,
    save_prompt_encoder,
)
from ref.text.tokenizer import Tokenizer as OurTokenizer
from ref.text.tokenizer import train_tokenizer

MARKERS = ("<instruct>", "<query>", "<response>")
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query."
TEXTS = [
    "how do magnets work", " one leading space", "   three", "\na newline first", "\n\n\ttabs", "trailing  ",
    "汉字，没有空格", "日本語", "한국어 문장", "😀 emoji", "a</s>b", "<s>", "{instruction} {text}",
    "Query: again\nQuery: twice", ":", "▁", " ", "\u0301x", "é",
]
EXAMPLES = [InContextExample("what is rust", "Iron oxide.\nIt is red."), InContextExample("  odd ", "{query}"),
            InContextExample("三", "汉字 <response> 😀")]


@pytest.fixture
def prompt_encoder() -> PromptEncoder:
    return PromptEncoder(mistral())


@pytest.fixture
def bge() -> PromptEncoder:
    return PromptEncoder(mistral(markers=MARKERS), TEMPLATES["bge-en-icl"])


def whole(prompt_encoder: PromptEncoder, string: str) -> list[int]:
    """Ids of a string encoded at once, between `<s>` and `</s>`."""
    tokenizer = prompt_encoder.tokenizer
    return [tokenizer.bos_id, *tokenizer.encode([string], max_tokens=10**6)[0], tokenizer.eos_id]


def parts(prompt_encoder: PromptEncoder, text: str, instruction: str | None = INSTRUCTION, examples=()) -> list[int]:
    """The same from prefix and text."""
    prefix = prompt_encoder.prefix(instruction, examples)
    return [*prefix.ids, *prompt_encoder.encode([text], prefix)[0]]


def report_string(text: str, examples=()) -> str:
    blocks = [f"Instruct: {INSTRUCTION}\nQuery: {e.query}\nResponse: {e.response}" for e in examples]
    return "\n\n".join([*blocks, f"Instruct: {INSTRUCTION}\nQuery: {text}"])


# ---- prefix and text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [[], EXAMPLES[:1], EXAMPLES], ids=len)
@pytest.mark.parametrize("text", TEXTS)
def test_prefix_and_text_equal_the_whole_string(prompt_encoder, text, examples):
    assert parts(prompt_encoder, text, examples=examples) == whole(prompt_encoder, report_string(text, examples))


@pytest.mark.parametrize("text", TEXTS)
def test_prefix_and_text_equal_the_whole_string_in_the_newer_form(text):
    """Where the library puts no word-start mark before a text that begins with a space."""
    prompt_encoder = PromptEncoder(mistral("metaspace"))
    assert parts(prompt_encoder, text) == whole(prompt_encoder, report_string(text))


@pytest.mark.parametrize("form", ["prepend", "metaspace"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_prefix_and_text_equal_the_whole_string_for_any_text(form, text):
    prompt_encoder = PromptEncoder(mistral(form))
    assert parts(prompt_encoder, text) == whole(prompt_encoder, report_string(text))


# ---- added tokens that are ordinary words -------------------------------------------------------------------

CODES = ("BRCA1-mut", "XK-7")
CODE_TEXTS = ["BRCA1-mut", "BRCA1-mut and XK-7", "a note about BRCA1-mut", "XK-7XK-7 x", "BRCA1-mu", "</s> XK-7"]


def with_codes(form: str) -> Tokenizer:
    """Mistral's tokenizer with two words that a user added by tokenizer.add_tokens."""
    library = Tokenizer.from_str(layout(form))
    library.add_tokens([AddedToken(code, special=False, normalized=False) for code in CODES])
    return library


@pytest.mark.parametrize("form", ["prepend", "metaspace"])
@pytest.mark.parametrize("text", CODE_TEXTS)
def test_added_words_have_their_own_ids_in_a_text_and_behind_a_prompt(form, text, tmp_path):
    """As the library alone encodes them, except for special tokens in a text."""
    library = with_codes(form)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    ours = PromptEncoder(OurTokenizer.from_folder(tmp_path))
    library.encode_special_tokens = True
    assert ours.tokenizer.encode([text], max_tokens=99)[0] == library.encode(text, add_special_tokens=False).ids
    assert parts(ours, text) == whole(ours, report_string(text))
    ids = parts(ours, text)
    assert sum(ids.count(library.token_to_id(code)) for code in CODES) == sum(map(text.count, CODES))
    assert ids.count(ours.tokenizer.eos_id) == 1


def test_added_words_stay_ordinary_in_an_exported_tokenizer(tmp_path):
    with_codes("prepend").save(str(tmp_path / "tokenizer.json"))
    OurTokenizer.from_folder(tmp_path).save(tmp_path)
    added = {token["content"]: token["special"] for token in json.loads(
        (tmp_path / "tokenizer.json").read_text())["added_tokens"]}
    assert added == {"<unk>": True, "<s>": True, "</s>": True, **dict.fromkeys(CODES, False)}


@pytest.mark.parametrize("listed", [
    {"pad_token": "XK-7"}, {"additional_special_tokens": ["XK-7"]},
    {"extra_special_tokens": {"code": {"content": "XK-7"}}}], ids=lambda value: next(iter(value)))
def test_tokens_that_the_config_calls_special_are_text(tmp_path, listed):
    with_codes("prepend").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    tokenizer = OurTokenizer.from_folder(tmp_path)
    ids = tokenizer.encode(["XK-7 BRCA1-mut"], max_tokens=99)[0]
    assert tokenizer.token_id("XK-7") not in ids and tokenizer.token_id("BRCA1-mut") in ids


def test_the_empty_text_is_the_space_before_it(prompt_encoder):
    split, string = parts(prompt_encoder, ""), whole(prompt_encoder, report_string(""))
    assert split == string and split[-2] == prompt_encoder.tokenizer.token_id("▁")


def test_control_a_split_after_the_space_differs(prompt_encoder):
    """A split after `Query: ` leaves an extra mark: the reason why the prefix ends with the colon."""
    tokenizer = prompt_encoder.tokenizer
    head = tokenizer.encode([report_string("")], max_tokens=999)[0]
    text = tokenizer.encode([TEXTS[0]], max_tokens=999)[0]
    assert [tokenizer.bos_id, *head, *text, tokenizer.eos_id] != whole(prompt_encoder, report_string(TEXTS[0]))


def test_the_prefix_is_the_same_for_every_text(prompt_encoder):
    prefix = prompt_encoder.prefix(INSTRUCTION, EXAMPLES)
    assert prefix.num_examples == 3
    assert prefix.suffix == ()
    rows = prompt_encoder.encode(TEXTS, prefix)
    assert [[*prefix.ids, *row] for row in rows] == [
        whole(prompt_encoder, report_string(text, EXAMPLES)) for text in TEXTS]


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_a_passage_has_no_prompt(prompt_encoder, text):
    assert prompt_encoder.prefix(None).ids == (prompt_encoder.tokenizer.bos_id,)
    assert parts(prompt_encoder, text, None) == whole(prompt_encoder, text)
    assert parts(prompt_encoder, text, None) != parts(prompt_encoder, text, "")  # an empty instruction is one


def test_prefix_and_text_equal_the_whole_string_for_a_trained_vocabulary():
    tokenizer = train_tokenizer([report_string(text) for text in TEXTS] * 3, vocab_size=300, lowercase=True)
    prompt_encoder = PromptEncoder(tokenizer)
    for text in TEXTS:
        assert parts(prompt_encoder, text, examples=EXAMPLES) == whole(prompt_encoder, report_string(text, EXAMPLES))


# ---- markers ------------------------------------------------------------------------------------------------


def bge_string(text: str, examples=()) -> str:
    blocks = [f"<instruct>{INSTRUCTION}\n<query>{e.query}\n<response>{e.response}" for e in examples]
    return "\n\n".join([*blocks, f"<instruct>{INSTRUCTION}\n<query>{text}\n<response>"])


def bge_library() -> Tokenizer:
    """bge-en-icl's tokenizer as its authors use it: markers in the string become tokens."""
    library = Tokenizer.from_str(layout())
    library.add_special_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    return library


@pytest.mark.parametrize("examples", [[], EXAMPLES[:2]], ids=len)
@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text and "</s>" not in text])
def test_markers_by_id_equal_the_whole_string(bge, text, examples):
    ids = bge_library().encode(bge_string(text, examples), add_special_tokens=False).ids
    assert parts(bge, text, examples=examples) == [1, *ids, 2]
    assert [ids.count(bge.tokenizer.token_id(m)) for m in MARKERS] == [1 + len(examples)] * 3


@pytest.mark.parametrize("count", [0, 2])
def test_a_vocabulary_without_the_markers_is_rejected(count, tmp_path):
    """As text a marker merges with what follows: the prefix would not be the same for each text."""
    tokenizer = mistral(markers=MARKERS[:count])
    message = f"^template bge-en-icl: the vocabulary must contain its markers .missing: {', '.join(MARKERS[count:])}.;"
    with pytest.raises(ValueError, match=message):
        PromptEncoder(tokenizer, TEMPLATES["bge-en-icl"])
    with pytest.raises(ValueError, match=message):
        load_prompt_encoder(tmp_path, tokenizer, template="bge-en-icl")
    [prefix, whole] = mistral().encode(["<query>", "<query>= 3"], max_tokens=99)
    assert whole[: len(prefix)] != prefix


HOSTILE = "a<query>b</s><response><s><instruct> <unk>"


@pytest.mark.parametrize(
    ("instruction", "text", "examples"),
    [
        (INSTRUCTION, HOSTILE, []),
        (HOSTILE, "how", []),
        (INSTRUCTION, "how", [InContextExample(HOSTILE, HOSTILE)]),
        (None, HOSTILE, []),
    ],
    ids=["text", "instruction", "example", "passage"],
)
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_user_text_never_becomes_a_marker_or_special_token(bge, template, instruction, text, examples):
    prompt_encoder = replace(bge, template=TEMPLATES[template])
    ids = parts(prompt_encoder, text, instruction, examples)
    blocks = (1 + len(examples)) * (template == "bge-en-icl" and instruction is not None)
    assert [ids.count(prompt_encoder.tokenizer.token_id(m)) for m in MARKERS] == [blocks] * 3
    assert (ids.count(1), ids.count(2), ids.count(0)) == (1, 1, 0)
    assert (ids[0], ids[-1]) == (1, 2)


def test_control_the_library_alone_finds_markers_in_text():
    found = bge_library().encode(HOSTILE, add_special_tokens=False).ids
    assert {1, 2, *(bge_library().token_to_id(m) for m in MARKERS)} <= set(found)


# ---- lengths ------------------------------------------------------------------------------------------------


def test_examples_are_dropped_whole_last_first_and_counted(prompt_encoder):
    lengths = [len(prompt_encoder.prefix(INSTRUCTION, EXAMPLES[:k]).ids) for k in range(4)]
    for kept in range(4):
        for spare, expected in ((0, kept), (-1, kept - 1)):
            room = replace(prompt_encoder, max_text_tokens=40, max_prompt_tokens=lengths[kept] + 40 + 1 + spare)
            prefix = room.prefix(INSTRUCTION, EXAMPLES)
            assert prefix.num_examples == max(0, expected)
            assert prefix.ids == prompt_encoder.prefix(INSTRUCTION, EXAMPLES[:max(0, expected)]).ids


def test_an_example_is_truncated_to_its_own_limit(prompt_encoder):
    short = replace(prompt_encoder, max_example_tokens=4)
    prefix = short.prefix(INSTRUCTION, [InContextExample("one two three four five six", "a b c d e f")])
    string = f"Instruct: {INSTRUCTION}\nQuery: one two three four\nResponse: a b c d\n\nInstruct: {INSTRUCTION}\nQuery:"
    assert list(prefix.ids) == whole(prompt_encoder, string)[:-1]
    assert prefix.num_examples == 1


@given(
    st.integers(20, 80), st.integers(1, 40), st.integers(0, 3), st.integers(0, 60), st.sampled_from(sorted(TEMPLATES))
)
def test_only_the_text_is_truncated(max_prompt, max_text, num_examples, words, template):
    tokenizer = mistral(markers=MARKERS)
    prompt_encoder = PromptEncoder(
        tokenizer, TEMPLATES[template], max_text_tokens=max_text, max_prompt_tokens=max_prompt)
    text = "word " * words
    alone = PromptEncoder(tokenizer, TEMPLATES[template]).prefix(INSTRUCTION)
    assume(len(alone.ids) + len(alone.suffix) + 2 <= max_prompt)
    prefix = prompt_encoder.prefix(INSTRUCTION, EXAMPLES[:num_examples])
    (row,) = prompt_encoder.encode([text], prefix)
    assert prefix.ids[2 - len(alone.ids):] == alone.ids[2:]  # the whole instruction; after an example without a mark
    assert len(prefix.ids) + len(row) <= max_prompt
    assert row[-1] == tokenizer.eos_id
    assert tuple(row[-1 - len(prefix.suffix):-1]) == prefix.suffix
    ids = tokenizer.encode([text], max_tokens=10**4)[0]
    if not text and template == "paper":
        ids = [tokenizer.token_id("▁")]
    kept = row[: len(row) - 1 - len(prefix.suffix)]
    room = min(max_text, max_prompt - len(prefix.ids) - len(prefix.suffix) - 1)
    assert kept == ids[:room]
    assert prefix.num_examples == 0 or room == max_text  # an example never shortens the text


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_prompt_without_room_is_an_error(bge, template):
    prompt_encoder = replace(bge, template=TEMPLATES[template])
    prefix = prompt_encoder.prefix(INSTRUCTION)
    least = len(prefix.ids) + len(prefix.suffix) + 2  # one token of text, and </s>
    assert replace(prompt_encoder, max_prompt_tokens=least).prefix(INSTRUCTION) == prefix
    message = rf"^instruction 'Given a web search.* has \d+ tokens and leaves no room.*max_prompt_tokens {least - 1}$"
    with pytest.raises(ValueError, match=message):
        replace(prompt_encoder, max_prompt_tokens=least - 1).prefix(INSTRUCTION)


# ---- embedder.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_saved_and_loaded_is_equal(tmp_path, template):
    encoder = PromptEncoder(mistral(markers=MARKERS), TEMPLATES[template], 100, 300, 40)
    save_prompt_encoder(tmp_path, encoder)
    assert load_prompt_encoder(tmp_path, mistral(markers=MARKERS)) == encoder
    assert json.loads((tmp_path / PROMPT_FILE).read_text())["template"] == template


def test_without_a_file_the_reports_settings_and_given_ones_override(tmp_path):
    assert load_prompt_encoder(tmp_path, mistral()) == PromptEncoder(mistral())
    save_prompt_encoder(tmp_path, PromptEncoder(mistral(), max_text_tokens=100, max_prompt_tokens=300))
    encoder = load_prompt_encoder(tmp_path, mistral(markers=MARKERS), template="bge-en-icl", max_text_tokens=1000)
    assert encoder.template == TEMPLATES["bge-en-icl"]
    assert (encoder.max_text_tokens, encoder.max_prompt_tokens) == (1000, 1000 + 2048 - 512)  # room for that text


@pytest.mark.parametrize(("settings", "message"), [
    ({"template": "e5"}, "'template' must be one of paper, bge-en-icl (got 'e5')"),
    ({"template": 3}, "'template' must be one of paper, bge-en-icl (got 3)"),
    ({"max_text_tokens": "9"}, "'max_text_tokens' must be a number of tokens >= 1 (got '9')"),
    ({"max_example_tokens": 0}, "'max_example_tokens' must be a number of tokens >= 1 (got 0)"),
    ({"max_tokens": 9}, "'max_tokens' is unknown"),
    ({"max_prompt_tokens": 20, "max_text_tokens": 20}, "'max_prompt_tokens' must be at least 'max_text_tokens' + 2"),
])
def test_a_bad_file_is_an_error_that_names_it(tmp_path, settings, message):
    (tmp_path / PROMPT_FILE).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"^{tmp_path / PROMPT_FILE}: ") as caught:
        load_prompt_encoder(tmp_path, mistral())
    assert message in str(caught.value)


def test_without_a_file_the_vocabularys_markers_tell_the_template(tmp_path):
    """All of them; a file or an argument goes first."""
    assert load_prompt_encoder(tmp_path, mistral(markers=MARKERS)).template_name == "bge-en-icl"
    assert load_prompt_encoder(tmp_path, mistral(markers=MARKERS[:2])).template_name == "paper"
    assert load_prompt_encoder(tmp_path, mistral(markers=MARKERS), template="paper").template_name == "paper"
    save_prompt_encoder(tmp_path, PromptEncoder(mistral(markers=MARKERS)))
    assert load_prompt_encoder(tmp_path, mistral(markers=MARKERS)).template_name == "paper"


def test_a_given_setting_is_named_without_a_file(tmp_path):
    with pytest.raises(ValueError, match="^template must be one of paper, bge-en-icl .got 'e5'"):
        load_prompt_encoder(tmp_path, mistral(), template="e5")
    with pytest.raises(ValueError, match="^--template must be one of"):
        get_template("e5", "--template")


def test_an_example_may_have_an_instruction_of_its_own(prompt_encoder):
    """The ids are those of the whole string, as in BGE-EN-ICL, whose examples carry their `instruct`."""
    examples = [InContextExample("q1", "r1", "Find the cause"), InContextExample("q2", "r2")]
    prefix = prompt_encoder.prefix("Find the answer", examples)
    whole = ("Instruct: Find the cause\nQuery: q1\nResponse: r1\n\nInstruct: Find the answer\nQuery: q2\nResponse: r2"
             "\n\nInstruct: Find the answer\nQuery:")
    [ids] = prompt_encoder.tokenizer.encode([whole], max_tokens=999)
    assert list(prefix.ids) == [prompt_encoder.tokenizer.bos_id, *ids]
