"""Activations rounded to whole numbers, by groups as wide as the weight's: what `integer_linear.py` multiplies.

8 bits: a group's codes are -127..127.  16 bits: codes are -16319..16319, kept as two bytes in two buffers, the code
being 128 times the first and the second, in -64..63; bytes are what processors multiply fastest.  Half a step of a
group is 3e-5 of its largest value, an eighth of what rounding that value to f16 costs.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.quantize_rows import rounded
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    add_to,
    bind,
    f32,
    get,
    horizontal_max,
    horizontal_sum,
    lanes_for,
    load,
    loop,
    put,
    register,
    span,
    splat,
    vector,
)

__all__ = [
    "BYTES_OF",
    "Activations",
    "Shape",
    "rounded_activations",
    "scales_of_block",
    "whole_sum",
    "with_group",
]

BYTES_OF: Final = {"int8": 1, "int16": 2}  # of a code
_LARGEST: Final = {1: 127, 2: 127 * 128 + 63}  # code
_BYTE: Final = 7  # bits of a code that its second byte holds


@dataclass(frozen=True)
class Shape:
    """Sizes of a product: a group of a row is `parts` vectors of `lanes` 32-bit words; a code has `bytes`."""

    m: int
    n: int
    k: int
    group: int
    lanes: int
    parts: int
    bytes: int

    @classmethod
    def of(cls, m: int, n: int, k: int, group: int, cpu: Cpu) -> Shape:
        lanes = math.gcd(4 * cpu.lanes, group // 2) // 4
        return cls(m, n, k, group, lanes, group // 2 // (4 * lanes), BYTES_OF[cpu.activations])

    @property
    def groups(self) -> int:
        return self.k // self.group


@dataclass(frozen=True)
class Activations:
    """Codes [m, groups, parts, 2, 4 * lanes], even columns of a part and then odd ones, a buffer for each
    byte (where rows of the weight are turned, `lanes` is 1: a part is a word); factors and offsets
    [m, groups].
    """

    codes: tuple[Buffer, ...]
    factors: Buffer
    offsets: Buffer


def rounded_activations(x: Buffer, shape: Shape, cpu: Cpu, half: int, rows: int) -> Activations:
    """Emits the rounding of x [m, k].

    `half`: how many even columns stand before as many odd ones; `rows`: what codes have room for, m at least,
    the others being of any content.
    """
    made = Activations(
        tuple(T.alloc_buffer((rows * shape.k,), "int8") for _ in range(shape.bytes)),
        T.alloc_buffer((shape.m * shape.groups,), "float32"),
        T.alloc_buffer((shape.m * shape.groups,), "float32"),
    )
    largest_code = f32(_LARGEST[shape.bytes])
    lanes = lanes_for(cpu.lanes, 4 * shape.lanes)
    with loop(shape.m, cpu, shape.m * shape.k * 8) as row, T.serial(0, shape.groups) as g:
        first = bind(g * shape.group)
        largest, total = register(lanes, 0), register(lanes, 0)
        with T.serial(0, shape.group // lanes) as i:
            value = bind(load(x, [row, first + i * lanes], lanes))
            put(largest, T.max(T.max(value, f32(0, lanes) - value), get(largest, lanes)), lanes)
        most = bind(horizontal_max(largest, lanes))
        times = bind(T.Select(most > f32(0), largest_code / most, f32(0)))
        with T.serial(0, shape.group // lanes) as i:
            value = load(x, [row, first + i * lanes], lanes)
            code = bind(rounded(value * splat(times, lanes), lanes))
            add_to(total, T.cast(code, vector("float32", lanes)), lanes)
            numbers = [code]
            if shape.bytes == 2:
                high = bind(T.shift_right(code + splat(T.int32(64), lanes), splat(T.int32(_BYTE), lanes)))
                numbers = [high, code - T.shift_left(high, splat(T.int32(_BYTE), lanes))]
            for buffer, number in zip(made.codes, numbers, strict=True):
                start = row * shape.k + first
                _store_parted(buffer, start, i, bind(T.cast(number, vector("int8", lanes))), lanes, half)
        factor = bind(most / largest_code)
        T.buffer_store(made.factors, factor, [row * shape.groups + g])
        T.buffer_store(made.offsets, factor * horizontal_sum(total, lanes), [row * shape.groups + g])
    return made


def _store_parted(codes: Buffer, start: Expr, i: Expr, bytes: Expr, lanes: int, half: int) -> None:
    """Stores vector `i` of a group that begins at `start`: `half` even columns, as many odd ones, .."""
    run = min(half, lanes // 2)  # neighbours
    parts = [
        [2 * (block * run + r) + odd for r in range(run)]
        for block in range(lanes // (2 * run))
        for odd in (0, 1)
    ]
    if half <= run:
        order = [T.int32(lane) for part in parts for lane in part]
        T.buffer_store(codes, T.Shuffle([bytes], order), [span(start + i * lanes, lanes)])
        return
    per_half = half // run  # vectors whose even columns stand together
    for odd, part in enumerate(parts):
        at = start + (i // per_half * 2 + odd) * half + i % per_half * run
        T.buffer_store(codes, T.Shuffle([bytes], [T.int32(lane) for lane in part]), [span(at, run)])


def scales_of_block(scales: Buffer, zeros: Buffer, n0: Expr, rows: int, groups: int) -> tuple[Buffer, Buffer]:
    """What a block of `rows` rows of the weight from `n0` on is scaled by, and that times its zero points,
    f32 [groups, rows]: a group's of all rows follow each other.
    """
    made, shifts = (T.alloc_buffer((groups * rows,), "float32") for _ in range(2))
    with T.serial(0, groups) as g, T.serial(0, rows) as r:
        zero = T.shift_right(zeros[n0 + r, g // 2], T.cast(g % 2 * 4, "uint8")) & T.uint8(15)
        scale = bind(load(scales, [n0 + r, g], 1))
        T.buffer_store(made, scale, [g * rows + r])
        T.buffer_store(shifts, scale * T.cast(T.cast(zero, "int32"), "float32"), [g * rows + r])
    return made, shifts


def whole_sum(sums: Sequence[Expr], lanes: int) -> Expr:
    """The integer sums of a code's bytes, put together, i32."""
    total = sums[0]
    for other in sums[1:]:
        total = T.shift_left(total, splat(T.int32(_BYTE), lanes)) + other
    return total


def with_group(
    sum: Expr, total: Expr, scale: Expr, shift: Expr, factor: Expr, offset: Expr, lanes: int
) -> Expr:
    """A row's f32 sum with one group more, `total` being the group's integer sum.

    Every product takes a row's groups one after the other and adds them up like this: a token's numbers are
    the same bits whatever other tokens are in the step.
    """
    product = T.cast(total, vector("float32", lanes)) * (scale * splat(factor, lanes))
    return sum + product - shift * splat(offset, lanes)
