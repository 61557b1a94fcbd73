"""A product whose columns are gathered from all dies, block by block as they are computed.

    %o = linear(%x, %w)                                   for each block of columns:
    %y = dist.all_gather(%o)                 -->              product -> buffer;  all_gather the buffers of all dies -> %y

As in `summed`, a block's collective runs while the next block is computed, and all dies cut alike.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import block_of, collective_block
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, sram_range
from tyir.backends.edge10.lowering.fused.fusion import ColumnSource, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.sources import column_source
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.dist import AllGather
from tyir.dialects.ty import tensor_type
from tyir.ir import Op
from tyir.types import bit_width

__all__ = ["Gathered"]


@dataclass(frozen=True)
class Gathered:
    """gather.out = all_gather(product) along the columns."""

    source: ColumnSource
    gather: AllGather

    @classmethod
    def match(cls, op: Op, room: Room) -> Gathered | None:
        if not isinstance(op, AllGather) or op.dies is not None or op.x is None or min(op.sizes) < 1:
            return None
        if op.axis != len(tensor_type(op.out).dims) - 1 or not block_of(op.out, room.machine):
            return None
        source = column_source(op.x, room)
        return None if source is None else cls(source, op)

    @property
    def anchor(self) -> Op:
        return self.gather

    @property
    def others(self) -> Sequence[Op]:
        return self.source.ops

    @property
    def scratch(self) -> Scratch | None:
        return self.source.scratch

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        results = _GatheredColumns(self.gather, lowering, self.source.results_area(lowering))
        self.source.lower_into(lowering, scratch, results)
        results.finish()


class _GatheredColumns:
    """The blocks of a product, gathered from all dies; the n-th block of each die at once, so that a die
    whose share is smaller ends with empty ones.
    """

    def __init__(self, gather: AllGather, lowering: Lowering, area: Area) -> None:
        self.gather, self.lowering = gather, lowering
        self.place, self.element = (
            lowering.place(gather.out),
            tensor_type(gather.out).element,
        )
        width = bit_width(self.element) // 8
        *outer, self.columns = tensor_type(gather.out).static_shape
        rows = math.prod(outer)
        self.width = self.piece_bytes = width
        self.block = collective_block(rows, width, lowering.machine)
        self.unit = 1
        self.piece_limit = area.nbytes
        self.rows = rows
        self._buffers = Buffers(area, rows * self.block * width, most=3)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * self.width

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        gather, width, place = self.gather, self.width, self.place
        sizes = tuple(max(0, min(self.block, size - n0)) * width for size in gather.sizes)
        displacements = tuple((sum(gather.sizes[:die]) + n0) * width for die in range(len(sizes)))
        self.lowering.emitter.begin(gather)
        self.lowering.emitter.emit(
            edge10.AllGather,
            *([] if place.in_sram else [self.lowering.address(place)]),
            source=offset,
            source_memory="sram" if n else "none",
            destination=place.offset,
            destination_memory=place.memory,
            rows=self.rows,
            sizes=sizes,
            displacements=displacements,
            stride=self.columns * width,
            die=self.lowering.die,
            reads=[sram_range(offset, m * n * width)] if n else [],
            writes=place.access(self.rows * self.columns * width, write=True),
        )

    def finish(self) -> None:
        """The blocks that only other dies have."""
        for n0 in range(
            -(-self.gather.sizes[self.lowering.die] // self.block) * self.block,
            max(self.gather.sizes),
            self.block,
        ):
            self.deliver(0, 0, self.rows, n0, 0)
