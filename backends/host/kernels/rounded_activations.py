"""Activations rounded to whole numbers, by groups as wide as the weight's: what `integer_linear.py` multiplies.

8 bits: a group's codes are -127..127.  16 bits: codes are -16319..16319, kept as two bytes in two buffers, the code
being 128 times the first and the second, in -64..63; bytes are what processors multiply fastest.  Half a step of a
group is 3e-5 of its largest value, an eighth of what rounding that value to f16 costs.

Codes lie as they are read: row by row, or by tiles of 16 rows and 64 codes, each 1 KiB that one instruction reads.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    register,
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
    "scales_of_block",
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
    for each byte (where rows of the weight are turned, `lanes` is 1: a part is a word).  Factors f32 and the
    sums of a group's codes i32, [groups, rows].

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

    def group(self, row: Expr, g: Expr) -> Expr:
        """Where the factor and the sum of a row's group lie."""
        return g * self.rows + row


def rounded_activations(
    x: Buffer, shape: Shape, cpu: Cpu, half: int, rows: int, tiles: bool = False
) -> Activations:
    """Emits the rounding of x [m, k].

    `half`: how many even columns stand before as many odd ones; `rows`: what there is room for, m at least:
    codes of the others are of any content, their factors are 0.
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
    lanes = lanes_for(cpu.lanes, 4 * shape.lanes)
    with loop(shape.m, cpu, shape.m * shape.k * 8) as row, T.serial(0, shape.groups) as g:
        first = bind(g * shape.group)
        largest, total = register(lanes, 0), T.alloc_buffer((lanes,), "int32")
        with T.serial(0, shape.group // lanes) as i:
            value = bind(load(x, [row, first + i * lanes], lanes))
            put(largest, T.max(T.max(value, f32(0, lanes) - value), get(largest, lanes)), lanes)
        most = bind(horizontal_max(largest, lanes))
        times = bind(T.Select(most > f32(0), largest_code / most, f32(0)))
        T.buffer_store(total, splat(T.int32(0), lanes), [span(0, lanes)])
        with T.serial(0, shape.group // lanes) as i:
            value = load(x, [row, first + i * lanes], lanes)
            code = bind(rounded(value * splat(times, lanes), lanes))
            put(total, get(total, lanes) + code, lanes)
            numbers = [code]
            if shape.bytes == 2:
                high = bind(T.shift_right(code + splat(T.int32(64), lanes), splat(T.int32(_BYTE), lanes)))
                numbers = [high, code - T.shift_left(high, splat(T.int32(_BYTE), lanes))]
            for buffer, number in zip(made.codes, numbers, strict=True):
                bytes = bind(T.cast(number, vector("int8", lanes)))
                _store_parted(buffer, lambda place: made.code(row, first + place), i, bytes, lanes, half)
        at = bind(made.group(row, g))
        T.buffer_store(made.factors, most / largest_code, [at])
        T.buffer_store(made.sums, exact_sums([get(total, lanes)], lanes), [at])
    if rows > shape.m:
        with T.serial(0, shape.groups) as g, T.serial(shape.m, rows) as row:
            T.buffer_store(made.factors, f32(0), [made.group(row, g)])
    return made


def _store_parted(
    codes: Buffer, at: Callable[[Expr], Expr], i: Expr, bytes: Expr, lanes: int, half: int
) -> None:
    """Stores vector `i` of a group, whose code j lies `at(j)`: `half` even columns, as many odd ones, .."""
    run = min(half, lanes // 2)  # neighbours
    parts = [
        [2 * (block * run + r) + odd for r in range(run)]
        for block in range(lanes // (2 * run))
        for odd in (0, 1)
    ]
    if half <= run:
        order = [T.int32(lane) for part in parts for lane in part]
        T.buffer_store(codes, T.Shuffle([bytes], order), [span(at(i * lanes), lanes)])
        return
    per_half = half // run  # vectors whose even columns stand together
    for odd, part in enumerate(parts):
        first = at((i // per_half * 2 + odd) * half + i % per_half * run)
        T.buffer_store(codes, T.Shuffle([bytes], [T.int32(lane) for lane in part]), [span(first, run)])


def scales_of_block(scales: Buffer, zeros: Buffer, n0: Expr, rows: int, groups: int) -> tuple[Buffer, Buffer]:
    """What a block of `rows` rows of the weight from `n0` on is scaled by, f32, and its zero points, i32
    [groups, rows]: a group's of all rows follow each other.
    """
    made, numbers = (T.alloc_buffer((groups * rows,), dtype) for dtype in ("float32", "int32"))
    with T.serial(0, groups) as g, T.serial(0, rows) as r:
        zero = T.shift_right(zeros[n0 + r, g // 2], T.cast(g % 2 * 4, "uint8")) & T.uint8(15)
        T.buffer_store(made, load(scales, [n0 + r, g], 1), [g * rows + r])
        T.buffer_store(numbers, T.cast(zero, "int32"), [g * rows + r])
    return made, numbers


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
