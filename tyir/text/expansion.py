"""How much text an attribute is when it is written out.

An alias that lists another one ten times, eleven deep, is a kilobyte of source and a hundred gigabytes of
printed IR: uniqued attributes share their parts, their text does not.  So the parser counts what aliases
stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tyir.attribute import Attribute

__all__ = ["Expansion"]

_FREE: Final = 64 << 20  # characters that the aliases of any text may stand for
_PER_CHARACTER: Final = 16  # and more of a longer text
_NODE: Final = 4  # characters that an attribute takes besides the texts and numbers in it


class Expansion:
    """The characters, about, that the aliases used in a text of `length` characters stand for."""

    def __init__(self, length: int) -> None:
        self.limit: Final = _FREE + _PER_CHARACTER * length
        self.total = 0
        self._known: dict[Attribute, tuple[int, int]] = {}

    @property
    def is_too_much(self) -> bool:
        return self.total > self.limit

    def is_small_since(self, total: int, length: int) -> bool:
        """Whether what was counted since `total` is within the allowance of a text of `length` characters: it
        may then be looked up by that text, without being counted again.
        """
        return self.total - total <= _PER_CHARACTER * length

    def add(self, value: Attribute) -> tuple[int, int]:
        """Count one more use of `value`: its characters, and the levels it is nested."""
        found = self._measure(value)
        self.total += found[0]
        return found

    def _measure(self, value: Attribute) -> tuple[int, int]:
        """Attributes hold no cycles and are at most `MAX_DEPTH` deep, or they had been refused."""
        found = self._known.get(value)
        if found is None:
            size, depth = _NODE, 0
            for part in _parts(value._key()):
                if isinstance(part, Attribute):
                    part_size, part_depth = self._measure(part)
                    size, depth = size + part_size, max(depth, part_depth)
                else:
                    size += len(part) if isinstance(part, (str, bytes)) else _NODE
            found = self._known[value] = size, depth + 1
        return found


def _parts(key: Any) -> Iterator[Any]:
    """What an attribute is made of: attributes, texts and numbers, out of tuples in tuples."""
    if isinstance(key, tuple):
        for part in key:
            yield from _parts(part)
    else:
        yield key
