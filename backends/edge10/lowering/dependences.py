"""Which earlier commands a new command must wait for, from the bytes each of them reads and writes.

`Tracker` keeps, for every byte, the last write and the reads since, as segments of neighbouring bytes with
the same history: a look-up costs a bisection and the segments that it meets, however long the program is.
Regions called *slots* (the buffers of the weight stream) and everything else (*rest*) each begin with a token
from outside, so that a function or a loop body can be written once and still overlap with what runs before
it.

Tokens that are implied are left out.  A unit is in order, so what it has waited for is done for its later
commands too; and what a command had waited for is done for whoever waits for that command.  Both are kept as
vector clocks (Mattern, "Virtual time and global states of distributed systems", 1989), as in the race
detector of the functional engine.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tyir.dialects.edge10 import UNITS
from tyir.ir import Value

__all__ = ["ACC", "SRAM", "Access", "Slot", "Space", "Tracker"]

Space = str | Value
SRAM: Final = "sram"
ACC: Final = "acc"
_NUMBER: Final = {unit: number for number, unit in enumerate(UNITS)}
_OUTSIDE: Final = len(UNITS)  # the place in a clock of the bits for tokens that are no command's
_END: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes [low, high) of a memory: SRAM, the accumulators, or the DRAM buffer that an address value stands
    for.
    """

    space: Space
    low: int
    high: int
    write: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of a memory that is handed from one function (or turn of a loop) to the next by a token of its
    own.
    """

    low: int
    high: int
    space: Space = SRAM

    def holds(self, access: Access) -> bool:
        """Whether an access meets it."""
        return access.space == self.space and access.low < self.high and self.low < access.high


@dataclass(frozen=True, slots=True, eq=False)
class _Done:
    """A command, or a token from outside (unit `_OUTSIDE`).

    `number` counts the commands of its unit, for a token it is the token's bit; `order` counts everything.
    `clock` is what is done when it is: for each unit the number of its last finished command, and the bits of
    the finished tokens.
    """

    unit: int
    number: int
    order: int
    token: Value
    clock: tuple[int, ...]

    def is_known(self, clock: Sequence[int]) -> bool:
        return (
            bool(clock[_OUTSIDE] & self.number) if self.unit == _OUTSIDE else clock[self.unit] >= self.number
        )


@dataclass(slots=True)
class _Segment:
    """Bytes with one history: the last write, and for each unit the last read since (tokens from outside by
    their bit).
    """

    writer: _Done
    readers: dict[int, _Done]


class _Memory:
    """The segments of one space.

    They cover everything; the i-th goes from `starts[i]` to the next one's start.
    """

    def __init__(self, first: _Done) -> None:
        self.starts = [-_END, _END]
        self.segments = [_Segment(first, {})]

    def _cut(self, at: int) -> int:
        """The index of the segment that begins at `at`, after dividing the one that holds it if need be."""
        index = bisect_left(self.starts, at)
        if self.starts[index] != at:
            old = self.segments[index - 1]
            self.starts.insert(index, at)
            self.segments.insert(index, _Segment(old.writer, dict(old.readers)))
        return index

    def between(self, low: int, high: int) -> Sequence[_Segment]:
        """The segments that share a byte with [low, high)."""
        return self.segments[bisect_right(self.starts, low) - 1 : bisect_left(self.starts, high)]

    def outside(self, slots: Iterable[Slot]) -> Iterator[_Segment]:
        """The segments of which a byte lies in no slot."""
        low = -_END
        for slot in sorted(slots, key=lambda s: s.low):
            if low < slot.low:
                yield from self.between(low, slot.low)
            low = max(low, slot.high)
        yield from self.between(low, _END)

    def write(self, low: int, high: int, by: _Done) -> None:
        first, last = self._cut(low), self._cut(high)
        self.starts[first:last] = [low]
        self.segments[first:last] = [_Segment(by, {})]

    def read(self, low: int, high: int, by: _Done) -> None:
        key = -by.number if by.unit == _OUTSIDE else by.unit
        for index in range(self._cut(low), self._cut(high)):
            self.segments[index].readers[key] = by


class Tracker:
    """The accesses of one block, in program order.  `slots` and `rest` begin as if written by the given
    tokens.

    So do the spaces in `given`, which the block only reads: the cache in a loop over it.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        slot_tokens: Sequence[Value],
        rest: Value,
        given: Mapping[Space, Value] | None = None,
    ) -> None:
        self.slots = tuple(slots)
        self.given = dict(given or {})
        self.log: list[Access] = []
        self.reset(slot_tokens, rest)

    def reset(self, slot_tokens: Sequence[Value], rest: Value) -> None:
        """Forget everything before this point but the given tokens: after a call."""
        self._clocks = [[0] * (len(UNITS) + 1) for _ in UNITS]
        self._order = 0
        self._bits = 1
        self._tokens: dict[Value, _Done] = {}
        self._rest = self._from_outside(rest)
        self._memories: dict[Space, _Memory] = {SRAM: _Memory(self._rest)}
        for space, token in self.given.items():
            self._memories[space] = _Memory(self._from_outside(token))
        for slot, token in zip(self.slots, slot_tokens):
            self._memory(slot.space).write(slot.low, slot.high, self._from_outside(token))

    def _from_outside(self, token: Value) -> _Done:
        """A token that is no command's; the same one for the same token."""
        if token not in self._tokens:
            self._tokens[token] = _Done(
                _OUTSIDE, self._bits, self._order, token, (*[0] * len(UNITS), self._bits)
            )
            self._bits <<= 1
        return self._tokens[token]

    def _memory(self, space: Space) -> _Memory:
        memory = self._memories.get(space)
        if memory is None:
            memory = self._memories[space] = _Memory(self._rest)
        return memory

    def waits(self, accesses: Sequence[Access], unit: str | None) -> list[Value]:
        """The tokens that the next command of `unit` with these accesses must wait for; without a unit (a
        call, a loop) nothing is known to be done.
        """
        found: set[_Done] = set()
        for access in accesses:
            for segment in self._memory(access.space).between(access.low, access.high):
                found.add(segment.writer)
                if access.write:
                    found.update(segment.readers.values())
        return (
            _needed(found, [0] * (len(UNITS) + 1))
            if unit is None
            else _needed(found, self._clocks[_NUMBER[unit]])
        )

    def record(self, accesses: Iterable[Access], token: Value, unit: str | None) -> None:
        """Remember a command's accesses, after `waits`."""
        self._order += 1
        if unit is None:
            done = self._from_outside(token)
        else:
            clock = self._clocks[_NUMBER[unit]]
            clock[_NUMBER[unit]] += 1
            done = _Done(_NUMBER[unit], clock[_NUMBER[unit]], self._order, token, tuple(clock))
        for access in accesses:
            self.log.append(access)
            if access.low < access.high:
                (_Memory.write if access.write else _Memory.read)(
                    self._memory(access.space), access.low, access.high, done
                )

    def finish(self) -> tuple[list[list[Value]], list[Value]]:
        """The tokens after which each slot is free, and those after which everything else is done."""
        unknown = [0] * (len(UNITS) + 1)
        slots = [
            _needed(_all(self._memory(slot.space).between(slot.low, slot.high)), list(unknown))
            for slot in self.slots
        ]
        others = [
            segment
            for space, memory in self._memories.items()
            if space not in self.given
            for segment in memory.outside([slot for slot in self.slots if slot.space == space])
        ]
        return slots, _needed({*_all(others), self._rest}, unknown)


def _all(segments: Iterable[_Segment]) -> Iterator[_Done]:
    for segment in segments:
        yield segment.writer
        yield from segment.readers.values()


def _needed(found: Iterable[_Done], clock: list[int]) -> list[Value]:
    """The tokens of `found` that `clock` does not know to be done, without those that others imply; `clock`
    learns them.

    The latest first: whatever waited for others was made after them.
    """
    tokens: list[Value] = []
    for done in sorted(
        found, key=lambda d: (-d.order, d.number)
    ):  # a set has no order: without the number, programs would differ from run to run
        if not done.is_known(clock):
            tokens.append(done.token)
            clock[:_OUTSIDE] = map(max, clock[:_OUTSIDE], done.clock[:_OUTSIDE])
            clock[_OUTSIDE] |= done.clock[_OUTSIDE]
    return tokens
