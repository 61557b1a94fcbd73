"""The k best of a row in one pass: a sorted list of k entries that few elements ever enter.

A block of vectors is compared with the last entry of the list at once; only when its largest value is better
are its elements looked at one by one.  For random logits the list changes about k ln(V / k) times, so a pass
costs what reading the row costs, and an exponential for each element: beside the list runs the sum of exp(x -
m), m being the largest so far, which is scaled when a block has a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.elementwise import capped
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    add_to,
    bind,
    exp,
    f32,
    flat,
    get,
    horizontal_max,
    horizontal_sum,
    load,
    log,
    loop,
    put,
    register,
    splat,
)
from tyir.dialects import ty

__all__ = ["EMITTERS", "BestList"]

_LOWEST = -3.4028234663852886e38  # what -inf and NaN count as: the lowest finite f32
_BLOCK = 4  # vectors compared at once
_WORK = 16  # operations that an element takes, most of them its exponential's


@dataclass(frozen=True)
class BestList:
    """The best entries so far, best first; free places hold -inf, which is below every entry."""

    values: Buffer
    ids: Buffer
    size: int

    @classmethod
    def empty(cls, size: int) -> BestList:
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


@dataclass(frozen=True)
class _Sum:
    """The running sum of exp(x - largest) over elements: lane by lane, and `largest` in one lane."""

    lanes: int
    total: Buffer
    largest: Buffer

    @classmethod
    def empty(cls, lanes: int) -> _Sum:
        return cls(lanes, register(lanes, 0), register(1, _LOWEST))

    def raise_to(self, value: Expr) -> None:
        """Make `value` the largest, if it is larger."""
        with T.If(value > get(self.largest, 1)), T.Then():
            factor = exp(get(self.largest, 1) - value, 1)
            put(self.total, get(self.total, self.lanes) * splat(factor, self.lanes), self.lanes)
            put(self.largest, value, 1)

    def add(self, vectors: Sequence[Expr]) -> None:
        """Add elements that are no larger than the largest: with each other first, which rounds less."""
        largest = bind(splat(get(self.largest, 1), self.lanes))
        terms = [exp(vector - largest, self.lanes) for vector in vectors]
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        add_to(self.total, terms[0], self.lanes)

    def add_one(self, value: Expr, weight: Expr | None = None) -> None:
        """Raise the largest to `value` and add its exponential, `weight` times."""
        self.raise_to(value)
        term = exp(value - get(self.largest, 1), 1)
        first = self.total[0] + (term if weight is None else term * weight)
        T.buffer_store(self.total, first, [0])

    def end(self) -> Expr:
        """The sum of the lanes; nothing is added afterwards."""
        return bind(horizontal_sum(self.total, self.lanes))


def _capped(x: Expr, cap: float | None, lanes: int) -> Expr:
    return x if cap is None else bind(capped(x, cap, lanes))


def _scan(
    x: Buffer, row: Expr, first: int, size: int, offset: int, cap: float | None, best: BestList, cpu: Cpu
) -> Expr:
    """Offers x[row, first : first + size] to the list, named offset, offset + 1, ...; the sum of exp of what
    they are capped, less the largest.
    """
    lanes = cpu.lanes
    block = lanes * _BLOCK
    whole = size // block
    total = _Sum.empty(lanes)

    def value(index: Expr, count: int) -> Expr:
        return bind(T.max(load(x, [row, first + index], count), f32(_LOWEST, count)))

    with T.serial(0, whole) as i:
        largest = register(lanes, _LOWEST)
        vectors = [value(i * block + part * lanes, lanes) for part in range(_BLOCK)]
        for vector in vectors:
            put(largest, T.max(vector, get(largest, lanes)), lanes)
        top = bind(horizontal_max(largest, lanes))
        total.raise_to(_capped(top, cap, 1))
        total.add([_capped(vector, cap, lanes) for vector in vectors])
        with T.If(top > best.values[best.size - 1]), T.Then(), T.serial(0, block) as j:
            best.insert(value(i * block + j, 1), bind(i * block + j + offset))
    with T.serial(whole * block, size) as i:
        one = value(i, 1)
        total.add_one(_capped(one, cap, 1))
        best.insert(one, bind(i + offset))
    return total.end()


def _rows(shape: Sequence[Expr], inner: int) -> int:
    return math.prod(int(d) for d in shape[: len(shape) - inner])


def _finish(
    best: BestList, total: Expr, cap: float | None, values: Buffer, ids: Buffer, logsumexp: Buffer, row: Expr
) -> None:
    """Stores a row's results."""
    T.buffer_store(logsumexp, _capped(bind(best.values[0]), cap, 1) + log(total), [row])
    with T.serial(0, best.size) as i:
        T.buffer_store(values, _capped(bind(best.values[i]), cap, 1), [row, i])
        T.buffer_store(ids, best.ids[i], [row, i])


def top_k(op: ty.TopK, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, values, ids, logsumexp = buffers
    rows, width = _rows(x.shape, 1), int(x.shape[-1])
    x, values, ids = flat(x, rows, width), flat(values, rows, op.k), flat(ids, rows, op.k)
    logsumexp = flat(logsumexp, rows)
    with loop(rows, cpu, rows * width * _WORK) as row:
        best = BestList.empty(op.k)
        total = _scan(x, row, 0, width, 0, op.softcap, best, cpu)
        _finish(best, total, op.softcap, values, ids, logsumexp, row)


def top_k_candidates(op: ty.TopKCandidates, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, out = buffers
    rows, width, words = _rows(x.shape, 1), int(x.shape[-1]), int(out.shape[-1])
    x, out = flat(x, rows, width), flat(out, rows, words)
    with loop(rows, cpu, rows * width * _WORK) as row:
        first = place = 0
        for size, count in zip(op.sizes, op.counts()):
            if count:
                best = BestList.empty(count)
                total = _scan(x, row, first, size, op.offset + first, op.softcap, best, cpu)
                with T.serial(0, count) as i:
                    T.buffer_store(out, T.reinterpret("int32", best.values[i]), [row, place + i])
                    T.buffer_store(out, best.ids[i], [row, place + count + i])
                T.buffer_store(out, T.reinterpret("int32", total), [row, place + 2 * count])
            first, place = first + size, place + ty.record_words(count)


def merge_top_k(op: ty.MergeTopK, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    records, values, ids, logsumexp = buffers
    rows, words = _rows(records.shape, 1), int(records.shape[-1])
    records = flat(records, rows, words)
    values, ids, logsumexp = flat(values, rows, op.k), flat(ids, rows, op.k), flat(logsumexp, rows)

    def number(row: Expr, word: Expr) -> Expr:
        return bind(T.reinterpret("float32", records[row, word]))

    with T.serial(0, rows) as row:
        best, total, place = BestList.empty(op.k), _Sum.empty(1), 0
        for count in filter(None, op.counts):
            with T.serial(0, count) as i:
                best.insert(number(row, place + i), bind(records[row, place + count + i]))
            total.add_one(_capped(number(row, place), op.softcap, 1), number(row, place + 2 * count))
            place += ty.record_words(count)
        _finish(best, total.end(), op.softcap, values, ids, logsumexp, row)


EMITTERS: Final[Emitters] = {
    ty.TopK: top_k,
    ty.TopKCandidates: top_k_candidates,
    ty.MergeTopK: merge_top_k,
}
