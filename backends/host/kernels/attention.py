"""kv.attention: causal attention of s new tokens over the cache, three passes per tile of queries; and
ty.attention that sees both ways within segments, where a tile's keys are those of its segment.

A tile's queries share their keys: several tokens of one head, or of one token several heads that read one
head of the cache.  Only positions that a query of the tile may see are visited, so the loops end at pos + s
however large the cache is.  As many keys as a vector has lanes are converted at once, and their scores with a
query are one vector.  Scores, maximum, sums and the weighted values are f32; the scores of a tile lie in a
scratch buffer [tile, block].  A cache of more than a block is visited by blocks, with an online softmax over
them (arXiv:2205.14135), so that the scratch does not grow with the cache.

With dual chunk attention the scores have three parts, those of keys before the last chunk, of the last chunk
and of the queries' own, each with its rotation of the queries; what follows is the same.

A cache that is cut by tokens is visited row by row as any other: whatever is said of positions becomes a
number of rows first, those before a position being the first ones.  What is stored are the sums, the largest
score and the total of the keys that are here; kv.merge_attention makes attention of those of all dies.

Attention to some blocks visits these one by one, and then the window; which, is what sampled queries, tiles
of every n-th token, see in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.artifacts.sparse_prefill import QUARTER, is_measured
from tyir.artifacts.token_blocks import TokenBlocks
from tyir.backends.host.kernels.cache_rows import CacheRows
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
    get,
    horizontal_max,
    horizontal_sum,
    lanes_for,
    load,
    log,
    loop,
    put,
    register,
    rows_before,
    span,
    splat,
    store,
    sums_of,
)  # fmt: skip
from tyir.backends.host.kernels.top_k import BestList
from tyir.dialects import kv, ty
from tyir.dialects.ty import default_kv_heads

__all__ = ["EMITTERS", "MOST_QUERIES"]

MOST_QUERIES = 8
_BLOCK: Final = 2048  # rows of a cache that are visited together: 64 KiB of scores fit the second-level cache
_VALUES: Final = 128  # rows of values that are visited together: 16 KiB of a width of 64
_AHEAD: Final = 32  # rows: what is asked for arrives while as many are converted
_HIDDEN = float("-inf")


@dataclass(frozen=True)
class _Part:
    """Queries as they meet the keys of rows `bounds` (None: all that the tile sees), and what their scores
    are multiplied by.
    """

    q: Buffer
    bounds: tuple[Expr, Expr] | None = None
    temperature: Expr | None = None

    def within(self, work: _Work) -> _Part:
        """The part of these keys that lie in a block."""
        if self.bounds is None:
            return self
        first, end = self.bounds
        return replace(self, bounds=(bind(T.max(first, work.low)), bind(T.min(end, work.high))))


@dataclass(frozen=True)
class _Online:
    """What is kept of the blocks before, one number a query; `factors` scale it to the newest maximum."""

    maxima: Buffer
    totals: Buffer
    factors: Buffer


@dataclass(frozen=True)
class _Work:
    """One tile: `queries` tokens from `token` on of one head, or heads from `head` on of one token, and the
    rows of keys `low`..`high` that any of them sees.

    `first`: the position of the first query, which sees none after it; None where all see all of them.
    `blocks`: of a cache that is cut by tokens, which positions its rows are.
    """

    sequence: Expr
    head: Expr
    group: Expr
    token: Expr
    queries: int
    of_heads: bool
    first: Expr | None
    low: Expr
    high: Expr
    by_head: bool
    blocks: TokenBlocks | None = None
    every: int = 1  # tokens from one query to the next

    def row(self, position: Expr) -> list[Expr]:
        """Where the head's row of a position lies in a cache."""
        return [self.sequence, *((self.group, position) if self.by_head else (position, self.group))]

    def query(self, t: Expr) -> list[Expr]:
        """Where the row of query t lies in q, and in the result."""
        heads, tokens = (t, 0) if self.of_heads else (0, self._after(t))
        return [self.sequence, self.token + tokens, self.head + heads]

    def position(self, t: Expr) -> Expr:
        """The position of query t."""
        assert self.first is not None
        return self.first if self.of_heads else self.first + self._after(t)

    def _after(self, t: Expr) -> Expr:
        """How many tokens query t comes after the first."""
        return t if self.every == 1 else t * self.every

    def before(self, position: Expr) -> Expr:
        """How many rows hold positions below this one."""
        return rows_before(self.blocks, position)


def _group_of(head: Expr, kv_heads: tuple[int, ...]) -> Expr:
    """kv_heads[head] as arithmetic: one comparison per change along the heads."""
    group: Expr = T.int32(kv_heads[0])
    for h in range(1, len(kv_heads)):
        if kv_heads[h] != kv_heads[h - 1]:
            group = T.Select(head >= h, T.int32(kv_heads[h]), group)
    return group


def _tile_of(queries: int) -> int:
    """The most queries of a tile that leave none over."""
    return max(d for d in range(1, MOST_QUERIES + 1) if queries % d == 0)


def _heads_together(kv_heads: tuple[int, ...]) -> int:
    """How many neighbouring heads always read the same head of the cache."""
    changes = [h for h in range(1, len(kv_heads)) if kv_heads[h] != kv_heads[h - 1]]
    return _tile_of(math.gcd(len(kv_heads), *changes))


def attention(op: kv.CachedAttention, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    q, k, v, pos, *scales, out = buffers
    chunked = isinstance(op, kv.DualChunkAttention)
    *scales, successive, inter, temperature = scales if chunked else (*scales, None, None, None)
    keys, values = (CacheRows(x, scale) for x, scale in zip((k, v), scales or (None, None)))
    b, s, heads, width = (int(d) for d in q.shape)
    held, blocks = op.held, op.token_blocks
    side_by_side = _heads_together(op.kv_heads) if s == 1 else 1
    of_heads = side_by_side > 1
    tokens = 1 if of_heads else _tile_of(s)
    tiles, groups = s // tokens, heads // side_by_side
    # The length is not known here: the work of a half-full cache decides about threads.
    with loop(b * groups * tiles, cpu, b * s * heads * width * held) as item:
        head = bind(item // tiles % groups * side_by_side)
        sequence = bind(item // (tiles * groups))
        token = bind(item % tiles * tokens)
        first = bind(pos[sequence] + token)
        high = bind(T.min(rows_before(blocks, first + tokens), held))
        low = bind(rows_before(blocks, T.max(first + 1 - op.window, 0))) if op.window > 0 else T.int32(0)
        work = _Work(
            sequence,
            head,
            bind(_group_of(head, op.kv_heads)),
            token,
            max(tokens, side_by_side),
            of_heads,
            first,
            low,
            high,
            op.layout == "HND",
            blocks,
        )
        parts: list[_Part] = [_Part(q)]
        if isinstance(op, kv.DualChunkAttention):
            own = bind(T.floordiv(pos[sequence], T.int32(op.step)) * op.step)
            last = bind(rows_before(blocks, T.max(own - op.step, 0)))
            own = bind(rows_before(blocks, own))
            heat = bind(temperature[sequence])
            bounds = (inter, (low, last)), (successive, (last, own)), (q, (own, high))
            parts = [_Part(rotated, rows, heat) for rotated, rows in bounds]
        visit = _by_blocks if held > _BLOCK or blocks is not None else _at_once
        visit(op, work, parts, keys, values, out, min(held, _BLOCK), cpu)


def both_ways(op: ty.Attention, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Tiles of queries never cross a segment: their number divides all of them."""
    q, k, v, out = buffers
    b, s, heads, width = (int(d) for d in q.shape)
    spans = op.spans()
    step = math.gcd(*(end for _, end in spans)) if op.segments else s
    queries = _tile_of(step)
    tiles, longest = s // queries, max(end - first for first, end in spans)
    groups = default_kv_heads(heads, int(k.shape[2]))
    with loop(b * heads * tiles, cpu, b * s * heads * width * longest) as item:
        head = bind(item // tiles % heads)
        token0 = bind(item % tiles * queries)
        low = bind(_of_segment(token0, [(first, first) for first, _ in spans]))
        high = bind(_of_segment(token0, spans))
        group = bind(_group_of(head, groups))
        work = _Work(
            bind(item // (tiles * heads)), head, group, token0, queries, False, None, low, high, False
        )
        _at_once(op, work, [_Part(q)], CacheRows(k), CacheRows(v), out, longest, cpu)


_Attending = kv.CachedAttention | kv.SparseAttention | kv.BlockScores | ty.Attention


def _at_once(
    op: kv.CachedAttention | ty.Attention,
    work: _Work,
    parts: Sequence[_Part],
    k: CacheRows,
    v: CacheRows,
    out: Buffer,
    rows: int,
    cpu: Cpu,
) -> None:
    """A tile whose keys are at most `rows`."""
    scores = T.alloc_buffer((work.queries, rows + cpu.lanes), "float32")
    for part in parts:
        _scores(op, work, part, k, scores, cpu)
    totals = T.alloc_buffer((work.queries,), "float32")
    _softmax(work, scores, totals, cpu)
    width = v.width
    lanes = lanes_for(cpu.lanes, width)
    sums = T.alloc_buffer((work.queries, width), "float32")
    with T.serial(0, work.queries) as t, T.serial(0, width // lanes) as i:
        store(sums, [t, i * lanes], f32(0, lanes), lanes)
    _weighted_values(work, v, scores, sums, cpu)
    _store_divided(work, out, sums, totals, lanes)


def _by_blocks(
    op: kv.CachedAttention,
    work: _Work,
    parts: Sequence[_Part],
    k: CacheRows,
    v: CacheRows,
    out: Buffer,
    rows: int,
    cpu: Cpu,
) -> None:
    """A tile over any number of keys, `rows` at a time: maximum, total and weighted sum of the blocks before
    are scaled to the maximum with the new block.
    """
    sums = _Sums.empty(work, v.width, rows, cpu)
    with T.serial(0, (work.high - work.low + (rows - 1)) // rows) as number:
        low = bind(work.low + number * rows)
        block = replace(work, low=low, high=bind(T.min(low + rows, work.high)))
        sums.add(op, block, [part.within(block) for part in parts], k, v, cpu)
    if work.blocks is not None:
        _store_part(work, out, sums)
    else:
        sums.store_divided(work, out)


@dataclass(frozen=True)
class _Sums:
    """What a tile's queries come to over the blocks of keys that have been added: weighted values, and what
    `_Online` keeps; `scores` has room for those of a block.
    """

    values: Buffer
    scores: Buffer
    online: _Online
    lanes: int

    @classmethod
    def empty(cls, work: _Work, width: int, rows: int, cpu: Cpu) -> _Sums:
        lanes = lanes_for(cpu.lanes, width)
        scores = T.alloc_buffer((work.queries, rows + cpu.lanes), "float32")
        values = T.alloc_buffer((work.queries, width), "float32")
        online = _Online(*(T.alloc_buffer((work.queries,), "float32") for _ in range(3)))
        with T.serial(0, work.queries) as t:
            T.buffer_store(online.maxima, f32(_HIDDEN if work.blocks is None else kv.LOWEST), [t])
            T.buffer_store(online.totals, f32(0), [t])
            with T.serial(0, width // lanes) as i:
                store(values, [t, i * lanes], f32(0, lanes), lanes)
        return cls(values, scores, online, lanes)

    def add(
        self, op: _Attending, block: _Work, parts: Sequence[_Part], k: CacheRows, v: CacheRows, cpu: Cpu
    ) -> None:
        """The keys of `block`, which may be none."""
        for part in parts:
            _scores(op, block, part, k, self.scores, cpu)
        _softmax(block, self.scores, self.online.totals, cpu, self.online)

        lanes = self.lanes
        with T.serial(0, block.queries) as t, T.serial(0, int(self.values.shape[1]) // lanes) as i:
            scaled = load(self.values, [t, i * lanes], lanes) * splat(self.online.factors[t], lanes)
            store(self.values, [t, i * lanes], scaled, lanes)
        _weighted_values(block, v, self.scores, self.values, cpu)

    def store_divided(self, work: _Work, out: Buffer) -> None:
        """The result."""
        _store_divided(work, out, self.values, self.online.totals, self.lanes)


def _store_divided(work: _Work, out: Buffer, sums: Buffer, totals: Buffer, lanes: int) -> None:
    with T.serial(0, work.queries) as t, T.serial(0, int(sums.shape[1]) // lanes) as i:
        value = load(sums, [t, i * lanes], lanes) / splat(totals[t], lanes)
        _store_out(work, out, t, i * lanes, value, lanes)


def _store_out(work: _Work, out: Buffer, t: Expr, column: Expr, value: Expr, lanes: int) -> None:
    store(out, [*work.query(t), column], value, lanes)


def _store_part(work: _Work, out: Buffer, sums: _Sums) -> None:
    """The sums of each query, its largest score and its total, for kv.merge_attention."""
    width, lanes = int(out.shape[3]) - 2, sums.lanes
    with T.serial(0, work.queries) as t:
        with T.serial(0, width // lanes) as i:
            _store_out(work, out, t, i * lanes, load(sums.values, [t, i * lanes], lanes), lanes)
        T.buffer_store(out, sums.online.maxima[t], [*work.query(t), width])
        T.buffer_store(out, sums.online.totals[t], [*work.query(t), width + 1])


def merge(op: kv.MergeAttention, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Each row's parts, weighted by how far their largest score is from that of all."""
    parts, out = buffers
    b, s, heads, width = (int(d) for d in out.shape)
    lanes, count, each = lanes_for(cpu.lanes, width), op.count, width + 2
    with loop(b * s * heads, cpu, b * s * heads * width * count) as item:
        row = [bind(item // (s * heads)), bind(item // heads % s), bind(item % heads)]
        largest = bind(parts[(*row, width)])
        for n in range(1, count):
            largest = bind(T.max(largest, parts[(*row, n * each + width)]))
        weights = [
            bind(exp(T.max(parts[(*row, n * each + width)] - largest, f32(-87)), 1)) for n in range(count)
        ]
        total = bind(sum((w * parts[(*row, n * each + width + 1)] for n, w in enumerate(weights)), f32(0)))
        total = bind(T.max(total, f32(1e-30)))
        with T.serial(0, width // lanes) as i:
            value = f32(0, lanes)
            for n, weight in enumerate(weights):
                value = value + splat(weight, lanes) * load(parts, [*row, n * each + i * lanes], lanes)
            store(out, [*row, i * lanes], bind(value) / splat(total, lanes), lanes)


def _of_segment(row: Expr, bounds: Sequence[tuple[int, int]]) -> Expr:
    """Of pairs (first row of a segment, value) the value of the row's segment, by halves."""
    if len(bounds) == 1:
        return T.int32(bounds[0][1])
    middle = len(bounds) // 2
    return T.Select(
        row < bounds[middle][0], _of_segment(row, bounds[:middle]), _of_segment(row, bounds[middle:])
    )


def _scores(
    op: _Attending,
    work: _Work,
    part: _Part,
    k: CacheRows,
    scores: Buffer,
    cpu: Cpu,
) -> None:
    """scores[t, j - work.low] = scale * q[t] . k[j], or -inf where query t must not see position j, for the
    keys j of the part; up to a vector of -inf follows.
    """
    low, high = part.bounds or (work.low, work.high)
    window = op.window if isinstance(op, (kv.CachedAttention, ty.Attention)) else 0
    width = int(part.q.shape[3])
    lanes = lanes_for(cpu.lanes, width)
    wide = T.alloc_buffer((work.queries, width), "float32")
    with T.serial(0, work.queries) as t, T.serial(0, width // lanes) as i:
        store(wide, [t, i * lanes], load(part.q, [*work.query(t), i * lanes], lanes), lanes)
    keys = T.alloc_buffer((lanes, width), "float32")
    with T.serial(0, (T.max(high - low, 0) + (lanes - 1)) // lanes) as block:
        start = bind(low + block * lanes)
        with T.serial(0, lanes) as key:
            position = bind(T.min(start + key, high - 1))
            row, read = k.row(work.row(position)), k.lanes(cpu.lanes)
            k.ask_ahead(work.row(position + _AHEAD), T.int32(0), width)
            with T.serial(0, width // read) as i:
                store(keys, [key, i * read], row.read(i * read, read), read)
        with T.serial(0, work.queries) as t:
            sums = [register(lanes, 0) for _ in range(lanes)]
            with T.serial(0, width // lanes) as i:
                query = bind(load(wide, [t, i * lanes], lanes))
                for key, total in enumerate(sums):
                    add_to(total, query * load(keys, [key, i * lanes], lanes), lanes)
            score = bind(sums_of(sums, lanes) * f32(op.scale, lanes))
            if part.temperature is not None:
                score = bind(score * splat(part.temperature, lanes))
            if op.softcap is not None:
                score = capped(score, op.softcap, lanes)
            last = high - 1
            if work.blocks is not None:
                last = T.min(last, work.before(work.position(t) + 1) - 1)
            elif work.first is not None:
                last = T.min(last, work.position(t))
            positions = bind(span(start, lanes))
            seen = T.Select(positions <= splat(bind(last), lanes), score, f32(_HIDDEN, lanes))
            if window > 0 and work.first is not None:
                if work.blocks is None:
                    before = bind(work.position(t) - window)
                else:
                    before = bind(work.before(T.max(work.position(t) + 1 - window, 0)) - 1)
                seen = T.Select(positions > splat(before, lanes), seen, f32(_HIDDEN, lanes))
            store(scores, [t, start - work.low], seen, lanes)


def _softmax(work: _Work, scores: Buffer, totals: Buffer, cpu: Cpu, online: _Online | None = None) -> None:
    """scores[t] becomes exp(scores[t] - max), with zeros after the last position; totals[t] is its sum.

    `online`: max is also that of the blocks before, whose sum is scaled to it and added.
    """
    lanes = cpu.lanes
    count = bind(work.high - work.low)
    vectors = bind((count + (lanes - 1)) // lanes)
    with T.serial(0, work.queries) as t:
        with T.serial(count, vectors * lanes) as j:
            T.buffer_store(scores, f32(_HIDDEN), [t, j])
        best, total = register(lanes, _HIDDEN), register(lanes, 0)
        with T.serial(0, vectors) as i:
            put(best, T.max(get(best, lanes), load(scores, [t, i * lanes], lanes)), lanes)
        highest = bind(horizontal_max(best, lanes))
        if online is not None:
            before = bind(online.maxima[t])
            highest = bind(T.max(before, highest))
            fallen = bind(before - highest)
            T.buffer_store(online.factors, T.Select(fallen < f32(-87), f32(0), exp(fallen, 1)), [t])
            T.buffer_store(online.maxima, highest, [t])
        with T.serial(0, vectors) as i:
            shifted = bind(load(scores, [t, i * lanes], lanes) - splat(highest, lanes))
            value = bind(T.Select(shifted < f32(-87, lanes), f32(0, lanes), exp(shifted, lanes)))
            store(scores, [t, i * lanes], value, lanes)
            add_to(total, value, lanes)
        added = horizontal_sum(total, lanes)
        if online is not None:
            added = bind(totals[t] * online.factors[t]) + added
        T.buffer_store(totals, added, [t])


def _weighted_values(work: _Work, v: CacheRows, scores: Buffer, sums: Buffer, cpu: Cpu) -> None:
    """sums[t] += sum_j scores[t, j] v[j].

    Some rows at a time, which the first-level cache holds: they are visited once for each chunk of the head's
    width, as much as leaves the sums of all queries in registers.
    """
    lanes = v.lanes(cpu.lanes)
    vectors = v.width // lanes
    chunk = max(
        d
        for d in range(1, vectors + 1)
        if vectors % d == 0 and (d == 1 or d * work.queries <= cpu.accumulators)
    )
    count = bind(work.high - work.low)
    with (
        T.serial(0, (count + (_VALUES - 1)) // _VALUES) as part,
        T.serial(0, vectors // chunk) as c,
    ):
        tile = [(t, d) for t in range(work.queries) for d in range(chunk)]
        columns = {d: (c * chunk + d) * lanes for d in range(chunk)}
        kept = {at: register(lanes) for at in tile}
        for t, d in tile:
            put(kept[t, d], load(sums, [t, columns[d]], lanes), lanes)
        first = bind(part * _VALUES)
        with T.serial(first, bind(T.min(first + _VALUES, count))) as j:
            position = work.low + j
            row = v.row(work.row(position))
            v.ask_ahead(work.row(position + _AHEAD), columns[0], chunk * lanes)
            for d in range(chunk):
                value = bind(row.read(columns[d], lanes))
                for t in range(work.queries):
                    add_to(kept[t, d], splat(scores[t, j], lanes) * value, lanes)
        for t, d in tile:
            store(sums, [t, columns[d]], get(kept[t, d], lanes), lanes)


# ----------------------------------------------------------------------------------- some blocks of the cache


def _chunk_starts(op: kv.BlockScores | kv.SparseAttention | kv.PickBlocks, pos: Expr) -> tuple[Expr, Expr]:
    """Where the queries' own chunk begins, and the one before."""
    if op.step is None:
        return T.int32(0), T.int32(0)
    own = bind(T.floordiv(pos, T.int32(op.step)) * op.step)
    return own, bind(T.max(own - op.step, 0))


def _met(
    op: kv.BlockScores | kv.SparseAttention, q: Buffer, far: Sequence[Buffer], work: _Work, pos: Expr
) -> list[_Part]:
    """The queries as keys of each range of a tile's rows meet them, nearest keys last."""
    if op.step is None:
        return [_Part(q)]
    own, last = _chunk_starts(op, pos)
    successive, inter, temperature = far
    heat = bind(temperature[work.sequence])
    bounds = (inter, (T.int32(0), last)), (successive, (last, own)), (q, (own, work.high))
    return [_Part(rotated, rows, heat) for rotated, rows in bounds]


def block_scores(op: kv.BlockScores, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Tiles of sampled queries of a head, block by block."""
    q, k, pos, *more, scores, totals = buffers
    keys, far = CacheRows(k, more[0] if op.scales else None), more[len(op.scales) :]
    size, every = op.choice.block, op.choice.every
    b, n, samples, heads = (int(d) for d in scores.shape)
    queries = _tile_of(samples)
    tiles = samples // queries
    with loop(b * heads * tiles, cpu, b * samples * heads * int(q.shape[3]) * op.held) as item:
        head, sequence = bind(item // tiles % heads), bind(item // (tiles * heads))
        sample = bind(item % tiles * queries)
        first = bind(pos[sequence] + sample * every)
        high = bind(T.min(first + ((queries - 1) * every + 1), op.held))
        group = bind(_group_of(head, op.kv_heads))
        work = _Work(
            *(sequence, head, group, bind(sample * every), queries, False, first, T.int32(0), high, True),
            every=every,
        )
        parts = _met(op, q, far, work, pos[sequence])
        found = T.alloc_buffer((queries, size + cpu.lanes), "float32")
        maxima, sums = (T.alloc_buffer((queries,), "float32") for _ in range(2))
        with T.serial(0, queries) as t:
            T.buffer_store(maxima, f32(kv.LOWEST), [t])
            T.buffer_store(sums, f32(0), [t])
        seen = bind((high + (size - 1)) // size)
        with T.serial(0, seen) as number:
            low = bind(number * size)
            block = replace(work, low=low, high=bind(T.min(low + size, high)))
            for part in parts:
                _scores(op, block, part.within(block), keys, found, cpu)
            with T.serial(0, queries) as t:
                largest, total = _sum_of_exp(block, found, t, cpu)
                T.buffer_store(scores, _logarithm(largest, total), [sequence, number, sample + t, head])
                highest = bind(T.max(maxima[t], largest))
                both = sums[t] * exp(maxima[t] - highest, 1) + total * exp(largest - highest, 1)
                T.buffer_store(sums, both, [t])
                T.buffer_store(maxima, highest, [t])
        with T.serial(seen, n) as number, T.serial(0, queries) as t:
            T.buffer_store(scores, f32(kv.LOWEST), [sequence, number, sample + t, head])
        with T.serial(0, queries) as t:
            T.buffer_store(totals, _logarithm(bind(maxima[t]), bind(sums[t])), [sequence, sample + t, head])


def _sum_of_exp(work: _Work, scores: Buffer, t: Expr, cpu: Cpu) -> tuple[Expr, Expr]:
    """The largest of a query's scores, -1e30 where none is seen, and the sum of e^(score - largest)."""
    lanes = cpu.lanes
    count = bind(work.high - work.low)
    vectors = bind((count + (lanes - 1)) // lanes)
    with T.serial(count, vectors * lanes) as j:
        T.buffer_store(scores, f32(_HIDDEN), [t, j])
    best, total = register(lanes, kv.LOWEST), register(lanes, 0)
    with T.serial(0, vectors) as i:
        put(best, T.max(get(best, lanes), load(scores, [t, i * lanes], lanes)), lanes)
    largest = bind(horizontal_max(best, lanes))
    with T.serial(0, vectors) as i:
        shifted = bind(load(scores, [t, i * lanes], lanes) - splat(largest, lanes))
        add_to(total, T.Select(shifted < f32(-87, lanes), f32(0, lanes), exp(shifted, lanes)), lanes)
    return largest, bind(horizontal_sum(total, lanes))


def _logarithm(largest: Expr, total: Expr) -> Expr:
    """Of the sum of e^score; -1e30 of none."""
    return T.Select(total > f32(0), log(bind(T.max(total, f32(1e-30)))) + largest, f32(kv.LOWEST))


def pick_blocks(op: kv.PickBlocks, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """The weights of all blocks, and then a list for each range."""
    scores, totals, pos, blocks = buffers
    b, n, samples, heads = (int(d) for d in scores.shape)
    groups, lists = int(blocks.shape[1]), op.lists
    choice = op.choice
    with loop(b * groups, cpu, b * n * samples * heads * 16) as item:
        sequence, group = bind(item // groups), bind(item % groups)
        end = bind(T.floordiv(T.max(pos[sequence] - choice.window, 0), T.int32(choice.block)))
        weights = T.alloc_buffer((n,), "float32")
        turn = T.floormod(T.floordiv(pos[sequence], T.int32(op.tokens)), T.int32(QUARTER))
        # of the samples that measure in such a step
        part = bind(T.Select(turn == QUARTER - 1, f32(0), f32(1)))
        with T.serial(0, end) as number:
            total = register(1, 0)
            for head, its in enumerate(op.kv_heads):
                with T.If(group == its), T.Then():
                    for sample in range(samples):
                        seen = scores[sequence, number, sample, head] - totals[sequence, sample, head]
                        share = exp(bind(seen), 1)
                        add_to(total, share * part if is_measured(sample) else share, 1)
            T.buffer_store(weights, get(total, 1), [number])
        with T.If(end > 0), T.Then():
            T.buffer_store(weights, f32(kv.ALWAYS), [0])
        own, last = (
            bind(T.min(T.floordiv(start, T.int32(choice.block)), end))
            for start in _chunk_starts(op, pos[sequence])
        )
        ranges = [(own, end), (last, own), (T.int32(0), last)][:lists]
        for which, (low, high) in enumerate(ranges):
            best = BestList.empty(choice.keep)
            with T.serial(0, n) as number:
                inside = T.And(number >= low, number < high)
                value = bind(T.if_then_else(inside, weights[number], f32(kv.NEVER)))
                with T.If(value > best.values[choice.keep - 1]), T.Then():
                    best.insert(value, number)
            with T.serial(0, choice.keep) as i:
                T.buffer_store(blocks, best.ids[i], [sequence, group, which, i])


def sparse_attention(op: kv.SparseAttention, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    """Tiles of queries of a head: the chosen blocks of each range, then the window."""
    q, k, pos, *more, v, blocks, asked, out, shares = buffers
    scales, far = more[: len(op.scales)], more[len(op.scales) :]
    keys, values = (CacheRows(x, scale) for x, scale in zip((k, v), scales or (None, None)))
    choice = op.choice
    b, s, heads, width = (int(d) for d in q.shape)
    tokens, rows = _tile_of(s), min(op.held, _BLOCK)
    tiles, seen = s // tokens, choice.keep * choice.block + choice.window
    with loop(b * heads * tiles, cpu, b * s * heads * width * seen) as item:
        head, sequence = bind(item // tiles % heads), bind(item // (tiles * heads))
        token = bind(item % tiles * tokens)
        start = bind(pos[sequence])
        first, group = bind(start + token), bind(_group_of(head, op.kv_heads))
        window = bind(T.floordiv(T.max(start - choice.window, 0), T.int32(choice.block)) * choice.block)
        high = bind(T.min(first + tokens, op.held))
        work = _Work(sequence, head, group, token, tokens, False, first, window, high, True)
        sums = _Sums.empty(work, width, max(choice.block, rows), cpu)
        parts = _met(op, q, far, work, start)
        own, last = _chunk_starts(op, start)
        ends = [bind(T.min(x, window)) for x in (own, last)]
        ranges = [(ends[0], window), (ends[1], ends[0]), (T.int32(0), ends[1])]
        for which, part in enumerate(reversed(parts)):  # nearest first, as the lists are
            low, end = ranges[which]
            count = bind(T.min((end - low) // choice.block, choice.keep))
            with T.serial(0, count) as number:
                begin = bind(blocks[sequence, group, which, number] * choice.block)
                block = replace(work, low=begin, high=bind(begin + choice.block))
                sums.add(op, block, [replace(part, bounds=None)], keys, values, cpu)
        with T.serial(0, (work.high - work.low + (rows - 1)) // rows) as number:
            low = bind(work.low + number * rows)
            block = replace(work, low=low, high=bind(T.min(low + rows, work.high)))
            sums.add(op, block, [p.within(block) for p in parts], keys, values, cpu)
        sums.store_divided(work, out)
        with T.serial(0, tokens) as t:
            query = bind(token + t)
            with T.If(T.floormod(query, T.int32(choice.every)) == 0), T.Then():
                sample = bind(T.floordiv(query, T.int32(choice.every)))
                held = log(bind(sums.online.totals[t])) + sums.online.maxima[t]
                share = exp(bind(held - asked[sequence, sample, head]), 1)
                T.buffer_store(shares, share, [sequence, sample, head])


EMITTERS: Final[Emitters] = {
    kv.CachedAttention: attention,
    kv.DualChunkAttention: attention,
    kv.MergeAttention: merge,
    kv.BlockScores: block_scores,
    kv.PickBlocks: pick_blocks,
    kv.SparseAttention: sparse_attention,
    ty.Attention: both_ways,
}
