r"""Prompts: the template, instruction and in-context examples in front of a text, and their encoding.

    <s>Instruct: …\nQuery: q1\nResponse: p1\n\nInstruct: …\nQuery: the text …</s>
    `----------- prefix, the same ids for all queries -----------'

The prefix is encoded as one string up to `Query:`, without the space that follows. When the text is encoded by itself,
its first token starts with the word-start mark (▁), which stands for that space. So the ids of prefix and text equal
those of the whole string, and the prefix's keys and values serve every query. A text is truncated to --max-text-tokens
and to what the prefix leaves, an example's query and response to --max-example-tokens. Examples that do not fit are
removed completely, starting with the last one, and counted.

A passage has no instruction, `<s>` text `</s>`, except in some task types (ref/task_types.py). A new template is one
more entry of TEMPLATES.
Source: arXiv 2506.07438 (the template); arXiv 2409.15700 and its trainer (in-context examples, the second template).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ref.text.tokenizer import Tokenizer
from ref.utils.files import check_type, read_json

PROMPT_FILE = "embedder.json"  # template and token limits, in the folder of a model of this project
LIMITS = ("max_text_tokens", "max_prompt_tokens", "max_example_tokens")


@dataclass(frozen=True)
class Template:
    """The strings of a prompt, for str.format.

    `query` contains {instruction} and ends with {text}; `suffix` follows the text. `example` contains {instruction},
    {query} and {response}.
    """

    query: str
    example: str
    separator: str = "\n\n"
    suffix: str = ""
    markers: tuple[str, ...] = ()  # tokens of the vocabulary, inserted by id

    @property
    def before_text(self) -> str:
        """What stands in front of a query's text, with {instruction}."""
        return self.query.removesuffix("{text}")


TEMPLATES = {
    "paper": Template(
        query="Instruct: {instruction}\nQuery: {text}",
        example="Instruct: {instruction}\nQuery: {query}\nResponse: {response}"),
    "bge-en-icl": Template(
        query="<instruct>{instruction}\n<query>{text}",
        example="<instruct>{instruction}\n<query>{query}\n<response>{response}",
        suffix="\n<response>", markers=("<instruct>", "<query>", "<response>")),
}


@dataclass(frozen=True)
class InContextExample:
    """A query with a correct response, shown in the prompt. `instruction`: None for the task's own."""

    query: str
    response: str
    instruction: str | None = None


@dataclass(frozen=True)
class PromptPrefix:
    """Ids from BOS to the beginning of the text, the suffix's ids after it, and how many examples fitted."""

    ids: tuple[int, ...]
    suffix: tuple[int, ...] = ()
    num_examples: int = 0
    space: str = ""  # between prefix and text; a byte-level vocabulary encodes it with the text

    @property
    def is_shared(self) -> bool:
        """Whether keys and values are computed once for all texts: BOS alone costs less in each text."""
        return len(self.ids) > 1


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes instruction, in-context examples and texts. `<s>` and `</s>` do not count as text tokens.

    Raises ValueError if a marker of the template is no token: as text it could merge with the text behind it, and then
    prefix and text would not have the ids of the whole string.
    """

    tokenizer: Tokenizer
    template: Template = TEMPLATES["paper"]
    max_text_tokens: int = 512
    max_prompt_tokens: int = 2048  # prefix, text, suffix and </s> together
    max_example_tokens: int = 256  # an example's query, and its response

    def __post_init__(self) -> None:
        if missing := [marker for marker in self.template.markers if self.tokenizer.token_id(marker) is None]:
            raise ValueError(f"template {self.template_name}: the vocabulary must contain its markers (missing: "
                             f"{', '.join(missing)}); use the template paper")
        self.tokenizer.mark_special(self.template.markers)

    @property
    def template_name(self) -> str:
        """The template's key in TEMPLATES."""
        return next(name for name, template in TEMPLATES.items() if template == self.template)

    def prefix(self, instruction: str | None, examples: Sequence[InContextExample] = ()) -> PromptPrefix:
        """The ids in front of a text; without an instruction only `<s>`.

        Raises ValueError if the instruction leaves no room for a single token of text.
        """
        if instruction is None:
            return PromptPrefix(self._bos())
        suffix = self._suffix()
        for count in range(len(examples), -1, -1):
            ids = self._prefix_ids(instruction, examples[:count])
            room = self.max_prompt_tokens - len(ids) - len(suffix) - 1
            if room >= (self.max_text_tokens if count else 1):
                return PromptPrefix(ids, suffix, count, self._space)
        raise ValueError(f"instruction {instruction!r:.60} has {len(ids)} tokens and leaves no room for a text in "
                         f"max_prompt_tokens {self.max_prompt_tokens}")

    def encode(self, texts: Sequence[str], prefix: PromptPrefix) -> list[list[int]]:
        """Ids of each text behind the prefix, truncated to what fits, followed by suffix and `</s>`."""
        room = self.max_prompt_tokens - len(prefix.ids) - len(prefix.suffix) - 1
        if prefix.space and not self.tokenizer.has_word_start:
            texts = [prefix.space + text for text in texts]
        limit = min(self.max_text_tokens, room)
        ids = self.tokenizer.encode(texts, max_tokens=limit)
        if prefix.space and self.tokenizer.has_word_start:
            # no word-start mark stands for the space in front of an empty text, of an added token, or of another space
            words = self.tokenizer.word_ids
            ids = [self.tokenizer.encode_continuation(prefix.space + text)[:limit]
                   if not found or found[0] in words or text[:1] in (" ", "▁") else found
                   for found, text in zip(ids, texts, strict=True)]
        return [[*text, *prefix.suffix, self.tokenizer.eos_id] for text in ids]

    def _prefix_ids(self, instruction: str, examples: Sequence[InContextExample]) -> tuple[int, ...]:
        """`<s>`, then the pieces between markers, each encoded as one string."""
        limit = self.max_example_tokens
        blocks = [self._fill(self.template.example, {
            "instruction": instruction if e.instruction is None else e.instruction,
            "query": self.tokenizer.truncate(e.query, max_tokens=limit),
            "response": self.tokenizer.truncate(e.response, max_tokens=limit)}) for e in examples]
        blocks.append(self._fill(self.template.before_text.removesuffix(" "), {"instruction": instruction}))
        return (*self._bos(), *self._ids(_join(blocks, self.template.separator)))

    @property
    def _space(self) -> str:
        """The space in front of {text} in the template, if there is one."""
        before_text = self.template.before_text
        return before_text[len(before_text.removesuffix(" ")) :]

    def _bos(self) -> tuple[int, ...]:
        """BOS as a tuple, empty if the tokenizer has none."""
        return () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)

    def _ids(self, parts: Sequence[tuple[bool, str]]) -> list[int]:
        """Ids of (is a marker, text) parts, one after the other."""
        ids: list[int] = []
        for is_marker, text in parts:
            ids += [self._marker_ids[text]] if is_marker else self.tokenizer.encode([text], max_tokens=2**20)[0]
        return ids

    def _fill(self, form: str, values: dict[str, str]) -> list[tuple[bool, str]]:
        """The parts of a filled template as (is a marker, text); a marker inside `values` is text."""
        parts = [(False, form)]
        for marker in self._marker_ids:
            parts = [piece for is_marker, text in parts for piece in (
                [(True, text)] if is_marker else _split(text, marker))]
        return [(True, text) if is_marker else (False, text.format(**values)) for is_marker, text in parts if text]

    @cached_property
    def _marker_ids(self) -> dict[str, int]:
        """The template's markers and their ids."""
        found = {marker: self.tokenizer.token_id(marker) for marker in self.template.markers}
        return {marker: token for marker, token in found.items() if token is not None}

    def _suffix(self) -> tuple[int, ...]:
        """Ids of the template's suffix, without a word-start mark at its beginning."""
        return tuple(token for is_marker, text in self._fill(self.template.suffix, {})
                     for token in ([self._marker_ids[text]] if is_marker else self.tokenizer.encode_continuation(text)))


def _split(text: str, marker: str) -> list[tuple[bool, str]]:
    """"a<m>b" -> (False, a), (True, <m>), (False, b)."""
    first, *rest = text.split(marker)
    return [(False, first)] + [part for piece in rest for part in ((True, marker), (False, piece))]


def _join(blocks: Sequence[Sequence[tuple[bool, str]]], separator: str) -> list[tuple[bool, str]]:
    """All blocks in one list with the separator between them; adjacent texts become one string."""
    flat = [part for n, block in enumerate(blocks) for part in ([(False, separator)] if n else []) + list(block)]
    joined: list[tuple[bool, str]] = []
    for is_marker, text in flat:
        if joined and not is_marker and not joined[-1][0]:
            joined[-1] = (False, joined[-1][1] + text)
        else:
            joined.append((is_marker, text))
    return joined


# ---- the file embedder.json --------------------------------------------------------------------------------


def get_template(name: object, where: str) -> Template:
    """The template of that name. Raises ValueError that starts with `where` if there is none."""
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"{where} must be one of {', '.join(TEMPLATES)} (got {name!r:.60})")
    return TEMPLATES[name]


def template_of_vocabulary(tokenizer: Tokenizer) -> str:
    """The template whose markers are all tokens of the vocabulary, else paper."""
    return next((name for name, template in TEMPLATES.items() if template.markers and all(
        tokenizer.token_id(marker) is not None for marker in template.markers)), "paper")


def load_prompt_encoder(folder: Path, tokenizer: Tokenizer, **given: str | int) -> PromptEncoder:
    """Template and token limits of a model: `given`, else its embedder.json.

    Without that file the template is the one whose markers the vocabulary has, and the limit sentence-transformers'.
    Raises ValueError for an unknown key, template or limit.
    """
    path = folder / PROMPT_FILE
    if not path.exists():
        given = {**_library_limits(folder, tokenizer), **given}
    settings = {**(read_json(path) if path.exists() else {}), **given}
    where = {key: key if key in given else f"{path}: {key!r}" for key in settings}
    name = settings.pop("template", None) or template_of_vocabulary(tokenizer)
    template = get_template(name, where.get("template", "template"))
    for key, value in settings.items():
        if key not in LIMITS:
            raise ValueError(f"{where[key]} is unknown (only template, {', '.join(LIMITS)})")
        if check_type(value, int, where[key], "a number of tokens >= 1") < 1:
            raise ValueError(f"{where[key]} must be a number of tokens >= 1 (got {value})")
    if "max_text_tokens" in given:  # the prompt keeps room for a text of that length
        rest = PromptEncoder.max_prompt_tokens - PromptEncoder.max_text_tokens
        least = settings["max_text_tokens"] + rest
        settings["max_prompt_tokens"] = max(least, settings.get("max_prompt_tokens", PromptEncoder.max_prompt_tokens))
    encoder = PromptEncoder(tokenizer, template, **settings)
    if encoder.max_text_tokens > encoder.max_prompt_tokens - 2:
        raise ValueError(f"{path}: 'max_prompt_tokens' must be at least 'max_text_tokens' + 2 "
                         f"(got {encoder.max_prompt_tokens} and {encoder.max_text_tokens})")
    return encoder


def _library_limits(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """sentence-transformers' max_seq_length, which includes BOS and EOS, if the folder has one; since version 6 it is
    the tokenizer's model_max_length, at most the model's max_position_embeddings.
    """
    limits = [(folder / "sentence_bert_config.json", "max_seq_length")]
    if (folder / "modules.json").exists():
        limits.append((folder / "tokenizer_config.json", "model_max_length"))
    found = ((path, key, read_json(path).get(key)) for path, key in limits if path.exists())
    path, key, limit = next((each for each in found if each[2] is not None), (folder, "", None))
    if limit is None:
        return {}
    least = 2 + (tokenizer.bos is not None)
    if check_type(limit, int, f"{path}: {key!r}", f"an integer >= {least}") < least:
        raise ValueError(f"{path}: {key!r} must be an integer >= {least} (got {limit})")
    if key == "model_max_length" and (folder / "config.json").exists():
        positions = read_json(folder / "config.json").get("max_position_embeddings")
        limit = min(limit, positions) if isinstance(positions, int) else limit
    return {"max_text_tokens": limit - least + 1}


def save_prompt_encoder(folder: Path, encoder: PromptEncoder) -> None:
    """Write template and token limits to embedder.json."""
    settings = {"template": encoder.template_name, **{limit: getattr(encoder, limit) for limit in LIMITS}}
    (folder / PROMPT_FILE).write_text(json.dumps(settings, indent=1))
