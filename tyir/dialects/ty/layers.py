"""The parts of a decoder layer but for attention: embedding, norm, linears, rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY

import numpy as np

from tyir.attributes import DenseElementsAttr
from tyir.diagnostics import TyirError
from tyir.dialects.ty.tensors import Array, as_type, static_shape, tensor_type
from tyir.dialects.ty.weights import dequantize
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, optional_operand, result
from tyir.traits import ConstantLike, Pure
from tyir.types import FloatType, TensorType, Type, f16, i32

__all__ = [
    "Embedding",
    "LayerNorm",
    "Linear",
    "Norm",
    "QuantizedLinear",
    "RmsNorm",
    "Rope",
    "RopeAngles",
    "RopeTable",
    "SelectRow",
    "rope_tables",
]


class Embedding(DeclaredOp, name="ty.embedding", traits=(Pure,)):
    """Row `id - offset` of table [V, h] for each id [b, s]; rows outside the table are zero, so that dies
    holding parts of it can be summed.
    """

    table: Value = operand()
    ids: Value = operand()
    _: KW_ONLY
    offset: int = attr(default=0)
    out: Value = result()

    def infer(self) -> Type:
        table = tensor_type(self.table, 2)
        return TensorType((*tensor_type(self.ids).dims, table.dims[1]), table.element)

    def evaluate(self, table: Array, ids: Array) -> Array:
        rows = ids - self.offset
        inside = (rows >= 0) & (rows < table.shape[0])
        return np.where(inside[..., None], table[np.where(inside, rows, 0)], np.zeros((), table.dtype))


class SelectRow(DeclaredOp, name="ty.select_row", traits=(Pure,)):
    """One row of each sequence: out[i, 0] = x[i, row[i]] of x [b, s, ..] for row i32 [b], out [b, 1, ..];
    zeros for a row outside.
    """

    x: Value = operand()
    row: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        batch, _, *rest = tensor_type(self.x, least=3).dims
        return tensor_type(self.x).with_shape((batch, 1, *rest))

    def verify(self) -> Iterator[str]:
        x, row = tensor_type(self.x), tensor_type(self.row)
        if row.element is not i32 or row.dims != x.dims[:1]:
            yield f"row is i32, one for each sequence of {x}; got {row}"

    def evaluate(self, x: Array, row: Array) -> Array:
        inside = (row >= 0) & (row < x.shape[1])
        found = x[np.arange(len(x)), np.where(inside, row, 0)]
        found[~inside] = 0  # indexing by arrays has made a copy
        return found[:, None]


class RmsNorm(DeclaredOp, name="ty.rms_norm", traits=(Pure,)):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in f32, rounded once."""

    x: Value = operand()
    weight: Value = operand()
    _: KW_ONLY
    eps: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        if tensor_type(self.weight).dims != tensor_type(self.x).dims[-1:]:
            yield f"weight {self.weight.type} does not match the last dimension of {self.x.type}"

    def evaluate(self, x: Array, weight: Array) -> Array:
        wide = x.astype(np.float32)
        scale = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(self.eps))
        return as_type(wide * scale * weight.astype(np.float32), tensor_type(self.out).element)


class LayerNorm(DeclaredOp, name="ty.layer_norm", traits=(Pure,)):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis, in f32, rounded once.

    weight and bias are [h], or [heads, D] where each head of x [b, s, heads, D] has its own.
    """

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    eps: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        x = tensor_type(self.x)
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            rank = 0 if value is None else tensor_type(value).rank
            if value is not None and (rank not in (1, 2) or tensor_type(value).dims != x.dims[-rank:]):
                yield f"{name} {value.type} does not match the last dimensions of {x}"

    def evaluate(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        wide = x.astype(np.float32)
        wide = wide - np.mean(wide, axis=-1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(self.eps))
        out = wide * scale * weight.astype(np.float32)
        return as_type(out if bias is None else out + bias.astype(np.float32), tensor_type(self.out).element)


Norm = RmsNorm | LayerNorm


def _linear_type(x: Value, rows: int | None, element: Type | None) -> Type:
    t = tensor_type(x, least=1)
    return TensorType((*t.dims[:-1], rows), element or t.element)


class Linear(DeclaredOp, name="ty.linear", traits=(Pure,)):
    """out[.., n] = sum_k x[.., k] * weight[n, k] + bias[n], accumulated in f32; `element` is the result's
    element type (default: x's).
    """

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    element: Type | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return _linear_type(self.x, tensor_type(self.weight, 2).dims[0], self.element)

    def verify(self) -> Iterator[str]:
        n, k = tensor_type(self.weight, 2).dims
        if tensor_type(self.x).dims[-1] != k:
            yield (
                f"inner sizes differ: x has {tensor_type(self.x).dims[-1]}, weight {self.weight.type} has {k}"
            )
        if self.bias is not None and tensor_type(self.bias).dims != (n,):
            yield f"bias {self.bias.type} does not match the {n} rows of the weight"

    def evaluate(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        out = x.astype(np.float32) @ weight.astype(np.float32, copy=False).T
        return as_type(out if bias is None else out + bias.astype(np.float32), tensor_type(self.out).element)


class QuantizedLinear(DeclaredOp, name="ty.quantized_linear", traits=(Pure,)):
    """`ty.linear` whose weight is 4-bit: f16((q - zero) * scale) by groups of `group_size` input channels; q
    [N, K] ui4, scales and zeros [N, K/g].
    """

    x: Value = operand()
    q: Value = operand()
    scales: Value = operand()
    zeros: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    group_size: int = attr(least=1)
    element: Type | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return _linear_type(self.x, static_shape(self.q, 2)[0], self.element)

    def verify(self) -> Iterator[str]:
        n, k = static_shape(self.q, 2)
        if tensor_type(self.x).dims[-1] != k:
            yield f"inner sizes differ: x has {tensor_type(self.x).dims[-1]}, q {self.q.type} has {k}"
        if k % self.group_size:
            yield f"group_size {self.group_size} does not divide the {k} input channels"
        elif tensor_type(self.scales).dims != (n, k // self.group_size) or tensor_type(self.zeros).dims != (
            n,
            k // self.group_size,
        ):
            yield (
                f"scales {self.scales.type} and zeros {self.zeros.type} must be {n}x{k // self.group_size}"
                f" for groups of {self.group_size}"
            )

    def evaluate(self, x: Array, q: Array, scales: Array, zeros: Array, bias: Array | None = None) -> Array:
        out = (
            x.astype(np.float32)
            @ dequantize(q, scales, zeros, self.group_size).astype(np.float32, copy=False).T
        )
        return as_type(out if bias is None else out + bias.astype(np.float32), tensor_type(self.out).element)


def rope_tables(angles: Array, inv_freq: Array, scale: float, element: Type) -> tuple[Array, Array]:
    """cos and sin of `angles` times `scale`; channels of frequency 0 are not turned and keep their size: 1
    and 0.
    """
    factor = np.where(inv_freq == 0, np.float32(1), np.float32(scale))
    return as_type(np.cos(angles) * factor, element), as_type(np.sin(angles) * factor, element)


def _frequencies(inv_freq: DenseElementsAttr) -> int:
    """How many frequencies there are; `TyirError` unless they are a list of floats."""
    kind = inv_freq.type
    if not isinstance(kind, TensorType) or kind.rank != 1 or not isinstance(kind.element, FloatType):
        raise TyirError(f"property 'inv_freq' must be a list of floats, got {kind}")
    return kind.size


class RopeTable(DeclaredOp, name="ty.rope_table", traits=(Pure, ConstantLike)):
    """cos and sin of position * inv_freq, times `scale` where inv_freq is not 0, for positions
    0..positions-1: two tensors [positions, D/2] of type `element`.

    With `short` frequencies the rows of positions 0..short_positions-1 at these follow: two tables in one,
    [positions + short_positions, D/2] (`tyir.artifacts.long_rope`).
    """

    _: KW_ONLY
    inv_freq: DenseElementsAttr = attr()
    positions: int = attr(least=0)
    scale: float = attr(default=1.0)
    element: Type = attr(default=f16)
    short: DenseElementsAttr | None = attr(default=None)
    short_positions: int | None = attr(default=None, least=1)
    cos: Value = result()
    sin: Value = result()

    def infer(self) -> tuple[Type, ...]:
        rows = self.positions + (self.short_positions or 0)
        t = TensorType((rows, _frequencies(self.inv_freq)), self.element)
        return t, t

    def verify(self) -> Iterator[str]:
        if (self.short is None) != (self.short_positions is None):
            yield "short and short_positions need each other"
        elif self.short is not None and _frequencies(self.short) != _frequencies(self.inv_freq):
            yield f"{_frequencies(self.short)} short frequencies for {_frequencies(self.inv_freq)}"

    def evaluate(self) -> tuple[Array, Array]:
        whole = self._part(self.inv_freq, self.positions)
        if self.short is None or self.short_positions is None:
            return whole
        cos, sin = (np.concatenate(p) for p in zip(whole, self._part(self.short, self.short_positions)))
        return cos, sin

    def _part(self, inv_freq: DenseElementsAttr, positions: int) -> tuple[Array, Array]:
        frequencies = inv_freq.to_numpy()
        return rope_tables(
            np.arange(positions, dtype=np.float32)[:, None] * frequencies,
            frequencies,
            self.scale,
            self.element,
        )


class RopeAngles(DeclaredOp, name="ty.rope_angles", traits=(Pure,)):
    """cos and sin of position * inv_freq, times `scale` where inv_freq is not 0: positions [b, s] -> two
    tensors [b, s, D/2] of type `element`.

    With `axis` each token has a position on several axes (time, row, column), positions [A, ..] -> [.., D/2],
    and pair i of channels is turned by the position on axis[i].
    """

    positions: Value = operand()
    _: KW_ONLY
    inv_freq: DenseElementsAttr = attr()
    scale: float = attr(default=1.0)
    element: Type = attr(default=f16)
    axis: tuple[int, ...] | None = attr(default=None)
    cos: Value = result()
    sin: Value = result()

    def infer(self) -> tuple[Type, ...]:
        dims = tensor_type(self.positions, least=1).dims[1 if self.axis else 0 :]
        t = TensorType((*dims, _frequencies(self.inv_freq)), self.element)
        return t, t

    def verify(self) -> Iterator[str]:
        axes = tensor_type(self.positions, least=1).dims[0]
        if self.axis and len(self.axis) != _frequencies(self.inv_freq):
            yield f"{len(self.axis)} axes are named for {_frequencies(self.inv_freq)} frequencies"
        elif any(a < 0 or (axes is not None and a >= axes) for a in self.axis or ()):
            yield f"an axis lies outside the {axes} that the positions have"

    def evaluate(self, positions: Array) -> tuple[Array, Array]:
        frequencies = self.inv_freq.to_numpy()
        wide = positions.astype(np.float32)
        turning = np.moveaxis(wide[list(self.axis)], 0, -1) if self.axis else wide[..., None]
        return rope_tables(turning * frequencies, frequencies, self.scale, self.element)


class Rope(DeclaredOp, name="ty.rope", traits=(Pure,)):
    """Rotary embedding in the half-split (NeoX) layout: (a, b) = halves of x; out = (a cos - b sin, b cos + a
    sin).

    x [b, s, heads, D], cos and sin [b, s, D/2]; computed in f32, rounded once.
    """

    x: Value = operand()
    cos: Value = operand()
    sin: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        x, cos = tensor_type(self.x), tensor_type(self.cos)
        if x.rank != 4 or cos.rank != 3 or x.dims[3] != 2 * (cos.dims[2] or 0):
            yield f"x must be [b, s, heads, D] and cos, sin [b, s, D/2]; got {x} and {cos}"

    def evaluate(self, x: Array, cos: Array, sin: Array) -> Array:
        wide = x.astype(np.float32)
        half = x.shape[-1] // 2
        a, b = wide[..., :half], wide[..., half:]
        c, s = cos.astype(np.float32)[:, :, None, :], sin.astype(np.float32)[:, :, None, :]
        return as_type(np.concatenate([a * c - b * s, b * c + a * s], axis=-1), tensor_type(self.out).element)
