"""Elementwise kernels: one pass over the flattened tensors in vectors, computed in f32 (cast: converted
directly).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    bind,
    exp,
    f32,
    flat,
    load,
    loop,
    splat,
    store,
    vector,
)
from tyir.dialects import ty
from tyir.dialects.ty.elementwise import ERFC
from tyir.types import FloatType

__all__ = ["EMITTERS", "capped"]


def _each_vector(size: int, cpu: Cpu, cost: int, emit: Callable[[Expr, int], None]) -> None:
    """Calls `emit(start, lanes)` for whole vectors in a loop and for the odd elements after them."""
    whole = size // cpu.lanes
    if whole:
        with loop(whole, cpu, size * cost) as i:
            emit(i * cpu.lanes, cpu.lanes)
    if size % cpu.lanes:
        with T.serial(0, size % cpu.lanes) as i:
            emit(whole * cpu.lanes + i, 1)


def _map(buffers: Sequence[Buffer], cpu: Cpu, cost: int, compute: Callable[[list[Expr], int], Expr]) -> None:
    size = math.prod(int(d) for d in buffers[-1].shape)
    views = [flat(b, size) for b in buffers]

    def emit(start: Expr, lanes: int) -> None:
        values = [bind(load(v, [start], lanes)) for v in views[:-1]]
        store(views[-1], [start], compute(values, lanes), lanes)

    _each_vector(size, cpu, cost, emit)


def _silu(x: Expr, lanes: int) -> Expr:
    return x / (f32(1, lanes) + exp(f32(0, lanes) - x, lanes))


def _gelu(x: Expr, approximate: str, lanes: int) -> Expr:
    """As `ty.gelu`: the tail of a normal variable by the fit of erfc, or the sigmoid that stands for it."""
    if approximate == "tanh":
        x = bind(x)
        cubic = x + f32(0.044715, lanes) * x * x * x
        return x / (f32(1, lanes) + exp(cubic * f32(-1.5957691216, lanes), lanes))
    if approximate == "quick":
        return x / (f32(1, lanes) + exp(x * f32(-1.702, lanes), lanes))
    x = bind(x)
    z = bind(T.max(x, f32(0, lanes) - x) * f32(0.70710678, lanes))
    t = bind(f32(1, lanes) / (f32(1, lanes) + f32(0.5, lanes) * z))
    power = f32(ERFC[-1], lanes)
    for c in ERFC[-2::-1]:
        power = power * t + f32(c, lanes)
    tail = bind(f32(0.5, lanes) * t * exp(power - z * z, lanes))
    return x * T.Select(x < f32(0, lanes), tail, f32(1, lanes) - tail)


def capped(x: Expr, cap: float, lanes: int) -> Expr:
    """cap * tanh(x / cap)."""
    power = bind(exp(x * f32(2 / cap, lanes), lanes))
    return f32(cap, lanes) * (power - f32(1, lanes)) / (power + f32(1, lanes))


def add(op: ty.Add, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 1, lambda v, lanes: v[0] + v[1])


def mul(op: ty.Mul, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 1, lambda v, lanes: v[0] * v[1])


def scale(op: ty.Scale, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 1, lambda v, lanes: v[0] * f32(op.factor, lanes))


def silu(op: ty.Silu, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 8, lambda v, lanes: _silu(v[0], lanes))


def silu_mul(op: ty.SiluMul, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 8, lambda v, lanes: _silu(v[0], lanes) * v[1])


def gelu(op: ty.Gelu, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 16, lambda v, lanes: _gelu(v[0], op.approximate, lanes))


def gelu_mul(op: ty.GeluMul, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 16, lambda v, lanes: _gelu(v[0], op.approximate, lanes) * v[1])


def relu(op: ty.Relu, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 1, lambda v, lanes: T.max(v[0], f32(0, lanes)))


def softcap(op: ty.Softcap, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _map(buffers, cpu, 8, lambda v, lanes: capped(v[0], op.cap, lanes))


def cast(op: ty.Cast, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Any stored element type to any but bf16; bf16 arrives as its bit patterns."""
    source = ty.tensor_type(op.x).element
    size = math.prod(int(d) for d in buffers[-1].shape)
    x, out = (flat(b, size) for b in buffers)
    from_bf16 = isinstance(source, FloatType) and source.name == "bf16"

    def emit(start: Expr, lanes: int) -> None:
        value = load(x, [start], lanes, "uint32" if from_bf16 else x.dtype)
        if from_bf16:
            value = T.reinterpret(vector("float32", lanes), T.shift_left(value, splat(T.uint32(16), lanes)))
        store(out, [start], value, lanes)

    _each_vector(size, cpu, 1, emit)


EMITTERS: Final[Emitters] = {
    ty.Add: add,
    ty.Mul: mul,
    ty.Scale: scale,
    ty.Silu: silu,
    ty.SiluMul: silu_mul,
    ty.Gelu: gelu,
    ty.GeluMul: gelu_mul,
    ty.Relu: relu,
    ty.Softcap: softcap,
    ty.Cast: cast,
}
