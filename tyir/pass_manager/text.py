"""The text of a pass pipeline, in MLIR's grammar, as data.

    pipeline ::= item (',' item)*
    item     ::= anchor '(' pipeline ')' | pass ('{' options '}')?
    options  ::= option ((' ' | ',') option)*
    option   ::= name ('=' value)?          // no value: true
    value    ::= word (',' word)* | '[' word (',' word)* ']' | 'quoted' | "quoted"

An anchor is an op name such as `func.func`, or `any`.  Errors point into the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NoReturn

from tyir.diagnostics import Diagnostic, Label, SourceText, TyirError

__all__ = [
    "MAX_PASSES",
    "Nest",
    "OptionText",
    "PassText",
    "PipelineItem",
    "parse_pipeline_text",
    "pipeline_error",
]

MAX_PASSES: Final = 10_000
_NAME: Final = re.compile(r"[A-Za-z_][\w.-]*")
_OPTION: Final = re.compile(r"[A-Za-z_][\w-]*")
_WORD: Final = re.compile(r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s,{}'"\[\]]+""")
_NEXT_OPTION: Final = re.compile(r"\s*[A-Za-z_][\w-]*\s*=")


@dataclass(frozen=True, slots=True)
class OptionText:
    """One option; `values` are the words of its list, `start` and `end` its place in the text."""

    name: str
    values: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PassText:
    """A pass (or a named pipeline) with its options."""

    name: str
    options: tuple[OptionText, ...]
    source: SourceText
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Nest:
    """`anchor(items)`."""

    anchor: str
    items: tuple[PipelineItem, ...]
    source: SourceText
    start: int
    end: int


PipelineItem = PassText | Nest


_FORM: Final = (
    "a pipeline is written as builtin.module(cse,func.func(canonicalize),kv-materialize{max-kv=512})"
)


def pipeline_error(source: SourceText, start: int, end: int, message: str, help: str = _FORM) -> TyirError:
    """An error that points into the pipeline's text."""
    return TyirError(Diagnostic(message, label=Label(source, start, max(end, start + 1)), help=help))


def parse_pipeline_text(text: str, name: str = "<pipeline>") -> tuple[PipelineItem, ...]:
    """The items of a pipeline; the empty text is an empty pipeline."""
    reader = _Reader(SourceText(name, text))
    items = () if not text.strip() else reader.items()
    reader.space()
    if reader.pos != len(text):
        reader.fail("expected ',' or the end of the pipeline")
    return items


class _Reader:
    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.text = source.text
        self.pos = 0
        self.depth = 0

    def fail(self, message: str, help: str = _FORM) -> NoReturn:
        found = (
            f", found '{self.text[self.pos]}'" if self.pos < len(self.text) else ", found the end of the text"
        )
        raise pipeline_error(self.source, self.pos, self.pos + 1, message + found, help)

    def space(self) -> str:
        """Skip white space; the character that follows."""
        while self.pos < len(self.text) and self.text[self.pos].isspace():
            self.pos += 1
        return self.text[self.pos : self.pos + 1]

    def items(self) -> tuple[PipelineItem, ...]:
        items = [self.item()]
        while self.space() == ",":
            if len(items) == MAX_PASSES:
                self.fail(f"a pipeline has at most {MAX_PASSES} passes", help="run it in parts")
            self.pos += 1
            items.append(self.item())
        return tuple(items)

    def item(self) -> PipelineItem:
        self.space()
        match = _NAME.match(self.text, self.pos)
        if match is None:
            self.fail(
                "expected the name of a pass or of an op", help="for example builtin.module(canonicalize,cse)"
            )
        self.pos = match.end()
        if self.space() == "(":
            self.pos += 1
            self.depth += 1
            if self.depth > 50:
                self.fail("anchors are nested deeper than 50 levels")
            items = () if self.space() == ")" else self.items()
            if self.space() != ")":
                self.fail("expected ',' or ')'")
            self.pos += 1
            self.depth -= 1
            return Nest(match[0], items, self.source, match.start(), self.pos)
        options = self.options() if self.space() == "{" else ()
        return PassText(match[0], options, self.source, match.start(), match.end())

    def options(self) -> tuple[OptionText, ...]:
        self.pos += 1
        options: list[OptionText] = []
        while self.space() != "}":
            if options and self.text[self.pos : self.pos + 1] == ",":
                self.pos += 1
                self.space()
            options.append(self.option())
        self.pos += 1
        return tuple(options)

    def option(self) -> OptionText:
        match = _OPTION.match(self.text, self.pos)
        if match is None:
            self.fail("expected an option such as max-kv=1024, or '}'")
        start, self.pos = match.start(), match.end()
        if self.text[self.pos : self.pos + 1] != "=":
            return OptionText(match[0], (), start, self.pos)
        self.pos += 1
        words = [self.word()]
        while self.text[self.pos : self.pos + 1] == "," and not _NEXT_OPTION.match(self.text, self.pos + 1):
            self.pos += 1
            words.append(self.word())
        return OptionText(match[0], tuple(w for word in words for w in _split(word)), start, self.pos)

    def word(self) -> str:
        match = _WORD.match(self.text, self.pos)
        if match is None:
            self.fail("expected a value")
        self.pos = match.end()
        return match[0]


def _split(word: str) -> list[str]:
    """The words of a bracketed list; a quoted word loses its quotes."""
    if word[0] == "[":
        return [w.strip().strip("'\"") for w in word[1:-1].split(",") if w.strip()]
    return [word[1:-1] if word[0] in "'\"" else word]
