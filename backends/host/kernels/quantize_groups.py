"""kv.quantize_groups: the new rows of a 4-bit cache, a word for each group of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.quantize_rows import rounded
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    add_to,
    bind,
    f32,
    flat,
    get,
    horizontal_max,
    horizontal_sum,
    lanes_for,
    load,
    loop,
    put,
    register,
    splat,
    store,
)
from tyir.dialects import kv

__all__ = ["EMITTERS"]


def quantize_groups(op: kv.QuantizeGroups, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """A group at a time, whose channels are two runs: the lower and the upper ones of its pairs."""
    x, q, words = buffers
    b, s, heads, width = (int(d) for d in x.shape)
    groups, rows = int(words.shape[3]), b * s * heads
    half = width // 2
    run = half // groups
    lanes = lanes_for(cpu.lanes, run)
    x, q, words = flat(x, rows, width), flat(q, rows, half), flat(words, rows, groups)
    runs = [(upper * half, i * lanes) for upper in (0, 1) for i in range(run // lanes)]
    with loop(rows, cpu, rows * width * 4) as row, T.serial(0, groups) as group:
        first = bind(group * run)
        high, negated, nothing = (register(lanes, 0) for _ in range(3))
        for offset, column in runs:
            value = bind(load(x, [row, first + (offset + column)], lanes))
            put(high, T.max(get(high, lanes), value), lanes)
            put(negated, T.max(get(negated, lanes), f32(0, lanes) - value), lanes)
            add_to(nothing, value * f32(0, lanes), lanes)  # NaN where a value is not finite
        low = bind(horizontal_max(negated, lanes))
        spread = horizontal_max(high, lanes) + low + horizontal_sum(nothing, lanes)
        step = T.cast(spread / f32(15), "float16")
        bits = bind(T.cast(T.reinterpret("uint16", step), "int32"))
        bits = bind(T.bitwise_and(bits + 15, T.int32(0xFFF0)))
        scale = bind(T.cast(T.reinterpret("float16", T.cast(bits, "uint16")), "float32"))
        known = bind(scale > f32(0))
        divisor = bind(T.Select(known, scale, f32(1)))
        zero = bind(T.Select(known, rounded(bind(T.min(low / divisor, f32(15))), 1), T.int32(0)))
        T.buffer_store(words, T.cast(T.bitwise_or(bits, zero), "uint16"), [row, group])
        for _, column in runs[: len(runs) // 2]:
            lower, upper = (
                _codes(load(x, [row, first + (offset + column)], lanes), divisor, zero, lanes)
                for offset in (0, half)
            )
            both = T.bitwise_or(lower, T.shift_left(upper, splat(T.int32(4), lanes)))
            empty = splat(T.int32(0), lanes)
            store(q, [row, first + column], T.Select(splat(known, lanes), both, empty), lanes)


def _codes(value: Expr, divisor: Expr, zero: Expr, lanes: int) -> Expr:
    """clamp(round(value / scale) + zero, 0, 15), as i32."""
    steps = bind(T.max(T.min(value / splat(divisor, lanes), f32(16, lanes)), f32(-16, lanes)))
    code = rounded(steps, lanes) + splat(zero, lanes)
    return bind(T.max(T.min(code, splat(T.int32(15), lanes)), splat(T.int32(0), lanes)))


EMITTERS: Final[Emitters] = {
    kv.QuantizeGroups: quantize_groups,
}
