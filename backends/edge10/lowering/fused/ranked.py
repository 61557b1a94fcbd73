"""The best tokens of many: a product whose columns are ranked block by block as they are computed, so that
logits are never in DRAM.

    %l = linear(%x, %w);  %values, %ids = top_k(%l)   -->   for each block of columns:  product -> buffer;  offer the buffer to the rows' lists
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import MOST_ROWS
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, Place, element_bytes
from tyir.backends.edge10.lowering.fused.fusion import ColumnSource, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.sources import column_source
from tyir.backends.edge10.lowering.ops.top_k import Range, Source, offer_columns, ranges_of
from tyir.backends.edge10.memory.allocate import align, sram_plan
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects.ty import TopK, TopKCandidates, tensor_type
from tyir.ir import Op

__all__ = ["Ranked"]


def _lists_bytes(op: TopK | TopKCandidates) -> int:
    """Of the values, ids and sums of all rows."""
    rows = math.prod(tensor_type(op.x).static_shape[:-1])
    return 2 * align(rows * op.k * 4) + align(rows * 4)


@dataclass(frozen=True)
class Ranked:
    """The best tokens of a product that nothing else reads."""

    source: ColumnSource
    best: TopK | TopKCandidates

    @classmethod
    def match(cls, op: Op, room: Room) -> Ranked | None:
        if not isinstance(op, (TopK, TopKCandidates)):
            return None
        rows = math.prod(tensor_type(op.x).static_shape[:-1])
        few = 2 * _lists_bytes(op) <= sram_plan(room.machine).temp_bytes // 4
        if not few or not room.machine.cube.rows < rows <= MOST_ROWS:
            return None
        source = column_source(op.x, room)
        return None if source is None else cls(source, op)

    @property
    def anchor(self) -> Op:
        return self.best

    @property
    def others(self) -> Sequence[Op]:
        return self.source.ops

    @property
    def scratch(self) -> Scratch | None:
        return self.source.scratch

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        results = _RankedColumns(self.best, lowering, self.source.results_area(lowering))
        self.source.lower_into(lowering, scratch, results)


class _RankedColumns:
    """The blocks of a product, each offered to the lists of its rows; two sets of lists, one filled while the
    other is stored.
    """

    block = 0

    def __init__(self, best: TopK | TopKCandidates, lowering: Lowering, area: Area) -> None:
        self.lowering, self.x = lowering, best.x
        self.piece_bytes = element_bytes(self.x)
        self._op = best
        self._ranges = ranges_of(best, lowering)
        self._list = align(math.prod(tensor_type(self.x).static_shape[:-1]) * best.k * 4)
        self._set = _lists_bytes(best)
        lists, rest = area.split(2 * self._set)
        self.unit = 1
        self._lists, self.piece_limit = lists.offset, rest.nbytes // 2
        self._buffers = Buffers(rest, self.piece_limit)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * self.piece_bytes

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        self.lowering.emitter.begin(self._op)
        for number, part in enumerate(self._ranges):
            begin, end = max(n0, part.first), min(n0 + n, part.first + part.size)
            if begin < end and part.count:
                self._offer(
                    part,
                    number,
                    offset + (begin - n0) * self.piece_bytes,
                    n * self.piece_bytes,
                    (m0, m),
                    (begin, end),
                )

    def _offer(
        self,
        part: Range,
        number: int,
        values: int,
        stride: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> None:
        m0, m = rows
        base = self._lists + number % 2 * self._set
        ends = [
            (t.place.offset + m0 * t.stride, t.stride)
            if t.place.in_sram
            else (base + side * self._list, t.nbytes)
            for side, t in enumerate(part.targets)
        ]
        source = Source(
            self.x,
            Place("sram", values),
            stride,
            part.first,
            part.size,
            part.name,
            softcap=self._op.softcap,
            ends=part.ends,
        )
        offer_columns(
            source,
            values,
            stride,
            columns[0] - part.first,
            m,
            columns[1] - columns[0],
            part.count,
            ends,
            self.lowering,
        )
        if columns[1] == part.first + part.size:
            for target, (sram, _) in zip(part.targets, ends):
                if not target.place.in_sram:
                    self.lowering.store(
                        target.place.at(m0 * target.stride),
                        sram,
                        (1, m, target.nbytes),
                        dram_strides=(0, target.stride),
                    )
