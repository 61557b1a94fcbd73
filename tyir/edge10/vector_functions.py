"""The functions of the vector units: one row each, and everything that anybody knows of a function comes from
its row.

To add one: a row here, and in every machine file a number `<name>_cycles` in `[vector]` (cycles of a lane for
an element; or `price` names the function whose number it shares).  From the row follow the operands that
`edge10.vector` takes, what it computes, the memory that it writes, its time, and the passes that a GPU makes
where it plays a die (`tools/silicon`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.kv import quantize_rows
from tyir.dialects.ty.elementwise import silu
from tyir.ir import Op

__all__ = [
    "ELEMENTWISE_FUNCTIONS",
    "VECTOR_FUNCTIONS",
    "VECTOR_PASSES",
    "Call",
    "VectorFunction",
    "angles",
    "function_of",
    "passes_of",
    "per_column",
    "per_row",
    "whole",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What a function is called with besides its inputs."""

    rows: int
    cols: int
    group: int = 1
    constant: float = 0.0


Shape = Callable[[Call], tuple[int, ...]]  # of an operand


def whole(call: Call) -> tuple[int, ...]:
    """Every element."""
    return (call.rows, call.cols)


def per_row(call: Call) -> tuple[int, ...]:
    """One element for each row."""
    return (call.rows,)


def per_column(call: Call) -> tuple[int, ...]:
    """One row that all rows share."""
    return (call.cols,)


def angles(call: Call) -> tuple[int, ...]:
    """Half a row, which the rows of a group share."""
    return (call.rows // call.group, call.cols // 2)


@dataclass(frozen=True)
class VectorFunction:
    """`compute(call, *inputs)` gives the outputs, on f32 inputs, rounded once when they are stored;
    `exact` ones take their inputs as they are stored.

    `elementwise` functions take strides for their inputs.  `passes` is how often the elements are gone over;
    `price` is the function whose cycles it takes ("": its own), `<price>_cycles` of a machine file.
    """

    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    meaning: str
    compute: Callable[..., Array | tuple[Array, ...]]
    elementwise: bool = False
    exact: bool = False
    passes: int = 1
    price: str = ""

    @property
    def priced_as(self) -> str:
        """The name of its cycles in a machine file."""
        return self.price or self.name


def _rms_norm(call: Call, a: Array, weight: Array) -> Array:
    scale = 1 / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + np.float32(call.constant))
    return np.asarray(a * scale * weight)


def _rope(call: Call, a: Array, cosines: Array, sines: Array) -> Array:
    cos, sin = (np.repeat(t, call.group, axis=0) for t in (cosines, sines))
    left, right = a[:, : call.cols // 2], a[:, call.cols // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)


def _fill(call: Call) -> Array:
    return np.full((call.rows, call.cols), np.float32(call.constant), np.float32)


_ONE: Final = (whole,)
_TWO: Final = (whole, whole)

_ROWS: Final = (
    VectorFunction("add", _TWO, _ONE, "a + b", lambda _, a, b: a + b, elementwise=True),
    VectorFunction("mul", _TWO, _ONE, "a * b", lambda _, a, b: a * b, elementwise=True),
    VectorFunction(
        "scale",
        _ONE,
        _ONE,
        "a * constant",
        lambda call, a: a * np.float32(call.constant),
        elementwise=True,
        price="mul",
    ),
    VectorFunction("silu", _ONE, _ONE, "a * sigmoid(a)", lambda _, a: silu(a), elementwise=True, passes=4),
    VectorFunction(
        "silu_mul", _TWO, _ONE, "silu(a) * b", lambda _, a, b: silu(a) * b, elementwise=True, passes=5
    ),
    VectorFunction("cast", _ONE, _ONE, "a in the output's element type", lambda _, a: a, elementwise=True),
    VectorFunction("copy", _ONE, _ONE, "a", lambda _, a: a.copy(), elementwise=True, exact=True),
    VectorFunction("fill", (), _ONE, "constant", _fill, price="fill_value"),
    VectorFunction(
        "rms_norm",
        (whole, per_column),
        _ONE,
        "a / sqrt(mean(a^2) + constant) * w, w [cols]",
        _rms_norm,
        passes=4,
    ),
    VectorFunction(
        "rope",
        (whole, angles, angles),
        _ONE,
        "half-split rotary embedding; a [rows, cols], cos and sin [rows / group, cols / 2]",
        _rope,
        passes=4,
    ),
    VectorFunction(
        "rescale_add",
        (whole, per_row, whole),
        _ONE,
        "a * s[row] + b: the running sum of blockwise attention",
        lambda _, a, s, b: a * s[:, None] + b,
        passes=2,
    ),
    VectorFunction(
        "divide_rows",
        (whole, per_row),
        _ONE,
        "a / s[row]: the end of blockwise attention",
        lambda _, a, s: a / np.maximum(s, np.float32(1e-30))[:, None],
        passes=2,
    ),
    VectorFunction(  # like a norm a pass that reduces the row and one that scales it
        "quantize_rows",
        _ONE,
        (whole, per_row),
        "a as i8 and one f16 scale per row, as kv.quantize_rows says",
        lambda _, a: quantize_rows(a),
        exact=True,
        passes=4,
        price="rms_norm",
    ),
)

VECTOR_FUNCTIONS: Final = {row.name: row for row in _ROWS}
ELEMENTWISE_FUNCTIONS: Final = tuple(row.name for row in _ROWS if row.elementwise)
# What a machine file has cycles for, and the passes over its elements of each; the softmax is a command of
# its own (`edge10.softmax_block`) on the same units.
VECTOR_PASSES: Final = {**{row.priced_as: row.passes for row in _ROWS}, "softmax": 8}


def function_of(op: Op) -> VectorFunction | None:
    """The function that computes an op of `ty`: the one of its name."""
    dialect, _, name = op.name.partition(".")
    return VECTOR_FUNCTIONS.get(name) if dialect == "ty" else None


def passes_of(function: str) -> int:
    """The passes of a function or of the softmax; what only compares and picks makes one."""
    row = VECTOR_FUNCTIONS.get(function)
    return row.passes if row is not None else VECTOR_PASSES.get(function, 1)
