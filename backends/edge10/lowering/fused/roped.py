"""A product whose columns are turned by rotary angles as they are computed, some heads at a time.

    %q = linear(%x, %w);  %t = reshape(%q);  %r = rope(%t, %cos, %sin)
    -->
    cos, sin -> SRAM, once;  for some heads: product -> buffer;  rope in the buffer;  -> DRAM, or to %r

For many rows: queries and keys that do not fit SRAM would go to DRAM, come back to be turned, and go again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.columns import MOST_ROWS
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, sram_range
from tyir.backends.edge10.lowering.fused.fusion import Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.sources import Alone, column_source
from tyir.backends.edge10.memory.allocate import align
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.ty import Reshape, Rope, tensor_type
from tyir.ir import Op
from tyir.types import f16

__all__ = ["Roped"]


@dataclass(frozen=True)
class Roped:
    """rope.out = rope(reshape(product)), nothing else reading what stands between."""

    source: Alone
    between: Sequence[Op]
    rope: Rope

    @classmethod
    def match(cls, op: Op, room: Room) -> Roped | None:
        if not isinstance(op, Rope) or tensor_type(op.out).element is not f16:
            return None
        value, between = op.x, []
        while isinstance(value.op, Reshape) and len(value.uses) == 1:
            between.append(value.op)
            value = value.op.operands[0]
        batch, tokens, _, dim = tensor_type(op.out).static_shape
        rows = batch * tokens
        if rows <= MOST_ROWS or math.prod(tensor_type(value).static_shape[:-1]) != rows:
            return None
        # One head must fit a buffer, of half of the temporaries where the product has to bring x.
        if rows * dim * 2 > room.plan.temp_bytes // 2 or tensor_type(op.cos).static_shape[1] != rows:
            return None
        source = column_source(value, room)
        return cls(source, between, op) if isinstance(source, Alone) else None

    @property
    def anchor(self) -> Op:
        return self.rope

    @property
    def others(self) -> Sequence[Op]:
        return *self.source.ops, *self.between

    @property
    def _angles(self) -> int:
        """Bytes of the cosines, or of the sines."""
        return align(tensor_type(self.rope.cos).nbytes)

    @property
    def scratch(self) -> Scratch:
        """Both tables, and behind them the rows of x that the product may ask for."""
        rows = self.source.scratch
        return Scratch(2 * self._angles + (rows.sram_bytes if rows else 0), 0)

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        assert scratch is not None, "the angles ask for scratch, so it has been given a place"
        offset, spilled = scratch
        lowering.emitter.begin(self.rope, self.source.product)
        angles: list[int] = []
        for number, value in enumerate((self.rope.cos, self.rope.sin)):
            place, at = lowering.place(value), offset + number * self._angles
            if not place.in_sram:
                lowering.load_bytes(place, at, tensor_type(value).nbytes, queue="ebdma")
            angles.append(place.offset if place.in_sram else at)
        results = _RopedColumns(self, lowering, self.source.results_area(lowering), angles)
        self.source.lower_into(lowering, (offset + 2 * self._angles, spilled), results)


class _RopedColumns:
    """The heads of a product, turned."""

    def __init__(self, roped: Roped, lowering: Lowering, area: Area, angles: Sequence[int]) -> None:
        self.roped, self.lowering, self.angles = roped, lowering, angles
        self.out = lowering.place(roped.rope.out)
        *_, self.heads, self.dim = tensor_type(roped.rope.out).static_shape
        self.piece_bytes, self.block, self.unit = 2, 0, self.dim
        head = math.prod(tensor_type(roped.rope.out).static_shape[:-2]) * self.dim * 2
        self.piece_limit = max(area.nbytes // 2, head)
        self._buffers = Buffers(area, self.piece_limit)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * 2

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        lowering, heads, head = self.lowering, n // self.dim, self.dim * 2
        row = self.heads * head
        start, nbytes = m0 * row + n0 * 2, m * n * 2
        target, stride = (self.out.offset + start, row) if self.out.in_sram else (offset, n * 2)
        angles = [at + m0 * self.dim for at in self.angles]  # rows of dim / 2 numbers
        lowering.emitter.begin(self.roped.rope, self.roped.source.product)
        lowering.emitter.emit(
            edge10.VectorOp,
            function="rope",
            inputs=(offset, *angles),
            outputs=(target,),
            input_types=ArrayAttr([f16, f16, f16]),
            output_types=ArrayAttr([f16]),
            rows=m * heads,
            cols=self.dim,
            group=heads,
            output_strides=(stride, head),
            reads=[sram_range(offset, nbytes), *(sram_range(at, m * self.dim) for at in angles)],
            writes=[sram_range(target, (m - 1) * stride + n * 2, write=True)],
        )
        if not self.out.in_sram:
            lowering.store(self.out.at(start), offset, (1, m, n * 2), dram_strides=(0, row))
