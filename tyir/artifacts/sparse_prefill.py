"""Sparse prefill: which blocks of a cache the queries of a prompt's step see.

A step of s tokens at position pos, blocks of B positions, whatever the cache holds:

    window     from floor(max(pos - window, 0) / B) B on: seen whole, as the step's own keys are
    candidates the blocks before: of each range of them `keep` are seen, block 0 always
    ranges     all candidates; with dual chunk attention those of the own chunk, of the one before and of
               those before that, each with a choice of its own

Every `every`-th query is sampled: its scores with all keys are computed, and of each block what share of its
attention the block holds.  They choose, by the sum of these shares over samples and over the query heads of
a cache head.  In one of four steps every fourth sample has no part in that: it measures what the choice is
worth.  The number of blocks is fixed, so that commands, buffers and time are.

Chosen from real scores as MInference (arXiv:2407.02490) does, whole blocks as MoBA (arXiv:2502.13189), one
choice for the query heads of a cache head as NSA (arXiv:2502.11089).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final, Self

from tyir.diagnostics import Diagnostic, TyirError

__all__ = ["MOST_TOKENS", "QUARTER", "RECALL", "BlockChoice", "is_measured"]

RECALL: Final = "recall"  # what its state is called, with the layer's number
MOST_TOKENS: Final = 128  # of a step: of more a layer works on blocks of rows, one after the other
QUARTER: Final = 4  # of so many steps, and of so many samples of such a step, the last measures
_LEAST: Final = {"keep": 2, "block": 16, "window": 0, "every": 1}


def is_measured(sample: int) -> bool:
    """Whether a sample measures, in a step that does; the others choose."""
    return sample % QUARTER == QUARTER - 1


@dataclass(frozen=True)
class BlockChoice:
    """`keep` blocks of `block` positions for each range, beside the last `window` positions; every `every`-th
    query is sampled.
    """

    keep: int
    block: int = 256
    window: int = 1024
    every: int = 4

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self | None:
        """What options and ops hold: the four numbers, or none of them for dense attention."""
        return cls(*numbers) if len(numbers) == len(_LEAST) else None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`keep=32,block=256`: what is not said is as usual.  `TyirError` for anything else."""
        names = [f.name for f in fields(cls)]
        found: dict[str, int] = {}
        for entry in text.split(","):
            name, equals, value = entry.strip().partition("=")
            if not equals or name not in names or name in found or not value.isdecimal() or len(value) > 9:
                raise TyirError(
                    f"'{entry.strip()}' in --sparse-prefill '{text}' is not one of"
                    f" {', '.join(f'{n}=N' for n in names)}, each once",
                    help="use --sparse-prefill keep=32",
                )
            found[name] = int(value)
        if "keep" not in found:
            raise TyirError(
                f"--sparse-prefill '{text}' does not say how many blocks are kept", help="add keep=32"
            )
        return cls(**found).checked()

    def problems(self) -> Iterator[Diagnostic]:
        """What makes no choice."""
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                yield Diagnostic(
                    f"sparse prefill has {name}={value}, at least {least} is needed",
                    help=f"use {name}={least}",
                )
        if self.block % _LEAST["block"]:
            yield Diagnostic(
                f"sparse prefill has block={self.block}, which is not a multiple of {_LEAST['block']}",
                help=f"use block={-(-self.block // _LEAST['block']) * _LEAST['block']}",
            )

    def checked(self) -> Self:
        """Itself; `TyirError` for numbers that make no choice."""
        if problems := list(self.problems()):
            raise TyirError(problems)
        return self

    @property
    def numbers(self) -> tuple[int, ...]:
        """What `of` reads."""
        return astuple(self)

    def text(self) -> str:
        """What `parse` reads."""
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @property
    def bend(self) -> int:
        """From this position on a step sees no more keys; to tell which takes longer and longer."""
        return self.window + self.keep * self.block

    def samples(self, tokens: int) -> int:
        """How many queries of a step are sampled: tokens 0, `every`, .."""
        return -(-tokens // self.every)

    @staticmethod
    def measures(pos: int, tokens: int) -> bool:
        """Whether a step of a length of `tokens` measures; in the others all samples choose."""
        return pos // tokens % QUARTER == QUARTER - 1

    def measured(self, tokens: int) -> list[int]:
        """The samples among a step's first tokens that measure, in a step that does."""
        return [number for number in range(self.samples(tokens)) if is_measured(number)]

    def blocks(self, capacity: int) -> int:
        """Blocks of a cache of so many positions."""
        return -(-capacity // self.block)

    def window_start(self, pos: int) -> int:
        """The first position that is seen whatever is chosen, block 0 excepted."""
        return max(pos - self.window, 0) // self.block * self.block

    def ranges(self, pos: int, step: int | None) -> list[tuple[int, int]]:
        """The candidates [first, end) of each range in blocks, by the rotation of the queries that meets them
        (`kv.dual_chunk_attention`): the own chunk's first.  `step`: the tokens of a chunk.
        """
        end = self.window_start(pos) // self.block
        if not step:
            return [(0, end)]
        own = pos // step * step // self.block
        last = max(own - step // self.block, 0)
        first, second = min(own, end), min(last, end)
        return [(first, end), (second, first), (0, second)]

    def leaves_out(self, pos: int, step: int | None) -> bool:
        """Whether there are more candidates than are kept."""
        return any(end - first > self.keep for first, end in self.ranges(pos, step))
