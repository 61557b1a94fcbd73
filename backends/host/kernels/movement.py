"""Kernels that move rows without computing: gathers, cache writes, transposes, slices, repeats."""

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
    flat,
    lanes_for,
    load,
    rows_before,
    splat,
    store,
)
from tyir.dialects import kv, ty

__all__ = ["EMITTERS"]


def _shape(buffer: Buffer) -> tuple[int, ...]:
    return tuple(int(d) for d in buffer.shape)


def _copy_row(
    source: Buffer, at: Sequence[Expr], target: Buffer, to: Sequence[Expr], size: int, cpu: Cpu
) -> None:
    """`size` elements along the last axis; `at` and `to` are where the rows begin."""
    lanes = lanes_for(cpu.lanes * 2, size)
    with T.serial(0, size // lanes) as i:
        value = load(source, [*at[:-1], at[-1] + i * lanes], lanes, source.dtype)
        store(target, [*to[:-1], to[-1] + i * lanes], value, lanes)


def _grid(extents: Sequence[int], emit: Callable[[list[Expr]], None]) -> None:
    """A nest of plain loops."""
    if not extents:
        return emit([])
    with T.serial(0, extents[0]) as i:
        _grid(extents[1:], lambda inner: emit([i, *inner]))


def embedding(op: ty.Embedding, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _copy_numbered(buffers, op.offset, cpu)


def _copy_numbered(buffers: Sequence[Buffer], first: int, cpu: Cpu) -> None:
    """Rows of a table whose first has the number `first`, by the numbers [b, s]."""
    table, numbers, out = buffers
    (b, s), (count, width) = _shape(numbers), _shape(table)

    def emit(at: list[Expr]) -> None:
        row = bind(T.cast(numbers[tuple(at)], "int64") - T.int64(first))
        _copy_row_or_zeros(table, (), row, count, out, [*at, 0], width, cpu)

    _grid((b, s), emit)


def _copy_row_or_zeros(
    source: Buffer,
    before: Sequence[Expr],
    row: Expr,
    count: int,
    target: Buffer,
    to: Sequence[Expr],
    size: int,
    cpu: Cpu,
) -> None:
    """Row `row` (i64) of the `count` at `before`, zeros when there is no such row."""
    lanes = lanes_for(cpu.lanes * 2, size)
    with T.If(T.And(row >= T.int64(0), row < T.int64(count))):
        with T.Then():
            _copy_row(source, [*before, T.cast(row, "int32"), 0], target, to, size, cpu)
        with T.Else(), T.serial(0, size // lanes) as i:
            zero = splat(T.cast(T.float32(0), target.dtype), lanes)
            store(target, [*to[:-1], to[-1] + i * lanes], zero, lanes)


def select_row(op: ty.SelectRow, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, row, out = buffers
    b, s, *rest = _shape(x)
    width = math.prod(rest)
    x, out = flat(x, b, s, width), flat(out, b, 1, width)

    def emit(at: list[Expr]) -> None:
        (sequence,) = at
        chosen = bind(T.cast(row[sequence], "int64"))
        _copy_row_or_zeros(x, [sequence], chosen, s, out, [sequence, 0, 0], width, cpu)

    _grid((b,), emit)


def rows(op: kv.Rows, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    table, pos, _, out = buffers
    (count, width), (b, s, _) = _shape(table), _shape(out)

    def emit(at: list[Expr]) -> None:
        row = pos[at[0]] + at[1]
        if op.modulo is not None:
            row = T.floormod(row, T.int32(op.modulo))
        row = bind(T.max(T.min(row + (op.offset or 0), T.int32(count - 1)), T.int32(0)))
        _copy_row(table, [row, 0], out, [*at, 0], width, cpu)

    _grid((b, s), emit)


def take_rows(op: kv.TakeRows, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    _copy_numbered(buffers, 0, cpu)


def append(op: kv.Append, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    cache, new, pos = buffers
    b, s, heads, width = (*_shape(new), 1)[:4]
    held, by_head, blocks = op.held, op.layout == "HND", op.token_blocks
    outer = (heads, held) if by_head else (held, heads)
    cache, new = (
        flat(cache, b, *outer, width),
        flat(new, b, s, heads, width),
    )  # the scales of an 8-bit cache have no width

    def emit(at: list[Expr]) -> None:
        sequence, token = at
        position = bind(pos[sequence] + token)
        row = position if blocks is None else bind(rows_before(blocks, position))
        here = T.And(row >= 0, row < held)
        if blocks is not None:
            owner = T.floormod(T.floordiv(position, T.int32(blocks.size)), T.int32(blocks.count))
            here = T.And(here, owner == blocks.number)
        with T.If(here), T.Then(), T.serial(0, heads) as head:
            _copy_row(
                new,
                [sequence, token, head, 0],
                cache,
                [sequence, *((head, row) if by_head else (row, head)), 0],
                width,
                cpu,
            )

    _grid((b, s), emit)


def transpose(op: ty.Transpose, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, out = buffers
    shape, perm = _shape(out), op.perm
    rank = len(shape)
    rows_stay = bool(perm) and perm[-1] == rank - 1
    looped = rank - 1 if rows_stay else rank

    def emit(at: list[Expr]) -> None:
        source: list[Expr] = [0] * rank
        for axis, index in zip(perm, at):
            source[axis] = index
        if rows_stay:
            _copy_row(x, source, out, [*at, 0], shape[-1], cpu)
        else:
            store(out, at, x[tuple(source)], 1)

    _grid(shape[:looped], emit)


def slice_(op: ty.Slice, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, out = buffers
    shape = _shape(out)

    def emit(at: list[Expr]) -> None:
        source = [*at, 0]
        source[op.axis] = source[op.axis] + op.offset
        _copy_row(x, source, out, [*at, 0], shape[-1], cpu)

    _grid(shape[:-1], emit)


def concat(op: ty.Concat, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """The tensors one after the other along an axis that is not the last."""
    *parts, out = buffers
    start = 0
    for part in parts:
        shape = _shape(part)

        def emit(at: list[Expr], part: Buffer = part, start: int = start, size: int = shape[-1]) -> None:
            target = [*at, 0]
            target[op.axis] = target[op.axis] + start
            _copy_row(part, [*at, 0], out, target, size, cpu)

        _grid(shape[:-1], emit)
        start += shape[op.axis]


def repeat(op: ty.Repeat, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, out = buffers
    shape = _shape(x)

    def emit(at: list[Expr]) -> None:
        *index, again = at
        target = list(index)
        target[op.axis] = target[op.axis] * op.times + again
        if op.axis == len(shape) - 1:
            store(out, target, x[tuple(index)], 1)
        else:
            _copy_row(x, [*index, 0], out, [*target, 0], shape[-1], cpu)

    looped = shape if op.axis == len(shape) - 1 else shape[:-1]
    _grid((*looped, op.times), emit)


def replace(op: kv.Replace, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    state, values = buffers
    size = math.prod(_shape(values))
    _copy_row(flat(values, size), [0], flat(state, size), [0], size, cpu)


EMITTERS: Final[Emitters] = {
    ty.Embedding: embedding,
    ty.SelectRow: select_row,
    ty.Transpose: transpose,
    ty.Slice: slice_,
    ty.Concat: concat,
    ty.Repeat: repeat,
    kv.Append: append,
    kv.Replace: replace,
    kv.Rows: rows,
    kv.TakeRows: take_rows,
}
