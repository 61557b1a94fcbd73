"""Rows put one after the other, and some rows of a tensor: bytes that move."""

from __future__ import annotations

import math

from tyir.backends.edge10.lowering.context import Lowering, element_bytes
from tyir.diagnostics import Diagnostic, TyirError
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
    """Rows along the first axis that is not 1: one run of bytes."""
    _check_outermost(op, op.axis, op.x)
    row = math.prod(tensor_type(op.x).static_shape[op.axis + 1 :]) * element_bytes(op.x)
    source = lowering.place(op.x).at(op.offset * row)
    lowering.move(source, lowering.place(op.out), tensor_type(op.out).nbytes)


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
