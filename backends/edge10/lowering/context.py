"""What lowering one function needs at hand: where its values are, the emitter, the weight stream's slots, and
the transfers everybody uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.dependences import ACC, SRAM, Access, Space
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import ALIGNMENT, RingCursor, SramPlan, align
from tyir.dialects import edge10
from tyir.dialects.ty import tensor_type
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import bit_width, ui8

__all__ = [
    "Area",
    "Buffers",
    "Lowering",
    "Piece",
    "Place",
    "ResidualCopy",
    "acc_range",
    "element_bytes",
    "sram_range",
]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: at `offset` of SRAM, or of the DRAM buffer `base` (a symbol, or an address
    argument).  `constant` data is never written.
    """

    memory: Literal["sram", "dram"]
    offset: int
    base: Space = ""
    constant: bool = False

    @property
    def in_sram(self) -> bool:
        return self.memory == "sram"

    def at(self, extra: int) -> Place:
        return Place(self.memory, self.offset + extra, self.base, self.constant)

    def access(self, nbytes: int, write: bool) -> list[Access]:
        """The bytes touched, for the tracker; none for constants."""
        if self.constant:
            return []
        return [Access(SRAM if self.in_sram else self.base, self.offset, self.offset + nbytes, write)]


def sram_range(offset: int, nbytes: int, write: bool = False) -> Access:
    return Access(SRAM, offset, offset + nbytes, write)


def acc_range(offset: int, nbytes: int, write: bool = False) -> Access:
    return Access(ACC, offset, offset + nbytes, write)


def element_bytes(value: Value) -> int:
    return bit_width(tensor_type(value).element) // 8


@dataclass(frozen=True)
class Piece:
    """Some rows of an op that works row by row, and the half of the temporaries that this piece uses."""

    first: int
    rows: int
    temp: int


@dataclass(frozen=True)
class ResidualCopy:
    """[rows, columns] of f16 in DRAM as blocks of `block` columns one after the other, so that each is one
    run of bytes.
    """

    place: Place
    rows: int
    columns: int
    block: int

    def at(self, n0: int) -> Place:
        """The block that begins at column `n0`."""
        return self.place.at(self.rows * n0 * 2)


class Buffers:
    """Equal parts of some bytes of SRAM, used in turn: what is made in one is taken away while the next is
    filled.
    """

    def __init__(self, area: Area, nbytes: int, most: int = 2) -> None:
        self._size = align(nbytes)
        self._offsets = cycle(
            range(
                area.offset,
                area.offset + self._size * max(1, min(most, area.nbytes // self._size)),
                self._size,
            )
        )

    def take(self) -> int:
        return next(self._offsets)


@dataclass(frozen=True)
class Area:
    """Bytes of SRAM."""

    offset: int
    nbytes: int

    def split(self, first: int) -> tuple[Area, Area]:
        """The first bytes, and the rest."""
        first = first // ALIGNMENT * ALIGNMENT
        return Area(self.offset, first), Area(self.offset + first, self.nbytes - first)


class Lowering:
    """State of one function's lowering."""

    def __init__(self, emitter: Emitter, machine: Machine, plan: SramPlan, die: int) -> None:
        self.emitter = emitter
        self.machine = machine
        self.plan = plan
        self.die = die
        self.places: dict[Value, Place] = {}
        self.first_token = 0  # of the rows that are being lowered (`fused/rows.py`)
        self.spare = 0  # bytes at the end of the arena that nothing lies in while an op is lowered
        # What is decided about a function before its ops are lowered:
        self.halved: Mapping[Op, Op] = {}  # products, and the norms whose first half they begin with
        self.waits: dict[Value, Value] = {}  # sums that are in `copies`, and what takes their place
        self.copies: dict[Value, ResidualCopy] = {}  # of sums that lose their place before their last reader
        self.side = RingCursor(plan.side)
        self.packed = RingCursor(plan.packed)
        self.wide = RingCursor(plan.wide)
        half = machine.accumulator_bytes // 2
        self.accumulators: Iterator[int] = cycle((0, half))

    def half_rows(self, rows: int) -> int:
        """Half of the rows in whole blocks of the cube; all of them when they are few."""
        unit = self.machine.cube.rows
        return rows if rows <= 2 * unit else align(rows // 2, unit)

    def begins_with_half(self, product: Op) -> bool:
        """Whether a product may begin while its x is made: by a norm before it, to SRAM."""
        norm = self.halved.get(product)
        return norm is not None and self.place(norm.results[0]).in_sram

    def place(self, value: Value) -> Place:
        return self.places[value]

    def position(self, sequence: int = 0) -> Value:
        """How many tokens of a sequence come before the first row."""
        pos = self.emitter.position(sequence)
        return self.emitter.affine([pos], [1], self.first_token) if self.first_token else pos

    def results_area(self, x_in_sram: bool) -> Area:
        """Temporaries for the results of a product, with what the arena has to spare before them; tiles of an
        x that lies in DRAM need the first half.
        """
        if x_in_sram:
            return Area(self.plan.temp - self.spare, self.plan.temp_bytes + self.spare)
        return Area(self.plan.temp, self.plan.temp_bytes).split(self.plan.temp_bytes // 2)[1]

    def address(self, place: Place) -> Value:
        """The address operand of a DRAM place."""
        return self.emitter.address_of(place.base) if isinstance(place.base, str) else place.base

    # -- transfers
    # ------------------------------------------------------------------------------------------------
    def load(
        self,
        place: Place,
        sram: int,
        shape: tuple[int, int, int],
        dram_strides: tuple[int, int] = (0, 0),
        sram_strides: tuple[int, int] | None = None,
        queue: str = "eidma",
    ) -> None:
        """[planes, rows, row bytes] from a DRAM place; without strides rows follow each other on that
        side.
        """
        dense = (shape[1] * shape[2], shape[2])
        dram_strides, sram_strides = _strides(dram_strides, dense), sram_strides or dense
        self.emitter.emit(
            edge10.Load,
            self.address(place),
            offset=place.offset,
            sram=sram,
            shape=shape,
            dram_strides=dram_strides,
            sram_strides=sram_strides,
            queue=queue,
            reads=place.access(_extent(shape, dram_strides), write=False),
            writes=[sram_range(sram, _extent(shape, sram_strides), write=True)],
        )

    def store(
        self,
        place: Place,
        sram: int,
        shape: tuple[int, int, int],
        dram_strides: tuple[int, int] = (0, 0),
        sram_strides: tuple[int, int] | None = None,
    ) -> None:
        """[planes, rows, row bytes] from SRAM to a DRAM place."""
        dense = (shape[1] * shape[2], shape[2])
        dram_strides, sram_strides = _strides(dram_strides, dense), sram_strides or dense
        self.emitter.emit(
            edge10.Store,
            self.address(place),
            offset=place.offset,
            sram=sram,
            shape=shape,
            dram_strides=dram_strides,
            sram_strides=sram_strides,
            reads=[sram_range(sram, _extent(shape, sram_strides))],
            writes=place.access(_extent(shape, dram_strides), write=True),
        )

    def load_bytes(self, place: Place, sram: int, nbytes: int, queue: str = "eidma") -> None:
        self.load(place, sram, (1, 1, nbytes), queue=queue)

    def store_bytes(self, place: Place, sram: int, nbytes: int) -> None:
        self.store(place, sram, (1, 1, nbytes))

    def move(self, source: Place, target: Place, nbytes: int) -> None:
        """Copy a whole tensor from one place to another."""
        if source == target:
            return
        if source.in_sram and target.in_sram:
            self.copy(source.offset, target.offset, nbytes)
        elif target.in_sram:
            self.load_bytes(source, target.offset, nbytes)
        elif source.in_sram:
            self.store_bytes(target, source.offset, nbytes)
        else:
            for piece in self.pieces(nbytes, 1):
                self.load_bytes(source.at(piece.first), piece.temp, piece.rows)
                self.store_bytes(target.at(piece.first), piece.temp, piece.rows)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        self.emitter.emit(
            edge10.VectorOp,
            function="copy",
            inputs=(source,),
            outputs=(target,),
            input_types=ArrayAttr([ui8]),
            output_types=ArrayAttr([ui8]),
            rows=1,
            cols=nbytes,
            reads=[sram_range(source, nbytes)],
            writes=[sram_range(target, nbytes, write=True)],
        )

    def pieces(self, rows: int, bytes_per_row: int, most: int | None = None) -> Iterator[Piece]:
        """Rows in pieces of at most `most` whose temporaries fit half of the temp area; neighbours use
        different halves so that their transfers overlap.
        """
        half = self.plan.temp_bytes // 2
        step = min(rows, most or rows)
        step = max(1, min(step, half // bytes_per_row)) if bytes_per_row else step
        for number, (first, count) in enumerate(spans(rows, step)):
            yield Piece(first, count, self.plan.temp + number % 2 * half)


def _strides(strides: tuple[int, int], dense: tuple[int, int]) -> tuple[int, int]:
    return (strides[0] or dense[0], strides[1] or dense[1])


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Bytes from the first to the last one touched."""
    return (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + shape[2]
