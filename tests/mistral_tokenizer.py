"""Mistral's own tokenizer, for tests: tokenizer.model.v1 (in mistral-common), by sentencepiece and as tokenizer.json.

Its pieces and scores become merges through transformers' converter. tokenizer.json comes in two forms. `prepend`
(Mistral-7B-v0.1 and its descendants) puts the word-start mark before every text, as sentencepiece does. `metaspace`
(what transformers 5 writes) leaves it out where a text begins with a space.
"""

import json
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ref.tokenizer import TextTokenizer


@cache
def pieces():
    """sentencepiece's reading of the file: the truth."""
    sentencepiece = pytest.importorskip("sentencepiece")
    package = find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral-common is not installed: it holds Mistral's tokenizer.model.v1")
    path = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@cache
def layout(form: str = "prepend") -> str:
    """The text of tokenizer.json."""
    truth = pieces()
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    ids = {truth.id_to_piece(i): i for i in range(len(truth))}
    scores = {truth.id_to_piece(i): truth.get_score(i) for i in range(len(truth))}
    tokenizer = Tokenizer(models.BPE(ids, convert.generate_merges(ids, scores), unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer.to_str()


@cache
def mistral(form: str = "prepend", *, markers: tuple[str, ...] = ()) -> TextTokenizer:
    """Our reading of the file, with `markers` as tokens of their own. One for all tests: leave it as it is."""
    tokenizer = Tokenizer.from_str(layout(form))
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False) for marker in markers])
    with tempfile.TemporaryDirectory() as folder:
        text = json.loads(tokenizer.to_str())
        for token in text["added_tokens"]:
            token["special"] = False  # files in the wild differ in this; it must not matter
        (Path(folder) / "tokenizer.json").write_text(json.dumps(text))
        return TextTokenizer.from_folder(Path(folder))
