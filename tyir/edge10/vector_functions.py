"""The functions of the vector units: one row each, and everything that anybody knows of a function comes from
its row.

To add one: a row here, and in every machine file a number `<name>_cycles` in `[vector]` (cycles of a lane for
an element; or `price` names the function whose number it shares).  From the row follow the operands that
`edge10.vector` takes, what it computes, the memory that it writes, its time, and the passes that a GPU makes
where it plays a die (`tools/silicon`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.kv import merge_parts, quantize_groups, quantize_rows
from tyir.dialects.ty.elementwise import gelu, silu, softcap
from tyir.ir import Op

__all__ = [
    "ELEMENTWISE_FUNCTIONS",
    "VECTOR_FUNCTIONS",
    "VECTOR_PASSES",
    "Call",
    "VectorFunction",
    "angles",
    "function_of",
    "half_rows",
    "passes_of",
    "per_column",
    "per_group",
    "per_head",
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


def per_head(call: Call) -> tuple[int, ...]:
    """A row for each row of a group: one that all rows share where the group is one row."""
    return (call.group, call.cols)


def merged(call: Call) -> tuple[int, ...]:
    """What the parts of a row, `group` side by side, come to: two columns less than one."""
    return (call.rows, call.cols // call.group - 2)


def half_rows(call: Call) -> tuple[int, ...]:
    """Half as many elements in each row."""
    return (call.rows, call.cols // 2)


def per_group(call: Call) -> tuple[int, ...]:
    """An element for each `group` elements of a row."""
    return (call.rows, call.cols // call.group)


def angles(call: Call) -> tuple[int, ...]:
    """Half a row, which the rows of a group share."""
    return (call.rows // call.group, call.cols // 2)


@dataclass(frozen=True)
class VectorFunction:
    """`compute(call, *inputs)` gives the outputs, on f32 inputs, rounded once when they are stored;
    `exact` ones take their inputs as they are stored.

    `elementwise` functions take strides for their inputs.  `passes` is how often the elements are gone over;
    `price` is the function whose cycles it takes ("": its own), `<price>_cycles` of a machine file;
    `constant` is the property of the op of its name that the command has as its constant.
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
    constant: str = ""

    @property
    def priced_as(self) -> str:
        """The name of its cycles in a machine file."""
        return self.price or self.name


def _rms_norm(call: Call, a: Array, weight: Array) -> Array:
    scale = 1 / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + np.float32(call.constant))
    return np.asarray(a * scale * weight)


def _layer_norm(call: Call, a: Array, weight: Array, *bias: Array) -> Array:
    centred = a - np.mean(a, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(call.constant))
    by_head = (centred * scale).reshape(-1, call.group, call.cols) * weight
    return np.asarray(sum(bias, by_head)).reshape(call.rows, call.cols)


def _gelus() -> Iterator[VectorFunction]:
    """gelu and gelu_mul, and both with each approximation."""
    for approximate in ("none", "tanh", "quick"):
        suffix = "" if approximate == "none" else f"_{approximate}"
        alone, gated = f"gelu{suffix}", f"gelu_mul{suffix}"

        def activated(a: Array, approximate: str = approximate) -> Array:
            return gelu(a, approximate)

        def compute(_: Call, a: Array, f: Callable[[Array], Array] = activated) -> Array:
            return f(a)

        def multiply(_: Call, a: Array, b: Array, f: Callable[[Array], Array] = activated) -> Array:
            return f(a) * b

        what = "a * P(normal < a)" + ("" if not suffix else f", by {approximate}")
        yield VectorFunction(alone, _ONE, _ONE, what, compute, elementwise=True, passes=6, price="gelu")
        meaning = f"{alone}(a) * b"
        yield VectorFunction(
            gated, _TWO, _ONE, meaning, multiply, elementwise=True, passes=7, price="gelu_mul"
        )


def _rope(call: Call, a: Array, cosines: Array, sines: Array) -> Array:
    cos, sin = (np.repeat(t, call.group, axis=0) for t in (cosines, sines))
    left, right = a[:, : call.cols // 2], a[:, call.cols // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)


def _share(largest: Array, total: Array, whole: Array) -> Array:
    with np.errstate(all="ignore"):  # replays compute on whatever is there
        return np.asarray(np.exp(largest + np.log(total) - whole))


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
        constant="factor",
    ),
    VectorFunction("silu", _ONE, _ONE, "a * sigmoid(a)", lambda _, a: silu(a), elementwise=True, passes=4),
    VectorFunction(
        "silu_mul", _TWO, _ONE, "silu(a) * b", lambda _, a, b: silu(a) * b, elementwise=True, passes=5
    ),
    *_gelus(),
    VectorFunction(
        "relu", _ONE, _ONE, "max(a, 0)", lambda _, a: np.maximum(a, 0), elementwise=True, price="add"
    ),
    VectorFunction(
        "softcap",
        _ONE,
        _ONE,
        "constant * tanh(a / constant)",
        lambda call, a: softcap(a, call.constant),
        elementwise=True,
        passes=4,
        price="silu",
        constant="cap",
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
        constant="eps",
    ),
    VectorFunction(
        "layer_norm",
        (whole, per_head),
        _ONE,
        "(a - mean(a)) / sqrt(variance(a) + constant) * w, w [group, cols]",
        _layer_norm,
        passes=6,
        constant="eps",
    ),
    VectorFunction(
        "layer_norm_bias",
        (whole, per_head, per_head),
        _ONE,
        "layer_norm(a, w) + b, b [group, cols]",
        _layer_norm,
        passes=6,
        price="layer_norm",
        constant="eps",
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
    VectorFunction(  # like blocks that are added up: a weight of each, and a product with it
        "merge_attention",
        _ONE,
        (merged,),
        "attention from the `group` parts [o, m, l] of each row, as kv.merge_attention says",
        lambda call, a: merge_parts(a, call.group),
        passes=2,
        price="rescale_add",
    ),
    VectorFunction(  # an exponential and a logarithm, a table each, of some numbers a row
        "share",
        (whole, whole, whole),
        _ONE,
        "l e^(m - t): of keys with the largest score m and the total l, what share of e^t they are",
        lambda _, largest, total, whole: _share(largest, total, whole),
        elementwise=True,
        passes=4,
        price="silu",
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
    VectorFunction(  # the same passes, over groups
        "quantize_groups",
        _ONE,
        (half_rows, per_group),
        "a as 4-bit codes and a word per `group` channels, as kv.quantize_groups says",
        lambda call, a: quantize_groups(a, call.cols // call.group),
        exact=True,
        passes=4,
        price="rms_norm",
    ),
)

VECTOR_FUNCTIONS: Final = {row.name: row for row in _ROWS}
ELEMENTWISE_FUNCTIONS: Final = tuple(row.name for row in _ROWS if row.elementwise)
# What a machine file has cycles for, and the passes over its elements of each; the softmax is a command of
# its own (`edge10.softmax_block`) on the same units.
VECTOR_PASSES: Final = {
    **{row.priced_as: row.passes for row in _ROWS},
    "softmax": 8,
    "softmax_capped": 12,
}


def function_of(op: Op) -> VectorFunction | None:
    """The function that computes an op of `ty`: the one of its name, with its approximation or its bias."""
    dialect, _, name = op.name.partition(".")
    if dialect != "ty":
        return None
    approximate = getattr(op, "approximate", "none")
    row = VECTOR_FUNCTIONS.get(name if approximate == "none" else f"{name}_{approximate}")
    if row is not None and len(row.inputs) != len(op.operands):
        return VECTOR_FUNCTIONS.get(f"{name}_bias")
    return row


def passes_of(function: str) -> int:
    """The passes of a function or of the softmax; what only compares and picks makes one."""
    row = VECTOR_FUNCTIONS.get(function)
    return row.passes if row is not None else VECTOR_PASSES.get(function, 1)
