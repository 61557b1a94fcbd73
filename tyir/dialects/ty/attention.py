"""Attention without a cache, and its reference meaning, which the ops with caches share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY

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
    """Causal self-attention without a cache: softmax(scale * q k^T) v per head; q [b, s, H, D], k and v [b,
    s, G, D] -> [b, s, H, D].

    Scores, softmax and sums are f32.  `window` > 0 is a sliding window (itself included); `softcap` c makes a
    score s c * tanh(s / c).
    """

    q: Value = operand()
    k: Value = operand()
    v: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    window: int = attr(default=0)
    softcap: float | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return self.q.type

    def verify(self) -> Iterator[str]:
        q, k = tensor_type(self.q), tensor_type(self.k)
        if q.rank != 4 or k.rank != 4 or q.dims[3] != k.dims[3]:
            yield f"q and k must be [b, s, heads, D] with equal D; got {q} and {k}"
        elif (q.dims[2] or 0) % (k.dims[2] or 1):
            yield f"{q.dims[2]} query heads are not a multiple of {k.dims[2]} key/value heads"

    def evaluate(self, q: Array, k: Array, v: Array) -> Array:
        heads = default_kv_heads(q.shape[2], k.shape[2])
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
