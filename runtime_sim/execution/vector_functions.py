"""The vector units' functions on numpy: f32 inside, one rounding at the end."""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.dialects import edge10
from tyir.dialects.kv import LOWEST
from tyir.dialects.kv import block_weights as kv_block_weights
from tyir.dialects.ty import comparable, select_best, softcap
from tyir.edge10.vector_functions import VECTOR_FUNCTIONS
from tyir.types import Type, storage_dtype

__all__ = ["SramAccess", "block_weights", "score_block", "softmax_block", "top_k", "vector_function"]

Array = npt.NDArray[Any]
_LOWEST: Final = np.float32(LOWEST)


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
    row = VECTOR_FUNCTIONS[op.function]
    call = op.call
    inputs: list[Array] = []
    for i, (offset, shape, t) in enumerate(zip(op.inputs, row.inputs, op.input_types)):
        strides = None if op.input_strides is None else (op.input_strides[i], _dtype(t).itemsize)
        array = sram(offset, shape(call), _dtype(t), strides)
        inputs.append(array if row.exact else array.astype(np.float32))
    made = row.compute(call, *inputs)
    values = made if isinstance(made, tuple) else (made,)
    rows, cols, group = op.rows, op.cols, op.group
    with np.errstate(over="ignore"):
        for offset, t, value in zip(op.outputs, op.output_types, values):
            dtype, row_strides = _dtype(t), op.output_strides
            if row_strides is None:
                sram(offset, value.shape, dtype, write=True)[...] = value
            else:
                heads, steps = (rows // group, group, cols), (row_strides[0], row_strides[1], dtype.itemsize)
                sram(offset, heads, dtype, steps, write=True)[...] = value.reshape(heads)


def _dtype(element: Any) -> np.dtype[Any]:
    assert isinstance(element, Type)
    return storage_dtype(element)


def softmax_block(op: edge10.SoftmaxBlock, cols: int, first_key: int, pos: int, sram: SramAccess) -> None:
    """Compute `edge10.softmax_block` over `cols` keys from `first_key` on."""
    if cols == 0:
        sram(op.alpha, (op.rows,), np.float32, write=True)[...] = 1
        return
    scores = sram(op.scores, (op.rows, cols), np.float32, (op.score_stride, 4)) * np.float32(op.scale)
    if op.temperature is not None:
        scores = scores * sram(op.temperature, (1,), np.float32)
    scores = scores if op.softcap is None else softcap(scores, op.softcap)
    queries = pos + op.first_query + np.arange(op.rows)[:, None] // op.heads
    keys = first_key + np.arange(cols)[None, :]
    hidden = (keys > queries) | ((keys <= queries - op.window) if op.window else np.False_)
    before = sram(op.maximum, (op.rows,), np.float32).copy()
    total = sram(op.total, (op.rows,), np.float32).copy()
    maximum = np.maximum(before, np.where(hidden, _LOWEST, scores).max(axis=1))
    alpha = np.exp(before - maximum)
    p = np.where(hidden, np.float32(0), np.exp(np.minimum(scores - maximum[:, None], np.float32(0))))
    sram(op.probabilities, (op.rows, cols), np.float16, (op.probability_stride, 2), write=True)[...] = p
    sram(op.maximum, (op.rows,), np.float32, write=True)[...] = maximum
    sram(op.total, (op.rows,), np.float32, write=True)[...] = total * alpha + p.sum(axis=1, dtype=np.float32)
    sram(op.alpha, (op.rows,), np.float32, write=True)[...] = alpha


def score_block(op: edge10.ScoreBlock, cols: int, first_key: int, pos: int, sram: SramAccess) -> None:
    """Compute `edge10.score_block` over `cols` keys from `first_key` on."""
    if cols == 0:
        sram(op.out, (op.rows,), np.float32, write=True)[...] = _LOWEST
        return
    scores = sram(op.scores, (op.rows, cols), np.float32, (op.score_stride, 4)) * np.float32(op.scale)
    if op.temperature is not None:
        scores = scores * sram(op.temperature, (1,), np.float32)
    scores = scores if op.softcap is None else softcap(scores, op.softcap)
    queries = pos + op.first_query + np.arange(op.rows)[:, None] // op.heads * op.every
    hidden = first_key + np.arange(cols)[None, :] > queries
    scores = np.where(hidden, np.float32(-np.inf), scores)
    with np.errstate(
        over="ignore", divide="ignore", invalid="ignore"
    ):  # replays of plans compute on anything
        largest = np.maximum(scores.max(axis=1), _LOWEST)
        sums = np.exp(scores - largest[:, None]).sum(axis=1, dtype=np.float32)
        found = np.where(sums > 0, np.log(sums) + largest, _LOWEST).astype(np.float32)
        total = np.logaddexp(sram(op.total, (op.rows,), np.float32).copy(), found)
    sram(op.out, (op.rows,), np.float32, write=True)[...] = found
    sram(op.total, (op.rows,), np.float32, write=True)[...] = total


def block_weights(op: edge10.BlockWeights, sizes: tuple[int, ...], sram: SramAccess) -> None:
    """Compute `edge10.block_weights`: `sizes` are the rows that are read, the candidates, and whether
    some samples measure.
    """
    seen, low, high, measures = sizes
    out = np.full(op.rows, -1, np.float32)
    if seen:
        x = sram(op.x, (seen, op.samples, op.heads), np.float32)
        totals = sram(op.totals, (op.samples, op.heads), np.float32, (op.total_stride, 4))
        out[:seen] = kv_block_weights(x, totals, low, high, op.first, measures=bool(measures))
    sram(op.out, (op.rows,), np.float32, write=True)[...] = out


def top_k(op: edge10.TopK, sram: SramAccess) -> None:
    """Compute `edge10.top_k`: the best of the tile and of the lists so far, and the sum of both."""
    rows, dtype = op.rows, _dtype(op.element)
    values = comparable(sram(op.values, (rows, op.cols), dtype, (op.stride, dtype.itemsize)))
    if op.ids is None:
        ids = np.broadcast_to(np.arange(op.first, op.first + op.cols, dtype=np.int32), values.shape)
    else:
        ids = sram(op.ids, (rows, op.cols), np.int32, (op.stride, 4))
    lists = [
        (offset, (rows, width), np.dtype(t), (stride, 4))
        for offset, stride, width, t in zip(
            op.best, op.best_strides, (op.k, op.k, 1), (np.float32, np.int32, np.float32)
        )
    ]
    if op.fresh:
        known = [
            np.full(shape, free, t)
            for free, (_, shape, t, _) in zip((-np.inf, np.iinfo(np.int32).max, 0), lists)
        ]
    else:
        known = [sram(*view).copy() for view in lists]
    best = select_best(
        np.concatenate([known[0], values], axis=1), np.concatenate([known[1], ids], axis=1), op.k
    )

    def summed(x: Array) -> Array:
        return x if op.softcap is None else softcap(x, op.softcap)

    first = summed(best[0][:, :1])
    if op.partial is None:
        added = np.exp(summed(values) - first).sum(axis=1, keepdims=True, dtype=np.float32)
    else:
        own = sram(op.partial, (rows, 1), np.float32, (op.stride, 4))
        added = own * np.exp(summed(values[:, :1]) - first)
    if not op.fresh:
        added = known[2] * np.exp(summed(known[0][:, :1]) - first) + added
    total = np.asarray(added, np.float32)
    made = [*best, total]
    if op.ends:
        with np.errstate(divide="ignore"):  # a program that is checked alone sums what no die has sent
            made = [summed(best[0]), best[1], first + np.log(total)]
    for view, found in zip(lists, made):
        sram(*view, write=True)[...] = found
