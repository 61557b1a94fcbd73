"""The best tokens: `edge10.top_k` over the logits, piece by piece when they do not lie in SRAM.

For each piece of the rows:   for each tile of columns: load (if x is in DRAM), top_k tile -> the rows' lists;   store the lists (if the result is in DRAM)

The logits of many tokens are ranked block by block as the product makes them (`RankedColumns`), and are
never in DRAM.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import MOST_ROWS
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, Place, element_bytes, sram_range
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import align, sram_plan
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, MergeTopK, QuantizedLinear, TopK, TopKCandidates, tensor_type
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import f32

__all__ = [
    "RankedColumns",
    "Ranking",
    "lower_merge_top_k",
    "lower_top_k",
    "lower_top_k_candidates",
    "rankings",
]

_ROWS = 16  # of a piece: longer runs of columns are better than more rows


@dataclass(frozen=True)
class _Source:
    """Rows of values, `stride` bytes apart in `place`, from column `first` on; ids are `name` and following,
    or lie `ids` bytes after the values.
    """

    value: Value
    place: Place
    stride: int
    first: int
    columns: int
    name: int = 0
    ids: int | None = None


@dataclass(frozen=True)
class _Target:
    """Where a row's `k` values or ids go: rows are `stride` bytes apart."""

    place: Place
    stride: int


def lower_top_k(op: TopK, low: Lowering) -> None:
    """`ty.top_k`."""
    *lead, columns = tensor_type(op.x).static_shape
    source = _Source(op.x, low.place(op.x), columns * element_bytes(op.x), 0, columns)
    _lower(source, [_Target(low.place(r), op.k * 4) for r in op.results], math.prod(lead), op.k, low)


def lower_top_k_candidates(op: TopKCandidates, low: Lowering) -> None:
    """`ty.top_k_candidates`: each range gives its own list."""
    *lead, columns = tensor_type(op.x).static_shape
    for part in _ranges(op, low):
        if part.count:
            source = _Source(
                op.x, low.place(op.x), columns * element_bytes(op.x), part.first, part.size, part.name
            )
            _lower(source, part.targets, math.prod(lead), part.count, low)


def lower_merge_top_k(op: MergeTopK, low: Lowering) -> None:
    """`ty.merge_top_k`."""
    *lead, _, columns = tensor_type(op.candidates).static_shape
    source = _Source(op.candidates, low.place(op.candidates), 2 * columns * 4, 0, columns, ids=columns * 4)
    _lower(source, [_Target(low.place(r), op.k * 4) for r in op.results], math.prod(lead), op.k, low)


@dataclass(frozen=True)
class Ranking:
    """The best tokens of a product that nothing else reads."""

    product: Linear | QuantizedLinear
    best: TopK | TopKCandidates


def rankings(function: Func, machine: Machine) -> dict[Op, Ranking]:
    """The products of many tokens that are ranked block by block, by the op that ranks them."""
    found: dict[Op, Ranking] = {}
    for op in function.body:
        if (
            isinstance(op, (TopK, TopKCandidates))
            and isinstance(op.x.op, (Linear, QuantizedLinear))
            and len(op.x.uses) == 1
        ):
            rows = math.prod(tensor_type(op.x).static_shape[:-1])
            lists = 4 * align(rows * op.k * 4)
            if machine.cube.rows < rows <= MOST_ROWS and lists <= sram_plan(machine).temp_bytes // 4:
                found[op] = Ranking(op.x.op, op)
    return found


@dataclass(frozen=True)
class _Range:
    """Columns [first, first + size) whose `count` best go to `targets`; the first column's token is
    `name`.
    """

    first: int
    size: int
    count: int
    name: int
    targets: Sequence[_Target]


class RankedColumns:
    """The blocks of a product, each offered to the lists of its rows; two sets of lists, one filled while the
    other is stored.
    """

    block = 0

    def __init__(self, ranking: Ranking, low: Lowering, area: Area) -> None:
        self.low, self.x = low, ranking.best.x
        self.piece_bytes = element_bytes(self.x)
        self._op = ranking.best
        self._ranges = _ranges(ranking.best, low)
        self._list = align(math.prod(tensor_type(self.x).static_shape[:-1]) * ranking.best.k * 4)
        lists, rest = area.split(4 * self._list)
        self._lists, self.piece_limit = lists.offset, rest.nbytes // 2
        self._buffers = Buffers(rest, self.piece_limit)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * self.piece_bytes

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        self.low.emitter.begin(self._op)
        for number, part in enumerate(self._ranges):
            low, high = max(n0, part.first), min(n0 + n, part.first + part.size)
            if low < high and part.count:
                self._offer(
                    part,
                    number,
                    offset + (low - n0) * self.piece_bytes,
                    n * self.piece_bytes,
                    (m0, m),
                    (low, high),
                )

    def _offer(
        self,
        part: _Range,
        number: int,
        values: int,
        stride: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> None:
        m0, m = rows
        base, row = self._lists + number % 2 * 2 * self._list, part.count * 4
        ends = [
            (t.place.offset + m0 * t.stride, t.stride) if t.place.in_sram else (base + side * self._list, row)
            for side, t in enumerate(part.targets)
        ]
        source = _Source(self.x, Place("sram", values), stride, part.first, part.size, part.name)
        _offer(
            source,
            values,
            stride,
            None,
            columns[0] - part.first,
            m,
            columns[1] - columns[0],
            part.count,
            ends,
            self.low,
        )
        if columns[1] == part.first + part.size:
            for target, (sram, _) in zip(part.targets, ends):
                if not target.place.in_sram:
                    self.low.store(
                        target.place.at(m0 * target.stride),
                        sram,
                        (1, m, row),
                        dram_strides=(0, target.stride),
                    )


def _ranges(op: TopK | TopKCandidates, low: Lowering) -> list[_Range]:
    if isinstance(op, TopK):
        return [
            _Range(
                0,
                tensor_type(op.x).static_shape[-1],
                op.k,
                0,
                [_Target(low.place(r), op.k * 4) for r in op.results],
            )
        ]
    total, first, entry, found = sum(op.counts()), 0, 0, []
    for size, count in zip(op.sizes, op.counts()):
        targets = [
            _Target(low.place(op.out).at(row * total * 4 + entry * 4), 2 * total * 4) for row in (0, 1)
        ]
        found.append(_Range(first, size, count, op.offset + first, targets))
        first, entry = first + size, entry + count
    return found


def _lower(source: _Source, targets: Sequence[_Target], rows: int, k: int, low: Lowering) -> None:
    quarter = low.plan.temp_bytes // 4 // 64 * 64
    width = 8 if source.ids is not None else element_bytes(source.value)
    step = min(rows, _ROWS, quarter // 2 // (align(k * 4)), quarter // 2 // width)
    if step < 1:
        raise TyirError(
            f"lists of {k} tokens do not fit {quarter // 2} bytes of SRAM for temporaries",
            help=f"use topk={quarter // 2 // 4 // 16 * 16} or less",
        )
    for number, (first, count) in enumerate(spans(rows, step)):
        lists = low.plan.temp + (2 + number % 2) * quarter
        ends = [
            (
                (t.place.offset + first * t.stride, t.stride)
                if t.place.in_sram
                else (lists + side * (quarter // 2), k * 4)
            )
            for side, t in enumerate(targets)
        ]
        _piece(source, first, count, k, ends, quarter, low)
        for target, (sram, stride) in zip(targets, ends):
            if not target.place.in_sram:
                low.store(
                    target.place.at(first * target.stride),
                    sram,
                    (1, count, k * 4),
                    dram_strides=(0, target.stride),
                    sram_strides=(0, stride),
                )


def _piece(
    source: _Source,
    first: int,
    rows: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    quarter: int,
    low: Lowering,
) -> None:
    """Offer all columns of some rows to their lists."""
    width = 4 if source.ids is not None else element_bytes(source.value)
    planes = 1 if source.ids is None else 2
    tile = source.columns if source.place.in_sram else min(source.columns, quarter // (rows * width * planes))
    for number, (column, count) in enumerate(spans(source.columns, tile)):
        start = first * source.stride + (source.first + column) * width
        values, stride, ids = source.place.offset + start, source.stride, source.ids
        if not source.place.in_sram:
            values, stride, ids = (
                low.plan.temp + number % 2 * quarter,
                count * width,
                None if source.ids is None else rows * count * width,
            )
            strides = (source.ids or 0, source.stride)
            low.load(source.place.at(start), values, (planes, rows, count * width), dram_strides=strides)
        _offer(source, values, stride, ids, column, rows, count, k, ends, low)


def _offer(
    source: _Source,
    values: int,
    stride: int,
    ids: int | None,
    column: int,
    rows: int,
    cols: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    low: Lowering,
) -> None:
    element = f32 if source.ids is not None else tensor_type(source.value).element
    extent = (rows - 1) * stride + cols * (4 if element is f32 else 2)
    lists = [(offset, (rows - 1) * step + k * 4) for offset, step in ends]
    reads = [sram_range(values, extent), *([sram_range(values + ids, extent)] if ids is not None else [])]
    if column:
        reads += [sram_range(offset, size) for offset, size in lists]
    low.emitter.emit(
        edge10.TopK,
        values=values,
        ids=None if ids is None else values + ids,
        stride=stride,
        element=element,
        first=source.name + column,
        rows=rows,
        cols=cols,
        best=tuple(offset for offset, _ in ends),
        best_strides=tuple(step for _, step in ends),
        k=k,
        fresh=column == 0,
        reads=reads,
        writes=[sram_range(offset, size, write=True) for offset, size in lists],
    )
