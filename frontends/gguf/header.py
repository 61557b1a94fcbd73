"""Whether a GGUF file's header fits the file, before a library that trusts it walks through it.

A count in the header says how often something is read; a hostile or damaged one keeps the gguf package busy
for ever, or until memory is full.  Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (magic,
version, numbers of tensors and of key-value pairs; the pairs; name, shape, type and offset of each tensor).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from tyir.process.files import open_regular, stand_in

__all__ = ["gguf_header_problem"]

_MAGIC: Final = b"GGUF"
_MAX_HEADER: Final = 256 << 20  # bytes; a vocabulary of 250,000 tokens with its merges takes 15 MB
_MAX_ITEMS: Final = (
    4_000_000  # array elements in all: such a vocabulary, its merges, scores and types have 1.2 M
)
_MAX_TENSORS: Final = 200_000
_MAX_DIMS: Final = 8
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of scalar types
_STRING: Final = 8
_ARRAY: Final = 9


class _TooShort(Exception):
    """What the header says does not fit."""


class _Cursor:
    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order, self.position, self.items = data, order, 4, 0

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; where they began."""
        start = self.position
        if size > len(self.data) - start:
            raise _TooShort(f"{size} bytes at byte {start} lie beyond its end")
        self.position += size
        return start

    def number(self, size: int) -> int:
        start = self.skip(size)
        (value,) = struct.unpack_from(self.order + {4: "I", 8: "Q"}[size], self.data, start)
        return int(value)

    def count(self, limit: int, what: str) -> int:
        found = self.number(8)
        if found > limit:
            raise _TooShort(f"its header counts {found} {what}, at most {limit} are read")
        return found

    def string(self) -> None:
        self.skip(self.number(8))

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            if depth:
                raise _TooShort("it has arrays of arrays")
            element, length = self.number(4), self.count(_MAX_ITEMS, "elements of an array")
            self.items += length
            if self.items > _MAX_ITEMS:
                raise _TooShort(f"its arrays have more than {_MAX_ITEMS} elements")
            if element in _SIZES:
                self.skip(_SIZES[element] * length)
            else:
                for _ in range(length):
                    self.value(element, depth + 1)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise _TooShort(f"it has a value of type {kind}, which GGUF does not have")


def gguf_header_problem(path: Path) -> str | None:
    """What is wrong with the header of a GGUF file, None if it can be walked; `OSError` when it cannot be
    read.
    """
    with open_regular(path) as file:
        data = file.read(_MAX_HEADER)
    if (instead := stand_in(data)) is not None:
        return f"it is {instead[0]}: {instead[1]}"
    if data[:4] != _MAGIC:
        return f"it begins with {data[:4]!r}, not with {_MAGIC!r}"
    # the version is a small number; seen as a large one, it is of the other byte order
    order = "<" if data[4:6] != b"\0\0" else ">"
    cursor = _Cursor(data, order)
    try:
        cursor.number(4)
        tensors = cursor.count(_MAX_TENSORS, "tensors")
        for _ in range(cursor.count(_MAX_TENSORS, "key-value pairs")):
            cursor.string()
            cursor.value(cursor.number(4))
        for _ in range(tensors):
            cursor.string()
            if (dims := cursor.number(4)) > _MAX_DIMS:
                return f"a tensor has {dims} dimensions"
            cursor.skip(8 * dims + 4 + 8)
    except _TooShort as error:
        return str(error)
    return None
