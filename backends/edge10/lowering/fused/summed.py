"""A product whose columns are reduced over the dies and added to the residual stream, block by block.

    %o = linear(%x, %w)                                   for each block of columns:
    %r = dist.all_reduce(%o)                 -->              product -> buffer;  all_reduce the buffer;  %h block + buffer -> %y block
    %y = add(%h, %r)

A collective of one block runs while the next block is computed (as in FlashOverlap, arXiv:2504.19519, and
TokenWeave, arXiv:2505.11329): only that of the last is waited for.  All dies cut their blocks alike,
whatever else differs between their programs: `collective_block` depends on the machine and the rows alone.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.columns import MOST_ROWS, block_of, collective_block
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, sram_range
from tyir.backends.edge10.lowering.fused.fusion import ColumnSource, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.sources import column_source
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.dist import AllReduce
from tyir.dialects.ty import Add, tensor_type
from tyir.ir import Op, Value
from tyir.types import f16

__all__ = ["Summed"]


@dataclass(frozen=True)
class Summed:
    """add.out = residual + all_reduce(product); no `reduce` on one die, no `source` on a die that has none of
    the product's share.
    """

    source: ColumnSource | None
    reduce: AllReduce | None
    add: Add
    residual: Value

    @classmethod
    def match(cls, op: Op, room: Room) -> Summed | None:
        if not isinstance(op, Add) or tensor_type(op.out).element is not f16:
            return None
        if not block_of(op.out, room.machine) and not _many_rows(op.out):
            return None
        for value, residual in ((op.rhs, op.lhs), (op.lhs, op.rhs)):
            if residual is not value and residual.type is value.type:
                match = cls._of(op, value, residual, room)
                if match is not None:
                    return match
        return None

    @classmethod
    def _of(cls, add: Add, value: Value, residual: Value, room: Room) -> Summed | None:
        reduce = value.op if isinstance(value.op, AllReduce) else None
        if reduce is not None and (len(value.uses) != 1 or _many_rows(add.out)):
            return None
        product = value if reduce is None else reduce.x
        if product is None:
            return cls(None, reduce, add, residual)
        source = column_source(product, room)
        return None if source is None else cls(source, reduce, add, residual)

    @property
    def product(self) -> Op | None:
        return None if self.source is None else self.source.ops[-1]

    @property
    def anchor(self) -> Op:
        return self.add

    @property
    def others(self) -> Sequence[Op]:
        computed = () if self.source is None else self.source.ops
        return computed if self.reduce is None else (*computed, self.reduce)

    @property
    def scratch(self) -> Scratch | None:
        return None if self.source is None else self.source.scratch

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        if self.source is None:
            _lower_nothing(_SummedColumns(self, lowering, lowering.results_area(x_in_sram=True)))
        else:
            results = _SummedColumns(self, lowering, self.source.results_area(lowering))
            self.source.lower_into(lowering, scratch, results)


class _SummedColumns:
    """The blocks of a product, reduced over the dies and added to the residual stream."""

    def __init__(self, summed: Summed, lowering: Lowering, area: Area) -> None:
        self.summed, self.lowering = summed, lowering
        self.residual, self.out = lowering.place(summed.residual), lowering.place(summed.add.out)
        self.read_copy, self.written_copy = (
            lowering.copies.get(summed.residual),
            lowering.copies.get(summed.add.out),
        )
        *outer, self.columns = tensor_type(summed.add.out).static_shape
        self.rows = math.prod(outer)
        in_sram = self.residual.in_sram and self.read_copy is None
        self.piece_bytes = 2 if in_sram else 4  # the block, and that of the residual stream
        whole_rows = summed.reduce is not None or self.read_copy is not None or self.written_copy is not None
        self.block = collective_block(self.rows, 2, lowering.machine) if whole_rows else 0
        self.unit = 1
        self.piece_limit = area.nbytes // (1 if self.block else 2)
        self._buffers = Buffers(area, self.rows * self.block * self.piece_bytes or self.piece_limit, most=3)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * 2

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        if self.summed.reduce is not None:
            self._reduce(self.summed.reduce, offset, m * n * 2)
        self._add(offset, m0, m, n0, n)

    def _reduce(self, reduce: AllReduce, offset: int, nbytes: int) -> None:
        emitter = self.lowering.emitter
        emitter.begin(reduce, self.summed.product)
        given = self.summed.product is not None
        emitter.emit(
            edge10.AllReduce,
            source=offset if given else 0,
            source_memory="sram" if given else "none",
            destination=offset,
            nbytes=nbytes,
            element=f16,
            dies=reduce.dies,
            group=reduce.group,
            reads=[sram_range(offset, nbytes)] if given else [],
            writes=[sram_range(offset, nbytes, write=True)],
        )

    def _add(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        lowering, row = self.lowering, self.columns * 2
        lowering.emitter.begin(self.summed.add, self.summed.product)
        start, nbytes = m0 * row + n0 * 2, m * n * 2
        before, before_row = self._residual(offset + nbytes, m0, m, n0, n)
        target, target_row = (self.out.offset + start, row) if self.out.in_sram else (offset, n * 2)
        written = sram_range(target, (m - 1) * target_row + n * 2, write=True)
        lowering.emitter.emit(
            edge10.VectorOp,
            function="add",
            inputs=(before, offset),
            outputs=(target,),
            input_types=ArrayAttr([f16, f16]),
            output_types=ArrayAttr([f16]),
            rows=m,
            cols=n,
            input_strides=(before_row, n * 2),
            output_strides=(target_row, 0),
            reads=[sram_range(before, (m - 1) * before_row + n * 2), sram_range(offset, nbytes)],
            writes=[written],
        )
        if not self.out.in_sram:
            lowering.store(self.out.at(start), offset, (1, m, n * 2), dram_strides=(0, row))
        elif self.written_copy is not None:
            lowering.emitter.emit(
                edge10.VectorOp,
                function="copy",
                inputs=(target,),
                outputs=(offset,),
                input_types=ArrayAttr([f16]),
                output_types=ArrayAttr([f16]),
                rows=m,
                cols=n,
                input_strides=(row,),
                reads=[replace(written, write=False)],
                writes=[sram_range(offset, nbytes, write=True)],
            )
            lowering.store_bytes(self.written_copy.at(n0), offset, nbytes)

    def _residual(self, buffer: int, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        """Where the block of the residual stream lies, and its rows' distance; `buffer` is for one that comes
        from DRAM.
        """
        row = self.columns * 2
        start = m0 * row + n0 * 2
        if self.read_copy is not None:
            self.lowering.load_bytes(self.read_copy.at(n0), buffer, m * n * 2)
        elif self.residual.in_sram:
            return self.residual.offset + start, row
        else:
            self.lowering.load(self.residual.at(start), buffer, (1, m, n * 2), dram_strides=(0, row))
        return buffer, n * 2


def _many_rows(value: Value) -> bool:
    """Whether a tensor has too many rows for collectives by blocks; without one its sum is made by blocks all
    the same.
    """
    *outer, _ = tensor_type(value).static_shape
    return math.prod(outer) > MOST_ROWS


def _lower_nothing(results: _SummedColumns) -> None:
    """A die without a share of the product meets the others' blocks all the same."""
    for n0, n in spans(results.columns, results.block):
        offset, _ = results.target(0, results.rows, n0, n)
        results.deliver(offset, 0, results.rows, n0, n)
