"""The tokenizer: ids equal to sentencepiece's for Mistral's file, no special token from a text, a trained vocabulary.

Known difference: a tokenizer.json of the form `metaspace` (see mistral_tokenizer.py) encodes a text that begins with a
space as the text without that space. We follow the file. With the form of Mistral-7B-v0.1 there is no difference.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_tokenizer import layout, mistral, pieces

from ref.text.tokenizer import LONGEST_TOKEN_CHARS, Tokenizer, train_tokenizer

SPECIAL = [
    "<s>", "</s>", "<unk>", "a</s>b <s> c", "</s></s>", "<s>[INST] hi [/INST]</s>", "< s >", "</s", "<0x0A>",
    "<0x0A><0xFF>", "text </s>", " </s>", "\n</s>\n",
]
AWKWARD = [
    "", " ", "  ", "   ", " a", "  a", "a ", "a  b", "a          b", "\n", "\n\n", "\r\n", "\t", " \t\n ",
    "a\nb", "a\n\n b", "\ta\tb", "▁", "▁▁", "a▁b", " ▁ ", "\x00", "a\x00b", "\x7f", "\u00a0", "\u3000",
    "\u200b", "\ufeff", "\u2028", "\ufffd", "\U0010ffff", "naïve café", "cafe\u0301", "\u0301", "ﬁ ﬀ ½ ™",
    "İstanbul ı", "ẞß", "Ω≈ç√∫", "日本語のテキスト。", "汉字，没有空格", "한국어 문장", "한국어",
    "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดี", "Здравствуй, мир", "😀", "👩‍👩‍👧‍👦 👍🏽", "🇰🇷🇫🇷", "a😀b", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "x" * 300,
    " " * 300, "\n" * 50, "." * 40, "_" * 40, "1234567890" * 5, "3.14159e-10", "http://a.b/c?d=e&f=g#h",
    "def f(x):\n    return x  # y\n", "{\"a\": [1, 2]}", "\\n \\t \\\\", "'\"`", "C++ / C# / F#",
    "ALL CAPS AND lower", "supercalifragilisticexpialidocious",
]
ALPHABETS = [
    "abcdefghij ", "abc  \n\t", "</s>unk ", "日本語漢字かな。、", "😀👍🏽👩‍👧🇰🇷 ", "àéîõüßñ ", "0123456789.,- ", "▁ a",
    "(){}[]<>=+*&^%$#@!~|\\/:;\"'`?_ ", "абвгд ", "مرحبا ", "한국어 ", "\u0300\u0301\u200d\u200b\ufeff\u00a0a ",
    "\x00\x01\x1b\r\n\x85 x",
]
WORDS = "the quick brown fox jumps over lazy dogs while Tokenization of UN-common words isn't easy: 3,000 kWh".split()  # noqa: SIM905


def random_texts(seed: int, count: int) -> list[str]:
    """In turn: words with runs of spaces, strings over one alphabet, strings over all of Unicode."""
    draw = random.Random(seed)

    def any_character() -> str:
        code = draw.randrange(draw.choice([0x80, 0x3000, 0x10000, 0x110000]))
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"
    kinds = [lambda n: "".join(draw.choice(WORDS) + draw.choice([" ", " ", "  ", "\n", "\t", ""]) for _ in range(n)),
             lambda n: "".join(draw.choices(draw.choice(ALPHABETS), k=n)),
             lambda n: "".join(any_character() for _ in range(n))]
    return [kinds[i % 3](draw.randrange(40)) for i in range(count)]


@pytest.fixture(scope="module")
def texts(request) -> list[str]:
    return [*AWKWARD, *SPECIAL, *random_texts(request.config.option.seed, 3000)]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text], max_tokens=10**5)[0]


def differing(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts that sentencepiece encodes differently."""
    ours = tokenizer.encode(texts, max_tokens=10**5)
    return [text for text, a, b in zip(texts, ours, pieces().encode(texts), strict=True) if a != b]


# ---- Mistral's file -----------------------------------------------------------------------------------------


def test_ids_equal_those_of_sentencepiece(texts):
    assert len(texts) >= 1000
    assert differing(mistral(), texts) == []


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_ids_equal_those_of_sentencepiece_for_any_text(text):
    assert differing(mistral(), [text]) == []


def test_metaspace_differs_only_for_a_leading_space(texts):
    tokenizer = mistral("metaspace")
    found = differing(tokenizer, texts)
    assert found  # also the control: the comparison notices one missing word-start mark
    assert all(text[0] in " ▁" for text in found)
    assert all(ids(tokenizer, text) == pieces().encode(text[1:]) for text in found if text[1:])


def test_no_text_becomes_a_special_token(texts):
    """Neither 1 and 2, nor 0 (unknown): each byte has a token."""
    for form in ("prepend", "metaspace"):
        assert not {0, 1, 2} & {token for row in mistral(form).encode(texts, max_tokens=10**5) for token in row}
    library = tokenizers.Tokenizer.from_str(layout())  # control: the library does by default
    assert {1, 2} <= set(library.encode("a</s>b <s> c", add_special_tokens=False).ids)


@pytest.mark.parametrize("max_tokens", [1, 3, 17])
def test_truncation_gives_the_first_ids(texts, max_tokens):
    tokenizer = mistral()
    more_than_the_first_cut = 64 * max_tokens
    long = [text * (1 + more_than_the_first_cut // max(1, len(text))) for text in texts[::3]]
    whole = tokenizer.encode(long, max_tokens=10**6)
    assert tokenizer.encode(long, max_tokens=max_tokens) == [row[:max_tokens] for row in whole]


def test_the_first_cut_is_long_enough(monkeypatch):
    tokenizer, word = mistral(), "straightforward"
    assert max(map(len, tokenizer.library.get_vocab())) == tokenizer.longest_token_chars
    monkeypatch.setattr(tokenizer, "longest_token_chars", 2)  # control
    assert tokenizer.encode([word], max_tokens=1) != [ids(tokenizer, word)[:1]]


def test_truncate_keeps_the_characters_of_the_first_ids(texts):
    tokenizer = mistral()
    for text in texts[:600]:
        short = tokenizer.truncate(text, max_tokens=5)
        assert text.startswith(short)
        assert len(ids(tokenizer, short)) <= 5 + 3  # a character of four bytes is not split
        if len(ids(tokenizer, text)) <= 5:
            assert short == text
    words = " ".join(WORDS)
    assert ids(tokenizer, tokenizer.truncate(words, max_tokens=7)) == ids(tokenizer, words)[:7]


@pytest.mark.parametrize("text", ["\n", "\n<response>", "\n\n", " more", "\tx"])
def test_a_continuation_has_no_word_start_mark(text):
    tokenizer = mistral()
    assert [*ids(tokenizer, "end."), *tokenizer.encode_continuation(text)] == ids(tokenizer, "end." + text)


@pytest.mark.parametrize("call", [
    lambda tokenizer, text: tokenizer.encode(["good", text], max_tokens=9),
    lambda tokenizer, text: tokenizer.truncate(text, max_tokens=9)], ids=["encode", "truncate"])
def test_an_unpaired_surrogate_is_an_error_that_shows_the_text(call):
    with pytest.raises(ValueError, match=r"text 'bad \\ud800 text' has an unpaired surrogate"):
        call(mistral(), "bad \ud800 text")


# ---- a trained vocabulary -----------------------------------------------------------------------------------


CORPUS = [" ".join(WORDS[i % 7:] + WORDS[: i % 5]) + f"\nline {i}: naïve 日本" for i in range(60)]
CORPUS += ["Instruct: find </s> things\nQuery: <s> what", "a\n a\n a\n .a\n", "q" * 90 + " " + "q" * 90]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CORPUS, vocab_size=400, lowercase=True, special_tokens=("<query>", "<response>"))


def test_training_is_deterministic(trained):
    code = ("import sys; sys.path[:0] = ['tests', 'tests/text']\n"
            "from test_tokenizer import CORPUS\nfrom ref.text.tokenizer import train_tokenizer\n"
            "print(train_tokenizer(CORPUS, vocab_size=400, lowercase=True, "
            "special_tokens=('<query>', '<response>')).library.to_str())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8",
                           cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"})
    assert json.loads(other.stdout) == json.loads(trained.library.to_str())
    different = train_tokenizer(CORPUS[:-1], vocab_size=400, lowercase=True, special_tokens=("<query>", "<response>"))
    assert different.library.to_str() != trained.library.to_str()


def test_trained_vocabulary(trained):
    assert trained.vocab_size <= 400
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert [trained.token_id(m) for m in ("<query>", "<response>", "<instruct>")] == [3, 4, None]
    assert max(map(len, trained.library.get_vocab())) <= LONGEST_TOKEN_CHARS
    assert ids(trained, "The QUICK fox") == ids(trained, "the quick fox")
    assert ids(train_tokenizer(CORPUS, vocab_size=400, lowercase=False), "The fox") != ids(trained, "the fox")
    assert trained.library.decode(ids(trained, "the quick fox")) == "the quick fox"
    assert trained.token_id("<unk>") in ids(trained, "Ж")


def test_trained_vocabulary_encodes_special_tokens_in_a_text_as_text(trained, texts):
    rows = trained.encode([*texts, "<query>a</s><response>"], max_tokens=10**5)
    assert not {1, 2, 3, 4} & {token for row in rows for token in row}


@pytest.mark.parametrize("text", ["\n", "\n<response>"])
def test_trained_continuation(trained, text):
    rows = [ids(trained, "the fox." + text), ids(trained, "the fox.")]
    assert [*rows[1], *trained.encode_continuation(text)] == rows[0]


def test_trained_truncation_gives_the_first_ids(trained):
    long = [" ".join(CORPUS), "q" * 4000, " " * 4000, "the " * 999]
    for max_tokens in (1, 5, 40):
        assert trained.encode(long, max_tokens=max_tokens) == [ids(trained, text)[:max_tokens] for text in long]


# ---- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["trained", "prepend", "metaspace"])
def test_a_saved_tokenizer_is_equal_and_transformers_adds_bos_and_eos(trained, texts, tmp_path, which):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained if which == "trained" else mistral(which)
    tokenizer.save(tmp_path)
    special = ("<s>", "</s>", "<unk>", "<query>", "<response>")
    some = [text for text in texts[:400] if not any(token in text for token in special)]
    ours = tokenizer.encode(some, max_tokens=10**5)
    assert Tokenizer.from_folder(tmp_path).encode(some, max_tokens=10**5) == ours
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer(some)["input_ids"] == [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in ours]
    assert peer("a</s>")["input_ids"].count(tokenizer.eos_id) == 2  # the one known difference: special tokens in a text


@pytest.mark.parametrize("token", ["<|end of text|>", "[EOS:1]", "<end:0>", "$A", "$0"])
def test_an_end_token_of_any_form_is_exported(token, tmp_path):
    """The library's post-processor reads its template as words, with a number behind a colon, and $A as the text."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, token: 2, "<s>": 3}, unk_token="a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens([token, "<s>"])
    Tokenizer(library, bos="<s>", eos=token).save(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.encode("a b").ids == [3, 0, 1, 2]


def without_eos(file: dict) -> dict:
    file["added_tokens"] = [t for t in file["added_tokens"] if t["content"] != "</s>"]
    file["model"]["vocab"].pop("</s>")
    return file


@pytest.mark.parametrize(("change", "message"), [
    (lambda path: path.unlink(), "file does not exist"),
    (lambda path: path.write_text("{"), "invalid JSON"),
    (lambda path: path.write_text("[]"), "must be a JSON object .got list"),
    (lambda path: path.write_text("{}"), "not a tokenizer"),
    (lambda path: path.write_text('{"added_tokens": ["</s>"]}'), "not a tokenizer"),
    (lambda path: path.write_text('{"added_tokens": 3}'), "not a tokenizer"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
    (lambda path: path.write_text(path.read_text()[:500]), "invalid JSON"),
    (lambda path: path.write_text(json.dumps(without_eos(json.loads(path.read_text())))),
     "the vocabulary must contain '</s>'"),
])
def test_a_bad_file_is_an_error_that_names_it(trained, tmp_path, change, message):
    trained.save(tmp_path)
    change(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'tokenizer.json'}: .*{message}"):
        Tokenizer.from_folder(tmp_path)
