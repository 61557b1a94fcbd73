"""Attention whose cache is cut by tokens: dies that would hold copies of the same key/value heads hold blocks of
their positions in turn (`tyir.artifacts.token_blocks`).

S dies (of a stage) and G key/value heads: gcd(G, S) groups of neighbouring dies, each with its share of the heads,
and in a group every die has every n-th block of all of them, n = S / gcd(G, S).  Query heads are cut as evenly over a
group's dies as they can be, which is how the products before and after attention are cut.

    %a = kv.attention(%q, %k, %v)             -->     %q' = dist.all_gather(%q)                    queries of the group's heads
                                                      %p = kv.attention(%q', %k, %v) {blocks}      what the die's keys come to
                                                      %p' = dist.all_gather(%p)
                                                      %a = ty.slice(kv.merge_attention(%p'))       the die's own query heads
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.attributes import DenseArrayAttr
from tyir.dialects.dist import AllGather
from tyir.dialects.kv import Append, CachedAttention, DualChunkAttention, MergeAttention
from tyir.dialects.ty import tensor_type
from tyir.ir import Op, Value
from tyir.layers import carry
from tyir.passes._placement import placement_of
from tyir.passes.specialize_seqlen import infer_results
from tyir.sharding import Range, Split, even_ranges
from tyir.targets.collectives import all_gather_ns
from tyir.targets.machine import Machine

__all__ = [
    "BLOCKS",
    "TokenGroups",
    "attend_by_tokens",
    "cache_ns",
    "refusal",
    "token_blocks_of",
    "write_blocks",
]

BLOCKS = "tyir.blocks"


@dataclass(frozen=True)
class TokenGroups:
    """The groups of `dies` dies for an attention that reads cache head `kv_heads[h]` with query head h."""

    dies: int
    kv_heads: tuple[int, ...]

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return max(self.kv_heads) + 1

    @property
    def count(self) -> int:
        """Groups of dies."""
        return math.gcd(self.heads, self.dies)

    @property
    def parts(self) -> int:
        """Dies of a group."""
        return self.dies // self.count

    def caches(self) -> tuple[Range, ...]:
        """Each die's key/value heads: those of its group."""
        each = self.heads // self.count
        return tuple((die // self.parts * each, each) for die in range(self.dies))

    def queries(self) -> tuple[Range, ...]:
        """Each die's query heads: its share of those that read its group's heads."""
        found: list[Range] = []
        for first, size in self.caches()[:: self.parts]:
            readers = [h for h, head in enumerate(self.kv_heads) if first <= head < first + size]
            found += [(readers[0] + offset, n) for offset, n in even_ranges(len(readers), self.parts)]
        return tuple(found)

    def gathers_ns(self, attention: CachedAttention, machine: Machine) -> float:
        """What a token's two exchanges take: queries, and what the keys come to."""
        batch, _, heads, width = (d or 1 for d in tensor_type(attention.q).dims)
        largest = -(-heads // self.count // self.parts)
        queries = [largest * width * 2] * self.parts
        sums = [heads // self.count * (width + 2) * 4] * self.parts
        return all_gather_ns(batch, queries, machine) + all_gather_ns(batch, sums, machine)


def refusal(attention: CachedAttention, groups: TokenGroups, block: int) -> tuple[str, str] | None:
    """Why its cache cannot be cut by tokens, and what helps."""
    if groups.parts < 2:
        what = f"{groups.heads} key/value heads leave each of {groups.dies} dies heads of its own"
        return f"{what}: there are no copies to cut by tokens", "use kv-split=heads, or auto"
    if isinstance(attention, DualChunkAttention) and attention.step % block:
        what = f"a chunk of dual chunk attention, {attention.step} tokens, is not whole blocks of {block}"
        return what, f"use kv-block={math.gcd(attention.step, block)}, or kv-split=heads"
    return None


def cache_ns(
    attention: CachedAttention, share: float, machine: Machine, blocks: TokenBlocks | None = None
) -> float:
    """How long a token's attention reads a half-full cache on a die that has this share of its heads and, if
    it is cut by tokens, these blocks.
    """
    appends = [op for v in (attention.k, attention.v, *attention.scales) if isinstance(op := v.op, Append)]
    end = appends[0].capacity // 2
    first = max(end - attention.window, 0) if attention.window else 0
    rows = end - first if blocks is None else blocks.rows_before(end) - blocks.rows_before(first)
    nbytes = sum(tensor_type(op.cache).nbytes // op.capacity for op in appends)
    return nbytes * share * rows / machine.dram_bytes_per_ns


def write_blocks(attention: CachedAttention, parts: int, block: int) -> None:
    """Say of an attention and of what appends to its caches how many dies share each head's blocks."""
    for op in (attention, *(v.op for v in (attention.k, attention.v, *attention.scales))):
        assert op is not None
        op.set_attribute(BLOCKS, DenseArrayAttr.i64((parts, block)))


def token_blocks_of(op: Op, cache: Value, die: int) -> tuple[TokenBlocks, tuple[int, ...]] | None:
    """What a die holds of a cache that is cut by tokens, as an append or attention says, and the dies of its
    group; None for other caches, and on dies that hold nothing of it.
    """
    written, placement = op.attributes.get(BLOCKS), placement_of(cache)
    if not isinstance(written, DenseArrayAttr) or not isinstance(placement, Split):
        return None
    own = placement.ranges[die]
    members = tuple(d for d, held in enumerate(placement.ranges) if held == own)
    count, size = written.ints()
    assert not own[1] or len(members) == count
    return (TokenBlocks(members.index(die), count, size), members) if own[1] else None


def attend_by_tokens(
    op: CachedAttention,
    die: int,
    local: Mapping[Value, Value],
    append: Callable[[Op], Op],
) -> tuple[Value, int]:
    """What a die does of an attention whose cache is cut by tokens, `append`ed: attention of all query heads
    of its group, and the first of these.  `local` are the die's values; one without query heads takes part
    too.
    """
    found = token_blocks_of(op, op.k, die)
    assert found is not None
    blocks, members = found
    heads, caches = placement_of(op.q), placement_of(op.k)
    assert isinstance(heads, Split) and isinstance(caches, Split)
    sizes = tuple(heads.ranges[d][1] for d in members)
    first, count = heads.ranges[members[0]][0], sum(sizes)

    def added(new: Op) -> Value:
        return append(carry(new, op)).results[0]

    def whole(value: Value) -> Value:
        """The group's heads of something that is cut by query heads."""
        t = tensor_type(value)
        kind = t.with_shape(count if axis == 2 else d for axis, d in enumerate(t.dims))
        x = local.get(value)
        return added(AllGather(x, axis=2, sizes=sizes, dies=members, loc=op.loc, result_types=[kind]))

    queries = {value: whole(value) for value in op.queries}
    new = type(op).create(
        [queries.get(v) or local[v] for v in op.operands],
        [r.type for r in op.results],
        op.properties,
        op.attributes.without(BLOCKS, "tyir.sharding", "sdy.sharding", "tyir.choice", "tyir.dies"),
        loc=op.loc,
    )
    assert isinstance(new, CachedAttention)
    new.kv_heads = tuple(head - caches.ranges[die][0] for head in op.kv_heads[first : first + count])
    new.blocks = (blocks.number, blocks.count, blocks.size)
    append(new)
    infer_results(new)
    part = tensor_type(new.out)
    width = part.dims[-1] or 0
    kind = part.with_shape((*part.dims[:-1], blocks.count * width))
    parts = added(
        AllGather(
            new.out, axis=3, sizes=(width,) * blocks.count, dies=members, loc=op.loc, result_types=[kind]
        )
    )
    merged = MergeAttention(parts, count=blocks.count, loc=op.loc)
    merged.set_attribute("tyir.shard", DenseArrayAttr.i64((2, first)))
    return added(merged), first
