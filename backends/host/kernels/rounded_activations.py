"""Activations rounded to whole numbers, by groups as wide as the weight's: what `integer_linear.py` multiplies.

8 bits: a group's codes are -127..127.  16 bits: codes are -16319..16319, kept as two bytes in two buffers, the code
being 128 times the first and the second, in -64..63; bytes are what processors multiply fastest.  Half a step of a
group is 3e-5 of its largest value, an eighth of what rounding that value to f16 costs.

Codes lie as they are read: row by row, or by tiles of 16 rows and 64 codes, each 1 KiB that one instruction reads.
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
    bind,
    exact_sums,
    f32,
    get,
    horizontal_max,
    lanes_for,
    load,
    loop,
    put,
    span,
    splat,
    vector,
)

__all__ = [
    "BYTES_OF",
    "TILE_BYTES",
    "TILE_ROWS",
    "Activations",
    "Shape",
    "centred",
    "rounded_activations",
    "whole_sum",
    "with_group",
]

BYTES_OF: Final = {"int8": 1, "int16": 2}  # of a code
_LARGEST: Final = {1: 127, 2: 127 * 128 + 63}  # code
TILE_ROWS: Final = 16
TILE_BYTES: Final = 64  # of a row of a tile
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
    """Codes of each row, [groups, parts, 2, 4 * lanes]: even columns of a part and then odd ones, a buffer
    for each byte.  Factors f32 and the sums of a group's codes i32, [groups, rows].

    `tiles`: codes lie as tiles [rows / 16, k / 64] of 16 rows and 64 bytes, else row by row.
    """

    codes: tuple[Buffer, ...]
    factors: Buffer
    sums: Buffer
    rows: int
    k: int
    tiles: bool

    def code(self, row: Expr, place: Expr) -> Expr:
        """Where code `place` of a row lies."""
        if not self.tiles:
            return row * self.k + place
        tile = row // TILE_ROWS * (self.k // TILE_BYTES) + place // TILE_BYTES
        return (tile * TILE_ROWS + row % TILE_ROWS) * TILE_BYTES + place % TILE_BYTES

    def apart(self, half: int) -> int:
        """How far the odd columns of a part lie behind its `half` even ones."""
        return TILE_ROWS * TILE_BYTES if self.tiles else half

    def group(self, row: Expr, g: Expr) -> Expr:
        """Where the factor and the sum of a row's group lie."""
        return g * self.rows + row


def rounded_activations(x: Buffer, shape: Shape, cpu: Cpu, rows: int, tiles: bool = False) -> Activations:
    """Emits the rounding of x [m, k].  `rows`: what there is room for, m at least: codes of the others are of
    any content, their factors are 0.
    """
    made = Activations(
        tuple(T.alloc_buffer((rows * shape.k,), "int8") for _ in range(shape.bytes)),
        T.alloc_buffer((rows * shape.groups,), "float32"),
        T.alloc_buffer((rows * shape.groups,), "int32"),
        rows,
        shape.k,
        tiles,
    )
    largest_code = f32(_LARGEST[shape.bytes])
    half = 4 * shape.lanes  # columns of a part that are even, and that are odd
    lanes = lanes_for(cpu.lanes, half)
    with loop(shape.m, cpu, shape.m * shape.k * 8) as row, T.serial(0, shape.groups) as g:
        first = bind(g * shape.group)
        most = bind(_largest(x, row, first, shape.group, lanes))
        times = splat(bind(T.Select(most > f32(0), largest_code / most, f32(0))), lanes)
        total = T.alloc_buffer((lanes,), "int32")
        put(total, splat(T.int32(0), lanes), lanes)
        with T.serial(0, shape.parts) as part, T.serial(0, half // lanes) as i:
            column = bind(first + part * (2 * half) + i * (2 * lanes))
            values = [load(x, [row, column + j * lanes], lanes) for j in range(2)]
            found = [bind(rounded(value * times, lanes)) for value in values]
            put(total, get(total, lanes) + found[0] + found[1], lanes)
            place = bind(made.code(row, first + part * (2 * half) + i * lanes))
            for buffer, number in zip(made.codes, _bytes_of(found, shape.bytes, lanes), strict=True):
                for odd, at in enumerate((place, place + made.apart(half))):
                    code = T.Shuffle([number], [T.int32(odd * lanes + j) for j in range(lanes)])
                    T.buffer_store(buffer, code, [span(at, lanes)])
        at = bind(made.group(row, g))
        T.buffer_store(made.factors, most / largest_code, [at])
        T.buffer_store(made.sums, exact_sums([get(total, lanes)], lanes), [at])
    if rows > shape.m:
        with T.serial(0, shape.groups) as g, T.serial(shape.m, rows) as row:
            T.buffer_store(made.factors, f32(0), [made.group(row, g)])
    return made


def _bytes_of(codes: Sequence[Expr], count: int, lanes: int) -> list[Expr]:
    """Each byte of the codes of neighbouring columns, two vectors: even columns and then odd ones."""
    order = [T.int32(4 * (2 * i + odd)) for odd in range(2) for i in range(lanes)]

    def lowest(words: Sequence[Expr]) -> Expr:
        return T.Shuffle([T.reinterpret(vector("int8", 4 * lanes), w) for w in words], order)

    if count == 1:
        return [bind(lowest(codes))]
    above = [bind(code + splat(T.int32(1 << (_BYTE - 1)), lanes)) for code in codes]
    high = [bind(T.shift_right(number, splat(T.int32(_BYTE), lanes))) for number in above]
    low = [c - T.shift_left(h, splat(T.int32(_BYTE), lanes)) for c, h in zip(codes, high, strict=True)]
    return [bind(lowest(high)), bind(lowest(low))]


def _largest(x: Buffer, row: Expr, first: Expr, group: int, lanes: int) -> Expr:
    """The largest absolute value of a group, f32; NaN where there is one.

    Values without sign are compared as whole numbers, whose order is the same: NaN is above infinity.
    """
    whole, lanes, all_but_sign = {
        "float16": ("int16", 2 * lanes, T.int16(0x7FFF)),
        "float32": ("int32", lanes, T.int32(0x7FFFFFFF)),
    }[x.dtype]
    largest = T.alloc_buffer((lanes,), whole)
    put(largest, splat(all_but_sign - all_but_sign, lanes), lanes)
    with T.serial(0, group // lanes) as i:
        value = T.reinterpret(vector(whole, lanes), x[row, span(first + i * lanes, lanes)])
        put(largest, T.max(value & splat(all_but_sign, lanes), get(largest, lanes)), lanes)
    return T.cast(T.reinterpret(x.dtype, horizontal_max(largest, lanes)), "float32")


def whole_sum(sums: Sequence[Expr], lanes: int) -> Expr:
    """The integer sums of a code's bytes, put together, i32."""
    total = sums[0]
    for other in sums[1:]:
        total = T.shift_left(total, splat(T.int32(_BYTE), lanes)) + other
    return total


def centred(total: Expr, zero: Expr, codes: Expr, lanes: int) -> Expr:
    """sum_k (q_k - zero) c_k, from sum_k q_k c_k and the sum of the codes, i32."""
    return total - zero * splat(codes, lanes)


def with_group(sum: Expr, total: Expr, scale: Expr, factor: Expr, lanes: int) -> Expr:
    """A row's f32 sum with one group more, `total` being the group's integer sum (`centred`).

    Every product takes a row's groups one after the other and adds them up like this: a token's numbers are
    the same bits whatever other tokens are in the step.
    """
    return sum + T.cast(total, vector("float32", lanes)) * (scale * splat(factor, lanes))
