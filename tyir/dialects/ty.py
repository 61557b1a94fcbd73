"""`ty`: the tensor dataflow of a language model, between the imported graph and a die's program.

Shapes use b = batch, s = tokens of this step, H = query heads, G = key/value heads, D = head dimension.
Activations are f16; every reduction accumulates in f32 and rounds once, at the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr, SymbolRefAttr
from tyir.diagnostics import TyirError
from tyir.ir import Region, Value
from tyir.opdef import DeclaredOp, attr, operand, optional_operand, region, result
from tyir.traits import Commutative, ConstantLike, IsolatedFromAbove, Pure, Symbol, Terminator
from tyir.types import FloatType, TensorType, Type, f16, f32, i32, storage_dtype, ui4

__all__ = [
    "Add", "Attention", "Cast", "Constant", "Dequantize", "Embedding", "GetGlobal", "Global", "Linear", "MergeTopK", "Mul", "Param", "QuantizeGroups",
    "QuantizedLinear", "Repeat", "Reshape", "RmsNorm", "Rope", "RopeAngles", "RopeTable", "Scale", "Silu", "SiluMul", "Slice", "Take", "TopK", "TopKCandidates",
    "Transpose", "Yield",
]  # fmt: skip

Array = npt.NDArray[Any]


def tensor_type(value: Value) -> TensorType:
    """The type of a value that must be a ranked tensor; `TyirError` when it is none."""
    if not isinstance(value.type, TensorType) or value.type.shape is None:
        raise TyirError(f"expected a ranked tensor, got {value.type}")
    return value.type


def as_type(array: Array, element: Type) -> Array:
    """`array` rounded to an element type; infinities from overflow are kept silently, as the chip does."""
    with np.errstate(over="ignore"):
        return array.astype(storage_dtype(element), copy=False)


def bf16_to_f32(words: Array) -> npt.NDArray[np.float32]:
    """bf16 bit patterns (uint16) to float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------------------------------------- weights


class Global(DeclaredOp, name="ty.global", traits=(Symbol,)):
    """A tensor of the checkpoint, by reference: `nbytes` little-endian bytes at `offset` of `file` (relative to the module's `tyir.checkpoint`).

    `key` is the tensor's name in the file.  Weights never travel in the text.
    """

    _: KW_ONLY
    sym_name: str = attr()
    type: TensorType = attr()
    file: str = attr()
    key: str = attr()
    offset: int = attr()
    nbytes: int = attr()

    def verify(self) -> Iterator[str]:
        if self.type.is_static and self.type.nbytes != self.nbytes:
            yield f"{self.type} takes {self.type.nbytes} bytes but nbytes is {self.nbytes}"


class Param(DeclaredOp, name="ty.param", traits=(Symbol, IsolatedFromAbove)):
    """A tensor of the artifact: its initializer says how it is made from the checkpoint (slice, cast, quantize, ...).

    Initializers are evaluated one at a time, when the `.params` file is written.  They refer to `ty.global`s only, never to other parameters.
    """

    _: KW_ONLY
    sym_name: str = attr()
    type: TensorType = attr()
    initializer: Region = region()


class Yield(DeclaredOp, name="ty.yield", traits=(Terminator,)):
    """Ends an initializer with its tensor."""

    value: Value = operand()


class GetGlobal(DeclaredOp, name="ty.get_global", traits=(Pure, ConstantLike)):
    """The tensor of a `ty.global` or `ty.param`, looked up in the enclosing modules from the inside out."""

    _: KW_ONLY
    symbol: SymbolRefAttr = attr()
    out: Value = result()


class Constant(DeclaredOp, name="ty.constant", traits=(Pure, ConstantLike)):
    """A small constant tensor."""

    _: KW_ONLY
    value: DenseElementsAttr = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.value.type

    def evaluate(self) -> Array:
        return self.value.to_numpy()


class QuantizeGroups(DeclaredOp, name="ty.quantize_groups", traits=(Pure,)):
    """Round-to-nearest asymmetric 4-bit quantisation of a weight [N, K], one scale and zero point per `group_size` columns of a row.

    scale = f16(max(max(w, 0) - min(w, 0), 1e-5) / 15);  zero = clamp(-round(min / scale), 0, 15);  q = clamp(round(w / scale) + zero, 0, 15)
    (the pseudo-quantisation of AutoAWQ, with the range widened to hold zero).  Results: q [N, K] ui4, scales [N, K/g] f16, zeros [N, K/g] ui4.
    """

    weight: Value = operand()
    _: KW_ONLY
    group_size: int = attr()
    q: Value = result()
    scales: Value = result()
    zeros: Value = result()

    def infer(self) -> tuple[Type, ...]:
        n, k = tensor_type(self.weight).static_shape
        groups = (n, k // self.group_size)
        return TensorType((n, k), ui4), TensorType(groups, f16), TensorType(groups, ui4)

    def verify(self) -> Iterator[str]:
        if tensor_type(self.weight).static_shape[1] % self.group_size:
            yield f"group_size {self.group_size} does not divide the {tensor_type(self.weight).static_shape[1]} input channels"

    def evaluate(self, weight: Array) -> tuple[Array, Array, Array]:
        n, k = weight.shape
        w = weight.astype(np.float32).reshape(n, -1, self.group_size)
        low = np.minimum(w.min(axis=2), 0)
        span = np.maximum(w.max(axis=2), 0) - low
        scales = (np.maximum(span, 1e-5) / 15).astype(np.float16)
        s = scales.astype(np.float32)
        zeros = np.clip(-np.rint(low / s), 0, 15)
        q = np.clip(np.rint(w / s[:, :, None]) + zeros[:, :, None], 0, 15)
        return q.astype(np.uint8).reshape(n, k), scales, zeros.astype(np.uint8)


def dequantize(q: Array, scales: Array, zeros: Array, group_size: int) -> npt.NDArray[np.float16]:
    """f16((q - zero) * scale), the weight [N, K] that the matrix unit sees (AutoAWQ's GEMM kernel rounds alike)."""
    n, k = q.shape
    centred = q.reshape(n, -1, group_size).astype(np.float32) - zeros[:, :, None].astype(np.float32)
    return (centred * scales[:, :, None].astype(np.float32)).astype(np.float16).reshape(n, k)


class Dequantize(DeclaredOp, name="ty.dequantize", traits=(Pure,)):
    """f16((q - zero) * scale) by groups of columns: q [N, K] ui4, scales [N, K/g] f16, zeros [N, K/g] ui4 -> [N, K] f16."""

    q: Value = operand()
    scales: Value = operand()
    zeros: Value = operand()
    _: KW_ONLY
    group_size: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.q).with_element(f16)

    def evaluate(self, q: Array, scales: Array, zeros: Array) -> Array:
        return dequantize(q, scales, zeros, self.group_size)


class Repeat(DeclaredOp, name="ty.repeat", traits=(Pure,)):
    """Every slice along `axis` repeated `times` times in place: [a, b] -> [a, a, b, b].  Refines quantisation groups exactly."""

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    times: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        return t.with_shape(d * self.times if i == self.axis and d is not None else d for i, d in enumerate(t.dims))

    def evaluate(self, x: Array) -> Array:
        return np.repeat(x, self.times, axis=self.axis)


class Take(DeclaredOp, name="ty.take", traits=(Pure,)):
    """The entries `indices` along `axis`, in that order: channels of a head in another order, in weight expressions."""

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    indices: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.x).with_shape(len(self.indices) if i == self.axis else d for i, d in enumerate(tensor_type(self.x).dims))

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.x)
        if not 0 <= self.axis < t.rank:
            yield f"axis {self.axis} is not in 0..{t.rank - 1}"
        elif (d := t.dims[self.axis]) is not None and not all(0 <= i < d for i in self.indices):
            yield f"an index lies outside the dimension of {d}"

    def evaluate(self, x: Array) -> Array:
        return np.take(x, self.indices, axis=self.axis)


def rope_tables(angles: Array, inv_freq: Array, scale: float, element: Type) -> tuple[Array, Array]:
    """cos and sin of `angles` times `scale`; channels of frequency 0 are not turned and keep their size: 1 and 0."""
    factor = np.where(inv_freq == 0, np.float32(1), np.float32(scale))
    return as_type(np.cos(angles) * factor, element), as_type(np.sin(angles) * factor, element)


class RopeTable(DeclaredOp, name="ty.rope_table", traits=(Pure, ConstantLike)):
    """cos and sin of position * inv_freq, times `scale` where inv_freq is not 0, for positions 0..positions-1: two tensors [positions, D/2] of type `element`."""

    _: KW_ONLY
    inv_freq: DenseElementsAttr = attr()
    positions: int = attr()
    scale: float = attr(default=1.0)
    element: Type = attr(default=f16)
    cos: Value = result()
    sin: Value = result()

    def infer(self) -> tuple[Type, ...]:
        t = TensorType((self.positions, len(self.inv_freq.to_numpy())), self.element)
        return t, t

    def evaluate(self) -> tuple[Array, Array]:
        frequencies = self.inv_freq.to_numpy()
        return rope_tables(np.arange(self.positions, dtype=np.float32)[:, None] * frequencies, frequencies, self.scale, self.element)


# ---------------------------------------------------------------------------------------------------- shape and elementwise


class Cast(DeclaredOp, name="ty.cast", traits=(Pure,)):
    """Converts elements (bf16 and f32 checkpoints to f16, ids to i32), rounding to nearest even."""

    x: Value = operand()
    _: KW_ONLY
    element: Type = attr()
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.x).with_element(self.element)

    def fold(self) -> tuple[Value] | None:
        return (self.x,) if self.out.type is self.x.type else None

    def evaluate(self, x: Array) -> Array:
        source = tensor_type(self.x).element
        return as_type(bf16_to_f32(x) if isinstance(source, FloatType) and source.name == "bf16" else x, self.element)


class Slice(DeclaredOp, name="ty.slice", traits=(Pure,)):
    """`size` entries from `offset` along `axis`."""

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    offset: int = attr()
    size: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        return t.with_shape(self.size if i == self.axis else d for i, d in enumerate(t.dims))

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.x)
        if not 0 <= self.axis < t.rank:
            yield f"axis {self.axis} is not in 0..{t.rank - 1}"
        elif (d := t.dims[self.axis]) is not None and not 0 <= self.offset <= self.offset + self.size <= d:
            yield f"rows {self.offset}..{self.offset + self.size} lie outside the dimension of {d}"

    def fold(self) -> tuple[Value] | None:
        return (self.x,) if self.out.type is self.x.type else None

    def evaluate(self, x: Array) -> Array:
        return x[(slice(None),) * self.axis + (slice(self.offset, self.offset + self.size),)]


class Reshape(DeclaredOp, name="ty.reshape", traits=(Pure,)):
    """Same elements in another shape; -1 stands for the dimension that follows from the others (`?` when the input is dynamic)."""

    x: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        if -1 not in self.shape:
            return t.with_shape(self.shape)
        if not t.is_static:
            return t.with_shape(None if d == -1 else d for d in self.shape)
        known = int(np.prod([d for d in self.shape if d != -1]))
        return t.with_shape(t.size // known if d == -1 else d for d in self.shape)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.x)
        if self.shape.count(-1) > 1:
            yield "more than one dimension is -1"
        elif t.is_static:
            known = int(np.prod([d for d in self.shape if d != -1]))
            if t.size % known or (-1 not in self.shape and t.size != known):
                yield f"{t} cannot be reshaped to {list(self.shape)}: {t.size} elements against {known}"

    def fold(self) -> tuple[Value] | None:
        return (self.x,) if self.out.type is self.x.type and tensor_type(self.x).dims.count(None) <= 1 else None

    def evaluate(self, x: Array) -> Array:
        return x.reshape(self.shape)


class Transpose(DeclaredOp, name="ty.transpose", traits=(Pure,)):
    """Axes permuted: out.shape[i] = x.shape[perm[i]]."""

    x: Value = operand()
    _: KW_ONLY
    perm: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        return t.with_shape(t.dims[p] for p in self.perm)

    def verify(self) -> Iterator[str]:
        if sorted(self.perm) != list(range(tensor_type(self.x).rank)):
            yield f"perm {list(self.perm)} is no permutation of 0..{tensor_type(self.x).rank - 1}"

    def fold(self) -> tuple[Value] | None:
        return (self.x,) if self.out.type is self.x.type and self.perm == tuple(range(len(self.perm))) else None

    def evaluate(self, x: Array) -> Array:
        return np.transpose(x, self.perm)


class Add(DeclaredOp, name="ty.add", traits=(Pure, Commutative)):
    """lhs + rhs of equal shapes, computed in f32, rounded once."""

    lhs: Value = operand()
    rhs: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.lhs.type

    def verify(self) -> Iterator[str]:
        if self.lhs.type is not self.rhs.type:
            yield f"operand types differ: {self.lhs.type} and {self.rhs.type}"

    def evaluate(self, lhs: Array, rhs: Array) -> Array:
        return as_type(lhs.astype(np.float32) + rhs.astype(np.float32), tensor_type(self.out).element)


class Mul(DeclaredOp, name="ty.mul", traits=(Pure, Commutative)):
    """lhs * rhs of equal shapes, computed in f32, rounded once."""

    lhs: Value = operand()
    rhs: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.lhs.type

    def verify(self) -> Iterator[str]:
        if self.lhs.type is not self.rhs.type:
            yield f"operand types differ: {self.lhs.type} and {self.rhs.type}"

    def evaluate(self, lhs: Array, rhs: Array) -> Array:
        return as_type(lhs.astype(np.float32) * rhs.astype(np.float32), tensor_type(self.out).element)


def silu(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x * sigmoid(x) in f32, without overflow for large negative x."""
    return np.asarray(x / (np.float32(1) + np.exp(-np.maximum(x, np.float32(-80)))), np.float32)


class Scale(DeclaredOp, name="ty.scale", traits=(Pure,)):
    """x * factor, computed in f32, rounded once: residual, embedding and logit multipliers."""

    x: Value = operand()
    _: KW_ONLY
    factor: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return as_type(x.astype(np.float32) * np.float32(self.factor), tensor_type(self.out).element)


class Silu(DeclaredOp, name="ty.silu", traits=(Pure,)):
    """x * sigmoid(x), computed in f32."""

    x: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return as_type(silu(x.astype(np.float32)), tensor_type(self.out).element)


class SiluMul(DeclaredOp, name="ty.silu_mul", traits=(Pure,)):
    """silu(gate) * up, computed in f32, rounded once: the activation of a gated MLP."""

    gate: Value = operand()
    up: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.gate.type

    def verify(self) -> Iterator[str]:
        if self.gate.type is not self.up.type:
            yield f"operand types differ: {self.gate.type} and {self.up.type}"

    def evaluate(self, gate: Array, up: Array) -> Array:
        return as_type(silu(gate.astype(np.float32)) * up.astype(np.float32), tensor_type(self.out).element)


# ---------------------------------------------------------------------------------------------------- the model's parts


class Embedding(DeclaredOp, name="ty.embedding", traits=(Pure,)):
    """Row `id - offset` of table [V, h] for each id [b, s]; rows outside the table are zero, so that dies holding parts of it can be summed."""

    table: Value = operand()
    ids: Value = operand()
    _: KW_ONLY
    offset: int = attr(default=0)
    out: Value = result()

    def infer(self) -> Type:
        table = tensor_type(self.table)
        return TensorType((*tensor_type(self.ids).dims, table.dims[1]), table.element)

    def evaluate(self, table: Array, ids: Array) -> Array:
        rows = ids - self.offset
        inside = (rows >= 0) & (rows < table.shape[0])
        return np.where(inside[..., None], table[np.where(inside, rows, 0)], np.zeros((), table.dtype))


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


def _linear_type(x: Value, rows: int | None, element: Type | None) -> Type:
    t = tensor_type(x)
    return TensorType((*t.dims[:-1], rows), element or t.element)


class Linear(DeclaredOp, name="ty.linear", traits=(Pure,)):
    """out[.., n] = sum_k x[.., k] * weight[n, k] + bias[n], accumulated in f32; `element` is the result's element type (default: x's)."""

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    element: Type | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return _linear_type(self.x, tensor_type(self.weight).dims[0], self.element)

    def verify(self) -> Iterator[str]:
        n, k = tensor_type(self.weight).dims
        if tensor_type(self.x).dims[-1] != k:
            yield f"inner sizes differ: x has {tensor_type(self.x).dims[-1]}, weight {self.weight.type} has {k}"
        if self.bias is not None and tensor_type(self.bias).dims != (n,):
            yield f"bias {self.bias.type} does not match the {n} rows of the weight"

    def evaluate(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        out = x.astype(np.float32) @ weight.astype(np.float32, copy=False).T
        return as_type(out if bias is None else out + bias.astype(np.float32), tensor_type(self.out).element)


class QuantizedLinear(DeclaredOp, name="ty.quantized_linear", traits=(Pure,)):
    """`ty.linear` whose weight is 4-bit: f16((q - zero) * scale) by groups of `group_size` input channels; q [N, K] ui4, scales and zeros [N, K/g]."""

    x: Value = operand()
    q: Value = operand()
    scales: Value = operand()
    zeros: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    group_size: int = attr()
    element: Type | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return _linear_type(self.x, tensor_type(self.q).dims[0], self.element)

    def verify(self) -> Iterator[str]:
        n, k = tensor_type(self.q).static_shape
        if tensor_type(self.x).dims[-1] != k:
            yield f"inner sizes differ: x has {tensor_type(self.x).dims[-1]}, q {self.q.type} has {k}"
        if k % self.group_size:
            yield f"group_size {self.group_size} does not divide the {k} input channels"
        elif tensor_type(self.scales).dims != (n, k // self.group_size) or tensor_type(self.zeros).dims != (n, k // self.group_size):
            yield f"scales {self.scales.type} and zeros {self.zeros.type} must be {n}x{k // self.group_size} for groups of {self.group_size}"

    def evaluate(self, x: Array, q: Array, scales: Array, zeros: Array, bias: Array | None = None) -> Array:
        out = x.astype(np.float32) @ dequantize(q, scales, zeros, self.group_size).astype(np.float32, copy=False).T
        return as_type(out if bias is None else out + bias.astype(np.float32), tensor_type(self.out).element)


class RopeAngles(DeclaredOp, name="ty.rope_angles", traits=(Pure,)):
    """cos and sin of position * inv_freq, times `scale` where inv_freq is not 0: positions [b, s] -> two tensors [b, s, D/2] of type `element`."""

    positions: Value = operand()
    _: KW_ONLY
    inv_freq: DenseElementsAttr = attr()
    scale: float = attr(default=1.0)
    element: Type = attr(default=f16)
    cos: Value = result()
    sin: Value = result()

    def infer(self) -> tuple[Type, ...]:
        t = TensorType((*tensor_type(self.positions).dims, len(self.inv_freq.to_numpy())), self.element)
        return t, t

    def evaluate(self, positions: Array) -> tuple[Array, Array]:
        frequencies = self.inv_freq.to_numpy()
        return rope_tables(positions.astype(np.float32)[..., None] * frequencies, frequencies, self.scale, self.element)


class Rope(DeclaredOp, name="ty.rope", traits=(Pure,)):
    """Rotary embedding in the half-split (NeoX) layout: (a, b) = halves of x; out = (a cos - b sin, b cos + a sin).

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


def softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Softmax over the last axis; rows hold at least one finite entry."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attend(q: Array, k: Array, v: Array, first: int, scale: float, window: int, kv_heads: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Causal attention of one sequence in f32: q [s, H, D] at positions first.., k and v [G, t, D] at positions 0.. -> [s, H, D].

    `window` > 0 limits each query to the last `window` positions, itself included.
    """
    out = np.empty(q.shape, np.float32)
    queries = first + np.arange(q.shape[0])[:, None]
    keys = np.arange(k.shape[1])[None, :]
    hidden = (keys > queries) | ((keys <= queries - window) if window > 0 else False)
    for head, group in enumerate(kv_heads):
        scores = q[:, head].astype(np.float32) @ k[group].astype(np.float32).T * np.float32(scale)
        out[:, head] = softmax(np.where(hidden, np.float32(-np.inf), scores)) @ v[group].astype(np.float32)
    return out


def default_kv_heads(heads: int, kv_heads: int) -> tuple[int, ...]:
    """Which key/value head each query head reads in grouped-query attention: groups of heads // kv_heads neighbours."""
    return tuple(h * kv_heads // heads for h in range(heads))


class Attention(DeclaredOp, name="ty.attention", traits=(Pure,)):
    """Causal self-attention without a cache: softmax(scale * q k^T) v per head; q [b, s, H, D], k and v [b, s, G, D] -> [b, s, H, D].

    Scores, softmax and sums are f32.  `window` > 0 is a sliding window (itself included).
    """

    q: Value = operand()
    k: Value = operand()
    v: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    window: int = attr(default=0)
    out: Value = result()

    def infer(self) -> Type:
        return self.q.type

    def verify(self) -> Iterator[str]:
        q, k = tensor_type(self.q), tensor_type(self.k)
        if q.rank != 4 or k.rank != 4 or q.dims[3] != k.dims[3]:
            yield f"q and k must be [b, s, heads, D] with equal D; got {q} and {k}"
        elif (q.dims[2] or 0) % (k.dims[2] or 1):
            yield f"{q.dims[2]} query heads are no multiple of {k.dims[2]} key/value heads"

    def evaluate(self, q: Array, k: Array, v: Array) -> Array:
        heads = default_kv_heads(q.shape[2], k.shape[2])
        rows = [attend(q[i], k[i].swapaxes(0, 1), v[i].swapaxes(0, 1), 0, self.scale, self.window, heads) for i in range(q.shape[0])]
        return as_type(np.stack(rows), tensor_type(self.out).element)


# ---------------------------------------------------------------------------------------------------- the choice of tokens

_LOWEST: Final = np.finfo(np.float32).min


def comparable(x: Array) -> npt.NDArray[np.float32]:
    """f32 numbers that have an order: -inf and NaN become the lowest finite number."""
    return np.fmax(x.astype(np.float32), _LOWEST)


def select_best(values: npt.NDArray[np.float32], ids: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest of each row, largest first, of equal ones the lower id first: values f32 [.., k] and ids i32 [.., k]."""
    order = np.lexsort((ids, -values), axis=-1)[..., :k]
    return np.take_along_axis(values, order, axis=-1), np.take_along_axis(ids, order, axis=-1).astype(np.int32)


class TopK(DeclaredOp, name="ty.top_k", traits=(Pure,)):
    """The `k` largest of x [.., V], largest first, of equal ones the lower id first: values f32 [.., k] and ids i32 [.., k].

    -inf and NaN count as the lowest finite number, so that there are always k.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr()
    values: Value = result()
    ids: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.x).dims[:-1]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32)

    def verify(self) -> Iterator[str]:
        if not 1 <= self.k <= (tensor_type(self.x).dims[-1] or 0):
            yield f"k = {self.k} is not in 1..{tensor_type(self.x).dims[-1]}, the last dimension of {self.x.type}"

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        return select_best(comparable(x), np.broadcast_to(np.arange(x.shape[-1], dtype=np.int32), x.shape), self.k)


class TopKCandidates(DeclaredOp, name="ty.top_k_candidates", traits=(Pure,)):
    """The first half of a `ty.top_k` over parts: of each range of x [.., V] its min(k, size) best, as i32 [.., 2, C].

    x is cut along its last axis into ranges of the given `sizes`; ids are positions in x plus `offset`.  Row 0 holds the bit patterns of the f32 values
    and row 1 the ids, so that one collective carries both, exactly.  `ty.merge_top_k` is the second half.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr()
    sizes: tuple[int, ...] = attr()
    offset: int = attr(default=0)
    out: Value = result()

    def counts(self) -> tuple[int, ...]:
        """How many candidates each range gives."""
        return tuple(min(self.k, size) for size in self.sizes)

    def infer(self) -> Type:
        return TensorType((*tensor_type(self.x).dims[:-1], 2, sum(self.counts())), i32)

    def verify(self) -> Iterator[str]:
        if self.k < 1:
            yield f"k = {self.k} is not positive"
        if sum(self.sizes) != tensor_type(self.x).dims[-1] or min(self.sizes, default=0) < 0:
            yield f"sizes {list(self.sizes)} do not cut the last dimension of {self.x.type}"

    def evaluate(self, x: Array) -> Array:
        parts, first = [], 0
        for size, count in zip(self.sizes, self.counts()):
            part = x[..., first : first + size]
            ids = np.broadcast_to(self.offset + first + np.arange(size, dtype=np.int32), part.shape)
            values, ids = select_best(comparable(part), ids, count)
            parts.append(np.stack([values.view(np.int32), ids], axis=-2))
            first += size
        return np.concatenate(parts, axis=-1)


class MergeTopK(DeclaredOp, name="ty.merge_top_k", traits=(Pure,)):
    """The second half of a `ty.top_k` over parts: the `k` best of candidates i32 [.., 2, C] (bit patterns of f32 values, ids), as `ty.top_k` gives them."""

    candidates: Value = operand()
    _: KW_ONLY
    k: int = attr()
    values: Value = result()
    ids: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.candidates).dims[:-2]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.candidates)
        if t.rank < 2 or t.dims[-2] != 2 or t.element is not i32:
            yield f"candidates are i32 [.., 2, C]; got {t}"
        elif not 1 <= self.k <= (t.dims[-1] or 0):
            yield f"k = {self.k} is not in 1..{t.dims[-1]}, the number of candidates"

    def evaluate(self, candidates: Array) -> tuple[Array, Array]:
        return select_best(np.ascontiguousarray(candidates[..., 0, :]).view(np.float32), candidates[..., 1, :], self.k)
