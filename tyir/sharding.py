"""Where a value lives on the dies, and how that is written on an op.

A placement is `REPLICATED` (every die has all of it), `PARTIAL` (every die has an addend) or a `Split`
(every die has a range along one axis; ranges may be uneven, and may overlap: that is how key/value heads
are replicated only where a query group crosses dies).  `tyir.dies` names the dies that execute an op (or
hold an argument) when these are not all: those of a pipeline stage.

    tyir.sharding = {axis = 2 : i64, offsets = array<i64: 0, 3, 6>, sizes = array<i64: 3, 3, 2>}      (absent: replicated; "partial")
    tyir.dies = array<i64: 2, 3>                                                                      (absent: all)
    sdy.sharding = #sdy.sharding_per_value<[<@mesh, [{}, {}, {"die"}]>]>                              (the same for Shardy's tools, without the ranges)
"""  # noqa: E501

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from tyir.attributes import Attribute, DenseArrayAttr, DictAttr, IntegerAttr, OpaqueAttr, StringAttr
from tyir.types import i64

__all__ = [
    "PARTIAL",
    "REPLICATED",
    "Placement",
    "Range",
    "Split",
    "even_ranges",
    "from_attribute",
    "head_ranges",
    "shardy_text",
    "to_attribute",
    "vocabulary_ranges",
]

Range = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """(offset, size) along `axis` for each die, in die order."""

    axis: int
    ranges: tuple[Range, ...]

    def along(self, axis: int) -> Split:
        """The same ranges along another axis."""
        return Split(axis, self.ranges)

    def scaled(self, axis: int, times: int, by: int = 1) -> Split:
        """The same cut in other units: offsets and sizes times `times`, divided by `by` (which must divide
        them).
        """
        return Split(axis, tuple((o * times // by, s * times // by) for o, s in self.ranges))


@dataclass(frozen=True)
class Whole:
    """One of the two placements without ranges."""

    name: str


REPLICATED: Final = Whole("replicated")
PARTIAL: Final = Whole("partial")
Placement = Split | Whole


def even_ranges(total: int, dies: int, unit: int = 1) -> tuple[Range, ...]:
    """`total` cut into contiguous ranges of whole units, as even as can be, larger ones first; trailing dies
    may get nothing.
    """
    units = total // unit
    ranges, offset = [], 0
    for die in range(dies):
        size = (units // dies + (die < units % dies)) * unit
        ranges.append((offset, size))
        offset += size
    return tuple(ranges)


def head_ranges(kv_heads: Sequence[int], dies: int) -> tuple[Range, ...]:
    """Query heads per die, contiguous: `kv_heads[i]` is the key/value head that query head i reads.

    First of all no die reads more key/value heads than it must, since it caches them: with more dies never
    more than with fewer.  Then the largest die has as few query heads as it can, and then they are as even as
    can be, larger shares first; trailing dies may get nothing.

    Example: 28 query heads over 4 key/value heads are cut 10, 9, 9 over 3 dies, which cache two each, and
    2, 2, 2, 1 of each group of 7 over 16 dies, which cache one each.
    """
    total = len(kv_heads)
    if not total:
        return ((0, 0),) * dies

    def least(caches: int, most: int) -> int:
        """How many dies it takes when each has at most `most` heads, which read at most `caches`."""
        used, first = 0, 0
        while first < total:
            first, used = max(ends(first, caches, most)), used + 1
        return used

    def ends(first: int, caches: int, most: int) -> list[int]:
        """Where a die's heads from `first` on may end."""
        last = kv_heads[first] + caches
        return [e for e in range(first + 1, min(first + most, total) + 1) if kv_heads[e - 1] < last]

    caches = next(c for c in range(1, total + 1) if least(c, total) <= dies)
    most = next(m for m in range(1, total + 1) if least(caches, m) <= dies)

    @cache
    def evenest(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The least sum of squares over the dies that are left, and their numbers of heads."""
        if first == total:
            return 0, (0,) * left
        found: tuple[float, tuple[int, ...]] = (math.inf, ())
        for end in reversed(ends(first, caches, most) if left else []):
            cost, sizes = evenest(end, left - 1)
            if (cost := cost + (end - first) ** 2) < found[0]:
                found = cost, (end - first, *sizes)
        return found

    _, sizes = evenest(0, dies)
    return tuple((sum(sizes[:die]), size) for die, size in enumerate(sizes))


def vocabulary_ranges(vocabulary: int, dies: int) -> tuple[Range, ...]:
    """Rows of embedding and head per die, in units of 16 where the vocabulary allows (whole tiles on every
    die).
    """
    return even_ranges(vocabulary, dies, math.gcd(vocabulary, 16) if vocabulary >= 16 * dies else 1)


def to_attribute(placement: Placement) -> Attribute | None:
    """The value of `tyir.sharding`; None for a replicated value, which carries none."""
    if isinstance(placement, Split):
        offsets, sizes = (DenseArrayAttr.i64(values) for values in zip(*placement.ranges))
        return DictAttr({"axis": IntegerAttr(placement.axis, i64), "offsets": offsets, "sizes": sizes})
    return StringAttr("partial") if placement is PARTIAL else None


@functools.cache  # attributes live as long as the process
def from_attribute(attribute: Attribute | None) -> Placement:
    """The placement written as `tyir.sharding`."""
    if isinstance(attribute, DictAttr):
        offsets, sizes = attribute["offsets"].ints(), attribute["sizes"].ints()
        return Split(attribute["axis"].value, tuple(zip(offsets, sizes)))
    return PARTIAL if attribute is StringAttr("partial") else REPLICATED


def shardy_text(placement: Placement, rank: int, axes: Sequence[str]) -> str:
    """`<@mesh, [{}, {"die"}]>`: Shardy's TensorShardingAttr without its mnemonic."""
    names = ", ".join(f'"{axis}"' for axis in axes)
    dims = ", ".join(
        f"{{{names}}}" if isinstance(placement, Split) and placement.axis == i else "{}" for i in range(rank)
    )
    unreduced = f", unreduced={{{names}}}" if placement is PARTIAL else ""
    return f"<@mesh, [{dims}]{unreduced}>"


def shardy_attribute(placement: Placement, rank: int, axes: Sequence[str]) -> Attribute:
    """`sdy.sharding` of an op with one result."""
    return OpaqueAttr("sdy.sharding_per_value", f"<[{shardy_text(placement, rank, axes)}]>")
