"""Where things lie: the division of SRAM, activations in SRAM by lifetime, buffers in DRAM.

SRAM, from offset 0:   arena (activations) | temp (pieces of what does not fit) | side (scales, biases) | packed (4-bit tiles) | wide (f16 tiles)
The last three are the weight stream's slots; they lie together so that a function hands them on by tokens (`dependences.Tracker`).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tyir.backends.edge10.lowering.dependences import Slot
from tyir.diagnostics import Diagnostic, TyirError
from tyir.targets.machine import Machine

__all__ = [
    "ALIGNMENT",
    "DramLayout",
    "Interval",
    "Ring",
    "RingCursor",
    "SramPlan",
    "SramShares",
    "align",
    "place_intervals",
    "sram_plan",
]

ALIGNMENT: Final = 64
_PARTS: Final = 256


@dataclass(frozen=True)
class SramShares:
    """How SRAM is divided, in 256ths.

    `temp`, the slots of the rings as (size, count), and how much of the arena layers may hand their
    activations on in.

    Of four slots of `side` and `wide`, large tiles take two neighbours; with small ones, twice as many are in
    flight, which hides the latency of small matrices. Few tokens want the weight stream large, many the arena
    (`search`).
    """

    temp: int = 44
    side: tuple[int, int] = (4, 4)
    packed: tuple[int, int] = (8, 4)
    wide: tuple[int, int] = (16, 4)
    boundary: float = 0.5
    waiting_sums: bool = False  # in DRAM while an MLP runs, see `residual`

    @property
    def arena(self) -> int:
        return _PARTS - self.temp - sum(size * count for size, count in (self.side, self.packed, self.wide))


def align(size: int, to: int = ALIGNMENT) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True)
class Ring:
    """A part of SRAM given out slot by slot, round and round.

    An entry of at most `largest` bytes takes one or two neighbouring slots.
    """

    offset: int
    slot_bytes: int
    slots: int
    largest: int

    @property
    def end(self) -> int:
        return self.offset + self.slot_bytes * self.slots

    def parts(self) -> tuple[Slot, ...]:
        return tuple(Slot(o, o + self.slot_bytes) for o in range(self.offset, self.end, self.slot_bytes))


class RingCursor:
    """Where a function's next entry of a ring goes."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._next = 0

    def take(self, nbytes: int) -> int:
        """The offset of the next entry; never wraps inside one."""
        assert nbytes <= self.ring.largest, f"{nbytes} bytes do not fit an entry of {self.ring.largest}"
        count = -(-nbytes // self.ring.slot_bytes) or 1
        first = self._next if self._next + count <= self.ring.slots else 0
        self._next = first + count
        return self.ring.offset + first * self.ring.slot_bytes


@dataclass(frozen=True)
class SramPlan:
    """Offsets and sizes in bytes of SRAM's parts."""

    capacity: int
    arena: int
    temp: int
    temp_bytes: int
    side: Ring
    packed: Ring
    wide: Ring
    boundary: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot of the weight stream, by ascending offset."""
        return (*self.side.parts(), *self.packed.parts(), *self.wide.parts())


def sram_plan(machine: Machine, shares: SramShares | None = None) -> SramPlan:
    """The division of a machine's SRAM.

    `boundary` is the part of the arena that layers may hand activations on in.
    """
    shares = shares or SramShares()
    unit = machine.sram.capacity_bytes // _PARTS // ALIGNMENT * ALIGNMENT
    if unit < ALIGNMENT:
        raise TyirError(
            f"{machine.sram.capacity_bytes} bytes of SRAM are too few to stream weights",
            help=f"sram.capacity_bytes must be at least {_PARTS * ALIGNMENT}",
        )
    arena = unit * shares.arena
    side = _ring(arena + shares.temp * unit, unit, shares.side)
    packed = _ring(side.end, unit, shares.packed, joined=1)
    wide = _ring(packed.end, unit, shares.wide)
    return SramPlan(
        machine.sram.capacity_bytes,
        arena,
        arena,
        shares.temp * unit,
        side,
        packed,
        wide,
        int(arena * shares.boundary),
    )


def _ring(offset: int, unit: int, shape: tuple[int, int], joined: int = 2) -> Ring:
    """`joined` slots hold the largest entry, if that leaves as many for the next one."""
    size, count = shape
    return Ring(offset, size * unit, count, size * unit * (joined if count >= 2 * joined else 1))


@dataclass
class Interval:
    """A tensor that must be somewhere from op `start` to op `end`, both included.

    `weight` says how much it matters that this is SRAM.
    """

    name: str
    nbytes: int
    start: int
    end: int
    weight: float
    offset: int | None = None


def place_intervals(intervals: Sequence[Interval], low: int, high: int) -> None:
    """Give intervals offsets in SRAM [low, high), each the lowest that is free during its life.

    Those that do not fit keep None.

    The most valuable first is within a few per cent of the optimum on chains with residuals, but may leave
    the large ones no gap; the largest first does not. What places more weighted bytes is taken.
    """
    by_value = sorted(intervals, key=lambda i: (-i.weight, -i.nbytes, i.start))
    by_size = sorted(intervals, key=lambda i: (i.weight != math.inf, -i.nbytes, i.start))
    best = max((_offsets(order, low, high) for order in (by_value, by_size)), key=_value)
    for interval, offset in best:
        interval.offset = offset


def _offsets(order: Sequence[Interval], low: int, high: int) -> list[tuple[Interval, int]]:
    placed: list[tuple[Interval, int]] = []
    for interval in order:
        busy = sorted(
            (at, at + p.nbytes) for p, at in placed if p.start <= interval.end and interval.start <= p.end
        )
        offset = low
        for begin, end in busy:
            if offset + interval.nbytes <= begin:
                break
            offset = max(offset, align(end))
        if offset + interval.nbytes <= high:
            placed.append((interval, offset))
    return placed


def _value(placed: Sequence[tuple[Interval, int]]) -> tuple[int, float]:
    """How many of those that must be placed are, and the weighted bytes of the others."""
    return sum(i.weight == math.inf for i, _ in placed), sum(
        i.weight * i.nbytes for i, _ in placed if i.weight != math.inf
    )


@dataclass
class DramLayout:
    """Buffers one after the other from address 0, each aligned to a DRAM page."""

    capacity: int
    end: int = 0
    parts: list[tuple[str, int]] = field(default_factory=list)

    def take(self, what: str, nbytes: int, alignment: int = 4096, planned: int | None = None) -> int:
        """The address of the next `nbytes`, or `planned`.

        `what` is the kind reported if the die's DRAM does not suffice.
        """
        address = align(self.end, alignment) if planned is None else planned
        self.end = max(self.end, address + nbytes)
        self.parts.append((what, nbytes))
        return address

    def check(self) -> None:
        """`TyirError` with the sizes by kind when the buffers exceed the DRAM."""
        if self.end <= self.capacity:
            return
        totals: dict[str, int] = {}
        for what, nbytes in self.parts:
            totals[what] = totals.get(what, 0) + nbytes
        detail = ", ".join(
            f"{what} {size / 1e6:.1f} MB" for what, size in sorted(totals.items(), key=lambda t: -t[1])
        )
        raise TyirError(
            Diagnostic(
                f"the die's program needs {self.end / 1e6:.1f} MB of DRAM but a die has"
                f" {self.capacity / 1e6:.1f} MB ({detail})",
                help="use more dies, a smaller max_kv, or quantised weights",
            )
        )
