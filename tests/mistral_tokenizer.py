"""Mistral's tokenizer for tests: tokenizer.model.v1 of mistral-common, read by sentencepiece and as tokenizer.json.

transformers' converter derives the merges from its pieces and scores. tokenizer.json exists in two forms: `prepend`
(Mistral-7B-v0.1 and its descendants) inserts the word-start mark before every text, as sentencepiece does; `metaspace`
(written by transformers 5) omits it where a text begins with a space.
"""

import json
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from ref.text.tokenizer import Tokenizer


@cache
def pieces():
    """The file read by sentencepiece: the oracle."""
    sentencepiece = pytest.importorskip("sentencepiece")
    package = find_spec("mistral_common")
    if package is None:
        pytest.skip("mistral-common is not installed: it holds Mistral's tokenizer.model.v1")
    path = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@cache
def layout(form: str = "prepend") -> str:
    """The content of tokenizer.json in one of the two forms."""
    truth = pieces()
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    ids = {truth.id_to_piece(i): i for i in range(len(truth))}
    scores = {truth.id_to_piece(i): truth.get_score(i) for i in range(len(truth))}
    tokenizer = tokenizers.Tokenizer(models.BPE(
        ids, convert.generate_merges(ids, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer.to_str()


@cache
def mistral(form: str = "prepend", *, markers: tuple[str, ...] = ()) -> Tokenizer:
    """The file read by our Tokenizer, with `markers` as added tokens. Shared by all tests: do not change it."""
    tokenizer = tokenizers.Tokenizer.from_str(layout(form))
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False) for marker in markers])
    with tempfile.TemporaryDirectory() as folder:
        content = json.loads(tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = False  # published files differ in this; it must not matter
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content))
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        return Tokenizer.from_folder(Path(folder))
