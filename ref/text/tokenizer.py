"""Tokenizer wrapper: special tokens written in a user's text are encoded as plain characters.

Reads tokenizer.json with the `tokenizers` library. Special tokens are inserted by id, never by text: inside a text they
are encoded as the characters they are written with: `</s>` in a user's text gives the ids of pieces such as `▁</`, `s`
and `>`, never the id of the end token. Special are those that the file marks so, the begin, end, padding and unknown
token, and the markers of a prompt template. Other added tokens (product codes, names of genes) are ordinary words.

Begin and end token (BOS, EOS) are the checkpoint's own, from tokenizer_config.json, special_tokens_map.json or the
ids of config.json. Every text ends with EOS, which is pooled. BOS precedes a text only if the checkpoint's own
tokenizer puts it there, by 'add_bos_token', by its post-processor, or because its class is Llama's:

    Mistral, Llama 2, Tekken           <s> text </s>              SentencePiece or byte-level
    SmolLM2 (instruct)                 text <|im_end|>            byte-level, no BOS

A SentencePiece vocabulary begins each text with a word-start mark, which stands for the space before it. A byte-level
vocabulary does not: behind a prompt, a text is encoded with its leading space (ref/text/prompts.py).

For random initialisation `train_tokenizer` learns a byte-pair vocabulary from the training texts, in the form of
Mistral's. Source: arXiv 1508.07909 (byte-pair encoding), arXiv 1808.06226 (the word-start mark).
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ref.utils.files import check_type, read_json

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
ADD_BOS_BY_DEFAULT = ("LlamaTokenizer", "LlamaTokenizerFast")  # classes, also of Mistral's checkpoints
LONGEST_TOKEN_CHARS = 32  # of a vocabulary that is trained here
TEXTS_AT_A_TIME = 1000  # the library needs some hundred bytes per token of the texts it encodes together


class Tokenizer:
    """tokenizer.json with the checkpoint's begin and end tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, bos: str | None = BOS, eos: str = EOS) -> None:
        """`bos`: the token in front of each text, or None. Raises ValueError if a token is not in the vocabulary."""
        self.library = tokenizer
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        self.bos, self.eos = bos, eos
        self.bos_id = None if bos is None else self._known_id(bos)
        self.eos_id = self._known_id(eos)
        # a text is truncated to this many characters per token asked for, before it is encoded
        self.longest_token_chars = max(map(len, tokenizer.get_vocab()))
        self.word_ids: set[int] = set()  # added tokens that are ordinary words
        self.pad_tokens: list[str] = []  # of the folder, special there; texts are not padded
        self.adds_eos = False  # whether the folder declares that its tokenizer appends EOS
        self.mark_special([])
        self.has_word_start = self.library.encode("a", add_special_tokens=False).tokens[:1] != ["a"]

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read folder/tokenizer.json; raises ValueError if it is missing, malformed or without an end token."""
        path = folder / "tokenizer.json"
        layout = json.dumps(read_json(path))
        try:
            library = tokenizers.Tokenizer.from_str(layout)
            add_declared_tokens(folder, library)
            bos, eos = special_tokens(folder, library)
            tokenizer = cls(library, bos=bos, eos=eos)
            tokenizer.adds_eos = _added_by_post_processor(library)[1] is not None or _declares_eos(folder)
            tokenizer.mark_special([BOS, EOS, UNK, eos, *([bos] if bos else []), *_named_specials(folder)])
            tokenizer.pad_tokens = _named(folder, "pad_token")
            return tokenizer
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None

    def mark_special(self, tokens: Iterable[str]) -> None:
        """From now on encode these added tokens as characters where a text contains them."""
        added = {token.content: token for token in self.library.get_added_tokens_decoder().values()}
        for text in tokens:
            if text in added and not added[text].special:
                token = added[text]
                self.library.add_special_tokens([AddedToken(
                    text, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                    normalized=token.normalized, special=True)])
        self.word_ids = {number for number, token in self.library.get_added_tokens_decoder().items()
                         if not token.special}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return self.library.get_vocab_size()

    @property
    def num_ids(self) -> int:
        """1 + the largest id that is used: a padding token that is nothing else is not."""
        unused = {self.library.token_to_id(pad) for pad in self.pad_tokens} - {self.bos_id, self.eos_id}
        return 1 + max(number for number in self.library.get_vocab().values() if number not in unused)

    def _known_id(self, token: str) -> int:
        token_id = self.library.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the vocabulary must contain {token!r:.80}")
        return token_id

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None if it is not in it."""
        return self.library.token_to_id(token)

    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """The first `max_tokens` ids of each text, without BOS and EOS; ValueError for an unpaired surrogate."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            cut = [text[: max_tokens * self.longest_token_chars] for text in texts[start : start + TEXTS_AT_A_TIME]]
            try:
                encoded = self.library.encode_batch_fast(cut, add_special_tokens=False)
            except TypeError:
                raise _surrogate_error(cut) from None
            ids += [e.ids[:max_tokens] for e in encoded]
        return ids

    def truncate(self, text: str, *, max_tokens: int) -> str:
        """The characters that the first `max_tokens` ids of a text represent."""
        try:
            encoded = self.library.encode(text[: max_tokens * self.longest_token_chars], add_special_tokens=False)
        except TypeError:
            raise _surrogate_error([text]) from None
        return text if len(encoded) <= max_tokens else text[: encoded.offsets[max_tokens - 1][1]]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text, so without a word-start mark at its beginning."""
        if not self.has_word_start:
            return self.encode([text], max_tokens=2**16)[0]
        head, whole = self.encode([".", "." + text], max_tokens=2**16)  # a full stop merges with nothing after it
        return whole[len(head):]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with a post-processor that adds BOS and EOS, and tokenizer_config.json.

        transformers 5 and sentence-transformers take them from the post-processor, and no longer from add_eos_token in
        tokenizer_config.json.
        """
        layout, num_ids = json.loads(self.library.to_str()), self.num_ids  # without padding tokens that need no row
        layout["added_tokens"] = [token for token in layout["added_tokens"] if token["id"] < num_ids]
        vocab = layout["model"]["vocab"]
        if isinstance(vocab, dict):
            layout["model"]["vocab"] = {text: number for text, number in vocab.items() if number < num_ids}
        copy = tokenizers.Tokenizer.from_str(json.dumps(layout))
        # a template is split at spaces and colons, and $ begins a text: such a token gets another name in it
        names = {token: token if re.fullmatch(r"[^\s:$]+", token) else name
                 for name, token in (("BOS", self.bos), ("EOS", self.eos)) if token is not None}
        first, last = "" if self.bos is None else f"{names[self.bos]} ", names[self.eos]
        copy.post_processor = processors.TemplateProcessing(
            single=f"{first}$A {last}", pair=f"{first}$A {last} {first}$B {last}",
            special_tokens=[{"id": name, "ids": [copy.token_to_id(token)], "tokens": [token]}
                            for token, name in names.items()])
        copy.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.bos, "eos_token": self.eos,
            "unk_token": UNK if copy.token_to_id(UNK) is not None else None, "pad_token": self.eos,
            "padding_side": "right", "clean_up_tokenization_spaces": False, "add_bos_token": self.bos is not None,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def add_declared_tokens(folder: Path, library: tokenizers.Tokenizer) -> None:
    """Add the words that only tokenizer_config.json ('added_tokens_decoder') or added_tokens.json lists.

    Special tokens are left out: a text cannot contain them. Raises ValueError if a word does not get the id it is
    listed with.
    """
    specials = set(_named_specials(folder))
    path = folder / "added_tokens.json"
    listed = [(path, number, {"content": text}) for text, number in (read_json(path) if path.exists() else {}).items()]
    path = folder / "tokenizer_config.json"
    decoder = (read_json(path) if path.exists() else {}).get("added_tokens_decoder") or {}
    decoder = check_type(decoder, dict, f"{path}: 'added_tokens_decoder'", "an object")
    listed += [(path, int(number) if number.isdigit() else number, token) for number, token in decoder.items()]
    for path, number, token in sorted(listed, key=lambda each: (each[0], str(each[1]).zfill(9))):
        where = f"{path}: added token {number!r:.60}"
        text = check_type(check_type(token, dict, where, "an object").get("content"), str, where, "a text")
        added = {each.content for each in library.get_added_tokens_decoder().values()}
        if text in added or text in specials or token.get("special"):
            continue
        flags = {key: bool(token[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
        library.add_tokens([AddedToken(text, **flags)])
        if library.token_to_id(text) != number:
            raise ValueError(f"{where}: {text!r:.60} must have that id (got {library.token_to_id(text)})")


def _named_specials(folder: Path) -> list[str]:
    """Padding and unknown token, and what is listed as additional or extra special tokens."""
    return _named(folder, "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")


def _named(folder: Path, *fields: str) -> list[str]:
    """Tokens by their fields in tokenizer_config.json and special_tokens_map.json: a text, an object, or several."""
    texts: list[Any] = []
    for path in (folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")):
        values = read_json(path) if path.exists() else {}
        for value in map(values.get, fields):
            is_token = isinstance(value, dict) and "content" in value
            several = list(value.values()) if isinstance(value, dict) and not is_token else (
                value if isinstance(value, list) else [value])
            texts += [each.get("content") if isinstance(each, dict) else each for each in several]
    return [text for text in texts if isinstance(text, str)]


def special_tokens(folder: Path, library: tokenizers.Tokenizer) -> tuple[str | None, str]:
    """BOS, if the checkpoint's tokenizer puts it in front of a text, and EOS. Raises ValueError without an EOS."""
    files = [read_json(path) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
             if (path := folder / name).exists()]
    add_bos = next((values["add_bos_token"] for values in files if isinstance(values.get("add_bos_token"), bool)), None)
    found: dict[str, str | None] = {}
    for kind, usual in (("bos", BOS), ("eos", EOS)):
        named = [values.get(f"{kind}_token") for values in files]
        named = [value.get("content") if isinstance(value, dict) else value for value in named]
        ids = [values.get(f"{kind}_token_id") for values in files]
        ids = [value[0] if isinstance(value, list) and value else value for value in ids]
        by_id = [library.id_to_token(value) for value in ids if isinstance(value, int) and value >= 0]
        usual_token = [usual] if library.token_to_id(usual) is not None else []
        found[kind] = next((token for token in (*named, *by_id, *usual_token) if isinstance(token, str)), None)
    bos, eos = found["bos"], found["eos"]
    if next((values["bos_token"] for values in files if "bos_token" in values), bos) is None:
        bos = None  # null: declared to have none
    if eos is None:
        raise ValueError(f"no end token: tokenizer_config.json must name 'eos_token', or the vocabulary contain {EOS}")
    before, after = _added_by_post_processor(library)
    if add_bos is None and (before or after):  # not declared: as the checkpoint's own tokenizer does
        return before, after or eos
    if add_bos is None:  # nor a post-processor: the default of the tokenizer's class
        add_bos = any(values.get("tokenizer_class") in ADD_BOS_BY_DEFAULT for values in files)
    return (before or bos) if add_bos else None, after or eos


def _declares_eos(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.exists() and read_json(path).get("add_eos_token") is True


def _added_by_post_processor(library: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The token that tokenizer.json's post-processor puts before a text, and the one behind it; None without."""
    library.no_padding()
    library.no_truncation()
    plain, whole = (library.encode("a", add_special_tokens=special).tokens for special in (False, True))
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain] if plain else []
    if not starts:
        return None, None
    before, after = whole[: starts[0]], whole[starts[0] + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise ValueError(f"its post-processor must add one token before and one behind a text (got {before}, {after})")
    return before[0] if before else None, after[0] if after else None


def _surrogate_error(texts: Sequence[str]) -> ValueError:
    bad = next(text for text in texts if any("\ud800" <= character <= "\udfff" for character in text))
    return ValueError(f"text {bad!r:.60} has an unpaired surrogate: it is not valid Unicode")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Learn a byte-pair vocabulary of `vocab_size` tokens from `texts` (fewer if they repeat little, more if they have
    more distinct characters), plus `special_tokens`.

    Words are split before a word-start mark, around punctuation and between digits; a character that `texts` do not
    contain is `<unk>`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNK, fuse_unk=True))
    fold = [normalizers.NFKC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence([*fold, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Digits(True)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[UNK, BOS, EOS, *special_tokens], min_frequency=2, show_progress=False,
        max_token_length=LONGEST_TOKEN_CHARS)
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)
