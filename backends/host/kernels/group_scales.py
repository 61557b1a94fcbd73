"""Scales and zero points of a 4-bit weight's groups, unpacked: [row, group] as they lie, or turned to [group, row],
so that a vector over rows of the weight meets its groups one after the other.
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
    span,
    splat,
    transposed,
    vector,
)

__all__ = ["by_group", "room_by_group", "scales_of_block", "unpacked"]

_ZEROS: Final = 8  # zero points that are unpacked at once: a word of them


def unpacked(
    scales: Buffer, zeros: Buffer, first: Expr, count: Expr, most: int, groups: int, cpu: Cpu
) -> tuple[Buffer, Buffer]:
    """Those of `count` rows from `first` on, [row, group]: scales f32, zero points i32.  `most`: rows that
    there is room for; a vector may be read that begins within it.
    """
    made = f32_of(scales, first * groups, count * groups, most * groups, cpu)
    numbers = T.alloc_buffer((most * groups + max(_ZEROS, cpu.lanes),), "int32")
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


def room_by_group(rows: int, groups: int) -> int:
    """Elements that `by_group` writes for so many rows: whole squares of them."""
    return -(-groups // rows) * rows * rows


def by_group(made: Buffer, rows: Sequence[Expr], groups: int, to: Buffer, at: Expr) -> None:
    """Writes what is unpacked of some rows, a power of two, to `to` from `at` on: [group, row]."""
    width = len(rows)
    with T.serial(0, -(-groups // width)) as part:
        values = [bind(made[span(row * groups + part * width, width)]) for row in rows]
        for column, value in enumerate(transposed(values)):
            T.buffer_store(to, value, [span(at + (part * width + column) * width, width)])


def scales_of_block(
    weight: tuple[Buffer, Buffer], n0: Expr, vectors: int, groups: int, cpu: Cpu
) -> tuple[Buffer, Buffer, int]:
    """Those of `vectors` times `cpu.lanes` rows from `n0` on, [vector, group, lane], and how far a vector's
    lie behind those of the one before.
    """
    rows, apart = vectors * cpu.lanes, room_by_group(cpu.lanes, groups)
    turned = []
    for made in unpacked(*weight, n0, T.int32(rows), rows, groups, cpu):
        turned.append(T.alloc_buffer((vectors * apart,), made.dtype))
        with T.serial(0, vectors) as v:
            lanes = [bind(v * cpu.lanes + lane) for lane in range(cpu.lanes)]
            by_group(made, lanes, groups, turned[-1], v * apart)
    return turned[0], turned[1], apart
