"""Scales and zero points of a 4-bit weight's groups, unpacked: [row, group] as they lie, or [group, row], so that
a vector over rows of the weight meets its groups one after the other.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    bind,
    f32_of,
    load,
    span,
    splat,
    transposed,
    vector,
)

__all__ = ["by_group", "scales_of_block", "unpacked"]

_ZEROS: Final = 8  # zero points that are unpacked at once: a word of them


def unpacked(
    scales: Buffer, zeros: Buffer, first: Expr, count: Expr, most: int, groups: int, cpu: Cpu
) -> tuple[Buffer, Buffer]:
    """Those of `count` rows from `first` on, [row, group]: scales f32, zero points i32.  `most`: rows that
    there is room for; a vector may be read that begins within it.
    """
    made = f32_of(scales, first * groups, count * groups, most * groups, cpu)
    numbers = T.alloc_buffer((most * groups + _ZEROS,), "int32")
    whole = groups - groups % _ZEROS

    def unpack(row: Expr, group: Expr, known: int) -> None:
        at = span(row * groups + group, _ZEROS)
        T.buffer_store(numbers, _zeros(zeros, first + row, group // 2, known), [at])

    with T.serial(0, count) as row:
        with T.serial(0, groups // _ZEROS) as i:
            unpack(row, i * _ZEROS, _ZEROS)
        if groups % _ZEROS:  # with what the next row writes over
            unpack(row, T.int32(whole), groups % _ZEROS)
    return made, numbers


def _zeros(zeros: Buffer, row: Expr, first: Expr, known: int) -> Expr:
    """`known` 4-bit numbers from byte `first` of a row of zero points on, each in a lane."""
    word = T.uint32(0)
    for i in range((known + 1) // 2):
        word = word | T.shift_left(T.cast(zeros[row, first + i], "uint32"), T.uint32(8 * i))
    shifts = T.cast(T.ramp(T.int32(0), 4, _ZEROS), vector("uint32", _ZEROS))
    nibbles = T.shift_right(splat(bind(word), _ZEROS), shifts) & splat(T.uint32(15), _ZEROS)
    return T.cast(nibbles, vector("int32", _ZEROS))


def by_group(made: Buffer, rows: Sequence[Expr], groups: int) -> Buffer:
    """What is unpacked of some rows, a power of two, [group, row]."""
    width = len(rows)
    parts = -(-groups // width)
    turned = T.alloc_buffer((parts * width * width,), made.dtype)
    with T.serial(0, parts) as part:
        values = [bind(made[span(row * groups + part * width, width)]) for row in rows]
        for column, value in enumerate(transposed(values)):
            T.buffer_store(turned, value, [span((part * width + column) * width, width)])
    return turned


def scales_of_block(scales: Buffer, zeros: Buffer, n0: Expr, rows: int, groups: int) -> tuple[Buffer, Buffer]:
    """Those of `rows` rows from `n0` on, [group, row], one number at a time: many tokens share them, and code
    that turns vectors of them takes as long and twice as long to compile.
    """
    made, numbers = (T.alloc_buffer((groups * rows,), dtype) for dtype in ("float32", "int32"))
    with T.serial(0, groups) as g, T.serial(0, rows) as r:
        zero = T.shift_right(zeros[n0 + r, g // 2], T.cast(g % 2 * 4, "uint8")) & T.uint8(15)
        T.buffer_store(made, load(scales, [n0 + r, g], 1), [g * rows + r])
        T.buffer_store(numbers, T.cast(zero, "int32"), [g * rows + r])
    return made, numbers
