"""Shapes, and ops element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.ty.tensors import Array, as_type, axis_in, bf16_to_f32, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result, variadic_operand
from tyir.traits import Commutative, Elementwise, Gated, Pure
from tyir.types import FloatType, Type

__all__ = [
    "ERFC",
    "Add",
    "Cast",
    "Concat",
    "Gelu",
    "GeluMul",
    "Mul",
    "Relu",
    "Reshape",
    "Scale",
    "Silu",
    "SiluMul",
    "Slice",
    "Softcap",
    "Transpose",
    "gelu",
    "silu",
    "softcap",
]


class Cast(DeclaredOp, name="ty.cast", traits=(Pure, Elementwise)):
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
        return as_type(
            bf16_to_f32(x) if isinstance(source, FloatType) and source.name == "bf16" else x, self.element
        )


class Slice(DeclaredOp, name="ty.slice", traits=(Pure,)):
    """`size` entries from `offset` along `axis`."""

    x: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    offset: int = attr(least=0)
    size: int = attr(least=0)
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        axis = axis_in(self.axis, t)
        return t.with_shape(self.size if i == axis else d for i, d in enumerate(t.dims))

    def verify(self) -> Iterator[str]:
        d = tensor_type(self.x).dims[self.axis]
        if d is not None and self.offset + self.size > d:
            yield f"rows {self.offset}..{self.offset + self.size} lie outside the dimension of {d}"

    def fold(self) -> tuple[Value] | None:
        return (self.x,) if self.out.type is self.x.type else None

    def evaluate(self, x: Array) -> Array:
        return x[(slice(None),) * self.axis + (slice(self.offset, self.offset + self.size),)]


class Concat(DeclaredOp, name="ty.concat", traits=(Pure,)):
    """The tensors one after the other along `axis`: weights that a checkpoint stores in parts."""

    parts: tuple[Value, ...] = variadic_operand()
    _: KW_ONLY
    axis: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        types = [tensor_type(v) for v in self.parts]
        if not types:
            raise TyirError("joins no tensor")
        axis = axis_in(self.axis, types[0])
        if len({(t.element, *t.dims[:axis], None, *t.dims[axis + 1 :]) for t in types}) != 1:
            raise TyirError(f"joins {', '.join(map(str, types))}, which differ beside axis {axis}")
        total = sum(t.dims[axis] or 0 for t in types)
        return types[0].with_shape(total if i == axis else d for i, d in enumerate(types[0].dims))

    def evaluate(self, *parts: Array) -> Array:
        return np.concatenate(parts, axis=self.axis)


class Reshape(DeclaredOp, name="ty.reshape", traits=(Pure,)):
    """Same elements in another shape; -1 stands for the dimension that follows from the others (`?` when the
    input is dynamic).
    """

    x: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr(least=-1)
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        free = self.shape.count(-1)
        if free > 1:
            raise TyirError(f"has more than one dimension of -1 in {list(self.shape)}")
        if not t.is_static:
            return t.with_shape(None if d == -1 else d for d in self.shape)
        known = math.prod(d for d in self.shape if d != -1)
        if t.size != known if not free else not known or t.size % known:
            raise TyirError(
                f"reshapes {t}, which cannot be reshaped to {list(self.shape)}: {t.size} elements against"
                f" {known}"
            )
        return t.with_shape(t.size // known if d == -1 else d for d in self.shape)

    def fold(self) -> tuple[Value] | None:
        return (
            (self.x,) if self.out.type is self.x.type and tensor_type(self.x).dims.count(None) <= 1 else None
        )

    def merged(self) -> Reshape | None:
        """With the reshape that makes x, one reshape: only the last shape counts."""
        inner = self.x.op
        return (
            Reshape(inner.x, shape=self.shape, attributes=self.attributes)
            if isinstance(inner, Reshape)
            else None
        )

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
        if sorted(self.perm) != list(range(t.rank)):
            raise TyirError(f"perm {list(self.perm)} is not a permutation of 0..{t.rank - 1}")
        return t.with_shape(t.dims[p] for p in self.perm)

    def fold(self) -> tuple[Value] | None:
        return (
            (self.x,) if self.out.type is self.x.type and self.perm == tuple(range(len(self.perm))) else None
        )

    def merged(self) -> Transpose | None:
        """With the transpose that makes x, one transpose: out[i] = inner[q[i]] = x[p[q[i]]]."""
        inner = self.x.op
        if not isinstance(inner, Transpose):
            return None
        return Transpose(inner.x, perm=tuple(inner.perm[q] for q in self.perm), attributes=self.attributes)

    def evaluate(self, x: Array) -> Array:
        return np.transpose(x, self.perm)


class Add(DeclaredOp, name="ty.add", traits=(Pure, Commutative, Elementwise)):
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


class Mul(DeclaredOp, name="ty.mul", traits=(Pure, Commutative, Elementwise)):
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


class Scale(DeclaredOp, name="ty.scale", traits=(Pure, Elementwise)):
    """x * factor, computed in f32, rounded once: residual, embedding and logit multipliers."""

    x: Value = operand()
    _: KW_ONLY
    factor: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return as_type(x.astype(np.float32) * np.float32(self.factor), tensor_type(self.out).element)


class Silu(DeclaredOp, name="ty.silu", traits=(Pure, Elementwise)):
    """x * sigmoid(x), computed in f32."""

    x: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return as_type(silu(x.astype(np.float32)), tensor_type(self.out).element)


class SiluMul(DeclaredOp, name="ty.silu_mul", traits=(Pure, Elementwise, Gated)):
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


# erfc(z) = t exp(polynomial in t - z^2) with t = 1 / (1 + z / 2), to a relative error of 1.2e-7 (Numerical
# Recipes, erfcc).
ERFC: Final = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def gelu(x: npt.NDArray[np.float32], approximate: str) -> npt.NDArray[np.float32]:
    """x * P(a normal variable is below x) in f32, or what models take for it: "tanh" and "quick"."""
    if approximate != "none":
        cubic = x + np.float32(0.044715) * x * x * x
        inner = cubic * np.float32(1.5957691216) if approximate == "tanh" else x * np.float32(1.702)
        return np.asarray(x / (np.float32(1) + np.exp(-np.maximum(inner, np.float32(-80)))), np.float32)
    z = np.abs(x) * np.float32(0.70710678)
    t = np.float32(1) / (np.float32(1) + np.float32(0.5) * z)
    power: Array = np.full_like(x, ERFC[-1])
    for c in ERFC[-2::-1]:
        power = power * t + np.float32(c)
    tail = np.float32(0.5) * t * np.exp(np.maximum(power - z * z, np.float32(-80)))
    return np.asarray(x * np.where(x < 0, tail, 1 - tail), np.float32)


_APPROXIMATIONS: Final = ("none", "tanh", "quick")


class Gelu(DeclaredOp, name="ty.gelu", traits=(Pure, Elementwise)):
    """x * P(a normal variable is below x), computed in f32.

    `approximate` tanh is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is 0.5 x (1 + tanh(..)) of
    half that, and quick is x * sigmoid(1.702 x).
    """

    x: Value = operand()
    _: KW_ONLY
    approximate: str = attr(default="none", choices=_APPROXIMATIONS)
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return as_type(gelu(x.astype(np.float32), self.approximate), tensor_type(self.out).element)


class GeluMul(DeclaredOp, name="ty.gelu_mul", traits=(Pure, Elementwise, Gated)):
    """gelu(gate) * up, computed in f32, rounded once: `ty.silu_mul` with the activation of Gemma."""

    gate: Value = operand()
    up: Value = operand()
    _: KW_ONLY
    approximate: str = attr(default="none", choices=_APPROXIMATIONS)
    out: Value = result()

    def infer(self) -> Type:
        return self.gate.type

    def verify(self) -> Iterator[str]:
        if self.gate.type is not self.up.type:
            yield f"operand types differ: {self.gate.type} and {self.up.type}"

    def evaluate(self, gate: Array, up: Array) -> Array:
        activated = gelu(gate.astype(np.float32), self.approximate)
        return as_type(activated * up.astype(np.float32), tensor_type(self.out).element)


class Relu(DeclaredOp, name="ty.relu", traits=(Pure, Elementwise)):
    """max(x, 0)."""

    x: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def evaluate(self, x: Array) -> Array:
        return np.asarray(np.maximum(x, x.dtype.type(0)))


def softcap(x: npt.NDArray[np.float32], cap: float) -> npt.NDArray[np.float32]:
    """cap * tanh(x / cap) in f32."""
    return np.asarray(np.tanh(x / np.float32(cap)) * np.float32(cap), np.float32)


class Softcap(DeclaredOp, name="ty.softcap", traits=(Pure, Elementwise)):
    """cap * tanh(x / cap), computed in f32: keeps logits within -cap..cap without changing their order."""

    x: Value = operand()
    _: KW_ONLY
    cap: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        if not self.cap > 0:
            yield f"cap is {self.cap}; it must be positive"

    def evaluate(self, x: Array) -> Array:
        return as_type(softcap(x.astype(np.float32), self.cap), tensor_type(self.out).element)
