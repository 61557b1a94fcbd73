"""kv.quantize_rows: the new rows of an 8-bit cache, one scale each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    bind,
    f32,
    flat,
    get,
    horizontal_max,
    lanes_for,
    load,
    loop,
    put,
    register,
    splat,
    store,
    vector,
)
from tyir.dialects import kv

__all__ = ["EMITTERS", "rounded"]

# 1.5 * 2^23: adding it leaves no bits for a fraction, so that the addition rounds to whole numbers, halves to
# even
_ROUND = 12582912.0


def quantize_rows(op: kv.QuantizeRows, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, q, scales = buffers
    b, s, heads, width = (int(d) for d in x.shape)
    rows, lanes = b * s * heads, lanes_for(cpu.lanes, width)
    x, q, scales = flat(x, rows, width), flat(q, rows, width), flat(scales, rows)
    with loop(rows, cpu, rows * width * 4) as row:
        largest = register(lanes, 0)
        with T.serial(0, width // lanes) as i:
            value = bind(load(x, [row, i * lanes], lanes))
            put(largest, T.max(T.max(value, f32(0, lanes) - value), get(largest, lanes)), lanes)
        scale = bind(T.cast(horizontal_max(largest, lanes) / f32(127), "float16"))
        T.buffer_store(scales, scale, [row])
        divisor = bind(T.cast(scale, "float32"))
        with T.serial(0, width // lanes) as i:
            value = load(x, [row, i * lanes], lanes) / splat(
                T.Select(divisor > f32(0), divisor, f32(1)), lanes
            )
            within = T.max(T.min(value, f32(127, lanes)), f32(-127, lanes))
            whole = T.cast(rounded(within, lanes), vector("float32", lanes))
            store(
                q,
                [row, i * lanes],
                T.Select(splat(divisor, lanes) > f32(0, lanes), whole, f32(0, lanes)),
                lanes,
            )


def rounded(x: Expr, lanes: int) -> Expr:
    """The nearest whole number, an int32, for small x; kept in integers so that no optimiser takes the two
    additions for nothing.
    """
    bits = T.reinterpret(vector("int32", lanes), x + f32(_ROUND, lanes))
    return bits - splat(T.int32(0x4B400000), lanes)


EMITTERS: Final[Emitters] = {
    kv.QuantizeRows: quantize_rows,
}
