"""The best tokens: `edge10.top_k` over the logits, piece by piece when they do not lie in SRAM.

For each piece of the rows:   for each tile of columns: load (if x is in DRAM), top_k tile -> the rows' lists and sums;   store them (if the result is in DRAM)

A merge offers the dies' records one after the other: a tile is the list of one, with its sum.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes, sram_range
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import align
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.ty import MergeTopK, TopK, TopKCandidates, record_words, tensor_type
from tyir.ir import Value
from tyir.types import f32

__all__ = [
    "Range",
    "Source",
    "Target",
    "lower_merge_top_k",
    "lower_top_k",
    "offer_columns",
    "ranges_of",
    "targets_of",
]

_ROWS = 16  # of a piece: longer runs of columns are better than more rows


@dataclass(frozen=True)
class Source:
    """Rows of values, `stride` bytes apart in `place`, from column `first` on; ids are `name` and following.

    `record`: the values are f32, their ids follow them, then their sum.  `ends`: the lists are complete after
    its last column.
    """

    value: Value
    place: Place
    stride: int
    first: int
    columns: int
    name: int = 0
    record: bool = False
    softcap: float | None = None
    fresh: bool = True
    ends: bool = False


@dataclass(frozen=True)
class Target:
    """Where a row's `nbytes` of values, ids or its sum go: rows are `stride` bytes apart."""

    place: Place
    stride: int
    nbytes: int


def targets_of(op: TopK | MergeTopK, lowering: Lowering) -> list[Target]:
    """Where the results go."""
    return [
        Target(lowering.place(r), nbytes, nbytes) for r, nbytes in zip(op.results, (op.k * 4, op.k * 4, 4))
    ]


def lower_top_k(op: TopK | TopKCandidates, lowering: Lowering) -> None:
    """`ty.top_k`, and `ty.top_k_candidates`: each range gives its own record."""
    *lead, columns = tensor_type(op.x).static_shape
    stride = columns * element_bytes(op.x)
    for part in ranges_of(op, lowering):
        if part.count:
            source = Source(
                op.x,
                lowering.place(op.x),
                stride,
                part.first,
                part.size,
                part.name,
                softcap=op.softcap,
                ends=part.ends,
            )
            _lower([source], part.targets, math.prod(lead), part.count, lowering)


def lower_merge_top_k(op: MergeTopK, lowering: Lowering) -> None:
    """`ty.merge_top_k`."""
    *lead, words = tensor_type(op.candidates).static_shape
    place, first = lowering.place(op.candidates), 0
    sources: list[Source] = []
    for count in filter(None, op.counts):
        sources.append(
            Source(
                op.candidates,
                place,
                words * 4,
                first,
                count,
                record=True,
                softcap=op.softcap,
                fresh=not sources,
            )
        )
        first += record_words(count)
    sources[-1] = replace(sources[-1], ends=True)
    _lower(sources, targets_of(op, lowering), math.prod(lead), op.k, lowering)


@dataclass(frozen=True)
class Range:
    """Columns [first, first + size) whose `count` best and whose sum go to `targets`; the first column's
    token is `name`; `ends`: they are results, not a record.
    """

    first: int
    size: int
    count: int
    name: int
    targets: Sequence[Target]
    ends: bool


def ranges_of(op: TopK | TopKCandidates, lowering: Lowering) -> list[Range]:
    """The columns that are ranked on their own, and where their lists go."""
    if isinstance(op, TopK):
        return [Range(0, tensor_type(op.x).static_shape[-1], op.k, 0, targets_of(op, lowering), True)]
    place, stride = lowering.place(op.out), tensor_type(op.out).static_shape[-1] * 4
    first, word, found = 0, 0, []
    for size, count in zip(op.sizes, op.counts()):
        targets = [
            Target(place.at((word + start) * 4), stride, words * 4)
            for start, words in ((0, count), (count, count), (2 * count, 1))
        ]
        found.append(Range(first, size, count, op.offset + first, targets, False))
        first, word = first + size, word + record_words(count)
    return found


def _lower(
    sources: Sequence[Source], targets: Sequence[Target], rows: int, k: int, lowering: Lowering
) -> None:
    quarter = lowering.plan.temp_bytes // 4 // 64 * 64
    room = [quarter // 2 - 64, quarter // 2 - 64, 128]  # values, ids, sums
    width = max(_words(s) if s.record else element_bytes(s.value) for s in sources)
    step = min(rows, _ROWS, room[0] // align(k * 4), quarter // width)
    if step < 1:
        raise TyirError(
            f"lists of {k} tokens do not fit {room[0]} bytes of SRAM for temporaries",
            help=f"use topk={room[0] // 4 // 16 * 16} or less",
        )
    for number, (first, count) in enumerate(spans(rows, step)):
        lists = lowering.plan.temp + (2 + number % 2) * quarter
        ends = [
            (t.place.offset + first * t.stride, t.stride)
            if t.place.in_sram
            else (lists + sum(room[:side]), t.nbytes)
            for side, t in enumerate(targets)
        ]
        turn = 0
        for source in sources:
            turn = _piece(source, first, count, k, ends, turn, lowering)
        for target, (sram, stride) in zip(targets, ends):
            if not target.place.in_sram:
                lowering.store(
                    target.place.at(first * target.stride),
                    sram,
                    (1, count, target.nbytes),
                    dram_strides=(0, target.stride),
                    sram_strides=(0, stride),
                )


def _words(record: Source) -> int:
    """Bytes of a row of a record."""
    return record_words(record.columns) * 4


def _piece(
    source: Source,
    first: int,
    rows: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    turn: int,
    lowering: Lowering,
) -> int:
    """Offer all columns of some rows to their lists; `turn` counts what has been loaded, which takes two
    quarters in turn.
    """
    quarter = lowering.plan.temp_bytes // 4 // 64 * 64
    width = 4 if source.record else element_bytes(source.value)
    whole = source.place.in_sram or source.record
    tile = source.columns if whole else min(source.columns, quarter // (rows * width))
    for column, count in spans(source.columns, tile):
        start = first * source.stride + (source.first + column) * width
        values, stride = source.place.offset + start, source.stride
        if not source.place.in_sram:
            values = lowering.plan.temp + turn % 2 * quarter
            stride = _words(source) if source.record else count * width
            lowering.load(source.place.at(start), values, (1, rows, stride), dram_strides=(0, source.stride))
            turn += 1
        offer_columns(source, values, stride, column, rows, count, k, ends, lowering)
    return turn


def offer_columns(
    source: Source,
    values: int,
    stride: int,
    column: int,
    rows: int,
    cols: int,
    k: int,
    ends: Sequence[tuple[int, int]],
    lowering: Lowering,
) -> None:
    """Offer columns [column, column + cols) of some rows, now at `values` of SRAM, to the rows' lists and
    sums at `ends`; the first columns begin them, and the last end them.
    """
    element = f32 if source.record else tensor_type(source.value).element
    row = _words(source) if source.record else cols * (4 if element is f32 else 2)
    lists = [(offset, (rows - 1) * step + nbytes) for (offset, step), nbytes in zip(ends, (k * 4, k * 4, 4))]
    fresh = source.fresh and column == 0
    reads = [sram_range(values, (rows - 1) * stride + row)]
    if not fresh:
        reads += [sram_range(offset, size) for offset, size in lists]
    lowering.emitter.emit(
        edge10.TopK,
        values=values,
        ids=values + cols * 4 if source.record else None,
        partial=values + 2 * cols * 4 if source.record else None,
        stride=stride,
        element=element,
        first=source.name + column,
        rows=rows,
        cols=cols,
        best=tuple(offset for offset, _ in ends),
        best_strides=tuple(step for _, step in ends),
        k=k,
        softcap=source.softcap,
        fresh=fresh,
        ends=source.ends and column + cols == source.columns,
        reads=reads,
        writes=[sram_range(offset, size, write=True) for offset, size in lists],
    )
