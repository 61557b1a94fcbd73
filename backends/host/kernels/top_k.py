"""The k best of a row in one pass: a sorted list of k entries that few elements ever enter.

A block of vectors is compared with the last entry of the list at once; only when its largest value is better
are its elements looked at one by one.  For random logits the list changes about k ln(V / k) times, so a pass
costs what reading the row costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    load,
    loop,
    put,
    register,
)
from tyir.dialects import ty

__all__ = ["EMITTERS"]

_LOWEST = -3.4028234663852886e38  # what -inf and NaN count as: the lowest finite f32
_BLOCK = 4  # vectors compared at once


@dataclass(frozen=True)
class _List:
    """The best entries so far, best first; free places hold -inf, which is below every entry."""

    values: Buffer
    ids: Buffer
    size: int

    @classmethod
    def empty(cls, size: int) -> _List:
        made = cls(T.alloc_buffer((size,), "float32"), T.alloc_buffer((size,), "int32"), size)
        with T.serial(0, size) as i:
            T.buffer_store(made.values, f32(float("-inf")), [i])
            T.buffer_store(made.ids, T.int32(0), [i])
        return made

    def insert(self, value: Expr, name: Expr) -> None:
        """Puts an entry where it belongs, if it is better than the last."""
        last = self.size - 1
        with (
            T.If(_better(value, name, self.values[last], self.ids[last])),
            T.Then(),
            T.serial(0, self.size) as turn,
        ):
            place = bind(last - turn)
            above = bind(T.max(place - 1, 0))
            upper, upper_id = bind(self.values[above]), bind(self.ids[above])
            own, own_id = bind(self.values[place]), bind(self.ids[place])
            moves = bind(T.And(place > 0, _better(value, name, upper, upper_id)))
            enters = bind(_better(value, name, own, own_id))
            T.buffer_store(self.values, T.Select(moves, upper, T.Select(enters, value, own)), [place])
            T.buffer_store(self.ids, T.Select(moves, upper_id, T.Select(enters, name, own_id)), [place])


def _better(value: Expr, name: Expr, other: Expr, other_name: Expr) -> Expr:
    return T.Or(value > other, T.And(value == other, name < other_name))


def _scan(x: Buffer, row: Expr, first: int, size: int, offset: int, best: _List, cpu: Cpu) -> None:
    """Offers x[row, first : first + size] to the list, named offset, offset + 1, ..."""
    block = cpu.lanes * _BLOCK
    whole = size // block

    def offer(index: Expr) -> None:
        best.insert(bind(T.max(load(x, [row, first + index], 1), f32(_LOWEST))), bind(index + offset))

    with T.serial(0, whole) as i:
        largest = register(cpu.lanes, _LOWEST)
        for part in range(_BLOCK):
            vector = load(x, [row, first + i * block + part * cpu.lanes], cpu.lanes)
            put(largest, T.max(vector, get(largest, cpu.lanes)), cpu.lanes)
        with (
            T.If(horizontal_max(largest, cpu.lanes) > best.values[best.size - 1]),
            T.Then(),
            T.serial(0, block) as j,
        ):
            offer(i * block + j)
    with T.serial(whole * block, size) as i:
        offer(i)


def _rows(shape: Sequence[Expr], inner: int) -> int:
    return math.prod(int(d) for d in shape[: len(shape) - inner])


def top_k(op: ty.TopK, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, values, ids = buffers
    rows, width = _rows(x.shape, 1), int(x.shape[-1])
    x, values, ids = flat(x, rows, width), flat(values, rows, op.k), flat(ids, rows, op.k)
    with loop(rows, cpu, rows * width) as row:
        best = _List.empty(op.k)
        _scan(x, row, 0, width, 0, best, cpu)
        with T.serial(0, op.k) as i:
            T.buffer_store(values, best.values[i], [row, i])
            T.buffer_store(ids, best.ids[i], [row, i])


def top_k_candidates(op: ty.TopKCandidates, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, out = buffers
    rows, width, total = _rows(x.shape, 1), int(x.shape[-1]), int(out.shape[-1])
    x, out = flat(x, rows, width), flat(out, rows, 2, total)
    with loop(rows, cpu, rows * width) as row:
        first = place = 0
        for size, count in zip(op.sizes, op.counts()):
            if count:
                best = _List.empty(count)
                _scan(x, row, first, size, op.offset + first, best, cpu)
                with T.serial(0, count) as i:
                    T.buffer_store(out, T.reinterpret("int32", best.values[i]), [row, 0, place + i])
                    T.buffer_store(out, best.ids[i], [row, 1, place + i])
            first, place = first + size, place + count


def merge_top_k(op: ty.MergeTopK, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    candidates, values, ids = buffers
    rows, count = _rows(candidates.shape, 2), int(candidates.shape[-1])
    candidates, values, ids = (
        flat(candidates, rows, 2, count),
        flat(values, rows, op.k),
        flat(ids, rows, op.k),
    )
    with T.serial(0, rows) as row:
        best = _List.empty(op.k)
        with T.serial(0, count) as i:
            best.insert(bind(T.reinterpret("float32", candidates[row, 0, i])), bind(candidates[row, 1, i]))
        with T.serial(0, op.k) as i:
            T.buffer_store(values, best.values[i], [row, i])
            T.buffer_store(ids, best.ids[i], [row, i])


EMITTERS: Final[Emitters] = {
    ty.TopK: top_k,
    ty.TopKCandidates: top_k_candidates,
    ty.MergeTopK: merge_top_k,
}
