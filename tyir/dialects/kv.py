"""`kv`: the key/value cache as aliased state of fixed capacity.

A cache is a function argument [b, G, capacity, D]; the function returns it updated, and `tyir.alias` in `res_attrs` says which argument it is.
`pos` [b] i32 is the number of tokens already in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, attend, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import InPlace, Pure
from tyir.types import TensorType, Type

__all__ = ["Append", "CachedAttention", "Rows"]

Array = npt.NDArray[Any]


class Append(DeclaredOp, name="kv.append", traits=(InPlace,)):
    """Writes rows [b, s, G, D] to positions pos.. of cache [b, G, capacity, D], in place; rows beyond the capacity are dropped (padding)."""

    cache: Value = operand()
    rows: Value = operand()
    pos: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.cache.type

    def verify(self) -> Iterator[str]:
        cache, rows = tensor_type(self.cache), tensor_type(self.rows)
        if cache.rank != 4 or rows.rank != 4 or (cache.dims[1], cache.dims[3]) != (rows.dims[2], rows.dims[3]):
            yield f"cache must be [b, heads, capacity, D] and rows [b, s, heads, D]; got {cache} and {rows}"

    def evaluate(self, cache: Array, rows: Array, pos: Array) -> Array:
        for i, start in enumerate(pos):
            count = min(rows.shape[1], cache.shape[2] - int(start))
            cache[i, :, start : start + count] = rows[i, :count].swapaxes(0, 1)
        return cache


class CachedAttention(DeclaredOp, name="kv.attention", traits=(Pure,)):
    """Causal attention of s new tokens over the cache: q [b, s, H, D] at positions pos.., k and v [b, G, capacity, D] -> [b, s, H, D].

    `kv_heads[h]` is the cache head that query head h reads.  Scores, softmax and sums are f32; positions after a query are never read.
    """

    q: Value = operand()
    k: Value = operand()
    v: Value = operand()
    pos: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    window: int = attr(default=0)
    kv_heads: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.q.type

    def verify(self) -> Iterator[str]:
        heads, groups = tensor_type(self.q).dims[2], tensor_type(self.k).dims[1] or 0
        if len(self.kv_heads) != heads:
            yield f"kv_heads names {len(self.kv_heads)} heads, q has {heads}"
        elif any(not 0 <= g < groups for g in self.kv_heads):
            yield f"kv_heads {list(self.kv_heads)} reads outside the {groups} heads of the cache"

    def evaluate(self, q: Array, k: Array, v: Array, pos: Array) -> Array:
        out = np.empty(q.shape, np.float32)
        for i, start in enumerate(pos):
            end = min(int(start) + q.shape[1], k.shape[2])
            out[i] = attend(q[i], k[i, :, :end], v[i, :, :end], int(start), self.scale, self.window, self.kv_heads)
        return as_type(out, tensor_type(self.out).element)


class Rows(DeclaredOp, name="kv.rows", traits=(Pure,)):
    """Rows pos..pos+s of table [positions, d] for each sequence, s being dimension 1 of `like`; rows past the end repeat the last one (padding).

    Fetches the rotary tables: -> [b, s, d].
    """

    table: Value = operand()
    pos: Value = operand()
    like: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        table, like = tensor_type(self.table), tensor_type(self.like)
        return TensorType((like.dims[0], like.dims[1], table.dims[1]), table.element)

    def evaluate(self, table: Array, pos: Array, like: Array) -> Array:
        rows = pos[:, None] + np.arange(like.shape[1])[None, :]
        return np.asarray(table[np.minimum(rows, table.shape[0] - 1)])
