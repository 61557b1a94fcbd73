"""The choice of tokens: the best logits, from parts of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty.tensors import Array, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Pure
from tyir.types import TensorType, Type, f32, i32

__all__ = ["MergeTopK", "TopK", "TopKCandidates", "comparable", "select_best"]

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


class TopK(DeclaredOp, name="ty.top_k", traits=(Pure,)):
    """The `k` largest of x [.., V], largest first, of equal ones the lower id first: values f32 [.., k] and
    ids i32 [.., k].

    -inf and NaN count as the lowest finite number, so that there are always k.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    values: Value = result()
    ids: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.x, least=1).dims[:-1]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32)

    def verify(self) -> Iterator[str]:
        if not 1 <= self.k <= (tensor_type(self.x).dims[-1] or 0):
            yield (
                f"k = {self.k} is not in 1..{tensor_type(self.x).dims[-1]}, the last dimension of"
                f" {self.x.type}"
            )

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        return select_best(
            comparable(x), np.broadcast_to(np.arange(x.shape[-1], dtype=np.int32), x.shape), self.k
        )


class TopKCandidates(DeclaredOp, name="ty.top_k_candidates", traits=(Pure,)):
    """The first half of a `ty.top_k` over parts: of each range of x [.., V] its min(k, size) best, as i32
    [.., 2, C].

    x is cut along its last axis into ranges of the given `sizes`; ids are positions in x plus `offset`.  Row
    0 holds the bit patterns of the f32 values and row 1 the ids, so that one collective carries both,
    exactly.  `ty.merge_top_k` is the second half.
    """

    x: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    sizes: tuple[int, ...] = attr(least=0)
    offset: int = attr(default=0)
    out: Value = result()

    def counts(self) -> tuple[int, ...]:
        """How many candidates each range gives."""
        return tuple(min(self.k, size) for size in self.sizes)

    def infer(self) -> Type:
        return TensorType((*tensor_type(self.x, least=1).dims[:-1], 2, sum(self.counts())), i32)

    def verify(self) -> Iterator[str]:
        if sum(self.sizes) != tensor_type(self.x).dims[-1]:
            yield f"sizes {list(self.sizes)} do not cut the last dimension of {self.x.type}"

    def evaluate(self, x: Array) -> Array:
        parts, first = [], 0
        for size, count in zip(self.sizes, self.counts()):
            part = x[..., first : first + size]
            ids = np.broadcast_to(self.offset + first + np.arange(size, dtype=np.int32), part.shape)
            values, ids = select_best(comparable(part), ids, count)
            parts.append(np.stack([values.view(np.int32), ids], axis=-2))
            first += size
        return np.concatenate(parts, axis=-1)


class MergeTopK(DeclaredOp, name="ty.merge_top_k", traits=(Pure,)):
    """The second half of a `ty.top_k` over parts: the `k` best of candidates i32 [.., 2, C] (bit patterns of
    f32 values, ids), as `ty.top_k` gives them.
    """

    candidates: Value = operand()
    _: KW_ONLY
    k: int = attr(least=1)
    values: Value = result()
    ids: Value = result()

    def infer(self) -> tuple[Type, ...]:
        lead = tensor_type(self.candidates, least=2).dims[:-2]
        return TensorType((*lead, self.k), f32), TensorType((*lead, self.k), i32)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.candidates)
        if t.dims[-2] != 2 or t.element is not i32:
            yield f"candidates are i32 [.., 2, C]; got {t}"
        elif not 1 <= self.k <= (t.dims[-1] or 0):
            yield f"k = {self.k} is not in 1..{t.dims[-1]}, the number of candidates"

    def evaluate(self, candidates: Array) -> tuple[Array, Array]:
        return select_best(
            np.ascontiguousarray(candidates[..., 0, :]).view(np.float32), candidates[..., 1, :], self.k
        )
