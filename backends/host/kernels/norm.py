"""Norms and rotary embedding: one row at a time, in vectors along the feature axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    add_to,
    bind,
    f32,
    flat,
    get,
    horizontal_sum,
    lanes_for,
    load,
    loop,
    register,
    splat,
    store,
)
from tyir.dialects import ty

__all__ = ["EMITTERS"]


def rms_norm(op: ty.RmsNorm, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, weight, out = buffers
    *lead, width = (int(d) for d in x.shape)
    rows = math.prod(lead)
    lanes = lanes_for(cpu.lanes, width)
    partial_sums = lanes_for(4, width // lanes)  # independent additions hide the latency of one
    x, out = flat(x, rows, width), flat(out, rows, width)
    with loop(rows, cpu, rows * width * 4) as row:
        sums = [register(lanes, 0) for _ in range(partial_sums)]
        with T.serial(0, width // (lanes * partial_sums)) as i:
            for u in range(partial_sums):
                value = bind(load(x, [row, (i * partial_sums + u) * lanes], lanes))
                add_to(sums[u], value * value, lanes)
        for other in sums[1:]:
            add_to(sums[0], get(other, lanes), lanes)
        mean = horizontal_sum(sums[0], lanes) / f32(width)
        scale = bind(f32(1) / T.sqrt(mean + f32(op.eps)))
        with T.serial(0, width // lanes) as i:
            value = load(x, [row, i * lanes], lanes) * splat(scale, lanes) * load(weight, [i * lanes], lanes)
            store(out, [row, i * lanes], value, lanes)


def layer_norm(op: ty.LayerNorm, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Three passes over a row: its mean, the mean square of what is left, the result."""
    x, *vectors, out = buffers
    *lead, width = (int(d) for d in x.shape)
    rows, heads = math.prod(lead), math.prod(int(d) for d in vectors[0].shape) // width
    lanes = lanes_for(cpu.lanes, width)
    x, out = flat(x, rows, width), flat(out, rows, width)
    vectors = [flat(v, heads, width) for v in vectors]
    with loop(rows, cpu, rows * width * 6) as row:
        head = bind(row % heads)
        total, squares = register(lanes, 0), register(lanes, 0)
        with T.serial(0, width // lanes) as i:
            add_to(total, load(x, [row, i * lanes], lanes), lanes)
        mean = bind(horizontal_sum(total, lanes) / f32(width))
        with T.serial(0, width // lanes) as i:
            centred = bind(load(x, [row, i * lanes], lanes) - splat(mean, lanes))
            add_to(squares, centred * centred, lanes)
        variance = horizontal_sum(squares, lanes) / f32(width)
        scale = bind(f32(1) / T.sqrt(variance + f32(op.eps)))
        with T.serial(0, width // lanes) as i:
            centred = load(x, [row, i * lanes], lanes) - splat(mean, lanes)
            value = centred * splat(scale, lanes) * load(vectors[0], [head, i * lanes], lanes)
            for bias in vectors[1:]:
                value = value + load(bias, [head, i * lanes], lanes)
            store(out, [row, i * lanes], value, lanes)


def rope(op: ty.Rope, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, cos, sin, out = buffers
    b, s, heads, width = (int(d) for d in x.shape)
    half = width // 2
    lanes = lanes_for(cpu.lanes, half)
    x, out = flat(x, b * s, heads, width), flat(out, b * s, heads, width)
    cos, sin = flat(cos, b * s, half), flat(sin, b * s, half)
    with (
        loop(b * s, cpu, b * s * heads * width * 2) as row,
        T.serial(0, heads) as head,
        T.serial(0, half // lanes) as i,
    ):
        at = i * lanes
        c, d = bind(load(cos, [row, at], lanes)), bind(load(sin, [row, at], lanes))
        low, high = bind(load(x, [row, head, at], lanes)), bind(load(x, [row, head, at + half], lanes))
        store(out, [row, head, at], low * c - high * d, lanes)
        store(out, [row, head, at + half], high * c + low * d, lanes)


EMITTERS: Final[Emitters] = {
    ty.RmsNorm: rms_norm,
    ty.LayerNorm: layer_norm,
    ty.Rope: rope,
}
