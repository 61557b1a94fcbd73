"""Parsing the metadata section at the end of a file: `{-# dialect_resources: { builtin: { key: "0x..." } }
#-}`.

Blobs are hex: four little-endian bytes of alignment, then the data.  `external_resources` (a reproducer's
pipeline) are read over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from tyir.text.lexer import Scanner

__all__ = ["check_dialect", "check_new", "parse_metadata", "read_blob"]

_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*")
_ENTRY: Final = re.compile(r'([A-Za-z_][A-Za-z0-9_$.]*+): "(0x[0-9A-Fa-f]++)"')
_SCALAR: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|true|false|-?[0-9]+')

Resources = dict[str, tuple[int, bytes]]


def parse_metadata(scanner: Scanner) -> Resources:
    """The blobs by key; the cursor stands at `{-#`."""
    scanner.expect("{-#")
    resources: Resources = {}
    for _ in _items(scanner, "#-}", last_comma=True):
        section = _key(scanner)
        if section == "dialect_resources":
            _dialects(scanner, resources)
        elif section == "external_resources":
            _skip_map(scanner)
        else:
            scanner.fail(
                f"unknown metadata section '{section}'",
                scanner.pos - len(section) - 1,
                scanner.pos - 1,
                help="sections: dialect_resources, external_resources",
            )
    return resources


def _items(scanner: Scanner, close: str, last_comma: bool = False) -> Iterator[None]:
    """A turn for each item of a list with commas between, up to and over `close`."""
    while not scanner.accept(close):
        yield
        if scanner.accept(","):
            if not last_comma and scanner.peek() == close[0]:
                scanner.expected("another key")
        elif scanner.peek() != close[0]:
            scanner.expected(f"',' or '{close}'")


def _key(scanner: Scanner) -> str:
    match = scanner.match(_KEY)
    if match is None:
        scanner.expected("a key")
    scanner.expect(":", "':' after the key")
    return match[0]


def _dialects(scanner: Scanner, resources: Resources) -> None:
    scanner.expect("{")
    for _ in _items(scanner, "}"):
        start = scanner.skip_space()
        dialect = _key(scanner)
        check_dialect(scanner, dialect, start)
        scanner.expect("{")
        _entries(scanner, resources)


def _entries(scanner: Scanner, resources: Resources) -> None:
    for _ in _items(scanner, "}"):
        start = scanner.skip_space()
        fast = scanner.match(_ENTRY)
        if fast is not None:
            key, value = fast[1], fast[2]
        else:
            key = _key(scanner)
            value = scanner.string("a blob")
        check_new(scanner, key, resources, start)
        resources[key] = read_blob(scanner, key, value, start)


def check_dialect(scanner: Scanner, dialect: str, start: int) -> None:
    """Refuse resources of dialects other than `builtin`, as mlir-opt and xDSL do."""
    if dialect != "builtin":
        scanner.fail(
            f"resources of dialect '{dialect}' are not known",
            start,
            start + len(dialect),
            help="write them under builtin",
        )


def check_new(scanner: Scanner, key: str, resources: Resources, start: int) -> None:
    """Refuse a second blob of the same key."""
    if key in resources:
        scanner.fail(f"resource '{key}' is given twice", start, start + len(key))


def read_blob(scanner: Scanner, key: str, value: str, start: int) -> tuple[int, bytes]:
    """Alignment and bytes of `"0x..."`."""
    if not value.startswith("0x"):
        scanner.fail('a blob is hex: "0x..."', start, scanner.pos)
    try:
        data = bytes.fromhex(value[2:])
    except ValueError:
        scanner.fail(f"resource '{key}' is not hex, two digits a byte", start, scanner.pos)
    if len(data) < 4:
        scanner.fail(f"resource '{key}' lacks the four bytes of alignment", start, scanner.pos)
    alignment = int.from_bytes(data[:4], "little")
    if alignment & (alignment - 1) or not alignment:
        scanner.fail(f"alignment {alignment} of resource '{key}' is no power of two", start, scanner.pos)
    return alignment, data[4:]


def _skip_map(scanner: Scanner) -> None:
    """Pass over `{ key: value, ... }`; a value is such a map, a string, a number or a boolean.

    No recursion: maps may be nested deeply.
    """
    scanner.expect("{")
    maps = [_items(scanner, "}")]
    while maps:
        for _ in maps[-1]:
            _key(scanner)
            if scanner.accept("{"):
                maps.append(_items(scanner, "}"))
                break
            if scanner.match(_SCALAR) is None:
                scanner.expected("a value")
        else:
            maps.pop()
