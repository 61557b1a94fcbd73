"""The choice of tokens: the best logits, from parts of the vocabulary, and what all of them sum up to.

    %values, %ids, %logsumexp = ty.top_k(%logits)

    %record = ty.top_k_candidates(%own logits)      each die: its best, and the sum of exp(x - its largest)
    %all    = dist.all_gather(%record)
    %values, %ids, %logsumexp = ty.merge_top_k(%all)

The logarithm of a candidate's probability among the whole vocabulary is its value less `logsumexp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty.elementwise import softcap
from tyir.dialects.ty.tensors import Array, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Pure
from tyir.types import TensorType, Type, f32, i32

__all__ = ["MergeTopK", "TopK", "TopKCandidates", "comparable", "record_words", "select_best", "sum_of_exp"]

_LOWEST: Final = np.finfo(np.float32).min


def comparable(x: Array) -> npt.NDArray[np.float32]:
    """f32 numbers that have an order: -inf and NaN become the lowest finite number."""
    return np.fmax(x.astype(np.float32), _LOWEST)


def select_best(values: npt.NDArray[np.float32], ids: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest of each row, largest first, of equal ones the lower id first: values f32 [.., k] and
    ids i32 [.., k].
    """
    order = np.lexsort((ids, -values), axis=-1)[..., :k]
    return np.take_along_axis(values, order, axis=-1), np.take_along_axis(ids, order, axis=-1).astype(
        np.int32
    )


def sum_of_exp(values: npt.NDArray[np.float32], largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """sum(exp(values - largest)) over the last axis, in f64, as f32 [..]; `largest` [..]."""
    shifted = values.astype(np.float64) - largest.astype(np.float64)[..., None]
    return np.asarray(np.exp(shifted).sum(axis=-1), np.float32)


def record_words(count: int) -> int:
    """The words of a range's record in `ty.top_k_candidates` that holds `count` candidates."""
    return 2 * count + 1 if count else 0


def _capped(x: npt.NDArray[np.float32], cap: float | None) -> npt.NDArray[np.float32]:
    return x if cap is None else softcap(x, cap)


def _cap_problems(cap: float | None) -> Iterator[str]:
    if cap is not None and not cap > 0:
        yield f"softcap is {cap}; it must be positive"


class TopK(DeclaredOp, name="ty.top_k", traits=(Pure,)):
    """The `k` largest of x [.., V], largest first, of equal ones the lower id first: values f32 [.., k] and
    ids i32 [.., k]; and the logarithm of the sum of exp of all V: logsumexp f32 [..].

    -inf and NaN count as the lowest finite number, so that there are always k.  With a `softcap` c the values
    and what is summed are c * tanh(x / c), the order is x's.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    softcap: float | None = attr(default=None)
    values: Value = result()
    ids: Value = result()
    logsumexp: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.x, least=1).dims[:-1]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32), TensorType(lead, f32)

    def verify(self) -> Iterator[str]:
        yield from _cap_problems(self.softcap)
        if not 1 <= self.k <= (tensor_type(self.x).dims[-1] or 0):
            yield (
                f"k = {self.k} is not in 1..{tensor_type(self.x).dims[-1]}, the last dimension of"
                f" {self.x.type}"
            )

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        known = comparable(x)
        values, ids = select_best(
            known, np.broadcast_to(np.arange(x.shape[-1], dtype=np.int32), x.shape), self.k
        )
        values = _capped(values, self.softcap)
        total = sum_of_exp(_capped(known, self.softcap), values[..., 0])
        return values, ids, np.asarray(values[..., 0] + np.log(total), np.float32)


class TopKCandidates(DeclaredOp, name="ty.top_k_candidates", traits=(Pure,)):
    """The first half of a `ty.top_k` over parts: a record of each range of x [.., V] with its min(k, size)
    best and its sum, one after the other, as i32 [.., W].

    x is cut along its last axis into ranges of the given `sizes`; ids are positions in x plus `offset`.  The
    record of c candidates is 2c + 1 words: the bit patterns of their f32 values, their ids, and the bit
    pattern of the f32 sum of exp(x - the first value) over the range; none for an empty range.  A `softcap`
    is for the sum alone, values are not capped yet.  One collective carries all of it, exactly.
    `ty.merge_top_k` is the second half.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    sizes: tuple[int, ...] = attr(least=0)
    offset: int = attr(default=0)
    softcap: float | None = attr(default=None)
    out: Value = result()

    def counts(self) -> tuple[int, ...]:
        """How many candidates each range gives."""
        return tuple(min(self.k, size) for size in self.sizes)

    def infer(self) -> Type:
        words = sum(map(record_words, self.counts()))
        return TensorType((*tensor_type(self.x, least=1).dims[:-1], words), i32)

    def verify(self) -> Iterator[str]:
        yield from _cap_problems(self.softcap)
        if sum(self.sizes) != tensor_type(self.x).dims[-1]:
            yield f"sizes {list(self.sizes)} do not cut the last dimension of {self.x.type}"

    def evaluate(self, x: Array) -> Array:
        known = comparable(x)
        parts, first = [np.empty((*x.shape[:-1], 0), np.int32)], 0
        for size, count in zip(self.sizes, self.counts()):
            if count:
                part = known[..., first : first + size]
                ids = np.broadcast_to(self.offset + first + np.arange(size, dtype=np.int32), part.shape)
                values, ids = select_best(part, ids, count)
                largest = _capped(values[..., 0], self.softcap)
                total = sum_of_exp(_capped(part, self.softcap), largest)[..., None]
                parts += [np.ascontiguousarray(values).view(np.int32), ids, total.view(np.int32)]
            first += size
        return np.concatenate(parts, axis=-1)


class MergeTopK(DeclaredOp, name="ty.merge_top_k", traits=(Pure,)):
    """The second half of a `ty.top_k` over parts: the `k` best of the records of `ty.top_k_candidates`, i32
    [.., W], of `counts` candidates each, and the logsumexp of all parts, as `ty.top_k` gives them.
    """

    candidates: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    counts: tuple[int, ...] = attr(least=0)
    softcap: float | None = attr(default=None)
    values: Value = result()
    ids: Value = result()
    logsumexp: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.candidates, least=1).dims[:-1]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32), TensorType(lead, f32)

    def verify(self) -> Iterator[str]:
        yield from _cap_problems(self.softcap)
        t, total = tensor_type(self.candidates), sum(self.counts)
        words = sum(map(record_words, self.counts))
        if t.dims[-1] != words or t.element is not i32:
            yield f"records of {list(self.counts)} candidates are i32 [.., {words}]; got {t}"
        elif not 1 <= self.k <= total:
            yield f"k = {self.k} is not in 1..{total}, the number of candidates"

    def evaluate(self, candidates: Array) -> tuple[Array, Array, Array]:
        values, ids, largest, sums, first = [], [], [], [], 0
        for count in filter(None, self.counts):
            record = np.ascontiguousarray(candidates[..., first : first + record_words(count)])
            values.append(record.view(np.float32)[..., :count])
            ids.append(record[..., count : 2 * count])
            largest.append(values[-1][..., 0])
            sums.append(record.view(np.float32)[..., 2 * count])
            first += record_words(count)
        best, names = select_best(np.concatenate(values, axis=-1), np.concatenate(ids, axis=-1), self.k)
        best = _capped(best, self.softcap)
        tops = _capped(np.stack(largest, axis=-1), self.softcap)
        shares = np.exp(tops.astype(np.float64) - best[..., :1])
        total = (shares * np.stack(sums, axis=-1)).sum(axis=-1)
        return best, names, np.asarray(best[..., 0] + np.log(total), np.float32)
