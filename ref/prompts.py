r"""Prompts: what stands before a text, as data, and how it becomes ids.

    <s>Instruct: …\nQuery: q1\nResponse: p1\n\nInstruct: …\nQuery: the text …</s>
    `----------- prefix, the same ids for all queries -----------'

The prefix ends with `Query:` and is encoded as one string; the text follows with the word-start mark that
encoding gives it, which stands for the space after the colon. So the ids are those of the whole string, and
the prefix's keys and values serve every query. Only text is ever cut: to its own limit, and to what the
prefix leaves; examples that do not fit are dropped whole, the last first, and counted.

A passage is bare: `<s>` text `</s>`. Called by embedder.py, trainer.py, run_train.py and scoring/.
Source: arXiv 2506.07438 (the template); arXiv 2409.15700 and its trainer (examples, the second template).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ref.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Template:
    """A prompt's strings. `query` ends with {text}; `suffix` follows the text of a query."""

    query: str
    example: str
    separator: str = "\n\n"
    suffix: str = ""
    markers: tuple[str, ...] = ()  # inserted by id where the vocabulary has them


TEMPLATES = {
    "report": Template(
        query="Instruct: {instruction}\nQuery: {text}",
        example="Instruct: {instruction}\nQuery: {query}\nResponse: {response}"),
    "bge-en-icl": Template(
        query="<instruct>{instruction}\n<query>{text}",
        example="<instruct>{instruction}\n<query>{query}\n<response>{response}",
        suffix="\n<response>", markers=("<instruct>", "<query>", "<response>")),
}


@dataclass(frozen=True)
class Example:
    """A solved query of the same task, shown in the prompt."""

    query: str
    response: str


@dataclass(frozen=True)
class Prefix:
    """Ids from `<s>` to where the text begins, the ids from its end to before `</s>`, and the examples that got in."""

    ids: tuple[int, ...]
    suffix: tuple[int, ...] = ()
    examples: int = 0


@dataclass(frozen=True)
class Prompter:
    """Instruction, examples and text to ids. Limits are counted in tokens, `<s>` and `</s>` not counted as text."""

    tokenizer: TextTokenizer
    template: Template = TEMPLATES["report"]
    max_text_tokens: int = 512
    max_prompt_tokens: int = 2048  # prefix, text, suffix and </s> together
    max_example_tokens: int = 256  # an example's query, and its response

    def prefix(self, instruction: str | None, examples: Sequence[Example] = ()) -> Prefix:
        """What stands before a text: `<s>` alone without an instruction (a passage).

        Raises ValueError if the instruction leaves no room for a single token of text.
        """
        if instruction is None:
            return Prefix((self.tokenizer.begin,))
        suffix = self._suffix()
        for count in range(len(examples), -1, -1):
            ids = self._prefix_ids(instruction, examples[:count])
            room = self.max_prompt_tokens - len(ids) - len(suffix) - 1
            if room >= (self.max_text_tokens if count else 1):
                return Prefix(ids, suffix, count)
        raise ValueError(
            f"the instruction {instruction!r:.60} takes {len(ids)} of {self.max_prompt_tokens} tokens and leaves "
            "no room for the text. Expected is a shorter instruction. Shorten it or raise max_prompt_tokens.")

    def texts(self, texts: Sequence[str], prefix: Prefix) -> list[list[int]]:
        """Ids of each text behind the prefix, cut to what fits, with suffix and `</s>`."""
        room = self.max_prompt_tokens - len(prefix.ids) - len(prefix.suffix) - 1
        cut = self.tokenizer.encode(texts, max_tokens=min(self.max_text_tokens, room))
        return [[*ids, *prefix.suffix, self.tokenizer.end] for ids in cut]

    def _prefix_ids(self, instruction: str, examples: Sequence[Example]) -> tuple[int, ...]:
        """`<s>`, then runs of text encoded as one string each, between markers given by id."""
        limit = self.max_example_tokens
        blocks = [self._fill(self.template.example, {
            "instruction": instruction,
            "query": self.tokenizer.cut(e.query, max_tokens=limit),
            "response": self.tokenizer.cut(e.response, max_tokens=limit)}) for e in examples]
        before_text = self.template.query.removesuffix("{text}").removesuffix(" ")
        blocks.append(self._fill(before_text, {"instruction": instruction}))
        return (self.tokenizer.begin, *self._ids(_runs(blocks, self.template.separator)))

    def _ids(self, parts: Sequence[tuple[bool, str]]) -> list[int]:
        """Ids of marker tokens and of runs of text, one after the other."""
        ids: list[int] = []
        for is_marker, text in parts:
            ids += [self._marker_ids[text]] if is_marker else self.tokenizer.encode([text], max_tokens=2**20)[0]
        return ids

    def _fill(self, form: str, values: dict[str, str]) -> list[tuple[bool, str]]:
        """A template's parts as (is a marker token, text): what comes from outside is never a marker."""
        parts = [(False, form)]
        for marker in self._marker_ids:
            parts = [piece for is_marker, text in parts for piece in (
                [(True, text)] if is_marker else _split(text, marker))]
        return [(True, text) if is_marker else (False, text.format(**values)) for is_marker, text in parts if text]

    @cached_property
    def _marker_ids(self) -> dict[str, int]:
        """The template's markers that are tokens of this vocabulary; the others are text."""
        found = {marker: self.tokenizer.marker(marker) for marker in self.template.markers}
        return {marker: token for marker, token in found.items() if token is not None}

    def _suffix(self) -> tuple[int, ...]:
        """Ids of what follows a query's text: no word-start mark before them."""
        return tuple(token for is_marker, text in self._fill(self.template.suffix, {})
                     for token in ([self._marker_ids[text]] if is_marker else self.tokenizer.continuation(text)))


def _split(text: str, marker: str) -> list[tuple[bool, str]]:
    """"a<m>b" -> (False, a), (True, <m>), (False, b)."""
    first, *rest = text.split(marker)
    return [(False, first)] + [part for piece in rest for part in ((True, marker), (False, piece))]


def _runs(blocks: Sequence[Sequence[tuple[bool, str]]], separator: str) -> list[tuple[bool, str]]:
    """All blocks in one list with the separator between them, neighbouring texts joined to one string."""
    flat = [part for n, block in enumerate(blocks) for part in ([(False, separator)] if n else []) + list(block)]
    joined: list[tuple[bool, str]] = []
    for is_marker, text in flat:
        if joined and not is_marker and not joined[-1][0]:
            joined[-1] = (False, joined[-1][1] + text)
        else:
            joined.append((is_marker, text))
    return joined
