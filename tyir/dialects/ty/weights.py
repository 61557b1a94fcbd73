"""Weights: tensors of files, parameters of dies, constants, and what makes the ones of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.attributes import Attribute, DenseElementsAttr, SymbolRefAttr
from tyir.checking.symbols import SymbolTables
from tyir.diagnostics import TyirError
from tyir.dialects.ty.tensors import Array, as_type, axis_in, static_shape, stored_bytes, tensor_type
from tyir.ir import Op, Region, Value
from tyir.opdef import DeclaredOp, attr, operand, optional_operand, region, result
from tyir.traits import (
    ComputedTensor,
    ConstantLike,
    IsolatedFromAbove,
    Pure,
    StoredTensor,
    Symbol,
    SymbolUser,
    Terminator,
    WeightReference,
)
from tyir.types import TensorType, Type, f16, f32, ui4

__all__ = [
    "ClampGroups",
    "Constant",
    "Dequantize",
    "DivideChannels",
    "GetGlobal",
    "Global",
    "MixRows",
    "MultiplyChannels",
    "PairScales",
    "Param",
    "QuantizeGroups",
    "Repeat",
    "Take",
    "Yield",
    "dequantize",
]


class Global(DeclaredOp, name="ty.global", traits=(Symbol, StoredTensor)):
    """A tensor of the checkpoint, by reference: `nbytes` little-endian bytes at `offset` of `file` (relative
    to the module's `tyir.checkpoint`).

    `key` is the tensor's name in the file.  Weights never travel in the text.
    """

    _: KW_ONLY
    sym_name: str = attr()
    type: TensorType = attr()
    file: str = attr()
    key: str = attr()
    offset: int = attr(least=0)
    nbytes: int = attr(least=0)

    def verify(self) -> Iterator[str]:
        if self.type.is_static and stored_bytes(self.type) != self.nbytes:
            yield f"{self.type} takes {self.type.nbytes} bytes but nbytes is {self.nbytes}"


class Param(DeclaredOp, name="ty.param", traits=(Symbol, IsolatedFromAbove, ComputedTensor)):
    """A tensor of the artifact: its initializer says how it is made from the checkpoint (slice, cast,
    quantize, ...).

    Initializers are evaluated one at a time, when the `.params` file is written.  They refer to `ty.global`s
    only, never to other parameters.
    """

    _: KW_ONLY
    sym_name: str = attr()
    type: TensorType = attr()
    initializer: Region = region()


class Yield(DeclaredOp, name="ty.yield", traits=(Terminator,)):
    """Ends an initializer with its tensor."""

    value: Value = operand()


class GetGlobal(DeclaredOp, name="ty.get_global", traits=(Pure, ConstantLike, WeightReference, SymbolUser)):
    """The tensor of a `ty.global` or `ty.param`, looked up in the enclosing modules from the inside out."""

    _: KW_ONLY
    symbol: SymbolRefAttr = attr()
    out: Value = result()

    def verify_symbols(self, tables: SymbolTables) -> Iterator[str]:
        """The weight exists in an enclosing module and has the result's type; an initializer sees the
        checkpoint's tensors only.
        """
        symbol, kind = self.symbol, self.results[0].type
        only = Global if isinstance(self.parent_op, Param) else Op
        target = tables.resolve(symbol, tables.nearest(self), outward=True, only=only)
        if target is None:
            yield tables.missing(symbol, tables.visible_names(self))
        elif not isinstance(target, (Global, Param)):
            yield f"refers to {symbol}, which is a '{target.name}' and neither a ty.global nor a ty.param"
        elif target.properties.get("type") is not kind:
            yield f"has type {kind} but {symbol} is {target.properties.get('type')}"


class Constant(DeclaredOp, name="ty.constant", traits=(Pure, ConstantLike)):
    """A small constant tensor."""

    _: KW_ONLY
    value: DenseElementsAttr = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.value.type

    @classmethod
    def materialize(cls, value: Attribute) -> Constant | None:
        return cls(value=value) if isinstance(value, DenseElementsAttr) else None

    def evaluate(self) -> Array:
        return self.value.to_numpy()


def _channels_problem(x: Value, scales: Value, axis: int) -> Iterator[str]:
    kind = tensor_type(x)
    if tensor_type(scales).dims != (kind.dims[axis],):
        yield f"scales {scales.type} are not one for each of the {kind.dims[axis]} entries along axis {axis}"


class MultiplyChannels(DeclaredOp, name="ty.multiply_channels", traits=(Pure,)):
    """Every slice along `axis` times a number of its own, in f32, rounded once: the input channels (axis 1)
    of a weight [N, K] times scales f32 [K].
    """

    x: Value = operand()
    scales: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        axis_in(self.axis, tensor_type(self.x))
        return self.x.type

    def verify(self) -> Iterator[str]:
        yield from _channels_problem(self.x, self.scales, self.axis)

    def evaluate(self, x: Array, scales: Array) -> Array:
        along = scales.reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])
        return as_type(x.astype(np.float32, copy=False) * along, tensor_type(self.out).element)


class DivideChannels(DeclaredOp, name="ty.divide_channels", traits=(Pure,)):
    """Every slice along `axis` divided by a number of its own, in f32, rounded once: the rows (axis 0) of a
    weight [N, K], or the entries of a norm's weight or of a bias, by scales f32 [N].
    """

    x: Value = operand()
    scales: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        axis_in(self.axis, tensor_type(self.x))
        return self.x.type

    def verify(self) -> Iterator[str]:
        yield from _channels_problem(self.x, self.scales, self.axis)

    def evaluate(self, x: Array, scales: Array) -> Array:
        along = scales.reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])
        return as_type(x.astype(np.float32, copy=False) / along, tensor_type(self.out).element)


class ClampGroups(DeclaredOp, name="ty.clamp_groups", traits=(Pure,)):
    """A weight [N, K] clamped, group by group of columns, to ranges f32 [2, N, K/g]: the lowest and the
    highest value of each group.

    min(max(w, lowest), highest), in f32, rounded once.
    """

    x: Value = operand()
    ranges: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        n, k = static_shape(self.x, 2)
        ranges = static_shape(self.ranges, 3)
        if ranges[:2] != (2, n) or not ranges[2] or k % ranges[2]:
            yield f"ranges {self.ranges.type} do not divide {self.x.type} into equal groups of columns"

    def evaluate(self, x: Array, ranges: Array) -> Array:
        n, k = x.shape
        groups = x.astype(np.float32, copy=False).reshape(n, ranges.shape[2], -1)
        clamped = np.minimum(np.maximum(groups, ranges[0, :, :, None]), ranges[1, :, :, None])
        return as_type(clamped.reshape(n, k), tensor_type(self.out).element)


class QuantizeGroups(DeclaredOp, name="ty.quantize_groups", traits=(Pure,)):
    """Round-to-nearest 4-bit quantisation of a weight [N, K], one scale and zero point per `group_size`
    columns of a row.  Results: q [N, K] ui4, scales [N, K/g] f16, zeros [N, K/g] ui4.

    With w the weight as it comes (f16 in a model of f16) taken to f32, in f32:

    asymmetric: scale = f16(max(max(w, 0) - min(w, 0), 1e-5) / 15);  zero = clamp(-round(min(w, 0) / scale),
    0, 15);  q = clamp(round(w / scale) + zero, 0, 15) (the pseudo-quantisation of AutoAWQ, with the range
    widened to hold zero).

    `symmetric`: scale = f16(max(max |w|, 1e-5) / 7);  zero = 8;  q = clamp(round(w / scale) + 8, 0, 15).

    Rounding is to nearest even.  A weight that was clamped to a range before (`ty.clamp_groups`) is quantised
    by what is left of it: the range of a group that does not reach its bounds is that of its values.
    """

    weight: Value = operand()
    _: KW_ONLY
    group_size: int = attr(least=1)
    symmetric: bool | None = attr(default=None)
    q: Value = result()
    scales: Value = result()
    zeros: Value = result()

    def infer(self) -> tuple[Type, ...]:
        n, k = static_shape(self.weight, 2)
        groups = (n, k // self.group_size)
        return TensorType((n, k), ui4), TensorType(groups, f16), TensorType(groups, ui4)

    def verify(self) -> Iterator[str]:
        _, k = static_shape(self.weight, 2)
        if k % self.group_size:
            yield f"group_size {self.group_size} does not divide the {k} input channels"

    def evaluate(self, weight: Array) -> tuple[Array, Array, Array]:
        n, k = weight.shape
        w = weight.astype(np.float32).reshape(n, -1, self.group_size)
        low, high = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)
        if self.symmetric:
            scales = (np.maximum(np.maximum(-low, high), 1e-5) / 7).astype(np.float16)
            s = scales.astype(np.float32)
            zeros = np.full(s.shape, np.float32(8))
        else:
            scales = (np.maximum(high - low, 1e-5) / 15).astype(np.float16)
            s = scales.astype(np.float32)
            zeros = np.clip(-np.rint(low / s), 0, 15)
        q = np.clip(np.rint(w / s[:, :, None]) + zeros[:, :, None], 0, 15)
        return q.astype(np.uint8).reshape(n, k), scales, zeros.astype(np.uint8)


def dequantize(q: Array, scales: Array, zeros: Array, group_size: int) -> npt.NDArray[np.float16]:
    """f16((q - zero) * scale), the weight [N, K] that the matrix unit sees (AutoAWQ's GEMM kernel rounds
    alike).
    """
    n, k = q.shape
    centred = q.reshape(n, -1, group_size).astype(np.float32) - zeros[:, :, None].astype(np.float32)
    return (centred * scales[:, :, None].astype(np.float32)).astype(np.float16).reshape(n, k)


class Dequantize(DeclaredOp, name="ty.dequantize", traits=(Pure,)):
    """f16((q - zero) * scale) by groups of columns: q [N, K] ui4, scales [N, K/g] f16, zeros [N, K/g] ui4 ->
    [N, K] f16.
    """

    q: Value = operand()
    scales: Value = operand()
    zeros: Value = operand()
    _: KW_ONLY
    group_size: int = attr(least=1)
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.q).with_element(f16)

    def evaluate(self, q: Array, scales: Array, zeros: Array) -> Array:
        return dequantize(q, scales, zeros, self.group_size)


class Repeat(DeclaredOp, name="ty.repeat", traits=(Pure,)):
    """Every slice along `axis` repeated `times` times in place: [a, b] -> [a, a, b, b].

    Refines quantisation groups exactly.
    """

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    times: int = attr(least=0)
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        axis = axis_in(self.axis, t)
        return t.with_shape(
            d * self.times if i == axis and d is not None else d for i, d in enumerate(t.dims)
        )

    def evaluate(self, x: Array) -> Array:
        return np.repeat(x, self.times, axis=self.axis)


_MOST_PAIR: Final = 10  # the exponent of a factor: queries grow by it
_PAIR_SHARE: Final = 0.75  # of the logarithm of how far a pair is above the others


class PairScales(DeclaredOp, name="ty.pair_scales", traits=(Pure,)):
    """Factors of the rotary pairs of keys that bring those far above their head's others down to them: f32
    [N], 1 or a larger power of two; 1 over it with `inverse`.

    Row n of `weight` [N, K] and `bias` [N] make channel n of keys, in heads of `dim` channels, of which d and
    d + dim / 2 are a pair; or `weight` [N] is a norm's.  A pair's size is the larger |bias| + 2 |row| of its
    two (two standard deviations, of inputs of mean square 1), its factor 2^floor(0.75 log2(size / the head's
    median)): what is taken from a pair of keys makes its rounding larger, so that the best is less than all
    of it (docs/long-context.md; QServe, arXiv:2405.04532, takes the root).  Each head's factors stand
    `repeats` times in place, for the query heads that read it.
    """

    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    dim: int = attr(least=2)
    repeats: int = attr(default=1, least=1)
    inverse: bool = attr(default=False)
    out: Value = result()

    def infer(self) -> Type:
        rows = tensor_type(self.weight, least=1).dims[0]
        return TensorType((None if rows is None else rows * self.repeats,), f32)

    def verify(self) -> Iterator[str]:
        rows = tensor_type(self.weight).dims[0]
        if rows is None or self.dim % 2 or rows % self.dim:
            yield f"{self.weight.type} is not the weight of heads of {self.dim} channels in pairs"
        elif self.bias is not None and tensor_type(self.bias).dims != (rows,):
            yield f"bias {self.bias.type} does not match the {rows} rows of {self.weight.type}"

    def evaluate(self, weight: Array, bias: Array | None = None) -> Array:
        rows = weight.astype(np.float64).reshape(len(weight), -1)
        sizes = 2 * np.sqrt((rows * rows).sum(axis=1))
        if bias is not None:
            sizes = sizes + abs(bias.astype(np.float64))
        pairs = sizes.reshape(-1, 2, self.dim // 2).max(axis=1)
        median = np.median(pairs, axis=1, keepdims=True)
        ratio = np.divide(pairs, median, out=np.ones_like(pairs), where=median > 0)
        exponents = np.clip(np.floor(_PAIR_SHARE * np.log2(np.maximum(ratio, 1))), 0, _MOST_PAIR)
        factors = np.exp2(-exponents if self.inverse else exponents)
        whole = np.repeat(np.concatenate([factors, factors], axis=1), self.repeats, axis=0)
        return np.asarray(whole.reshape(-1), np.float32)


class MixRows(DeclaredOp, name="ty.mix_rows", traits=(Pure,)):
    """out[n] = sum_j weights[n, j] * table[rows[n, j]] in f32, rounded once: learned positions resampled to
    another grid, in weight expressions.  table [V, h], rows and weights [N, J] -> [N, h] of type `element`.
    """

    table: Value = operand()
    _: KW_ONLY
    rows: DenseElementsAttr = attr()
    weights: DenseElementsAttr = attr()
    element: Type = attr(default=f16)
    out: Value = result()

    def infer(self) -> Type:
        rows = self.rows.type
        if not isinstance(rows, TensorType) or rows.rank != 2:
            raise TyirError(f"rows must be [N, J], got {rows}")
        return TensorType((rows.dims[0], tensor_type(self.table, 2).dims[1]), self.element)

    def verify(self) -> Iterator[str]:
        rows, weights = self.rows.type, self.weights.type
        if (
            not isinstance(weights, TensorType)
            or not isinstance(rows, TensorType)
            or weights.dims != rows.dims
        ):
            yield f"rows {rows} and weights {weights} differ in shape"
            return
        count, found = tensor_type(self.table, 2).dims[0], self.rows.to_numpy()
        if count is not None and found.size and (found.min() < 0 or found.max() >= count):
            yield f"a row lies outside the {count} of the table"

    def evaluate(self, table: Array) -> Array:
        weights = self.weights.to_numpy().astype(np.float32)
        wide = table.astype(np.float32)[self.rows.to_numpy()] * weights[:, :, None]
        return as_type(wide.sum(axis=1), tensor_type(self.out).element)


class Take(DeclaredOp, name="ty.take", traits=(Pure,)):
    """The entries `indices` along `axis`, in that order: channels of a head in another order, in weight
    expressions.
    """

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    indices: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        axis = axis_in(self.axis, t)
        return t.with_shape(len(self.indices) if i == axis else d for i, d in enumerate(t.dims))

    def verify(self) -> Iterator[str]:
        d = tensor_type(self.x).dims[self.axis]
        if d is not None and not all(0 <= i < d for i in self.indices):
            yield f"an index lies outside the dimension of {d}"

    def evaluate(self, x: Array) -> Array:
        return np.take(x, self.indices, axis=self.axis)
