"""The best tokens: `edge10.top_k` over the logits, piece by piece when they do not lie in SRAM.

For each piece of the rows:   for each tile of columns: load (if x is in DRAM), top_k tile -> the rows' lists;   store the lists (if the result is in DRAM)
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes, sram_range
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import align
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.ty import MergeTopK, TopK, TopKCandidates, tensor_type
from tyir.ir import Value
from tyir.types import f32

__all__ = [
    "Range",
    "Source",
    "Target",
    "lower_merge_top_k",
    "lower_top_k",
    "lower_top_k_candidates",
    "offer_columns",
    "ranges_of",
]

_ROWS = 16  # of a piece: longer runs of columns are better than more rows


@dataclass(frozen=True)
class Source:
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
class Target:
    """Where a row's `k` values or ids go: rows are `stride` bytes apart."""

    place: Place
    stride: int


def lower_top_k(op: TopK, lowering: Lowering) -> None:
    """`ty.top_k`."""
    *lead, columns = tensor_type(op.x).static_shape
    source = Source(op.x, lowering.place(op.x), columns * element_bytes(op.x), 0, columns)
    _lower(source, [Target(lowering.place(r), op.k * 4) for r in op.results], math.prod(lead), op.k, lowering)


def lower_top_k_candidates(op: TopKCandidates, lowering: Lowering) -> None:
    """`ty.top_k_candidates`: each range gives its own list."""
    *lead, columns = tensor_type(op.x).static_shape
    for part in ranges_of(op, lowering):
        if part.count:
            source = Source(
                op.x, lowering.place(op.x), columns * element_bytes(op.x), part.first, part.size, part.name
            )
            _lower(source, part.targets, math.prod(lead), part.count, lowering)


def lower_merge_top_k(op: MergeTopK, lowering: Lowering) -> None:
    """`ty.merge_top_k`."""
    *lead, _, columns = tensor_type(op.candidates).static_shape
    source = Source(
        op.candidates, lowering.place(op.candidates), 2 * columns * 4, 0, columns, ids=columns * 4
    )
    _lower(source, [Target(lowering.place(r), op.k * 4) for r in op.results], math.prod(lead), op.k, lowering)


@dataclass(frozen=True)
class Range:
    """Columns [first, first + size) whose `count` best go to `targets`; the first column's token is
    `name`.
    """

    first: int
    size: int
    count: int
    name: int
    targets: Sequence[Target]


def ranges_of(op: TopK | TopKCandidates, lowering: Lowering) -> list[Range]:
    """The columns that are ranked on their own, and where their lists go."""
    if isinstance(op, TopK):
        return [
            Range(
                0,
                tensor_type(op.x).static_shape[-1],
                op.k,
                0,
                [Target(lowering.place(r), op.k * 4) for r in op.results],
            )
        ]
    total, first, entry, found = sum(op.counts()), 0, 0, []
    for size, count in zip(op.sizes, op.counts()):
        targets = [
            Target(lowering.place(op.out).at(row * total * 4 + entry * 4), 2 * total * 4) for row in (0, 1)
        ]
        found.append(Range(first, size, count, op.offset + first, targets))
        first, entry = first + size, entry + count
    return found


def _lower(source: Source, targets: Sequence[Target], rows: int, k: int, lowering: Lowering) -> None:
    quarter = lowering.plan.temp_bytes // 4 // 64 * 64
    width = 8 if source.ids is not None else element_bytes(source.value)
    step = min(rows, _ROWS, quarter // 2 // (align(k * 4)), quarter // 2 // width)
    if step < 1:
        raise TyirError(
            f"lists of {k} tokens do not fit {quarter // 2} bytes of SRAM for temporaries",
            help=f"use topk={quarter // 2 // 4 // 16 * 16} or less",
        )
    for number, (first, count) in enumerate(spans(rows, step)):
        lists = lowering.plan.temp + (2 + number % 2) * quarter
        ends = [
            (
                (t.place.offset + first * t.stride, t.stride)
                if t.place.in_sram
                else (lists + side * (quarter // 2), k * 4)
            )
            for side, t in enumerate(targets)
        ]
        _piece(source, first, count, k, ends, quarter, lowering)
        for target, (sram, stride) in zip(targets, ends):
            if not target.place.in_sram:
                lowering.store(
                    target.place.at(first * target.stride),
                    sram,
                    (1, count, k * 4),
                    dram_strides=(0, target.stride),
                    sram_strides=(0, stride),
                )


def _piece(
    source: Source,
    first: int,
    rows: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    quarter: int,
    lowering: Lowering,
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
                lowering.plan.temp + number % 2 * quarter,
                count * width,
                None if source.ids is None else rows * count * width,
            )
            strides = (source.ids or 0, source.stride)
            lowering.load(source.place.at(start), values, (planes, rows, count * width), dram_strides=strides)
        offer_columns(source, values, stride, ids, column, rows, count, k, ends, lowering)


def offer_columns(
    source: Source,
    values: int,
    stride: int,
    ids: int | None,
    column: int,
    rows: int,
    cols: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    lowering: Lowering,
) -> None:
    """Offer columns [column, column + cols) of some rows, now at `values` (and `ids`) of SRAM, to the rows'
    lists at `ends`; the first columns begin the lists.
    """
    element = f32 if source.ids is not None else tensor_type(source.value).element
    extent = (rows - 1) * stride + cols * (4 if element is f32 else 2)
    lists = [(offset, (rows - 1) * step + k * 4) for offset, step in ends]
    reads = [sram_range(values, extent), *([sram_range(values + ids, extent)] if ids is not None else [])]
    if column:
        reads += [sram_range(offset, size) for offset, size in lists]
    lowering.emitter.emit(
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
