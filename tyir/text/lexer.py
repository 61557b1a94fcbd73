"""Scanning of IR text: a position in a string, tokens by compiled regular expression, errors with a caret.

The tokens are those of MLIR.  There is no token list: the parser asks for what it needs at a position, which
is what makes the fast path of `tyir.parser` possible.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn

from tyir.diagnostics import Diagnostic, Label, SourceText, TyirError

__all__ = ["Scanner", "has_too_many_digits", "unescape"]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]++|//[^\n]*+)*+")
_STRING: Final = re.compile(r'"((?:[^"\\\n]++|\\.)*+)"')
_ESCAPE: Final = re.compile(rb"\\(?:([nt\\\"])|([0-9A-Fa-f]{2}))")
_TOKEN: Final = re.compile(r'->|::|-?\d[\w.]*|[@#!%^]?[\w$.-]+|"(?:[^"\\\n]|\\.)*"?|\S')
_SIMPLE: Final = {b"n": b"\n", b"t": b"\t", b"\\": b"\\", b'"': b'"'}
MAX_DIGITS: Final = 4000  # of an integer literal; Python refuses to convert more than 4300
_MAX_HEX_DIGITS: Final = 3300  # fewer than MAX_DIGITS decimal ones, in which they are printed
MAX_DEPTH: Final = 100  # nesting of attributes and types, aliases written out
MAX_REGIONS: Final = 1000  # nesting of regions: every line of the innermost is indented by twice as much


def unescape(body: str) -> str:
    r"""The value of what stands between the quotes: `\n \t \\ \" \HH` (bytes of UTF-8).

    `ValueError` on anything else.
    """
    if "\\" not in body:
        return body
    raw = body.encode("utf-8", "surrogateescape")
    consumed = _ESCAPE.sub(b"", raw)
    if b"\\" in consumed:
        raise ValueError(r"unknown escape in string; known are \n \t \\ \" and \HH with two hex digits")
    decoded = _ESCAPE.sub(lambda m: _SIMPLE[m[1]] if m[1] else bytes([int(m[2], 16)]), raw)
    return decoded.decode("utf-8", "surrogateescape")


def has_too_many_digits(literal: str) -> bool:
    """Whether an integer as written could not be printed again."""
    return len(literal) > (_MAX_HEX_DIGITS if "x" in literal else MAX_DIGITS)


class Scanner:
    """A cursor over one source text."""

    def __init__(self, source: SourceText) -> None:
        self.source: Final = source
        self.text: Final = source.text
        self.pos = 0
        self.depth = 0

    def enough_levels(self, further: int, start: int | None = None) -> None:
        """Refuse what would nest deeper than `MAX_DEPTH`: hostile input must not exhaust Python's stack."""
        if self.depth + further > MAX_DEPTH:
            self.fail(
                f"attribute or type is nested deeper than {MAX_DEPTH} levels",
                start,
                help="write it with fewer lists, dictionaries or types within each other",
            )

    # -- errors
    # -----------------------------------------------------------------------------------------------------
    def fail(
        self, message: str, start: int | None = None, end: int | None = None, help: str = "", label: str = ""
    ) -> NoReturn:
        """Raise at a span; without one, at the token under the cursor."""
        raise TyirError(self.diagnostic(message, start, end, help, label))

    def diagnostic(
        self, message: str, start: int | None = None, end: int | None = None, help: str = "", label: str = ""
    ) -> Diagnostic:
        if start is None:
            start = self.skip_space()
            match = _TOKEN.match(self.text, start)
            end = match.end() if match else start
        return Diagnostic(
            message, label=Label(self.source, start, end if end is not None else start + 1, label), help=help
        )

    def expected(self, what: str, help: str = "") -> NoReturn:
        """Raise "expected X, found Y" at the cursor."""
        start = self.skip_space()
        match = _TOKEN.match(self.text, start)
        found = f"'{match[0][:40]}'" if match else "the end of the file"
        self.fail(f"expected {what}, found {found}", start, match.end() if match else start, help)

    # -- tokens
    # -----------------------------------------------------------------------------------------------------
    def skip_space(self) -> int:
        """Move behind white space and `//` comments; the new position."""
        match = _SPACE.match(self.text, self.pos)
        assert match is not None
        self.pos = match.end()
        return self.pos

    def peek(self) -> str:
        """The next character that is no white space, or an empty string."""
        return self.text[self.skip_space() : self.pos + 1]

    def accept(self, literal: str) -> bool:
        """Consume `literal` if it comes next."""
        if self.text.startswith(literal, self.skip_space()):
            self.pos += len(literal)
            return True
        return False

    def expect(self, literal: str, what: str = "") -> None:
        if not self.accept(literal):
            self.expected(what or f"'{literal}'")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Consume a match of `pattern` if it comes next."""
        match = pattern.match(self.text, self.skip_space())
        if match is not None:
            self.pos = match.end()
        return match

    def string(self, what: str = "a string") -> str:
        """A quoted string's value."""
        match = self.match(_STRING)
        if match is None:
            if self.peek() == '"':
                end = self.text.find("\n", self.pos)
                self.fail("string is not closed", self.pos, end if end >= 0 else len(self.text))
            self.expected(what)
        try:
            return unescape(match[1])
        except ValueError as error:
            self.fail(str(error), match.start(), match.end())

    def enter(self) -> None:
        """One level deeper into an attribute."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.enough_levels(0)

    def leave(self) -> None:
        self.depth -= 1
