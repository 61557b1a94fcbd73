"""A die's memories as bytes, with the checks that hardware does not make: bounds, bytes never written, and
races.

DRAM is one array per buffer (weights may be read-only views of mapped files); SRAM and the accumulators are
one array each. A race is two accesses of overlapping bytes, at least one of them a write, by commands that
nothing orders: neither tokens nor the order of a unit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.runtime_sim.timing.program import Command

__all__ = ["DieMemory", "Dram", "Memory", "RaceDetector", "Stored"]

Bytes = npt.NDArray[np.uint8]


class Memory:
    """A flat memory of `capacity` bytes; `written` marks the bytes that hold something."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.data: Bytes = np.zeros(capacity, np.uint8)
        self.written: npt.NDArray[np.bool_] = np.zeros(capacity, np.bool_)

    def view(self, offset: int, nbytes: int, command: Command) -> Bytes:
        """The bytes [offset, offset + nbytes); `TyirError` when they do not all exist."""
        if offset < 0 or offset + nbytes > len(self.data):
            raise TyirError(
                f"{command.describe()} touches bytes {offset}..{offset + nbytes} of {self.name}, which has"
                f" {len(self.data)}"
            )
        return self.data[offset : offset + nbytes]


@dataclass(eq=False, slots=True)
class Stored:
    """What a DRAM buffer holds, one object for all programs of a die that share it; `written` marks its
    bytes, None: all of them are.
    """

    data: Bytes
    written: npt.NDArray[np.bool_] | None


class Dram:
    """Buffers by address.

    `images` gives a buffer's initial bytes (any dtype); what is not given starts unwritten.
    """

    def __init__(self, buffers: Iterable[edge10.Buffer], images: Mapping[str, npt.NDArray[Any]]) -> None:
        self.buffers = sorted(buffers, key=lambda b: b.address)
        self.starts = [b.address for b in self.buffers]
        self.stored: list[Stored] = []
        missing: list[str] = []
        for buffer in self.buffers:
            image = images.get(buffer.sym_name)
            if image is not None:
                self.stored.append(Stored(_image_bytes(buffer, image), None))
            elif buffer.kind == "weight":
                missing.append(buffer.sym_name)
            else:
                self.stored.append(
                    Stored(np.zeros(buffer.nbytes, np.uint8), np.zeros(buffer.nbytes, np.bool_))
                )
        if missing:
            raise TyirError(
                f"no data for weight buffers: {', '.join(missing[:8])}"
                + (f" and {len(missing) - 8} more" if len(missing) > 8 else ""),
                help="give the die's common_die<i>.params",
            )

    def find(self, address: int, nbytes: int, command: Command) -> tuple[int, int]:
        """The number of the buffer that holds these bytes, and the offset in it; `TyirError` when no single
        buffer does.
        """
        number = bisect_right(self.starts, address) - 1
        if number < 0 or address + nbytes > self.starts[number] + len(self.stored[number].data):
            near = self.buffers[max(number, 0)]
            raise TyirError(
                f"{command.describe()} touches DRAM bytes {address}..{address + nbytes}, which lie in no"
                f" buffer; the nearest is @{near.sym_name} at {near.address}..{near.address + near.nbytes}"
            )
        return number, address - self.starts[number]

    def buffer(self, name: str) -> Bytes:
        """The bytes of a buffer by name."""
        return self._named(name).data

    def _named(self, name: str) -> Stored:
        for buffer, stored in zip(self.buffers, self.stored):
            if buffer.sym_name == name:
                return stored
        raise TyirError(f"the program has no buffer @{name}")

    def write_buffer(self, name: str, data: npt.NDArray[Any]) -> None:
        """What the host does before a step: fill a buffer."""
        stored = self._named(name)
        target = stored.data
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if len(flat) > len(target):
            raise TyirError(f"{len(flat)} bytes do not fit buffer @{name} of {len(target)}")
        target[: len(flat)] = flat
        stored.written = None


def _image_bytes(buffer: edge10.Buffer, image: npt.NDArray[Any]) -> Bytes:
    flat = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
    if len(flat) != buffer.type.nbytes:
        raise TyirError(
            f"buffer @{buffer.sym_name} holds {buffer.type} = {buffer.type.nbytes} bytes, the data given has"
            f" {len(flat)}",
            help="4-bit tensors must be packed (tyir.execution.storage.pack)",
        )
    return flat


class DieMemory:
    """All memories of one die."""

    def __init__(self, dram: Dram, sram_bytes: int, accumulator_bytes: int) -> None:
        self.dram = dram
        self.sram = Memory("SRAM", sram_bytes)
        self.acc = Memory("the accumulators", accumulator_bytes)


class RaceDetector:
    """Vector clocks over the units of one die: a command has seen, for each unit, how many of its commands
    are surely done.

    Accesses are remembered by blocks of addresses, so that one is compared only with those near it.
    """

    def __init__(self) -> None:
        self._number = {unit: i for i, unit in enumerate(edge10.UNITS)}
        self._clocks: list[tuple[int, ...]] = []
        self._issued = [0] * len(edge10.UNITS)
        self._last: dict[str, int] = {}
        self._live: dict[tuple[str, int], list[_Access]] = {}

    def begin(self, command: Command) -> None:
        """A command starts: what it has seen is what its tokens' commands and its unit's last command
        have.
        """
        clock = [0] * len(edge10.UNITS)
        before = (*command.deps, self._last[command.unit]) if command.unit in self._last else command.deps
        for index in before:
            clock = [max(a, b) for a, b in zip(clock, self._clocks[index])]
        unit = self._number[command.unit]
        self._issued[unit] += 1
        clock[unit] = self._issued[unit]
        self._last[command.unit] = command.index
        self._clocks.append(tuple(clock))

    def access(self, memory: str, low: int, high: int, write: bool, command: Command) -> None:
        """Note an access; `TyirError` showing both commands when it races with an earlier one.  `memory`
        names the memory or DRAM buffer.
        """
        if high <= low:
            return
        clock, unit = self._clocks[command.index], self._number[command.unit]
        size = _DRAM_BLOCK if memory.startswith("DRAM") else _BLOCK
        for block in range(low // size, (high - 1) // size + 1):
            begin, end = max(low, block * size), min(high, (block + 1) * size)
            keep = []
            for entry in self._live.get((memory, block), ()):
                first, last, wrote, other_unit, number, other, extent = entry
                if first < end and begin < last:
                    if (write or wrote) and clock[other_unit] < number and other is not command:
                        raise _race(memory, (low, high), write, command, extent, wrote, other)
                    covered = begin <= first and last <= end
                    # What a later write covers is ordered before it; a read of the same bytes by the same
                    # unit is implied by the later one.
                    if covered and (write or (not wrote and other_unit == unit)):
                        continue
                keep.append(entry)
            keep.append((begin, end, write, unit, clock[unit], command, (low, high)))
            self._live[memory, block] = keep


_BLOCK: Final = 65536
_DRAM_BLOCK: Final = (
    1 << 20
)  # rows of a tile lie far apart there, and an access counts from its first byte to its last
_Access = tuple[
    int, int, bool, int, int, Command, tuple[int, int]
]  # bytes in the block, write, unit, its number there, command, all its bytes


def _race(
    memory: str,
    mine: tuple[int, int],
    write: bool,
    command: Command,
    theirs: tuple[int, int],
    wrote: bool,
    other: Command,
) -> TyirError:
    return TyirError(
        f"race on bytes {max(mine[0], theirs[0])}..{min(mine[1], theirs[1])} of {memory}: nothing orders\n"
        f"  {other.describe()}, which {'writes' if wrote else 'reads'} {theirs[0]}..{theirs[1]}, and\n"
        f"  {command.describe()}, which {'writes' if write else 'reads'} {mine[0]}..{mine[1]}",
        help="give the later command the earlier one's token",
    )
