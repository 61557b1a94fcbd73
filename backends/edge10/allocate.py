"""Where things lie: the division of SRAM, activations in SRAM by lifetime, buffers in DRAM.

SRAM, from offset 0:   arena (activations) | temp (pieces of what does not fit) | side (scales, biases) | packed (4-bit tiles) | wide (f16 tiles)
The last three are the weight stream's slots; they lie together so that a function hands them on by tokens (`dependences.Tracker`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tyir.backends.edge10.dependences import Slot
from tyir.diagnostics import Diagnostic, TyirError
from tyir.targets.machine import Machine

__all__ = ["ALIGNMENT", "DramLayout", "Interval", "SramPlan", "align", "place_intervals", "sram_plan"]

ALIGNMENT: Final = 64
# Shares of SRAM in sixty-fourths.  Two wide tiles are computed on and filled in turn; four packed tiles let the DMA run ahead of them.
# A side slot holds whole rows of scales, so it bounds the rows of a tile: few large ones rather than many small ones.
_WIDE, _PACKED, _SIDE, _TEMP = 8, 2, 2, 11
_WIDE_SLOTS, _PACKED_SLOTS, _SIDE_SLOTS = 2, 4, 2


def align(size: int, to: int = ALIGNMENT) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True)
class SramPlan:
    """Offsets and sizes in bytes of SRAM's parts."""

    capacity: int
    arena: int
    temp: int
    temp_bytes: int
    side: tuple[int, ...]
    side_bytes: int
    packed: tuple[int, ...]
    packed_bytes: int
    wide: tuple[int, ...]
    wide_bytes: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot of the weight stream, by ascending offset."""
        groups = ((self.side, self.side_bytes), (self.packed, self.packed_bytes), (self.wide, self.wide_bytes))
        return tuple(Slot(offset, offset + size) for offsets, size in groups for offset in offsets)


def sram_plan(machine: Machine) -> SramPlan:
    """The division of a machine's SRAM."""
    unit = machine.sram.capacity_bytes // 64 // ALIGNMENT * ALIGNMENT
    if unit < 2 * ALIGNMENT:
        raise TyirError(
            f"{machine.sram.capacity_bytes} bytes of SRAM are too few to stream weights",
            help=f"sram.capacity_bytes must be at least {64 * 2 * ALIGNMENT}",
        )
    arena = 64 * unit - unit * (_TEMP + _SIDE_SLOTS * _SIDE + _PACKED_SLOTS * _PACKED + _WIDE_SLOTS * _WIDE)
    temp = arena
    side = temp + _TEMP * unit
    packed = side + _SIDE_SLOTS * _SIDE * unit
    wide = packed + _PACKED_SLOTS * _PACKED * unit
    return SramPlan(
        capacity=machine.sram.capacity_bytes,
        arena=arena,
        temp=temp,
        temp_bytes=_TEMP * unit,
        side=_offsets(side, _SIDE * unit, _SIDE_SLOTS),
        side_bytes=_SIDE * unit,
        packed=_offsets(packed, _PACKED * unit, _PACKED_SLOTS),
        packed_bytes=_PACKED * unit,
        wide=_offsets(wide, _WIDE * unit, _WIDE_SLOTS),
        wide_bytes=_WIDE * unit,
    )


def _offsets(first: int, size: int, count: int) -> tuple[int, ...]:
    return tuple(first + i * size for i in range(count))


@dataclass
class Interval:
    """A tensor that must be somewhere from op `start` to op `end`, both included; `weight` says how much it matters that this is SRAM."""

    name: str
    nbytes: int
    start: int
    end: int
    weight: float
    offset: int | None = None


def place_intervals(intervals: Sequence[Interval], low: int, high: int) -> None:
    """Give offsets in SRAM [low, high) to the intervals, the most valuable first, each at the lowest offset free during its life; the rest keep None.

    Greedy by value is within a few per cent of the optimum on chains with residuals, and never moves anything.
    """
    placed: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (-i.weight, -i.nbytes, i.start)):
        busy = sorted((p.offset or 0, (p.offset or 0) + p.nbytes) for p in placed if p.start <= interval.end and interval.start <= p.end)
        offset = low
        for begin, end in busy:
            if offset + interval.nbytes <= begin:
                break
            offset = max(offset, align(end))
        if offset + interval.nbytes <= high:
            interval.offset = offset
            placed.append(interval)


@dataclass
class DramLayout:
    """Buffers one after the other from address 0, each aligned to a DRAM page."""

    capacity: int
    end: int = 0
    parts: list[tuple[str, int]] = field(default_factory=list)

    def take(self, what: str, nbytes: int, alignment: int = 4096) -> int:
        """The address of the next `nbytes`; `what` is the kind reported if the die's DRAM does not suffice."""
        address = align(self.end, alignment)
        self.end = address + nbytes
        self.parts.append((what, nbytes))
        return address

    def check(self) -> None:
        """`TyirError` with the sizes by kind when the buffers exceed the DRAM."""
        if self.end <= self.capacity:
            return
        totals: dict[str, int] = {}
        for what, nbytes in self.parts:
            totals[what] = totals.get(what, 0) + nbytes
        detail = ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in sorted(totals.items(), key=lambda t: -t[1]))
        raise TyirError(
            Diagnostic(
                f"the die's program needs {self.end / 1e6:.1f} MB of DRAM but a die has {self.capacity / 1e6:.1f} MB ({detail})",
                help="use more dies, a smaller max_kv, or quantised weights",
            )
        )
