"""How a prompt of any length runs over the compiled sequence lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tyir.diagnostics import TyirError

__all__ = ["Chunk", "plan_chunks"]


@dataclass(frozen=True)
class Chunk:
    """`count` tokens from position `start`, run by the program for `seqlen` tokens (the rest is padding)."""

    start: int
    count: int
    seqlen: int


def plan_chunks(tokens: int, position: int, seqlens: Sequence[int], capacity: int) -> Iterator[Chunk]:
    """Chunks for `tokens` new tokens when `position` are cached.

    The largest length while it is full, then the smallest that holds the rest.

    A step on a memory-bound machine costs nearly the same for one token as for a few, so padding beats
    several short steps.  `TyirError` when the cache is full.
    """
    if position + tokens > capacity:
        raise TyirError(
            f"{tokens} tokens do not fit: {position} of the cache's {capacity} positions are taken,"
            f" {capacity - position} are left",
            help=f"shorten the prompt, or compile with --max-kv {position + tokens} or more",
        )
    end = position + tokens
    while position < end:
        left = end - position
        fitting = [s for s in seqlens if position + s <= capacity]
        if not fitting:
            raise TyirError(
                f"no compiled length fits: {capacity - position} positions are left in the cache and the"
                f" shortest length is {min(seqlens)}",
                help="compile with length 1 among --seqlens",
            )
        holding = [s for s in fitting if s >= left]
        seqlen = min(holding) if holding else max(fitting)
        count = min(seqlen, left)
        yield Chunk(position, count, seqlen)
        position += count
