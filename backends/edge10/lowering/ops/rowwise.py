"""Ops that work row by row (norms, rotary embedding, elementwise): one vector command when everything is in
SRAM, pieces through temporaries otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Piece, element_bytes, sram_range
from tyir.backends.edge10.memory.allocate import align
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.ty import Norm, tensor_type
from tyir.edge10.vector_functions import Call, VectorFunction, angles, function_of, per_column, per_head
from tyir.ir import Op, Value

__all__ = ["lower_rowwise"]


@dataclass(frozen=True)
class _Operand:
    """One tensor of the command: `row_bytes` per row of the command; `per_row` False for a vector that all
    rows share.
    """

    value: Value
    row_bytes: int
    per_row: bool = True


def lower_rowwise(op: Op, lowering: Lowering) -> None:
    """An op of `ty` with a vector function of its name."""
    out, function = op.results[0], function_of(op)
    assert function is not None
    *outer, cols = tensor_type(out).static_shape
    rows = math.prod(outer)
    group = outer[-1] if _by_head(op, function) else 1
    constant = float(getattr(op, function.constant)) if function.constant else 0.0
    call = Call(rows, cols, group, constant)
    inputs = [
        _Operand(v, math.prod(shape(call)) * element_bytes(v), per_row=False)
        if shape in (per_column, per_head)
        else _Operand(v, shape(call)[-1] * element_bytes(v))
        for v, shape in zip(op.operands, function.inputs)
    ]
    _emit(op, lowering, inputs, _Operand(out, cols * element_bytes(out)), rows, cols, group, constant)


def _by_head(op: Op, function: VectorFunction) -> bool:
    """Whether the heads of a token are a group: they share its angles, or each has vectors of its own."""
    return any(
        shape is angles or (shape is per_head and tensor_type(v).rank == 2)
        for v, shape in zip(op.operands, function.inputs)
    )


def _emit(
    op: Op,
    lowering: Lowering,
    inputs: Sequence[_Operand],
    out: _Operand,
    rows: int,
    cols: int,
    group: int,
    constant: float,
) -> None:
    """`group` rows of the command share one row of the inputs after the first; pieces hold whole groups."""
    function, first, others = function_of(op), inputs[0], inputs[1:]
    assert function is not None
    shared = [_shared_vector(o, lowering) if not o.per_row else None for o in inputs]
    spilled = [o for o in (*inputs, out) if o.per_row and not lowering.place(o.value).in_sram]
    bytes_per_group = sum(align(o.row_bytes * (1 if o in others and group > 1 else group)) for o in spilled)
    most = lowering.half_rows(rows) if isinstance(op, Norm) else None  # see `fused/halved.py`
    for piece in lowering.pieces(rows // group, bytes_per_group, most):
        temp = piece.temp
        offsets: list[int] = []
        for operand, vector in zip(inputs, shared):
            share = 1 if operand is not first and group > 1 else group
            offset, temp = (
                (vector, temp) if vector is not None else _bring(operand, lowering, piece, share, temp)
            )
            offsets.append(offset)
        place = lowering.place(out.value)
        target = place.offset + piece.first * group * out.row_bytes if place.in_sram else temp
        count = piece.rows * group
        reads = [
            sram_range(
                offset,
                o.row_bytes * (1 if not o.per_row else piece.rows if o is not first and group > 1 else count),
            )
            for o, offset in zip(inputs, offsets)
        ]
        lowering.emitter.emit(
            edge10.VectorOp,
            function=function.name,
            inputs=tuple(offsets),
            outputs=(target,),
            rows=count,
            cols=cols,
            group=group,
            constant=constant,
            input_types=_types(inputs),
            output_types=_types([out]),
            reads=reads,
            writes=[sram_range(target, count * out.row_bytes, write=True)],
        )
        if not place.in_sram:
            lowering.store_bytes(place.at(piece.first * group * out.row_bytes), target, count * out.row_bytes)


def _types(operands: Sequence[_Operand]) -> ArrayAttr:
    return ArrayAttr([tensor_type(o.value).element for o in operands])


def _shared_vector(operand: _Operand, lowering: Lowering) -> int:
    """A weight vector, brought to a side slot."""
    place = lowering.place(operand.value)
    if place.in_sram:
        return place.offset
    if operand.row_bytes > lowering.plan.side.largest:
        raise TyirError(
            f"a vector of {operand.row_bytes} bytes does not fit the {lowering.plan.side.largest} bytes of"
            " SRAM kept for scales and norms",
            help="the machine has too little SRAM for this hidden size",
        )
    slot = lowering.side.take(operand.row_bytes)
    lowering.load_bytes(place, slot, operand.row_bytes, queue="ebdma")
    return slot


def _bring(
    operand: _Operand, lowering: Lowering, piece: Piece, rows_per_group: int, temp: int
) -> tuple[int, int]:
    """The SRAM offset of a piece's rows of an operand, and the next free temporary."""
    place, row = lowering.place(operand.value), operand.row_bytes * rows_per_group
    if place.in_sram:
        return place.offset + piece.first * row, temp
    lowering.load_bytes(place.at(piece.first * row), temp, piece.rows * row)
    return temp, temp + align(piece.rows * row)
