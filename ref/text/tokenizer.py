"""Tokenizer wrapper: special tokens written in a user's text are encoded as plain characters.

Reads tokenizer.json with the `tokenizers` library. Special tokens are inserted by id, never by text: every added token
of the file is marked special and, inside a text, encoded as the characters it is written with: `</s>` in a user's text
gives the ids of pieces such as `▁</`, `s` and `>`, never the id of the end token.

For random initialisation `train_tokenizer` learns a byte-pair vocabulary from the training texts, in the form of
Mistral's: a space becomes the word-start mark, and each text begins with one.
Source: arXiv 1508.07909 (byte-pair encoding), arXiv 1808.06226 (the word-start mark).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ref.utils.files import read_json

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
LONGEST_TOKEN_CHARS = 32  # a text is truncated to this many characters per token asked for, before it is encoded
TEXTS_AT_A_TIME = 1000  # the library needs some hundred bytes per token of the texts it encodes together


class Tokenizer:
    """tokenizer.json with `<s>` and `</s>`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.library = tokenizer
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        bos_id, eos_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        if bos_id is None or eos_id is None:
            raise ValueError(f"the vocabulary must contain {BOS} and {EOS} (a Mistral tokenizer)")
        self.bos_id, self.eos_id = bos_id, eos_id

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read folder/tokenizer.json; raises ValueError if it is missing, malformed or without `<s>` and `</s>`."""
        path = folder / "tokenizer.json"
        layout = read_json(path)
        try:
            for token in layout.get("added_tokens") or []:
                token["special"] = True
            return cls(tokenizers.Tokenizer.from_str(json.dumps(layout)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return self.library.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None if it is not in it."""
        return self.library.token_to_id(token)

    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """The first `max_tokens` ids of each text, without BOS and EOS; ValueError for an unpaired surrogate."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            cut = [text[: max_tokens * LONGEST_TOKEN_CHARS] for text in texts[start : start + TEXTS_AT_A_TIME]]
            try:
                encoded = self.library.encode_batch_fast(cut, add_special_tokens=False)
            except TypeError:
                raise _surrogate_error(cut) from None
            ids += [e.ids[:max_tokens] for e in encoded]
        return ids

    def truncate(self, text: str, *, max_tokens: int) -> str:
        """The characters that the first `max_tokens` ids of a text represent."""
        try:
            encoded = self.library.encode(text[: max_tokens * LONGEST_TOKEN_CHARS], add_special_tokens=False)
        except TypeError:
            raise _surrogate_error([text]) from None
        return text if len(encoded) <= max_tokens else text[: encoded.offsets[max_tokens - 1][1]]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text, so without a word-start mark at its beginning."""
        head, whole = self.encode([".", "." + text], max_tokens=2**16)  # a full stop merges with nothing after it
        return whole[len(head):]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, with a post-processor that adds `<s>` and `</s>`, and tokenizer_config.json.

        transformers 5 and sentence-transformers take them from the post-processor, and no longer from add_eos_token in
        tokenizer_config.json.
        """
        copy = tokenizers.Tokenizer.from_str(self.library.to_str())
        copy.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} {BOS} $B {EOS}",
            special_tokens=[(BOS, self.bos_id), (EOS, self.eos_id)])
        copy.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": UNK,
            "pad_token": EOS, "padding_side": "right", "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _surrogate_error(texts: Sequence[str]) -> ValueError:
    bad = next(text for text in texts if any("\ud800" <= character <= "\udfff" for character in text))
    return ValueError(f"text {bad!r:.60} has an unpaired surrogate: it is not valid Unicode")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Learn a byte-pair vocabulary of at most `vocab_size` tokens from `texts`, plus `special_tokens`.

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
