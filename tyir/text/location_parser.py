"""Parsing locations and looking up aliases: what attributes, types and ops have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from tyir import location as l
from tyir.attributes import Attribute
from tyir.diagnostics import SourceText, did_you_mean
from tyir.text.expansion import Expansion
from tyir.text.lexer import Scanner

__all__ = ["LocationParser"]

_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*")
_DECIMAL: Final = re.compile(r"[0-9]+")
_ALIAS_USE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|([#!][A-Za-z_][A-Za-z0-9_$]*)(?![A-Za-z0-9_$.<])')
_ALIAS_DEFINITION: Final = re.compile(r"^[ \t]*(#[A-Za-z_][A-Za-z0-9_$]*)[ \t]*=[ \t]*loc\(", re.MULTILINE)


class LocationParser(Scanner):
    """Reads `loc(...)` at the cursor; knows the file's aliases."""

    def __init__(self, source: SourceText) -> None:
        super().__init__(source)
        self.aliases: dict[str, Attribute] = {}
        self._later: dict[str, int] = {}  # where aliases of locations are defined below their first use
        self._looked_for_later = False
        self._being_read: set[str] = set()
        self._expansion = Expansion(len(source.text))

    def listed(self, opening: str, closing: str, item: Callable[[], Any]) -> list[Any]:
        """`( item (, item)* )?` between brackets."""
        self.expect(opening)
        items: list[Any] = []
        if self.accept(closing):
            return items
        items.append(item())
        while self.accept(","):
            items.append(item())
        self.expect(closing, f"',' or '{closing}'")
        return items

    # -- aliases
    # ----------------------------------------------------------------------------------------------------
    def define_alias(self, name: str, value: Attribute, start: int) -> None:
        """Give the alias defined at `start` its value."""
        if name in self.aliases and self._later.get(name) != start:
            self.fail(f"alias {name} is defined twice", start, start + len(name))
        self.aliases[name] = value

    def _alias(self, name: str, start: int) -> Attribute:
        value = self.aliases.get(name)
        if value is None and (value := self._later_alias(name)) is None:
            hint = did_you_mean(name, self.aliases) or f"define it above its first use: {name} = ..."
            self.fail(f"unknown alias {name}", start, self.pos, help=hint)
        self.enough_levels(self._charge(name, value, start), start)
        return value

    def _charge(self, name: str, value: Attribute, start: int) -> int:
        """Count the text that a use of an alias stands for; returns the levels it is nested."""
        size, depth = self._expansion.add(value)
        if self._expansion.is_too_much:
            self.fail(
                f"the aliases stand for more than {self._expansion.limit} characters, {size} of them here:"
                f" {name}",
                start,
                start + len(name),
                help="let an alias be used often or stand for much, not both: printed IR has no aliases",
            )
        return depth

    def _later_alias(self, name: str) -> Attribute | None:
        """The location of an alias that is defined further below: mlir-opt writes the aliases of locations
        behind the module.
        """
        if not self._looked_for_later:
            self._looked_for_later = True
            self._later = {m[1]: m.start(1) for m in _ALIAS_DEFINITION.finditer(self.text, self.pos)}
        at = self._later.get(name)
        if at is None or name in self._being_read:
            return None
        before, self.pos = self.pos, at + len(name)
        self._being_read.add(name)
        self.expect("=")
        value = self.location()
        self._being_read.remove(name)
        self.define_alias(name, value, at)
        self.pos = before
        return value

    def expand_aliases(self, body: str, at: int) -> str:
        """`body`, which stands at `at`, with the aliases in it replaced by what they stand for."""
        if not self.aliases:
            return body

        def expand(match: re.Match[str]) -> str:
            value = self.aliases.get(match[1]) if match[1] else None
            if value is None:
                return match[0]
            self._charge(match[1], value, at + match.start(1))
            return str(value)

        return _ALIAS_USE.sub(expand, body)

    # -- locations
    # --------------------------------------------------------------------------------------------------
    def location(self) -> l.Location:
        """`loc(...)`, the word included."""
        self.expect("loc", "loc(...)")
        return self._location_in_parentheses()

    def _location_in_parentheses(self) -> l.Location:
        self.expect("(")
        value = self.location_body()
        self.expect(")")
        return value

    def location_body(self) -> l.Location:
        """What stands between the parentheses."""
        self.enter()
        value = self._location_body()
        self.depth -= 1
        return value

    def _location_body(self) -> l.Location:
        first = self.peek()
        if first == '"':
            return self._name_or_file()
        start = self.pos
        if first == "#":
            self.pos += 1
            match = _WORD.match(self.text, self.pos)
            self.pos = match.end() if match else self.pos
            value = self._alias(self.text[start : self.pos], start)
            if not isinstance(value, l.Location):
                self.fail(f"{self.text[start : self.pos]} is not a location", start, self.pos)
            return value
        if self.accept("unknown"):
            return l.UNKNOWN
        if self.accept("fused"):
            return l.FusedLoc(tuple(self.listed("[", "]", self.location_body)))
        if self.accept("callsite"):
            self.expect("(")
            callee = self.location_body()
            self.expect("at", "'at'")
            caller = self.location_body()
            self.expect(")")
            return l.CallSiteLoc(callee, caller)
        if self.accept("loc"):
            return self._location_in_parentheses()
        self.expected(
            'a location: unknown, "file":line:col, "name", fused[..], callsite(.. at ..) or an alias'
        )

    def _name_or_file(self) -> l.Location:
        name = self.string()
        if self.accept(":"):
            line = self.match(_DECIMAL)
            self.expect(":", "':' and a column")
            col = self.match(_DECIMAL)
            if line is None or col is None or len(line[0]) > 10 or len(col[0]) > 10:
                self.fail('a file location is written "file":line:column')
            return l.FileLoc(name, int(line[0]), int(col[0]))
        if self.accept("("):
            child = self.location_body()
            self.expect(")")
            return l.NameLoc(name, child)
        return l.NameLoc(name)
