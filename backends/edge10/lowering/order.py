"""The order of a layer's ops: keys and values before the queries, so that their way to the cache and back is
over when the attention begins.

q = linear(x); k = linear(x); v = linear(x); q = rope(q); k = rope(k); append(k); append(v); attention(q, ...)
-->
k = linear(x); v = linear(x); k = rope(k); append(k); append(v); q = linear(x); q = rope(q); attention(q, ...)

A vision tower's that are gathered from all dies likewise: queries are computed while they are on their way.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from tyir.dialects.dist import AllGather
from tyir.dialects.func import Func
from tyir.dialects.kv import BlockScores, CachedAttention
from tyir.dialects.ty import Attention
from tyir.ir import Op, Value

__all__ = ["keys_first", "makers"]

# The latter stands before kv.sparse_attention, whose queries it takes.
_OVER_CACHE: Final = (CachedAttention, BlockScores)


def keys_first(function: Func) -> Func:
    """A copy of a layer function, in that order."""
    copy = function.clone()
    for attention in [op for op in copy.body if isinstance(op, _OVER_CACHE) or _gathers(op)]:
        queries = attention.queries if isinstance(attention, _OVER_CACHE) else attention.operands[:1]
        wanted = makers([v for v in attention.operands if v not in queries])
        own = [op for op in makers(queries) if op not in wanted]
        first = next((op for op in copy.body if op in own), None)
        if first is None:
            continue
        for op in [op for op in copy.body if op in wanted and _follows(op, first)]:
            op.detach().insert_before(first)
    return copy


def _gathers(op: Op) -> bool:
    """Whether it is an attention whose keys come from all dies."""
    return isinstance(op, Attention) and isinstance(op.k.op, AllGather)


def makers(values: Collection[Value]) -> set[Op]:
    """The ops that values depend on."""
    found: set[Op] = set()
    waiting = [v.op for v in values if v.op is not None]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [v.op for v in op.operands if v.op is not None]
    return found


def _follows(op: Op, other: Op) -> bool:
    before: Op | None = op.prev_op
    while before is not None and before is not other:
        before = before.prev_op
    return before is other
