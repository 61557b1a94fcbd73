"""Tensors joined along an axis, and a part of a tensor along one: bytes that move."""

from __future__ import annotations

import math

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Place, sram_range
from tyir.dialects import edge10
from tyir.dialects.ty import Concat, Slice, tensor_type
from tyir.types import Type, bit_width

__all__ = ["lower_concat", "lower_slice"]


def lower_concat(op: Concat, lowering: Lowering) -> None:
    """Along the first axis that is not 1 each tensor is one run of bytes, along another one a run for each
    row before it.
    """
    whole = tensor_type(op.out)
    start, (rows, row) = 0, _rows(whole.static_shape, op.axis, whole.element)
    for part in op.parts:
        run = tensor_type(part).nbytes // rows
        _move_runs(
            lowering.place(part),
            run,
            lowering.place(op.out).at(start),
            row,
            rows,
            run,
            whole.element,
            lowering,
        )
        start += run


def lower_slice(op: Slice, lowering: Lowering) -> None:
    """The same the other way round."""
    whole = tensor_type(op.x)
    rows, row = _rows(whole.static_shape, op.axis, whole.element)
    run = tensor_type(op.out).nbytes // rows
    start = op.offset * row // whole.static_shape[op.axis]
    _move_runs(
        lowering.place(op.x).at(start), row, lowering.place(op.out), run, rows, run, whole.element, lowering
    )


def _rows(shape: tuple[int, ...], axis: int, element: Type) -> tuple[int, int]:
    """How many rows there are before an axis, and the bytes of one."""
    return math.prod(shape[:axis]), math.prod(shape[axis:]) * (bit_width(element) // 8)


def _move_runs(
    source: Place,
    source_row: int,
    target: Place,
    target_row: int,
    rows: int,
    run: int,
    element: Type,
    lowering: Lowering,
) -> None:
    """The first `run` bytes of each of `rows` rows, which are so many bytes apart in the source and in the
    target.
    """
    if rows == 1:
        lowering.move(source, target, run)
        return
    if source.in_sram and target.in_sram:
        lowering.emitter.emit(
            edge10.VectorOp,
            function="copy",
            inputs=(source.offset,),
            outputs=(target.offset,),
            input_types=ArrayAttr([element]),
            output_types=ArrayAttr([element]),
            rows=rows,
            cols=run // (bit_width(element) // 8),
            input_strides=None if source_row == run else (source_row,),
            output_strides=None if target_row == run else (target_row, 0),
            reads=[sram_range(source.offset, (rows - 1) * source_row + run)],
            writes=[sram_range(target.offset, (rows - 1) * target_row + run, write=True)],
        )
        return
    for piece in lowering.pieces(rows, 0 if source.in_sram or target.in_sram else run):
        here, there = source.at(piece.first * source_row), target.at(piece.first * target_row)
        shape = 1, piece.rows, run
        if source.in_sram:
            lowering.store(there, here.offset, shape, (0, target_row), (0, source_row))
        elif target.in_sram:
            lowering.load(here, there.offset, shape, (0, source_row), (0, target_row))
        else:
            lowering.load(here, piece.temp, shape, (0, source_row))
            lowering.store(there, piece.temp, shape, (0, target_row))
