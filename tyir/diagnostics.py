"""Errors as data: a `Diagnostic` with a message, a place, notes and help; `TyirError` carries one or more of
them.

`TyirError` is the one exception for everything that is the user's to mend (wrong file, wrong number,
malformed IR): tools print it without a traceback and exit 1.  Anything else that escapes is an internal
error.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Final, Literal

__all__ = ["Diagnostic", "Label", "Severity", "SourceText", "TyirError", "did_you_mean", "kind_of"]

Severity = Literal["error", "warning", "note", "remark"]
_LONGEST_NAME: Final = 100
_MOST_NAMES: Final = 5000
_MOST_SHOWN: Final = 100  # of the problems of one error
_MOST_ALIKE: Final = 8  # of those that differ in names and numbers alone: a damaged file makes hundreds


@dataclass(frozen=True, slots=True)
class SourceText:
    """A named piece of text that positions point into."""

    name: str
    text: str

    def line_col(self, offset: int) -> tuple[int, int]:
        """1-based line and column of a character offset."""
        offset = min(max(offset, 0), len(self.text))
        starts = _line_starts(self.text)
        line = bisect_right(starts, offset)
        return line, offset - starts[line - 1] + 1


@lru_cache(maxsize=1)  # thousands of ops are located one after the other, all in one text
def _line_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer("\n", text))]


@dataclass(frozen=True, slots=True)
class Label:
    """A span of source text (character offsets), with what to say about it."""

    source: SourceText
    start: int
    end: int
    text: str = ""

    def render(self, width: int = 160) -> str:
        """The source line with carets below; long lines are cut to a window around the span."""
        line, col = self.source.line_col(self.start)
        begin = self.source.text.rfind("\n", 0, self.start) + 1
        end = self.source.text.find("\n", self.start)
        content = self.source.text[begin : end if end >= 0 else len(self.source.text)].replace("\t", " ")
        shift = max(0, col - 1 - width // 2)
        content = ("…" if shift else "") + content[shift : shift + width]
        column = col - 1 - shift + (1 if shift else 0)
        carets = "^" * max(1, min(self.end - self.start, len(content) - column))
        gutter = f"{line} | "
        return (
            f"{gutter}{content}\n{' ' * (len(gutter) - 2)}|"
            f" {' ' * column}{carets}{' ' + self.text if self.text else ''}"
        )


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One message.

    `where` is `file:line:col` or a file name; `excerpt` is IR or source text; `help` says what to do.
    """

    message: str
    severity: Severity = "error"
    where: str = ""
    label: Label | None = None
    excerpt: str = ""
    notes: tuple[Diagnostic, ...] = ()
    help: str = ""

    def position(self) -> str:
        if self.label is not None:
            line, col = self.label.source.line_col(self.label.start)
            return f"{self.label.source.name}:{line}:{col}"
        return self.where

    def render(self) -> str:
        position = self.position()
        lines = [
            f"{position}: {self.severity}: {self.message}" if position else f"{self.severity}: {self.message}"
        ]
        if self.label is not None:
            lines.append(self.label.render())
        if self.excerpt:
            lines.extend("  " + line for line in self.excerpt.splitlines()[:20])
        if self.help:
            lines.append(f"help: {self.help}")
        lines.extend(note.render() for note in self.notes)
        return "\n".join(lines)


@dataclass(eq=False)
class TyirError(Exception):
    """Something the user can mend; holds every diagnostic found, in order, each once (several dies may meet
    the same one).
    """

    diagnostics: Sequence[Diagnostic] = field(default_factory=tuple)

    def __init__(
        self, diagnostics: str | Diagnostic | Iterable[Diagnostic], *, help: str = "", where: str = ""
    ) -> None:
        if isinstance(diagnostics, str):
            diagnostics = Diagnostic(diagnostics, help=help, where=where)
        self.diagnostics = (
            (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(dict.fromkeys(diagnostics))
        )
        super().__init__(self.render())

    def render(self) -> str:
        alike: dict[str, list[Diagnostic]] = {}
        for d in self.diagnostics:
            alike.setdefault(kind_of(d.message), []).append(d)
        kept = {id(d) for group in alike.values() for d in group[:_MOST_ALIKE]}
        shown = [d for d in self.diagnostics if id(d) in kept]
        lines = [d.render() for d in shown[:_MOST_SHOWN]]
        for first, *others in alike.values() if len(shown) <= _MOST_SHOWN else ():
            if len(others) >= _MOST_ALIKE:
                lines.append(f"... and {len(others) + 1 - _MOST_ALIKE} more like: {first.message}")
        if len(shown) > _MOST_SHOWN:
            lines.append(f"... and {len(self.diagnostics) - _MOST_SHOWN} more problems")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.render()


def kind_of(message: str) -> str:
    """A message without its names and numbers: equal for what one cause makes of many things."""
    return re.sub(r"'[^']*'|[\w.]+", _without_number, message)


def _without_number(found: re.Match[str]) -> str:
    """A word without its digits; nothing of a quoted name or of one that counts (`layers.3.mlp`).

    Word by word: one pattern for all of it takes the square of a long word's time.
    """
    word = found[0]
    return "" if word.startswith("'") or re.search(r"\w\.\d+\.\w", word) else re.sub(r"\d+", "", word)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, or an empty string.

    Comparing takes the product of the lengths and names may come from hostile input: a name longer than any
    written by hand gets no suggestion, and of many known ones the first thousands are looked at.
    """
    if len(name) > _LONGEST_NAME:
        return ""
    near = [k for k in islice(known, _MOST_NAMES) if abs(len(k) - len(name)) <= len(name)]
    close = difflib.get_close_matches(name, near, n=1)
    return f"did you mean '{close[0]}'?" if close else ""
