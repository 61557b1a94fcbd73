"""`aten`: PyTorch's operators as `torch.export` leaves them, one op per node of the exported graph;
`raise-aten` turns them into `ty`.

Only what causal language models contain is declared: the front end's table (`frontends/aten_table.py`) maps
graph nodes to these classes and reports every node it has no row for.  Names are PyTorch's operator names
without the overload; where an overload takes a number in place of a tensor, the number is the property
`scalar`.

Result types come from the exported graph.  `evaluate` follows PyTorch on the CPU: element-wise ops round to
the result's element type after every op (that is how half precision models behave), products and sums
accumulate in f32.
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.ty import as_type, bf16_to_f32, gelu, silu, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, optional_operand, result, variadic_operand
from tyir.traits import Pure
from tyir.types import FloatType, TensorType, Type

__all__ = [
    "Add",
    "Addmm",
    "Argsort",
    "Cat",
    "Conv",
    "Cos",
    "Div",
    "Embedding",
    "Expand",
    "Gelu",
    "Index",
    "LayerNorm",
    "Linear",
    "Mean",
    "Mul",
    "Neg",
    "Permute",
    "Pow",
    "Relu",
    "RepeatInterleave",
    "Reshape",
    "Rsqrt",
    "Select",
    "Sigmoid",
    "Silu",
    "Sin",
    "Slice",
    "Stack",
    "Sub",
    "Sum",
    "Tanh",
    "To",
    "Transpose",
    "Unsqueeze",
    "View",
]

Array = npt.NDArray[Any]


def _rounded(array: Array, out: Value) -> Array:
    return as_type(array, tensor_type(out).element)


def _wide(array: Array) -> Array:
    """f16 widened to f32; other dtypes as they are."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


# ------------------------------------------------------------------------------------------------- arithmetic


class Add(DeclaredOp, name="aten.add", traits=(Pure,)):
    """x + y with broadcasting, or x + scalar."""

    x: Value = operand()
    y: Value | None = optional_operand(default=None)
    _: KW_ONLY
    scalar: float | None = attr(default=None)
    out: Value = result()

    def evaluate(self, x: Array, y: Array | None = None) -> Array:
        return _rounded(_wide(x) + (_wide(y) if y is not None else x.dtype.type(self.scalar or 0)), self.out)


class Sub(DeclaredOp, name="aten.sub", traits=(Pure,)):
    """x - y with broadcasting, or x - scalar."""

    x: Value = operand()
    y: Value | None = optional_operand(default=None)
    _: KW_ONLY
    scalar: float | None = attr(default=None)
    out: Value = result()

    def evaluate(self, x: Array, y: Array | None = None) -> Array:
        return _rounded(_wide(x) - (_wide(y) if y is not None else x.dtype.type(self.scalar or 0)), self.out)


class Mul(DeclaredOp, name="aten.mul", traits=(Pure,)):
    """x * y with broadcasting, or x * scalar."""

    x: Value = operand()
    y: Value | None = optional_operand(default=None)
    _: KW_ONLY
    scalar: float | None = attr(default=None)
    out: Value = result()

    def evaluate(self, x: Array, y: Array | None = None) -> Array:
        other = _wide(y) if y is not None else np.float32(self.scalar if self.scalar is not None else 1)
        return _rounded(_wide(x) * other, self.out)


class Div(DeclaredOp, name="aten.div", traits=(Pure,)):
    """x / y with broadcasting, or x / scalar."""

    x: Value = operand()
    y: Value | None = optional_operand(default=None)
    _: KW_ONLY
    scalar: float | None = attr(default=None)
    out: Value = result()

    def evaluate(self, x: Array, y: Array | None = None) -> Array:
        other = _wide(y) if y is not None else np.float32(self.scalar if self.scalar is not None else 1)
        return _rounded(_wide(x) / other, self.out)


class Neg(DeclaredOp, name="aten.neg", traits=(Pure,)):
    """-x."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.negative(x)


class Pow(DeclaredOp, name="aten.pow", traits=(Pure,)):
    """x ** exponent."""

    x: Value = operand()
    _: KW_ONLY
    exponent: float = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.power(_wide(x), np.float32(self.exponent)), self.out)


class Rsqrt(DeclaredOp, name="aten.rsqrt", traits=(Pure,)):
    """1 / sqrt(x)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(1 / np.sqrt(_wide(x)), self.out)


class Cos(DeclaredOp, name="aten.cos", traits=(Pure,)):
    """cos(x)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.cos(_wide(x)), self.out)


class Sin(DeclaredOp, name="aten.sin", traits=(Pure,)):
    """sin(x)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.sin(_wide(x)), self.out)


class Silu(DeclaredOp, name="aten.silu", traits=(Pure,)):
    """x * sigmoid(x)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(silu(x.astype(np.float32)), self.out)


class Gelu(DeclaredOp, name="aten.gelu", traits=(Pure,)):
    """x * P(a normal variable is below x), or its approximation by a tanh."""

    x: Value = operand()
    _: KW_ONLY
    approximate: str = attr(default="none", choices=("none", "tanh"))
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(gelu(x.astype(np.float32), self.approximate), self.out)


class Relu(DeclaredOp, name="aten.relu", traits=(Pure,)):
    """max(x, 0)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.asarray(np.maximum(x, x.dtype.type(0)))


class Tanh(DeclaredOp, name="aten.tanh", traits=(Pure,)):
    """tanh(x)."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.tanh(_wide(x)), self.out)


class Sigmoid(DeclaredOp, name="aten.sigmoid", traits=(Pure,)):
    """1 / (1 + exp(-x))."""

    x: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(1 / (1 + np.exp(-np.maximum(x.astype(np.float32), np.float32(-80)))), self.out)


class Mean(DeclaredOp, name="aten.mean", traits=(Pure,)):
    """Mean over the axes `dim`."""

    x: Value = operand()
    _: KW_ONLY
    dim: tuple[int, ...] = attr()
    keepdim: bool = attr(default=False)
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.mean(_wide(x), axis=self.dim, keepdims=self.keepdim), self.out)


class To(DeclaredOp, name="aten.to", traits=(Pure,)):
    """x converted to element type `element`."""

    x: Value = operand()
    _: KW_ONLY
    element: Type = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        source = tensor_type(self.x).element
        return as_type(
            bf16_to_f32(x) if isinstance(source, FloatType) and source.name == "bf16" else x, self.element
        )


# ---------------------------------------------------------------------------------------------------- layers


class Embedding(DeclaredOp, name="aten.embedding", traits=(Pure,)):
    """weight[ids]: weight [V, h], ids [b, s] -> [b, s, h]."""

    weight: Value = operand()
    ids: Value = operand()
    out: Value = result()

    def evaluate(self, weight: Array, ids: Array) -> Array:
        return np.asarray(weight[ids])


class LayerNorm(DeclaredOp, name="aten.layer_norm", traits=(Pure,)):
    """(x - mean(x)) / sqrt(variance(x) + eps) over the last axis (`normalized_shape` is its length), times
    the first and plus the second of the `vectors`, if there are any.
    """

    x: Value = operand()
    vectors: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    normalized_shape: tuple[int, ...] = attr()
    eps: float = attr(default=1e-5)
    out: Value = result()

    def evaluate(self, x: Array, *vectors: Array) -> Array:
        wide = x.astype(np.float32)
        wide = wide - np.mean(wide, axis=-1, keepdims=True)
        out = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(self.eps))
        for vector, combine in zip(vectors, (np.multiply, np.add)):
            out = combine(out, vector.astype(np.float32))
        return _rounded(out, self.out)


class Addmm(DeclaredOp, name="aten.addmm", traits=(Pure,)):
    """bias + x @ weight: x [s, K], weight [K, N], bias [N] -> [s, N]."""

    bias: Value = operand()
    x: Value = operand()
    weight: Value = operand()
    out: Value = result()

    def evaluate(self, bias: Array, x: Array, weight: Array) -> Array:
        return _rounded(x.astype(np.float32) @ weight.astype(np.float32) + bias.astype(np.float32), self.out)


class Linear(DeclaredOp, name="aten.linear", traits=(Pure,)):
    """x @ weight.T + bias: x [.., K], weight [N, K], bias [N] -> [.., N]."""

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    out: Value = result()

    def evaluate(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        out = x.astype(np.float32) @ weight.astype(np.float32).T
        return _rounded(out if bias is None else out + bias.astype(np.float32), self.out)


# ---------------------------------------------------------------------------------------------------- shape


def _target_shape(x: Array, shape: tuple[int, ...], out: TensorType) -> tuple[int, ...]:
    """`shape` with the result's static dimensions filled in; at most one entry stays -1 for the dynamic
    dimension.
    """
    return tuple(-1 if d is None else d for d in out.dims) if -1 in shape else shape


class View(DeclaredOp, name="aten.view", traits=(Pure,)):
    """The same elements in another shape; -1 stands for the dynamic dimension."""

    x: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return x.reshape(_target_shape(x, self.shape, tensor_type(self.out)))


class Reshape(DeclaredOp, name="aten.reshape", traits=(Pure,)):
    """`aten.view` that copies where it must; here the same."""

    x: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return x.reshape(_target_shape(x, self.shape, tensor_type(self.out)))


class Expand(DeclaredOp, name="aten.expand", traits=(Pure,)):
    """Dimensions of size 1 repeated to `shape`; -1 keeps the dimension."""

    x: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        padded = (1,) * (len(self.shape) - x.ndim) + x.shape
        return np.broadcast_to(x, tuple(p if d == -1 else d for p, d in zip(padded, self.shape)))


class Unsqueeze(DeclaredOp, name="aten.unsqueeze", traits=(Pure,)):
    """A dimension of size 1 inserted at `dim`."""

    x: Value = operand()
    _: KW_ONLY
    dim: int = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.expand_dims(x, self.dim)


class Transpose(DeclaredOp, name="aten.transpose", traits=(Pure,)):
    """Axes `dim0` and `dim1` exchanged."""

    x: Value = operand()
    _: KW_ONLY
    dim0: int = attr()
    dim1: int = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.swapaxes(x, self.dim0, self.dim1)


class Slice(DeclaredOp, name="aten.slice", traits=(Pure,)):
    """Every `step`-th of the entries `start`..`end` (exclusive, clamped; 2**63-1 means the end) along
    `dim`.
    """

    x: Value = operand()
    _: KW_ONLY
    dim: int = attr()
    start: int = attr()
    end: int = attr()
    step: int = attr(default=1)
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        axis = self.dim % x.ndim
        return x[(slice(None),) * axis + (slice(self.start, self.end, self.step),)]


class RepeatInterleave(DeclaredOp, name="aten.repeat_interleave", traits=(Pure,)):
    """Every entry along `dim` `repeats` times in place: [a, b] -> [a, a, b, b]."""

    x: Value = operand()
    _: KW_ONLY
    repeats: int = attr()
    dim: int = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.repeat(x, self.repeats, axis=self.dim)


class Stack(DeclaredOp, name="aten.stack", traits=(Pure,)):
    """The tensors along a new dimension `dim`."""

    tensors: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    dim: int = attr()
    out: Value = result()

    def evaluate(self, *tensors: Array) -> Array:
        return np.stack(tensors, axis=self.dim)


class Cat(DeclaredOp, name="aten.cat", traits=(Pure,)):
    """The tensors joined along `dim`."""

    tensors: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    dim: int = attr()
    out: Value = result()

    def evaluate(self, *tensors: Array) -> Array:
        return np.concatenate(tensors, axis=self.dim)


class Select(DeclaredOp, name="aten.select", traits=(Pure,)):
    """The entry `index` along `dim`, which goes: [.., n, ..] -> [.., ..]."""

    x: Value = operand()
    _: KW_ONLY
    dim: int = attr()
    index: int = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.asarray(np.take(x, self.index, axis=self.dim))


class Permute(DeclaredOp, name="aten.permute", traits=(Pure,)):
    """Axes in another order: out.shape[i] = x.shape[dims[i]]."""

    x: Value = operand()
    _: KW_ONLY
    dims: tuple[int, ...] = attr()
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.transpose(x, self.dims)


class Index(DeclaredOp, name="aten.index", traits=(Pure,)):
    """The rows `index` [n] of x along its first axis, in that order."""

    x: Value = operand()
    index: Value = operand()
    out: Value = result()

    def evaluate(self, x: Array, index: Array) -> Array:
        return np.take(x, index, axis=0)


class Argsort(DeclaredOp, name="aten.argsort", traits=(Pure,)):
    """The places of x's entries along `dim` in ascending order."""

    x: Value = operand()
    _: KW_ONLY
    dim: int = attr(default=-1)
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return np.asarray(np.argsort(x, axis=self.dim, kind="stable"))


class Sum(DeclaredOp, name="aten.sum", traits=(Pure,)):
    """Sum over the axes `dim`."""

    x: Value = operand()
    _: KW_ONLY
    dim: tuple[int, ...] = attr()
    keepdim: bool = attr(default=False)
    out: Value = result()

    def evaluate(self, x: Array) -> Array:
        return _rounded(np.sum(_wide(x), axis=self.dim, keepdims=self.keepdim), self.out)


class Conv(DeclaredOp, name="aten.conv", traits=(Pure,)):
    """Convolution without padding whose windows tile x: x [n, C, ..] and weight [M, C, ..] -> [n, M, ..];
    `stride` is the kernel's size, and so that of x along each axis but one window's.
    """

    x: Value = operand()
    weight: Value = operand()
    bias: Value | None = optional_operand(default=None)
    _: KW_ONLY
    stride: tuple[int, ...] = attr()
    out: Value = result()

    def evaluate(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        kernel = weight.shape[2:]
        if self.stride != kernel or any(n % k for n, k in zip(x.shape[2:], kernel)):
            raise TyirError(f"aten.conv of a kernel {kernel} has stride {self.stride}")
        counts = [n // k for n, k in zip(x.shape[2:], kernel)]
        split = x.reshape(*x.shape[:2], *(d for pair in zip(counts, kernel) for d in pair))
        axes = range(len(kernel))
        inner = [3 + 2 * i for i in axes]
        patches = split.transpose(0, *(2 + 2 * i for i in axes), 1, *inner)
        rows = patches.reshape(x.shape[0], *counts, -1).astype(np.float32)
        out = rows @ weight.reshape(len(weight), -1).astype(np.float32).T
        out = out if bias is None else out + bias.astype(np.float32)
        return _rounded(np.moveaxis(out, -1, 1), self.out)
