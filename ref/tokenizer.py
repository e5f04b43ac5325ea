"""Text to token ids, and never more than text: a control token comes from us, by id, or not at all.

The library is `tokenizers` and the file tokenizer.json. Every added token of the file is marked special and
encoded as the characters it is written with, so that `</s>` in a user's text is those four characters.

For a model with fresh weights `train` learns a byte-pair vocabulary from the training texts, in the same form
as Mistral's: a space becomes the word-start mark, and a text brings a mark of its own.
Called by prompts.py, embedder.py and runs.py.
Source: arXiv 1508.07909 (byte-pair encoding), arXiv 1808.06226 (the word-start mark).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ref.config import read_json

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LONGEST_TOKEN_CHARS = 32  # a text is cut to this many characters for each token asked, before it is encoded
TEXTS_AT_A_TIME = 1000  # the library keeps some hundred bytes for each token of the texts it is given together


class TextTokenizer:
    """tokenizer.json with `<s>` and `</s>`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.library = tokenizer
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        if begin is None or end is None:
            raise ValueError(f"the tokenizer has no {BEGIN} or no {END}. Expected are both. "
                             "Choose a Mistral tokenizer.")
        self.begin, self.end = begin, end

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read folder/tokenizer.json; ValueError if it is missing, malformed or without `<s>` and `</s>`."""
        path = folder / "tokenizer.json"
        layout = read_json(path)
        try:
            for token in layout.get("added_tokens") or []:
                token["special"] = True
            return cls(tokenizers.Tokenizer.from_str(json.dumps(layout)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error}). Fetch it again.") from None

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self.library.get_vocab_size()

    def marker(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None if it is not one."""
        return self.library.token_to_id(token)

    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """The first `max_tokens` ids of each text, without `<s>` and `</s>`; ValueError for half a surrogate pair."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            cut = [text[: max_tokens * LONGEST_TOKEN_CHARS] for text in texts[start : start + TEXTS_AT_A_TIME]]
            try:
                encoded = self.library.encode_batch_fast(cut, add_special_tokens=False)
            except TypeError:
                raise _half_a_pair(cut) from None
            ids += [e.ids[:max_tokens] for e in encoded]
        return ids

    def cut(self, text: str, *, max_tokens: int) -> str:
        """The characters that the first `max_tokens` ids of a text stand for."""
        try:
            encoded = self.library.encode(text[: max_tokens * LONGEST_TOKEN_CHARS], add_special_tokens=False)
        except TypeError:
            raise _half_a_pair([text]) from None
        return text if len(encoded) <= max_tokens else text[: encoded.offsets[max_tokens - 1][1]]

    def continuation(self, text: str) -> list[int]:
        """Ids of `text` where it follows other text, so without a word-start mark of its own."""
        head, whole = self.encode([".", "." + text], max_tokens=2**16)  # a full stop merges with nothing after it
        return whole[len(head):]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with a post-processor that adds `<s>` and `</s>`, and tokenizer_config.json.

        The post-processor is where transformers 5 and sentence-transformers look for them: add_eos_token in
        tokenizer_config.json is no longer read.
        """
        copy = tokenizers.Tokenizer.from_str(self.library.to_str())
        copy.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} {BEGIN} $B {END}",
            special_tokens=[(BEGIN, self.begin), (END, self.end)])
        copy.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN,
            "pad_token": END, "padding_side": "right", "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _half_a_pair(texts: Sequence[str]) -> ValueError:
    half = next(text for text in texts if any("\ud800" <= character <= "\udfff" for character in text))
    return ValueError(f"text {half!r:.60} has half a surrogate pair. Expected is valid Unicode. Remove it.")


def train(texts: Iterable[str], *, vocab_size: int, lowercase: bool, markers: Sequence[str] = ()) -> TextTokenizer:
    """A byte-pair vocabulary of at most `vocab_size` tokens learnt from `texts`, `markers` as tokens of their own.

    Words are cut before a word-start mark, around punctuation and between digits; a character that `texts` do
    not have is `<unk>`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    fold = [normalizers.NFKC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence([*fold, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Digits(True)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[UNKNOWN, BEGIN, END, *markers], min_frequency=2, show_progress=False,
        max_token_length=LONGEST_TOKEN_CHARS)
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer)
