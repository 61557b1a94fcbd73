"""Weight expressions a window at a time: what a part of a tensor needs of its expression, and no more.

A window is a range for each axis.  Every op of `_RULES` says which windows of its operands a window of its
result is made of, so that a tensor of any size is written in blocks, and a die that takes a slice computes
that slice.  What an op has no rule for is computed whole, and remembered.

4-bit elements stay two to a byte wherever the ops between a stored tensor and the file only move them: an
eighth of the work of taking them apart and putting them together again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import quant, ty
from tyir.dialects.builtin import Module
from tyir.execution.storage import pack
from tyir.execution.weights import WeightSource
from tyir.interpreter import evaluate_op
from tyir.ir import Op, Value
from tyir.types import bit_width

__all__ = ["Window", "WindowReader", "whole_window"]

Array = npt.NDArray[Any]
Window = tuple[slice, ...]
_GRID: Final = 1 << 21  # elements of a block of rows that an op of `_BY_ROWS` computes at once
_REMEMBERED: Final = 64 << 20  # bytes of such blocks, and of ops that are computed whole; the last one always
_WORDS: Final = 64  # columns of words that are taken apart at once: what a core's cache holds of them
_PER_WORD: Final = 8

# Ops that compute each row of their results from one row of each operand; the axis of rows, None: all of it.
_BY_ROWS: Final[dict[type[Op], tuple[int | None, ...]]] = {
    ty.QuantizeGroups: (0,),
    ty.Dequantize: (0, 0, 0),
    ty.ClampGroups: (0, 1),
    quant.DequantizeIndexed: (0, 0, 0, None),
    quant.GgmlDequantize: (0,),
    quant.GgmlQ40: (0,),
}


def whole_window(shape: Sequence[int]) -> Window:
    """All of a tensor."""
    return tuple(slice(0, extent) for extent in shape)


class WindowReader:
    """Reads windows of weight expressions over a checkpoint; one for each thread.

    `remember`: bytes of results that are kept for others to use.  `touched`: the stored tensors that have
    been read since `forget`.
    """

    def __init__(self, weights: WeightSource, remember: int = _REMEMBERED) -> None:
        self.weights, self.remember = weights, remember
        self.touched: set[ty.Global] = set()
        self._globals: dict[Op, dict[str, ty.Global]] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}  # of equal expressions
        self._of_op: dict[Op, int] = {}
        self._recent: OrderedDict[tuple[int, int], tuple[Array, ...]] = OrderedDict()

    def evaluate(self, param: ty.Param) -> Array:
        """All of a parameter, an element each."""
        (last,) = [op for op in param.body if isinstance(op, ty.Yield)]
        return self.elements(last.value, whole_window(param.type.static_shape))

    def stored(self, root: Value, window: Window) -> Array:
        """The window as files hold it: 4-bit elements in pairs along the last axis."""
        kind = ty.tensor_type(root)
        if bit_width(kind.element) == 4:
            return np.ascontiguousarray(self.packed(root, window, kind.rank - 1))
        return pack(self.elements(root, window), kind)

    def elements(self, value: Value, window: Window) -> Array:
        """The window, an element each in the storage dtype of the value's type."""
        op = value.op
        if op is None:
            raise TyirError("a weight expression depends on an argument")
        if (rule := _RULES.get(type(op))) is not None:
            return rule(self, op, window)
        if type(op) in _BY_ROWS:
            return self._rows(op, value.index, window)
        return self._whole(op)[value.index][window]

    def packed(self, value: Value, window: Window, axis: int) -> Array:
        """The window of a tensor of 4-bit elements, two to a byte along `axis`; the first in the low half."""
        op, along = value.op, window[axis]
        if along.start % 2 == 0 and along.stop % 2 == 0:
            if isinstance(op, ty.Slice):
                inner = _shift(window, op.axis, op.offset)
                return (
                    self.packed(op.x, inner, axis)
                    if inner[axis].start % 2 == 0
                    else self._pack(value, window, axis)
                )
            if isinstance(op, ty.Transpose):
                inner = _permuted(window, op.perm)
                return self.packed(op.x, inner, op.perm[axis]).transpose(op.perm)
            if isinstance(op, quant.Unpack) and len(window) == 2:
                return self._unpack_packed(op, window, axis)
        return self._pack(value, window, axis)

    def _pack(self, value: Value, window: Window, axis: int) -> Array:
        found = np.moveaxis(self.elements(value, window), axis, -1)
        return np.moveaxis(pack(found, ty.tensor_type(value)), -1, axis)

    def _unpack_packed(self, op: quant.Unpack, window: Window, axis: int) -> Array:
        """Pairs straight from words: along the axis of the words' elements, or across it."""
        across = axis != op.axis
        if not across and (list(op.order) != list(range(_PER_WORD)) or window[axis].start % _PER_WORD):
            return self._pack(op.out, window, axis)
        inner, kept = _words_of(window, op.axis)
        words = self.elements(op.words, inner)
        turned = words if op.axis == 1 else words.T  # elements along the last axis
        if across:
            pairs = _pairs_across(turned, op.order)
        else:
            pairs = np.ascontiguousarray(turned).view(np.uint8)
            kept = slice(0, (window[axis].stop - window[axis].start) // 2)
        pairs = pairs[:, kept]
        return pairs if op.axis == 1 else pairs.T

    def _global(self, op: ty.GetGlobal) -> ty.Global:
        around: Op | None = op
        while around is not None:
            if isinstance(around, Module):
                if around not in self._globals:
                    self._globals[around] = {
                        str(o.sym_name): o for o in around.body if isinstance(o, ty.Global)
                    }
                if (found := self._globals[around].get(op.symbol.leaf)) is not None:
                    return found
            around = around.parent_op
        raise TyirError(f"@{op.symbol.leaf} is not a tensor of the checkpoint")

    def _read(self, op: ty.GetGlobal, window: Window) -> Array:
        target = self._global(op)
        self.touched.add(target)
        return self.weights.read(target)[window]

    def _rows(self, op: Op, index: int, window: Window) -> Array:
        """Rows of an op of `_BY_ROWS`, computed on a fixed grid of rows, so that who asks for its other
        results, or for other columns, finds them.
        """
        rows, rest = window[0], window[1:]
        extent = ty.tensor_type(op.results[0]).static_shape[0]
        step = max(1, _GRID // max(ty.tensor_type(op.results[0]).static_shape[1], 1))
        parts = []
        for number in range(rows.start // step, -(-rows.stop // step)):
            begin, end = number * step, min((number + 1) * step, extent)
            found = self._remembered(op, number, partial(self._operand_rows, op, slice(begin, end)))
            inside = slice(max(rows.start, begin) - begin, min(rows.stop, end) - begin)
            parts.append(found[index][(inside, *rest)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _operand_rows(self, op: Op, rows: slice) -> list[Array]:
        operands = []
        for value, axis in zip(op.operands, _BY_ROWS[type(op)], strict=True):
            all_of_it = whole_window(ty.tensor_type(value).static_shape)
            window = tuple(rows if i == axis else s for i, s in enumerate(all_of_it))
            operands.append(self.elements(value, window))
        return operands

    def _whole(self, op: Op) -> tuple[Array, ...]:
        def operands() -> list[Array]:
            shapes = [ty.tensor_type(v).static_shape for v in op.operands]
            return [self.elements(v, whole_window(s)) for v, s in zip(op.operands, shapes)]

        return self._remembered(op, -1, operands)

    def _remembered(self, op: Op, part: int, operands: Callable[[], list[Array]]) -> tuple[Array, ...]:
        key = (self._number(op), part)
        if (known := self._recent.get(key)) is not None:
            self._recent.move_to_end(key)
            return known
        result = evaluate_op(op, operands())
        found = self._recent[key] = result if isinstance(result, tuple) else (result,)
        while (
            len(self._recent) > 1 and sum(a.nbytes for r in self._recent.values() for a in r) > self.remember
        ):
            self._recent.popitem(last=False)
        return found

    def _number(self, op: Op) -> int:
        """Equal for ops that compute the same of the same stored tensors."""
        if op not in self._of_op:
            if isinstance(op, ty.GetGlobal):
                target = self._global(op)
                key: tuple[Any, ...] = (target.file, target.key, target.offset, target.type)
            else:
                inner = ((v.index, self._number(v.op)) for v in op.operands if v.op is not None)
                key = (op.name, op.properties, *inner)
            self._of_op[op] = self._numbers.setdefault(key, len(self._numbers))
        return self._of_op[op]

    def forget(self) -> None:
        """Let go what is remembered of the tensors before."""
        self._recent.clear()
        self._numbers.clear()
        self._of_op.clear()
        self.touched.clear()


# ------------------------------------------------------------------------------------------------------ rules


def _shift(window: Window, axis: int, offset: int) -> Window:
    return tuple(slice(s.start + offset, s.stop + offset) if i == axis else s for i, s in enumerate(window))


def _permuted(window: Window, perm: Sequence[int]) -> Window:
    inner = list(window)
    for place, axis in enumerate(perm):
        inner[axis] = window[place]
    return tuple(inner)


def _words_of(window: Window, axis: int) -> tuple[Window, slice]:
    """The words that hold a window's elements along `axis`, and which of their elements those are."""
    along = window[axis]
    first, last = along.start // _PER_WORD, -(-along.stop // _PER_WORD)
    inner = tuple(slice(first, last) if i == axis else s for i, s in enumerate(window))
    return inner, slice(along.start - first * _PER_WORD, along.stop - first * _PER_WORD)


def _pairs_across(words: Array, order: Sequence[int]) -> Array:
    """Elements of words [K, C] i32, paired along the first axis: bytes [K/2, 8 C]."""
    pairs, columns = words.shape[0] // 2, words.shape[1]
    out = np.empty((columns, _PER_WORD, pairs), np.uint8)
    low, four = np.uint32(0x0F0F0F0F), np.uint32(4)
    for begin in range(0, columns, _WORDS):
        first, second = (words[i::2, begin : begin + _WORDS].view(np.uint32) for i in (0, 1))
        even, odd = (first & low) | ((second & low) << four), ((first >> four) & low) | (second & ~low)
        for half, found in enumerate((even, odd)):
            turned = np.ascontiguousarray(found.T).view(np.uint8).reshape(found.shape[1], pairs, 4)
            for byte in range(4):
                out[begin : begin + _WORDS, order[2 * byte + half]] = turned[:, :, byte]
    return out.reshape(columns * _PER_WORD, pairs).T


def _unpack(reader: WindowReader, op: Any, window: Window) -> Array:
    inner, kept = _words_of(window, op.axis)
    found: Array = quant.unpack_words(reader.elements(op.words, inner), op.axis, op.order)
    return np.asarray(found[(slice(None),) * op.axis + (kept,)])


def _concat(reader: WindowReader, op: Any, window: Window) -> Array:
    found: list[Array] = []
    position, along = 0, window[op.axis]
    for part in op.parts:
        extent = ty.tensor_type(part).static_shape[op.axis]
        begin, end = max(along.start, position), min(along.stop, position + extent)
        if begin < end or (not found and part is op.parts[-1]):
            inside = slice(begin - position, max(begin, end) - position)
            found.append(
                reader.elements(part, tuple(inside if i == op.axis else s for i, s in enumerate(window)))
            )
        position += extent
    return found[0] if len(found) == 1 else np.concatenate(found, axis=op.axis)


def _channels(reader: WindowReader, op: Any, window: Window) -> Array:
    operands = [reader.elements(op.x, window), reader.elements(op.scales, (window[op.axis],))]
    return np.asarray(evaluate_op(op, operands))


def _repeat(reader: WindowReader, op: Any, window: Window) -> Array:
    along = window[op.axis]
    first = along.start // op.times
    inner = slice(first, -(-along.stop // op.times))
    found = reader.elements(op.x, tuple(inner if i == op.axis else s for i, s in enumerate(window)))
    kept = slice(along.start - first * op.times, along.stop - first * op.times)
    return np.asarray(np.repeat(found, op.times, axis=op.axis)[(slice(None),) * op.axis + (kept,)])


def _elementwise(reader: WindowReader, op: Any, window: Window) -> Array:
    return np.asarray(evaluate_op(op, [reader.elements(op.x, window)]))


def _slice(reader: WindowReader, op: Any, window: Window) -> Array:
    return reader.elements(op.x, _shift(window, op.axis, op.offset))


def _transpose(reader: WindowReader, op: Any, window: Window) -> Array:
    return np.transpose(reader.elements(op.x, _permuted(window, op.perm)), op.perm)


_RULES: Final[dict[type[Op], Callable[[WindowReader, Any, Window], Array]]] = {
    ty.GetGlobal: WindowReader._read,
    ty.Cast: _elementwise,
    quant.AddWrapping: _elementwise,
    ty.Slice: _slice,
    ty.Transpose: _transpose,
    ty.Concat: _concat,
    ty.Repeat: _repeat,
    ty.MultiplyChannels: _channels,
    ty.DivideChannels: _channels,
    quant.Unpack: _unpack,
}
