"""Attention without a cache, and its reference meaning, which the ops with caches share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty.elementwise import softcap
from tyir.dialects.ty.tensors import Array, as_type, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Pure
from tyir.types import Type

__all__ = ["Attention", "attend", "default_kv_heads", "softmax"]


def softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Softmax over the last axis; rows hold at least one finite entry."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attend(
    q: Array,
    k: Array,
    v: Array,
    first: int,
    scale: float,
    window: int,
    kv_heads: tuple[int, ...],
    cap: float | None = None,
) -> npt.NDArray[np.float32]:
    """Causal attention of one sequence in f32: q [s, H, D] at positions first.., k and v [G, t, D] at
    positions 0.. -> [s, H, D].

    `window` > 0 limits each query to the last `window` positions, itself included; `cap` is the scores'
    soft cap.
    """
    out = np.empty(q.shape, np.float32)
    queries = first + np.arange(q.shape[0])[:, None]
    keys = np.arange(k.shape[1])[None, :]
    hidden = (keys > queries) | ((keys <= queries - window) if window > 0 else False)
    for head, group in enumerate(kv_heads):
        scores = q[:, head].astype(np.float32) @ k[group].astype(np.float32).T * np.float32(scale)
        scores = scores if cap is None else softcap(scores, cap)
        out[:, head] = softmax(np.where(hidden, np.float32(-np.inf), scores)) @ v[group].astype(np.float32)
    return out


def default_kv_heads(heads: int, kv_heads: int) -> tuple[int, ...]:
    """Which key/value head each query head reads in grouped-query attention: groups of heads // kv_heads
    neighbours.
    """
    return tuple(h * kv_heads // heads for h in range(heads))


class Attention(DeclaredOp, name="ty.attention", traits=(Pure,)):
    """Self-attention without a cache: softmax(scale * q k^T) v per head; q [b, s, H, D], k and v [b, s, G, D]
    -> [b, s, H, D].

    Scores, softmax and sums are f32.  `causal`: a row sees itself and those before it, with `window` > 0 at
    most that many; otherwise (a vision tower) it sees all rows of its segment, where `segments` are the
    bounds 0, .., s of the segments, none being one segment, of which q may be some rows.  `softcap` c makes a
    score s c * tanh(s / c).
    """

    q: Value = operand()
    k: Value = operand()
    v: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    window: int = attr(default=0)
    softcap: float | None = attr(default=None)
    causal: bool = attr(default=True)
    segments: tuple[int, ...] | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return self.q.type

    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each segment of keys, of an attention that is not causal, whose s is known."""
        rows = tensor_type(self.k).static_shape[1]
        return list(pairwise(self.segments or (0, rows)))

    def verify(self) -> Iterator[str]:
        q, k = tensor_type(self.q), tensor_type(self.k)
        if q.rank != 4 or k.rank != 4 or q.dims[3] != k.dims[3]:
            yield f"q and k must be [b, s, heads, D] with equal D; got {q} and {k}"
        elif (q.dims[2] or 0) % (k.dims[2] or 1):
            yield f"{q.dims[2]} query heads are not a multiple of {k.dims[2]} key/value heads"
        if self.causal and self.segments:
            yield "has segments and is causal; segments are for attention that sees both ways"
        if not self.causal and self.window:
            yield f"has a window of {self.window} and is not causal; a window looks back"
        if self.segments and (
            self.segments[0] != 0
            or (q.rank == 4 and self.segments[-1] != q.dims[1])
            or any(a >= b for a, b in pairwise(self.segments))
        ):
            yield f"segments must ascend from 0 to the number of rows, {q.dims[1] if q.rank == 4 else '?'}"

    def evaluate(self, q: Array, k: Array, v: Array) -> Array:
        heads = default_kv_heads(q.shape[2], k.shape[2])
        if not self.causal:
            return as_type(self._both_ways(q, k, v, heads), tensor_type(self.out).element)
        rows = [
            attend(
                q[i],
                k[i].swapaxes(0, 1),
                v[i].swapaxes(0, 1),
                0,
                self.scale,
                self.window,
                heads,
                self.softcap,
            )
            for i in range(q.shape[0])
        ]
        return as_type(np.stack(rows), tensor_type(self.out).element)

    def _both_ways(self, q: Array, k: Array, v: Array, kv_heads: tuple[int, ...]) -> npt.NDArray[np.float32]:
        out = np.empty(q.shape, np.float32)
        for first, end in pairwise(self.segments or (0, k.shape[1])):
            own = slice(first, end) if self.segments else slice(None)  # one segment: of any rows
            for head, group in enumerate(kv_heads):
                mine = q[:, own, head].astype(np.float32)
                keys, values = (x[:, first:end, group].astype(np.float32) for x in (k, v))
                scores = mine @ keys.swapaxes(1, 2) * np.float32(self.scale)
                scores = scores if self.softcap is None else softcap(scores, self.softcap)
                out[:, own, head] = softmax(scores) @ values
        return out
