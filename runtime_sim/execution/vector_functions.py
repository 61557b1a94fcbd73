"""The vector units' functions on numpy: f32 inside, one rounding at the end."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.kv import quantize_rows
from tyir.dialects.ty import comparable, select_best, silu
from tyir.types import Type, storage_dtype

__all__ = ["SramAccess", "softmax_block", "top_k", "vector_function"]

Array = npt.NDArray[Any]


class SramAccess(Protocol):
    """A view of SRAM: offset, shape, dtype, optional byte strides."""

    def __call__(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: Any,
        strides: tuple[int, ...] | None = None,
        *,
        write: bool = False,
    ) -> Array: ...


def vector_function(op: edge10.VectorOp, sram: SramAccess) -> None:
    """Compute `edge10.vector` from and to SRAM."""
    rows, cols, group = op.rows, op.cols, op.group
    name = op.function
    if name == "quantize_rows":
        for offset, t, made in zip(
            op.outputs, op.output_types, quantize_rows(sram(op.inputs[0], (rows, cols), np.float16))
        ):
            sram(offset, made.shape, _dtype(t), write=True)[...] = made
        return
    shapes = _input_shapes(name, rows, cols, group)
    inputs = [
        sram(
            offset,
            shape,
            _dtype(t),
            None if op.input_strides is None else (op.input_strides[i], _dtype(t).itemsize),
        )
        for i, (offset, shape, t) in enumerate(zip(op.inputs, shapes, op.input_types))
    ]
    value = inputs[0].copy() if name == "copy" else _compute(name, [a.astype(np.float32) for a in inputs], op)
    dtype = _dtype(op.output_types[0])
    strides = op.output_strides
    with np.errstate(over="ignore"):
        if strides is None:
            sram(op.outputs[0], (rows, cols), dtype, write=True)[...] = value
        else:
            target = sram(
                op.outputs[0],
                (rows // group, group, cols),
                dtype,
                (strides[0], strides[1], dtype.itemsize),
                write=True,
            )
            target[...] = value.reshape(rows // group, group, cols)


def _dtype(element: Any) -> np.dtype[Any]:
    assert isinstance(element, Type)
    return storage_dtype(element)


def _input_shapes(name: str, rows: int, cols: int, group: int) -> list[tuple[int, ...]]:
    whole = (rows, cols)
    if name == "rms_norm":
        return [whole, (cols,)]
    if name == "rope":
        return [whole, (rows // group, cols // 2), (rows // group, cols // 2)]
    if name == "rescale_add":
        return [whole, (rows,), whole]
    if name == "divide_rows":
        return [whole, (rows,)]
    return [whole, whole]


def _compute(name: str, inputs: list[Array], op: edge10.VectorOp) -> Array:
    if name == "fill":
        return np.full((op.rows, op.cols), np.float32(op.constant), np.float32)
    a, *others = inputs
    if name == "add":
        return np.asarray(a + others[0])
    if name == "mul":
        return np.asarray(a * others[0])
    if name == "scale":
        return np.asarray(a * np.float32(op.constant))
    if name == "silu":
        return silu(a)
    if name == "silu_mul":
        return np.asarray(silu(a) * others[0])
    if name == "cast":
        return a
    if name == "rms_norm":
        scale = 1 / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + np.float32(op.constant))
        return np.asarray(a * scale * others[0])
    if name == "rope":
        cos, sin = (np.repeat(t, op.group, axis=0) for t in others)
        half = op.cols // 2
        left, right = a[:, :half], a[:, half:]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)
    if name == "rescale_add":
        return np.asarray(a * others[0][:, None] + others[1])
    if name == "divide_rows":
        return np.asarray(a / np.maximum(others[0], np.float32(1e-30))[:, None])
    raise TyirError(f"the vector units have no function '{name}'")


def softmax_block(op: edge10.SoftmaxBlock, cols: int, first_key: int, pos: int, sram: SramAccess) -> None:
    """Compute `edge10.softmax_block` over `cols` keys from `first_key` on."""
    scores = sram(op.scores, (op.rows, cols), np.float32, (op.score_stride, 4)) * np.float32(op.scale)
    queries = pos + op.first_query + np.arange(op.rows)[:, None] // op.heads
    keys = first_key + np.arange(cols)[None, :]
    hidden = (keys > queries) | ((keys <= queries - op.window) if op.window else np.False_)
    before = sram(op.maximum, (op.rows,), np.float32).copy()
    total = sram(op.total, (op.rows,), np.float32).copy()
    maximum = np.maximum(before, np.where(hidden, np.float32(-1e30), scores).max(axis=1))
    alpha = np.exp(before - maximum)
    p = np.where(hidden, np.float32(0), np.exp(np.minimum(scores - maximum[:, None], np.float32(0))))
    sram(op.probabilities, (op.rows, cols), np.float16, (op.probability_stride, 2), write=True)[...] = p
    sram(op.maximum, (op.rows,), np.float32, write=True)[...] = maximum
    sram(op.total, (op.rows,), np.float32, write=True)[...] = total * alpha + p.sum(axis=1, dtype=np.float32)
    sram(op.alpha, (op.rows,), np.float32, write=True)[...] = alpha


def top_k(op: edge10.TopK, sram: SramAccess) -> None:
    """Compute `edge10.top_k`: the best of the tile and of the lists so far."""
    rows, dtype = op.rows, _dtype(op.element)
    values = comparable(sram(op.values, (rows, op.cols), dtype, (op.stride, dtype.itemsize)))
    if op.ids is None:
        ids = np.broadcast_to(np.arange(op.first, op.first + op.cols, dtype=np.int32), values.shape)
    else:
        ids = sram(op.ids, (rows, op.cols), np.int32, (op.stride, 4))
    lists = [
        (offset, (rows, op.k), np.dtype(t), (stride, 4))
        for offset, stride, t in zip(op.best, op.best_strides, (np.float32, np.int32))
    ]
    if op.fresh:
        known = [
            np.full((rows, op.k), free, t)
            for free, t in ((-np.inf, np.float32), (np.iinfo(np.int32).max, np.int32))
        ]
    else:
        known = [sram(*view).copy() for view in lists]
    best = select_best(
        np.concatenate([known[0], values], axis=1), np.concatenate([known[1], ids], axis=1), op.k
    )
    for view, found in zip(lists, best):
        sram(*view, write=True)[...] = found
