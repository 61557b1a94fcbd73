"""A cache cut by tokens: blocks of neighbouring positions are dealt out to the dies that share its heads.

    position   0 .. B-1   B .. 2B-1   2B .. 3B-1   3B .. 4B-1   ..        (n = 2 dies)
    die        0          1           0            1
    row        0 .. B-1   0 .. B-1    B .. 2B-1    B .. 2B-1

A die's rows are in the order of their positions, so that the rows of all positions before one are its first.
Rank-interleaved as the decode context parallelism of vLLM and SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["BLOCK", "TokenBlocks"]

BLOCK: Final = 256  # positions of a block, where nothing else is said


@dataclass(frozen=True)
class TokenBlocks:
    """What one of `count` dies holds: blocks `number`, `number` + `count`, .. of `size` positions each."""

    number: int
    count: int
    size: int

    def rows(self, capacity: int) -> int:
        """Rows that each of the dies has for a cache of `capacity` positions; the same on all."""
        return -(-capacity // (self.count * self.size)) * self.size

    def rows_before(self, position: int) -> int:
        """How many of its rows hold positions below this one."""
        turn = self.count * self.size
        return position // turn * self.size + min(
            max(position % turn - self.number * self.size, 0), self.size
        )

    def row_of(self, position: int) -> int | None:
        """The row of a position; None where another die has it."""
        if position // self.size % self.count != self.number:
            return None
        return self.rows_before(position)

    def position_of(self, row: int) -> int:
        """The position that a row holds."""
        return (row // self.size * self.count + self.number) * self.size + row % self.size
