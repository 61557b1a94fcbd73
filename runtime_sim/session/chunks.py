"""How a prompt of any length runs over the compiled sequence lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tyir.artifacts.dual_chunk import DualChunk
from tyir.diagnostics import TyirError

__all__ = ["Chunk", "length_for", "pad", "plan_chunks"]


@dataclass(frozen=True)
class Chunk:
    """`count` tokens from position `start`, run by the program for `seqlen` tokens (the rest is padding)."""

    start: int
    count: int
    seqlen: int


def plan_chunks(
    tokens: int,
    position: int,
    seqlens: Sequence[int],
    capacity: int,
    chunks: DualChunk | None = None,
    sparse: int | None = None,
) -> Iterator[Chunk]:
    """Chunks for `tokens` new tokens when `position` are cached.

    The largest length while it is full, then the smallest that holds the rest.

    A step on a memory-bound machine costs nearly the same for one token as for a few, so padding beats
    several short steps.  Padding may reach past the end of the cache: the programs drop it (`kv.append`), so
    that every position can be used whatever the lengths.  No step crosses a border of `chunks`.  `sparse`, a
    length beside the others, is for what is followed by as many tokens or more: the last ones of a prompt see
    all of it.  `TyirError` when the tokens do not fit.
    """
    if position + tokens > capacity:
        raise TyirError(
            f"{tokens} tokens do not fit: {position} of the cache's {capacity} positions are taken,"
            f" {capacity - position} are left",
            help=f"shorten the prompt, or compile with --max-kv {position + tokens} or more",
        )
    end = position + tokens
    while position < end:
        left = end - position if chunks is None else min(end - position, chunks.room(position))
        seqlen = length_for(left, seqlens)
        if sparse is not None and end - position >= 2 * sparse:
            seqlen = sparse
        count = min(seqlen, left)
        yield Chunk(position, count, seqlen)
        position += count


def length_for(tokens: int, seqlens: Sequence[int]) -> int:
    """The compiled length that a step for `tokens` takes: the smallest that holds them, else the largest."""
    return min((s for s in seqlens if s >= tokens), default=max(seqlens))


def pad(ids: Sequence[int], seqlen: int) -> list[int]:
    """`seqlen` tokens: these, then the last of them again (token 0 after none).

    Nothing that counts reads padding, but products do: their zero weights times a value that is not finite
    are NaN.  A token that was computed already is as finite as the rest.
    """
    filler = ids[-1] if ids else 0
    return [*ids, *[filler] * (seqlen - len(ids))]
