"""Attention of a prompt's step that sees some blocks of the cache, chosen from real scores (`tyir.artifacts.sparse_prefill`).

    %scores, %totals = kv.block_scores(%q, %k, %pos)                            what sampled queries see in each block
    %blocks = kv.pick_blocks(%scores, %totals, %pos)                            the blocks with most of it
    %out, %held = kv.sparse_attention(%q, %k, %v, %pos, %blocks, %totals)       attention to them, and how much of the whole that was
    %recall1 = kv.replace(%recall, %held)                                       state, which the caller may look at

All of it in one step: nobody outside chooses, and nothing is kept for the next step but `%recall`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.sparse_prefill import BlockChoice, is_measured
from tyir.dialects.kv.cache import LOWEST
from tyir.dialects.kv.stored_rows import rows_of, scales_type
from tyir.dialects.ty.choice import select_best
from tyir.dialects.ty.elementwise import softcap
from tyir.dialects.ty.tensors import as_type, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result, variadic_operand
from tyir.traits import InPlace, Pure
from tyir.types import TensorType, Type, f32, i32

__all__ = ["ALWAYS", "NEVER", "BlockScores", "PickBlocks", "Replace", "SparseAttention", "block_weights"]

Array = npt.NDArray[Any]
NEVER: Final = -1.0  # the weight of a block that is not a candidate
ALWAYS: Final = 1e30  # and of block 0
_LOWEST: Final = np.float32(LOWEST)  # the score of a block without a key that is seen


def _numbers_problem(numbers: tuple[int, ...], step: int | None) -> Iterator[str]:
    """What is wrong with the property `sparse` and with chunks of `step` tokens."""
    if len(numbers) != 4 or min(numbers[0], numbers[1], numbers[3]) < 1 or numbers[2] < 0:
        yield f"sparse is keep, block, window and every; got {list(numbers)}"
    elif step is not None and step % numbers[1]:
        yield f"a chunk of {step} tokens is not whole blocks of {numbers[1]}"


class _OverBlocks(DeclaredOp, name="kv.over_blocks"):
    """What both ops that meet the cache have: queries, a cache by heads, and `more`: the scales of 8-bit
    and 4-bit caches and, of dual chunk attention with chunks of `step` tokens, successive and inter queries
    and the temperature.
    """

    q: Value = operand()
    k: Value = operand()
    pos: Value = operand()
    more: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scale: float = attr()
    softcap: float | None = attr(default=None)
    kv_heads: tuple[int, ...] = attr()
    sparse: tuple[int, ...] = attr()
    step: int | None = attr(default=None, least=1)

    @property
    def choice(self) -> BlockChoice:
        """What is kept, and what is looked at."""
        return BlockChoice(*self.sparse)

    @property
    def scales(self) -> tuple[Value, ...]:
        """Of 8-bit and 4-bit caches."""
        return self.more if self.step is None else self.more[:-3]

    @property
    def queries(self) -> tuple[Value, ...]:
        """By the distance of the keys that they meet, nearest first."""
        return (self.q,) if self.step is None else (self.q, *self.more[-3:-1])

    @property
    def temperature(self) -> Value | None:
        """What scores are multiplied by, f32 [b]."""
        return None if self.step is None else self.more[-1]

    @property
    def cache_heads(self) -> int:
        """Heads of the cache."""
        return tensor_type(self.k).static_shape[1]

    @property
    def held(self) -> int:
        """Rows of the cache, which are its positions."""
        return tensor_type(self.k).static_shape[2]

    def _problems(self, *caches: Value) -> Iterator[str]:
        yield from _numbers_problem(self.sparse, self.step)
        heads, groups = tensor_type(self.q, 4).dims[2], self.cache_heads
        if len(self.kv_heads) != heads or any(not 0 <= g < groups for g in self.kv_heads):
            yield f"kv_heads {list(self.kv_heads)} do not give {heads} heads of q one of {groups} each"
        wanted: list[Type] = [kind for kind in map(scales_type, caches) if kind is not None]
        if self.step is not None:
            wanted += [self.q.type, self.q.type, TensorType(tensor_type(self.pos).dims, f32)]
        if [v.type for v in self.more] != wanted:
            found = ", ".join(str(v.type) for v in self.more) or "nothing"
            yield f"needs {', '.join(map(str, wanted)) or 'nothing'} beside q, caches and pos; got {found}"

    def _given(self, more: tuple[Array, ...], number: int) -> tuple[list[Array], list[Array], np.float32]:
        """Of a sequence the scales of its caches, queries without the first, and the temperature."""
        scales, far = (more, ()) if self.step is None else (more[:-3], more[-3:])
        heat = np.float32(far[2][number]) if far else np.float32(1)
        return [s[number] for s in scales], [x[number] for x in far[:2]], heat

    def _scored(self, q: Array, keys: Array, heat: np.float32) -> npt.NDArray[np.float32]:
        """Scores of queries [s, D] with keys [n, D], [s, n]."""
        scores = q.astype(np.float32) @ keys.T * np.float32(self.scale) * heat
        return np.asarray(scores if self.softcap is None else softcap(scores, self.softcap), np.float32)


class BlockScores(_OverBlocks, name="kv.block_scores", traits=(Pure,)):
    """What the sampled queries of a step see in each block of the cache: q [b, s, H, D] -> f32 scores [b, N,
    S, H], the logarithm of the sum of e^score over the keys of block n that query `every` * i sees, -1e30
    where it sees none; and totals [b, S, H], the same over all blocks.
    """

    scores: Value = result()
    totals: Value = result()

    def infer(self) -> tuple[Type, ...]:
        b, tokens, heads, _ = tensor_type(self.q, 4).static_shape
        samples = self.choice.samples(tokens)
        return (
            TensorType((b, self.choice.blocks(self.held), samples, heads), f32),
            TensorType((b, samples, heads), f32),
        )

    def verify(self) -> Iterator[str]:
        yield from self._problems(self.k)

    def evaluate(self, q: Array, k: Array, pos: Array, *more: Array) -> tuple[Array, Array]:
        sparse, tokens = self.choice, q.shape[1]
        sampled = range(0, tokens, sparse.every)
        scores = np.full(tensor_type(self.scores).static_shape, _LOWEST, np.float32)
        for number, start in enumerate(map(int, pos)):
            scales, far, heat = self._given(more, number)
            own = 0 if self.step is None else start // self.step * self.step
            last = 0 if self.step is None else max(own - self.step, 0)
            for group in range(self.cache_heads):
                end = min(start + tokens, self.held)
                keys = k[number, group, :end]
                keys = rows_of(keys, scales[0][group, :end]) if scales else keys
                wide = keys.astype(np.float32)
                for head in (h for h, g in enumerate(self.kv_heads) if g == group):
                    met = [(q[number], own, end), *zip(far, (last, 0), (own, last))]
                    row = np.empty((len(sampled), end), np.float32)
                    for x, low, high in met:
                        row[:, low:high] = self._scored(x[list(sampled), head], wide[low:high], heat)
                    hidden = np.arange(end)[None, :] > start + np.array(sampled)[:, None]
                    row = np.where(hidden, np.float32(-np.inf), row)
                    for block, first in enumerate(range(0, end, sparse.block)):
                        part = row[:, first : first + sparse.block]
                        largest = np.maximum(part.max(axis=1), _LOWEST)
                        total = np.exp(part - largest[:, None]).sum(axis=1, dtype=np.float32)
                        seen = np.log(np.maximum(total, np.float32(1e-30))) + largest
                        scores[number, block, :, head] = np.where(total > 0, seen, _LOWEST)
        largest = scores.max(axis=1, keepdims=True)
        totals = np.log(np.exp(scores - largest).sum(axis=1, dtype=np.float32)) + largest[:, 0]
        return scores, np.asarray(totals, np.float32)


def block_weights(
    scores: Array, totals: Array, first: int, end: int, start: int = 0, *, measures: bool = False
) -> npt.NDArray[np.float32]:
    """How much of their attention the choosing samples give blocks `start`.. of scores [n, S, h], totals [S,
    h] -> [n]; 1e30 for block 0, -1 for blocks that are not among the candidates `first` to `end`.
    `measures`: some samples have no part in it.
    """
    choosing = [i for i in range(scores.shape[1]) if not (measures and is_measured(i))]
    with np.errstate(over="ignore", invalid="ignore"):  # replays of plans compute on whatever lies there
        shares = np.exp(scores[:, choosing] - totals[None, choosing])
        weights = np.asarray(shares.sum(axis=(1, 2), dtype=np.float32), np.float32)
    numbers = start + np.arange(scores.shape[0])
    weights[numbers == 0] = ALWAYS
    return np.where((numbers >= first) & (numbers < end), weights, np.float32(NEVER))


class PickBlocks(DeclaredOp, name="kv.pick_blocks", traits=(Pure,)):
    """The `keep` blocks of each range of candidates that sampled queries see most in: scores [b, N, S, H] and
    totals [b, S, H] of `kv.block_scores` -> i32 [b, G, R, keep], best first, of equal ones the lower number.

    A block's weight for cache head g is the sum over its query heads and the choosing samples of the share of
    attention that the block holds; block 0 comes before all others.  Which samples choose follows `pos` and
    the step's length of `tokens`.  R is 1, or 3 for chunks of `step` tokens; what follows the last candidate
    of a range says nothing.
    """

    scores: Value = operand()
    totals: Value = operand()
    pos: Value = operand()
    _: KW_ONLY
    kv_heads: tuple[int, ...] = attr()
    sparse: tuple[int, ...] = attr()
    tokens: int = attr(least=1)
    step: int | None = attr(default=None, least=1)
    blocks: Value = result()

    @property
    def choice(self) -> BlockChoice:
        """What is kept, and what is looked at."""
        return BlockChoice(*self.sparse)

    @property
    def lists(self) -> int:
        """Ranges, each with a choice of its own."""
        return 1 if self.step is None else 3

    def infer(self) -> Type:
        b = tensor_type(self.scores, 4).static_shape[0]
        return TensorType((b, max(self.kv_heads) + 1, self.lists, self.choice.keep), i32)

    def verify(self) -> Iterator[str]:
        yield from _numbers_problem(self.sparse, self.step)
        scores, totals = tensor_type(self.scores, 4), tensor_type(self.totals, 3)
        if (scores.dims[0], *scores.dims[2:]) != totals.dims or len(self.kv_heads) != scores.dims[3]:
            yield f"scores {scores} and totals {totals} are not of {len(self.kv_heads)} heads' samples"
        elif (scores.dims[1] or 0) < self.sparse[0]:
            yield f"keeps {self.sparse[0]} of {scores.dims[1]} blocks"

    def evaluate(self, scores: Array, totals: Array, pos: Array) -> Array:
        found = np.empty(tensor_type(self.blocks).static_shape, np.int32)
        names = np.arange(scores.shape[1], dtype=np.int32)
        for number, start in enumerate(map(int, pos)):
            measures = self.choice.measures(start, self.tokens)
            for group in range(found.shape[1]):
                heads = [h for h, g in enumerate(self.kv_heads) if g == group]
                for which, (first, end) in enumerate(self.choice.ranges(start, self.step)):
                    weights = block_weights(
                        *(scores[number][..., heads], totals[number][:, heads], first, end),
                        measures=measures,
                    )
                    _, best = select_best(weights[None], names[None], self.choice.keep)
                    found[number, group, which] = best[0]
        return found


class SparseAttention(_OverBlocks, name="kv.sparse_attention", traits=(Pure,)):
    """`kv.attention` to the blocks of `kv.pick_blocks` and to the window: q [b, s, H, D] -> [b, s, H, D], and
    of each sampled query what share of its whole attention these keys hold, f32 [b, S, H].

    That share is sum of e^score over them / e^total, `totals` being those of `kv.block_scores`.
    """

    _: KW_ONLY
    v: Value = operand()
    blocks: Value = operand()
    totals: Value = operand()
    out: Value = result()
    shares: Value = result()

    def infer(self) -> tuple[Type, ...]:
        return self.q.type, self.totals.type

    def verify(self) -> Iterator[str]:
        yield from self._problems(self.k, self.v)
        b, tokens, heads, _ = tensor_type(self.q, 4).static_shape
        if self.totals.type is not TensorType((b, self.choice.samples(tokens), heads), f32):
            yield f"totals {self.totals.type} are not those of the samples of {self.q.type}"
        lists = 1 if self.step is None else 3
        if self.blocks.type is not TensorType((b, self.cache_heads, lists, self.sparse[0]), i32):
            yield f"blocks are i32 [b, {self.cache_heads}, {lists}, {self.sparse[0]}]; got {self.blocks.type}"
        if self.v.type is not self.k.type and not self.scales:
            yield f"keys are {self.k.type}, values {self.v.type}"

    def evaluate(self, q: Array, k: Array, pos: Array, *rest: Array) -> tuple[Array, Array]:
        *more, v, blocks, totals = rest
        sparse, tokens = self.choice, q.shape[1]
        out = np.empty(q.shape, np.float32)
        shares = np.empty(totals.shape, np.float32)
        sampled = list(range(0, tokens, sparse.every))
        for number, start in enumerate(map(int, pos)):
            scales, far, heat = self._given(tuple(more), number)
            window, end = sparse.window_start(start), min(start + tokens, self.held)
            own = 0 if self.step is None else start // self.step * self.step
            last = 0 if self.step is None else max(own - self.step, 0)
            hidden_from = start + np.arange(tokens)[:, None]
            for group in range(self.cache_heads):
                parts = []  # positions, and the rotation that meets them
                for which, (first, stop) in enumerate(sparse.ranges(start, self.step)):
                    for block in blocks[number, group, which, : min(sparse.keep, stop - first)]:
                        parts.append((np.arange(sparse.block) + int(block) * sparse.block, which))
                for which, (low, high) in enumerate(((own, end), (last, own), (0, last))[: 1 + len(far)]):
                    parts.append((np.arange(max(low, window), max(high, low, window)), which))
                positions = np.concatenate([rows for rows, _ in parts])
                keys, values = (x[number, group, positions] for x in (k, v))
                if scales:
                    keys, values = (rows_of(x, s[group, positions]) for x, s in zip((keys, values), scales))
                wide, places = keys.astype(np.float32), np.cumsum([0, *(len(rows) for rows, _ in parts)])
                for head in (h for h, g in enumerate(self.kv_heads) if g == group):
                    rotated = [q[number, :, head], *(x[:, head] for x in far)]
                    scores = np.concatenate(
                        [
                            self._scored(rotated[which], wide[low:high], heat)
                            for (_, which), low, high in zip(parts, places, places[1:])
                        ],
                        axis=1,
                    )
                    scores = np.where(positions[None, :] > hidden_from, np.float32(-np.inf), scores)
                    largest = scores.max(axis=1)
                    weights = np.exp(scores - largest[:, None])
                    total = weights.sum(axis=1, dtype=np.float32)
                    out[number, :, head] = weights @ values.astype(np.float32) / total[:, None]
                    seen = (largest + np.log(total))[sampled]
                    shares[number, :, head] = np.exp(seen - totals[number, :, head])
        return as_type(out, tensor_type(self.out).element), shares


class Replace(DeclaredOp, name="kv.replace", traits=(InPlace,)):
    """Overwrites state with values of its type."""

    state: Value = operand()
    values: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.state.type

    def verify(self) -> Iterator[str]:
        if self.values.type is not self.state.type:
            yield f"the state is {self.state.type}, the values are {self.values.type}"

    def evaluate(self, state: Array, values: Array) -> Array:
        state[...] = values
        return state
