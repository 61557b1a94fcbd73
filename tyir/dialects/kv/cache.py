"""`kv`: the key/value cache as aliased state of fixed capacity.

A cache is a function argument; the function returns it updated, and `tyir.alias` in `res_attrs` says which
argument it is. `pos` [b] i32 is the number of tokens already in the cache.  Its `layout` is "HND", [b, G,
capacity, D], where a head's rows follow each other, or "NHD", [b, capacity, G, D], where a token's do (the
names are FlashInfer's: heads, n tokens, dimension).

An 8-bit cache is of i8 with one f16 scale per token and head, a cache of its own without D; a 4-bit one of
ui8 with one word per token, head and group of channels (`stored_rows`). `kv.quantize_rows` and
`kv.quantize_groups` make both from the new rows, `kv.append` writes each, `kv.attention` takes the scales and
reads f16(q * scale).

`kv.dual_chunk_attention` is attention beyond the trained length (`tyir.artifacts.dual_chunk`): the cache is
the same, its keys rotated at their position modulo a chunk, and a step's queries come rotated three times.

A cache that is cut by tokens (`blocks`) holds every n-th block of positions (`tyir.artifacts.token_blocks`).
Attention over it gives what the die's own keys come to, and `kv.merge_attention` makes attention of what all
dies have:

    m = the largest score, l = sum of e^(score - m), o = sum of e^(score - m) v      of each die, in f32
    M = max m;  attention = sum of o e^(m - M) / sum of l e^(m - M)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.cache_layout import LAYOUTS, cache_shape, head_axis, position_axis
from tyir.artifacts.token_blocks import TokenBlocks
from tyir.dialects.kv.stored_rows import rows_of, scales_type
from tyir.dialects.ty import as_type, attend, softcap, softmax, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result, variadic_operand
from tyir.traits import InPlace, Pure
from tyir.types import TensorType, Type, f16, f32, i32

__all__ = [
    "LAYOUTS",
    "LOWEST",
    "Append",
    "CachedAttention",
    "DualChunkAttention",
    "MergeAttention",
    "Rows",
    "TakeRows",
    "cache_shape",
    "head_axis",
    "merge_parts",
    "position_axis",
]

Array = npt.NDArray[Any]
LOWEST: Final = -1e30  # the largest score of no keys: finite, so that differences with it are numbers


def _blocks_of(blocks: tuple[int, ...] | None) -> TokenBlocks | None:
    return None if blocks is None else TokenBlocks(*blocks)


def _blocks_problem(blocks: tuple[int, ...] | None) -> Iterator[str]:
    """What is wrong with the property."""
    if blocks is not None and not (len(blocks) == 3 and blocks[0] < blocks[1] and blocks[2] > 0):
        yield f"blocks are the die's number, the number of dies and positions of a block; got {list(blocks)}"


class Append(DeclaredOp, name="kv.append", traits=(InPlace,)):
    """Writes rows [b, s, G, D] to positions pos.. of a cache, in place; rows beyond the capacity are dropped
    (padding).

    For the scales of an 8-bit cache there is no D, for those of a 4-bit one D is their groups.  With `blocks`
    [i, n, B] the cache holds blocks i, i + n, .. of B positions each, and rows of other positions go nowhere.
    """

    cache: Value = operand()
    rows: Value = operand()
    pos: Value = operand()
    _: KW_ONLY
    layout: str = attr(default="HND", choices=LAYOUTS)
    blocks: tuple[int, ...] | None = attr(default=None, least=0)
    out: Value = result()

    @property
    def held(self) -> int:
        """Rows of the cache."""
        return tensor_type(self.cache).static_shape[position_axis(self.layout)]

    @property
    def token_blocks(self) -> TokenBlocks | None:
        """Which positions these are; None: all."""
        return _blocks_of(self.blocks)

    @property
    def capacity(self) -> int:
        """Positions of the cache, on all dies that share it."""
        return self.held * (1 if self.blocks is None else self.blocks[1])

    def infer(self) -> Type:
        return self.cache.type

    def verify(self) -> Iterator[str]:
        cache, rows = tensor_type(self.cache), tensor_type(self.rows)
        axes = "heads, capacity" if self.layout == "HND" else "capacity, heads"
        if (
            cache.rank not in (3, 4)
            or rows.rank != cache.rank
            or (cache.dims[head_axis(self.layout)], *cache.dims[3:]) != rows.dims[2:]
        ):
            yield (
                f"cache must be [b, {axes}, D] and rows [b, s, heads, D], or both without D; got {cache} and"
                f" {rows}"
            )
        elif cache.element is not rows.element:
            yield f"the cache holds {cache.element}, the rows are {rows.element}"
        yield from _blocks_problem(self.blocks)

    def evaluate(self, cache: Array, rows: Array, pos: Array) -> Array:
        by_head = cache if self.layout == "HND" else cache.swapaxes(1, 2)  # a view
        for i, start in enumerate(pos):
            if (blocks := self.token_blocks) is not None:
                for t in range(rows.shape[1]):
                    row = blocks.row_of(int(start) + t)
                    if row is not None and row < by_head.shape[2]:
                        by_head[i, :, row] = rows[i, t]
                continue
            count = max(min(rows.shape[1], by_head.shape[2] - int(start)), 0)  # a full cache takes nothing
            by_head[i, :, start : start + count] = rows[i, :count].swapaxes(0, 1)
        return cache


class CachedAttention(DeclaredOp, name="kv.attention", traits=(Pure,)):
    """Causal attention of s new tokens over the cache: q [b, s, H, D] at positions pos.., k and v caches ->
    [b, s, H, D].

    `kv_heads[h]` is the cache head that query head h reads.  Scores, softmax and sums are f32; positions
    after a query are never read; `window` and `softcap` are as in `ty.attention`.  8-bit and 4-bit caches
    come with the scales of k and of v, as `kv.quantize_rows` and `kv.quantize_groups` make them; keys may be
    of 8 bits where values are of 4.

    With `blocks` [i, n, B] the caches hold blocks i, i + n, .. of B positions each, and the result is not
    attention yet but f32 [b, s, H, D + 2]: of the keys that are here the sums o [D], the largest score m and
    the total l, for `kv.merge_attention`.  Where a query sees none of them, o and l are 0 and m is -1e30.
    """

    q: Value = operand()
    k: Value = operand()
    v: Value = operand()
    pos: Value = operand()
    scales: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scale: float = attr()
    window: int = attr(default=0)
    softcap: float | None = attr(default=None)
    kv_heads: tuple[int, ...] = attr()
    layout: str = attr(default="HND", choices=LAYOUTS)
    blocks: tuple[int, ...] | None = attr(default=None, least=0)
    out: Value = result()

    @property
    def queries(self) -> tuple[Value, ...]:
        """All that the queries are given as."""
        return (self.q,)

    @property
    def cache_heads(self) -> int:
        """Heads of each cache."""
        return tensor_type(self.k).static_shape[head_axis(self.layout)]

    @property
    def held(self) -> int:
        """Rows of each cache."""
        return tensor_type(self.k).static_shape[position_axis(self.layout)]

    @property
    def token_blocks(self) -> TokenBlocks | None:
        """Which positions these are; None: all."""
        return _blocks_of(self.blocks)

    def infer(self) -> Type:
        q = tensor_type(self.q)
        return q if self.blocks is None else TensorType((*q.dims[:-1], (q.dims[-1] or 0) + 2), f32)

    def verify(self) -> Iterator[str]:
        heads = tensor_type(self.q, 4).dims[2]
        groups = tensor_type(self.k, 4).dims[head_axis(self.layout)] or 0
        if len(self.kv_heads) != heads:
            yield f"kv_heads names {len(self.kv_heads)} heads, q has {heads}"
        elif any(not 0 <= g < groups for g in self.kv_heads):
            yield f"kv_heads {list(self.kv_heads)} reads outside the {groups} heads of the cache"
        needed = (scales_type(self.k), scales_type(self.v))
        wanted = [kind for kind in needed if kind is not None]
        if [v.type for v in self.scales] != wanted:
            yield (
                f"scales of {self.k.type} and {self.v.type} are {', '.join(map(str, wanted)) or 'none'}; got"
                f" {', '.join(str(v.type) for v in self.scales) or 'none'}"
            )
        yield from _blocks_problem(self.blocks)

    def evaluate(self, q: Array, k: Array, v: Array, pos: Array, *scales: Array) -> Array:
        def one_sequence(number: int, start: int, keys: Array, values: Array) -> npt.NDArray[np.float32]:
            if self.blocks is not None:
                return self._part(start, [(q[number], keys.shape[1])], keys, values)
            rest = (start, self.scale, self.window, self.kv_heads, self.softcap)
            return attend(q[number], keys, values, *rest)

        return self._each_sequence(q, (k, v), pos, scales, one_sequence)

    def _each_sequence(
        self,
        q: Array,
        caches: tuple[Array, Array],
        pos: Array,
        scales: Sequence[Array],
        one: Callable[[int, int, Array, Array], npt.NDArray[np.float32]],
    ) -> Array:
        """`one` of each sequence's number and position, and of its keys and values [G, n, D] up to the last
        query's.
        """
        out = np.empty((*q.shape[:-1], q.shape[-1] + 2 * (self.blocks is not None)), np.float32)
        if self.layout == "NHD":
            caches, scales = (
                (caches[0].swapaxes(1, 2), caches[1].swapaxes(1, 2)),
                [x.swapaxes(1, 2) for x in scales],
            )
        for i, start in enumerate(pos):
            end = int(start) + q.shape[1]
            if (blocks := self.token_blocks) is not None:
                end = blocks.rows_before(end)
            end = min(end, caches[0].shape[2])
            keys, values = (cache[i, :, :end] for cache in caches)
            if scales:
                keys, values = (rows_of(x, s[i, :, :end]) for x, s in zip((keys, values), scales))
            out[i] = one(i, int(start), keys, values)
        return as_type(out, tensor_type(self.out).element)

    def _part(
        self,
        start: int,
        parts: Sequence[tuple[Array, int]],
        keys: Array,
        values: Array,
        temperature: np.float32 | None = None,
    ) -> npt.NDArray[np.float32]:
        """What the keys of some blocks come to; `parts` are queries [s, H, D] and the end of the rows that
        they meet.
        """
        blocks, queries = self.token_blocks, parts[0][0]
        assert blocks is not None
        ends = [end for _, end in parts]
        positions = np.array([blocks.position_of(row) for row in range(keys.shape[1])], np.int64)[None, :]
        asked = start + np.arange(queries.shape[0])[:, None]
        hidden = (positions > asked) | ((positions <= asked - self.window) if self.window else np.False_)
        out = np.zeros((*queries.shape[:2], values.shape[2] + 2), np.float32)
        for head, group in enumerate(self.kv_heads):
            wide = keys[group].astype(np.float32)
            met = zip(parts, (0, *ends), ends)
            scores = np.concatenate(
                [q[:, head].astype(np.float32) @ wide[low:high].T for (q, _), low, high in met], axis=1
            )
            scores = scores * np.float32(self.scale)
            scores = scores if temperature is None else scores * temperature
            scores = scores if self.softcap is None else softcap(scores, self.softcap)
            scores = np.where(hidden, np.float32(-np.inf), scores)
            largest = scores.max(axis=1, initial=np.float32(LOWEST))
            weights = np.exp(scores - largest[:, None])
            out[:, head, :-2] = weights @ values[group].astype(np.float32)
            out[:, head, -2], out[:, head, -1] = largest, weights.sum(axis=1)
        return out


class DualChunkAttention(CachedAttention, name="kv.dual_chunk_attention"):
    """`kv.attention` of a step that lies in chunk n = pos // step, whose queries come rotated three times.

    Keys of the chunk itself meet `q`, those of chunk n - 1 `successive`, those before `inter`; scores are
    multiplied by `temperature` [b] f32.  Tokens after the chunk's end are padding.
    """

    _: KW_ONLY
    successive: Value = operand()
    inter: Value = operand()
    temperature: Value = operand()
    step: int = attr(least=1)

    @property
    def queries(self) -> tuple[Value, ...]:
        """By the distance of the keys that they meet, nearest first."""
        return (self.q, self.successive, self.inter)

    def verify(self) -> Iterator[str]:
        yield from super().verify()
        for name, value in (("successive", self.successive), ("inter", self.inter)):
            if value.type is not self.q.type:
                yield f"{name} is {value.type}, the queries of the chunk itself are {self.q.type}"
        if self.temperature.type is not TensorType(tensor_type(self.pos).dims, f32):
            yield f"temperature is {self.temperature.type}, one f32 for each sequence is needed"
        if self.window:
            yield f"has a window of {self.window}; chunks are for attention without one"
        if self.blocks is not None and self.step % self.blocks[2]:
            yield f"a chunk of {self.step} tokens is not whole blocks of {self.blocks[2]}"

    def evaluate(self, q: Array, k: Array, v: Array, pos: Array, *rest: Array) -> Array:
        *scales, successive, inter, temperature = rest

        def one_sequence(number: int, start: int, keys: Array, values: Array) -> npt.NDArray[np.float32]:
            chunk = start // self.step * self.step
            ends = (max(chunk - self.step, 0), chunk, keys.shape[1])
            if (blocks := self.token_blocks) is not None:
                ends = (*(min(blocks.rows_before(end), ends[2]) for end in ends[:2]), ends[2])
                met = [(x[number], end) for x, end in zip((inter, successive, q), ends)]
                return self._part(start, met, keys, values, temperature[number])
            parts = [x[number].astype(np.float32) for x in (inter, successive, q)]
            hidden = np.arange(ends[2])[None, :] > start + np.arange(q.shape[1])[:, None]
            out = np.empty(q.shape[1:], np.float32)
            for head, group in enumerate(self.kv_heads):
                wide = keys[group].astype(np.float32)
                scores = np.concatenate(
                    [x[:, head] @ wide[low:high].T for x, low, high in zip(parts, (0, *ends), ends)], axis=1
                )
                scores = scores * np.float32(self.scale) * temperature[number]
                scores = scores if self.softcap is None else softcap(scores, self.softcap)
                weights = softmax(np.where(hidden, np.float32(-np.inf), scores))
                out[:, head] = weights @ values[group].astype(np.float32)
            return out

        return self._each_sequence(q, (k, v), pos, scales, one_sequence)


class MergeAttention(DeclaredOp, name="kv.merge_attention", traits=(Pure,)):
    """Attention from what `count` dies' keys come to, f32 [b, s, H, count (D + 2)] -> f16 [b, s, H, D].

    Of each die the sums o [D], the largest score m and the total l, as `kv.attention` with `blocks` gives
    them; in f32, rounded once.
    """

    parts: Value = operand()
    _: KW_ONLY
    count: int = attr(least=1)
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.parts, 4)
        return TensorType((*t.dims[:-1], (t.dims[-1] or 0) // self.count - 2), f16)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.parts)
        width = t.dims[-1] or 0
        if t.element is not f32 or width % self.count or width // self.count < 3:
            yield f"parts are f32 [b, s, heads, {self.count} (D + 2)]; got {t}"

    def evaluate(self, parts: Array) -> Array:
        return as_type(merge_parts(parts, self.count), f16)


def merge_parts(parts: Array, count: int) -> npt.NDArray[np.float32]:
    """What `kv.merge_attention` computes: rows f32 [.., count (D + 2)] -> f32 [.., D]."""
    each = parts.reshape(*parts.shape[:-1], count, -1)
    sums, largest, totals = each[..., :-2], each[..., -2], each[..., -1]
    with np.errstate(over="ignore", invalid="ignore"):  # replays of plans compute on whatever lies there
        weights = np.exp(largest - largest.max(axis=-1, keepdims=True))
        total = np.maximum((totals * weights).sum(axis=-1, dtype=np.float32), np.float32(1e-30))
        return np.asarray((sums * weights[..., None]).sum(axis=-2, dtype=np.float32) / total[..., None])


class Rows(DeclaredOp, name="kv.rows", traits=(Pure,)):
    """Rows pos..pos+s of table [positions, d] for each sequence, s being dimension 1 of `like`; rows past the
    end repeat the last one (padding).

    Fetches the rotary tables: -> [b, s, d].  With `modulo` the row of token t is (pos + t) mod modulo +
    `offset`, or the last one: positions within chunks.
    """

    table: Value = operand()
    pos: Value = operand()
    like: Value = operand()
    _: KW_ONLY
    modulo: int | None = attr(default=None, least=1)
    offset: int | None = attr(default=None, least=0)
    out: Value = result()

    def infer(self) -> Type:
        table, like = tensor_type(self.table, 2), tensor_type(self.like, least=2)
        return TensorType((like.dims[0], like.dims[1], table.dims[1]), table.element)

    def evaluate(self, table: Array, pos: Array, like: Array) -> Array:
        rows = pos[:, None] + np.arange(like.shape[1])[None, :]
        if self.modulo is not None:
            rows = rows % self.modulo
        return np.asarray(table[np.minimum(rows + (self.offset or 0), table.shape[0] - 1)])


class TakeRows(DeclaredOp, name="kv.take_rows", traits=(Pure,)):
    """Rows of table [N, d] by their numbers: rows i32 [b, s] -> [b, s, d]; a number outside gives
    zeros.

    Fetches rotary tables where a row does not follow from the position alone (`tyir.artifacts.long_rope`).
    """

    table: Value = operand()
    rows: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        table, rows = tensor_type(self.table, 2), tensor_type(self.rows, 2)
        return TensorType((*rows.dims, table.dims[1]), table.element)

    def verify(self) -> Iterator[str]:
        if tensor_type(self.rows).element is not i32:
            yield f"rows are i32 [b, s]; got {self.rows.type}"

    def evaluate(self, table: Array, rows: Array) -> Array:
        inside = (rows >= 0) & (rows < table.shape[0])
        return np.where(inside[..., None], table[np.where(inside, rows, 0)], np.zeros((), table.dtype))
