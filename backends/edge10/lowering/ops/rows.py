"""Rows put one after the other, and some rows of a tensor: bytes that move."""

from __future__ import annotations

import math

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes, sram_range
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import edge10
from tyir.dialects.ty import Concat, Slice, tensor_type
from tyir.ir import Op, Value

__all__ = ["lower_concat", "lower_slice"]


def lower_concat(op: Concat, lowering: Lowering) -> None:
    """Tensors one after the other along the first axis that is not 1: each is one run of bytes."""
    _check_outermost(op, op.axis, op.out)
    start = 0
    for part in op.parts:
        nbytes = tensor_type(part).nbytes
        lowering.move(lowering.place(part), lowering.place(op.out).at(start), nbytes)
        start += nbytes


def lower_slice(op: Slice, lowering: Lowering) -> None:
    """Along the first axis that is not 1 one run of bytes, along another one a run for each row before it."""
    shape, element = tensor_type(op.x).static_shape, element_bytes(op.x)
    row = math.prod(shape[op.axis + 1 :]) * element
    source, target = lowering.place(op.x).at(op.offset * row), lowering.place(op.out)
    if (rows := math.prod(shape[: op.axis])) == 1:
        lowering.move(source, target, tensor_type(op.out).nbytes)
    elif source.in_sram and target.in_sram:
        run, whole = op.size * row, shape[op.axis] * row
        lowering.emitter.emit(
            edge10.VectorOp,
            function="copy",
            inputs=(source.offset,),
            outputs=(target.offset,),
            input_types=ArrayAttr([tensor_type(op.x).element]),
            output_types=ArrayAttr([tensor_type(op.x).element]),
            rows=rows,
            cols=run // element,
            input_strides=(whole,),
            reads=[sram_range(source.offset, (rows - 1) * whole + run)],
            writes=[sram_range(target.offset, rows * run, write=True)],
        )
    else:
        _move_runs(source, target, rows, op.size * row, shape[op.axis] * row, lowering)


def _move_runs(source: Place, target: Place, rows: int, run: int, whole: int, lowering: Lowering) -> None:
    """The first `run` bytes of each `whole` to rows that follow each other, where one side or both lie in
    DRAM.
    """
    through = 0 if source.in_sram or target.in_sram else run
    for piece in lowering.pieces(rows, through):
        here, there = source.at(piece.first * whole), target.at(piece.first * run)
        if source.in_sram:
            lowering.store(there, here.offset, (1, piece.rows, run), sram_strides=(0, whole))
            continue
        sram = there.offset if target.in_sram else piece.temp
        lowering.load(here, sram, (1, piece.rows, run), dram_strides=(0, whole))
        if not target.in_sram:
            lowering.store_bytes(there, sram, piece.rows * run)


def _check_outermost(op: Op, axis: int, value: Value) -> None:
    shape = tensor_type(value).static_shape
    if math.prod(shape[:axis]) != 1:
        raise TyirError(
            Diagnostic(
                f"'{op.name}' along axis {axis} of {value.type} has no edge10 command",
                where=str(op.loc),
                help="rows of one sequence can be joined and cut; weights are cut before outline-params",
            )
        )
