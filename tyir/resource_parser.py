"""Parsing the metadata section at the end of a file: `{-# dialect_resources: { builtin: { key: "0x..." } } #-}`.

Blobs are hex: four little-endian bytes of alignment, then the data.  `external_resources` (a reproducer's pipeline) are read over.
"""

from __future__ import annotations

import re
from typing import Final

from tyir.lexer import Scanner

__all__ = ["check_dialect", "check_new", "parse_metadata", "read_blob"]

_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*")
_KEY_AND_COLON: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*\s*:")
_ENTRY: Final = re.compile(r'\s*+([A-Za-z_][A-Za-z0-9_$.]*+): "(0x[0-9A-Fa-f]++)",?')
_SCALAR: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|true|false|-?[0-9]+')

Resources = dict[str, tuple[int, bytes]]


def parse_metadata(scanner: Scanner) -> Resources:
    """The blobs by key; the cursor stands at `{-#`."""
    scanner.expect("{-#")
    resources: Resources = {}
    while not scanner.accept("#-}"):
        section = _key(scanner)
        if section == "dialect_resources":
            _dialects(scanner, resources)
        elif section == "external_resources":
            _skip(scanner)
        else:
            scanner.fail(
                f"unknown metadata section '{section}'",
                scanner.pos - len(section) - 1,
                scanner.pos - 1,
                help="sections: dialect_resources, external_resources",
            )
        scanner.accept(",")
    return resources


def _key(scanner: Scanner) -> str:
    match = scanner.match(_KEY)
    if match is None:
        scanner.expected("a key")
    scanner.expect(":", "':' after the key")
    return match[0]


def _dialects(scanner: Scanner, resources: Resources) -> None:
    scanner.expect("{")
    while not scanner.accept("}"):
        start = scanner.skip_space()
        dialect = _key(scanner)
        check_dialect(scanner, dialect, start)
        scanner.expect("{")
        _entries(scanner, resources)
        scanner.accept(",")


def _entries(scanner: Scanner, resources: Resources) -> None:
    while not scanner.accept("}"):
        fast = _ENTRY.match(scanner.text, scanner.pos)
        if fast is not None:
            key, value, start = fast[1], fast[2], fast.start(1)
            scanner.pos = fast.end()
        else:
            start = scanner.skip_space()
            key = _key(scanner)
            value = scanner.string("a blob")
            if not scanner.accept(",") and scanner.peek() != "}":
                scanner.expected("',' or '}'")
        check_new(scanner, key, resources, start)
        resources[key] = read_blob(scanner, key, value, start)


def check_dialect(scanner: Scanner, dialect: str, start: int) -> None:
    """Refuse resources of dialects other than `builtin`, as mlir-opt and xDSL do."""
    if dialect != "builtin":
        scanner.fail(f"resources of dialect '{dialect}' are not known", start, start + len(dialect), help="write them under builtin")


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


def _skip(scanner: Scanner) -> None:
    """Pass over a value: `{ key: value, ... }`, a string, a number or a boolean."""
    depth = 0
    while True:
        if scanner.accept("{"):
            depth += 1
        elif scanner.accept("}"):
            depth -= 1
            scanner.accept(",")
        elif scanner.match(_KEY_AND_COLON) is not None:
            continue
        elif scanner.match(_SCALAR) is not None:
            scanner.accept(",")
        elif depth:
            scanner.expected("a key, a value or '}'")
        if depth == 0:
            return
