"""Which earlier commands a new command must wait for, from the bytes each of them reads and writes.

`Tracker` keeps the accesses that can still conflict.  Regions called *slots* (the buffers of the weight stream) and everything else (*rest*) each begin
with a token from outside, so that a function or a loop body can be written once and still overlap with what runs before it.

Tokens that are implied are left out: a unit is in order, so what a unit has waited for, its later commands need not wait for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tyir.ir import Value

__all__ = ["ACC", "SRAM", "Access", "Slot", "Space", "Tracker"]

Space = str | Value
SRAM: Final = "sram"
ACC: Final = "acc"


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes [low, high) of a memory: SRAM, the accumulators, or the DRAM buffer that an address value stands for."""

    space: Space
    low: int
    high: int
    write: bool

    def conflicts(self, other: Access) -> bool:
        return (self.write or other.write) and self.space == other.space and self.low < other.high and other.low < self.high


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of SRAM that is handed from one function (or turn of a loop) to the next by a token of its own."""

    low: int
    high: int


@dataclass(slots=True)
class _Done:
    access: Access
    token: Value
    unit: str | None
    number: int


class Tracker:
    """The accesses of one block, in program order.  `slots` (neighbours in SRAM) and `rest` begin as if written by the given tokens.

    In DRAM and below `arena` in SRAM, neighbouring accesses of one unit are remembered as one: who reads a tensor wants all of its tiles.
    """

    def __init__(self, slots: Sequence[Slot], slot_tokens: Sequence[Value], rest: Value | None, arena: int = 0) -> None:
        self.slots = tuple(slots)
        self.arena = arena
        self.log: list[Access] = []
        self._number = 0
        self.reset(slot_tokens, rest)

    def reset(self, slot_tokens: Sequence[Value], rest: Value | None) -> None:
        """Forget everything before this point but the given tokens: after a call."""
        self.rest = rest
        self._live: dict[Space, list[_Done]] = {}
        self._waited: dict[str, dict[str, int]] = {}
        self._waited_outside: dict[str, set[Value]] = {}
        self._slot_tokens = tuple(slot_tokens)
        for slot, token in zip(self.slots, slot_tokens):
            self._live.setdefault(SRAM, []).append(_Done(Access(SRAM, slot.low, slot.high, True), token, None, 0))

    def _in_slot(self, access: Access) -> bool:
        return bool(self.slots) and access.space == SRAM and self.slots[0].low <= access.low and access.high <= self.slots[-1].high

    def waits(self, accesses: Sequence[Access], unit: str | None) -> list[Value]:
        """The tokens that a command of `unit` with these accesses must wait for; without a unit (a call, a loop) nothing is implied."""
        latest: dict[str, _Done] = {}
        outside: dict[Value, None] = {}
        for access in accesses:
            if self.rest is not None and not self._in_slot(access):
                outside[self.rest] = None
            low, high, write = access.low, access.high, access.write
            for done in self._live.get(access.space, ()):
                other = done.access  # `Access.conflicts`, spelled out: this is where lowering spends its time
                if other.low >= high or low >= other.high or not (write or other.write):
                    continue
                if done.unit is None:
                    outside[done.token] = None
                elif done.unit != unit and (done.unit not in latest or latest[done.unit].number < done.number):
                    latest[done.unit] = done
        if unit is None:
            return [*outside, *(d.token for d in latest.values())]
        waited, waited_outside = self._waited.setdefault(unit, {}), self._waited_outside.setdefault(unit, set())
        tokens = [t for t in outside if t not in waited_outside]
        waited_outside.update(tokens)
        for name, done in latest.items():
            if waited.get(name, 0) < done.number:
                waited[name] = done.number
                tokens.append(done.token)
        return tokens

    def record(self, accesses: Iterable[Access], token: Value, unit: str | None) -> None:
        """Remember a command's accesses."""
        self._number += 1
        for access in accesses:
            self.log.append(access)
            live = self._live.setdefault(access.space, [])
            if access.write:  # what it covers is ordered before it and can be forgotten
                live[:] = [
                    d for d in live if not (d.access.space == access.space and access.low <= d.access.low and d.access.high <= access.high)
                ]
            else:  # a later read of the same bytes by the same unit stands for the earlier one
                live[:] = [
                    d
                    for d in live
                    if d.access.write or d.unit != unit or unit is None or (d.access.low, d.access.high) != (access.low, access.high)
                ]
            live.append(_Done(self._merged(access, live, unit), token, unit, self._number))

    def _merged(self, access: Access, live: list[_Done], unit: str | None) -> Access:
        """`access` together with the last one in the list, taken out of it, if they are of one kind and unit and touch."""
        if unit is None or not live or (access.space == ACC or (access.space == SRAM and access.high > self.arena)):
            return access
        last = live[-1]
        old = last.access
        if last.unit != unit or old.write != access.write or old.high < access.low or access.high < old.low:
            return access
        live.pop()
        return Access(access.space, min(old.low, access.low), max(old.high, access.high), access.write)

    def finish(self) -> tuple[list[list[Value]], list[Value]]:
        """The tokens after which each slot is free, and those after which everything else is done."""
        slots: list[list[Value]] = []
        for slot, token in zip(self.slots, self._slot_tokens):
            whole = Access(SRAM, slot.low, slot.high, True)
            slots.append(_latest(d for d in self._live.get(SRAM, ()) if whole.conflicts(d.access)) or [token])
        rest = _latest(d for live in self._live.values() for d in live if not self._in_slot(d.access))
        return slots, [*rest, *([self.rest] if self.rest is not None else [])]


def _latest(entries: Iterable[_Done]) -> list[Value]:
    """One token per unit, the last, and all tokens that belong to none."""
    latest: dict[str, _Done] = {}
    outside: dict[Value, None] = {}
    for done in entries:
        if done.unit is None:
            outside[done.token] = None
        elif done.unit not in latest or latest[done.unit].number < done.number:
            latest[done.unit] = done
    return [*outside, *(d.token for d in latest.values())]
