"""What sparse steps of a prompt have seen: of sampled queries that had no part in the choice, what share of
their whole attention the keys hold that they saw (`tyir.artifacts.sparse_prefill`).

One of four steps measures.  Only those that left something out count, or a long beginning that sees all of
itself would hide the rest.  Memory does not grow with the prompt: shares are counted in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.sparse_prefill import RECALL, BlockChoice

__all__ = ["Recall"]

Array = npt.NDArray[Any]
_PARTS: Final = 1000
_LOW: Final = 0.05  # the share of queries that may hold less than what is reported


class Recall:
    """Shares by layer, over heads, queries and steps."""

    def __init__(self) -> None:
        self._counts: dict[int, npt.NDArray[np.int64]] = {}
        self._sum = 0.0
        self.steps = 0

    def add(self, states: Mapping[tuple[int, str], Array], choice: BlockChoice, tokens: int) -> None:
        """What a step has left in its state, [1, S, H] by die and name; `tokens` of it are no padding."""
        measured = choice.measured(tokens)
        self.steps += 1
        for (_, name), shares in states.items():
            if name.startswith(RECALL):
                found = np.clip(shares[0, measured].ravel(), 0, 1)
                counts = self._counts.setdefault(
                    int(name.removeprefix(RECALL)), np.zeros(_PARTS + 1, np.int64)
                )
                counts += np.bincount((found * _PARTS).astype(np.int64), minlength=_PARTS + 1)
                self._sum += float(found.sum(dtype=np.float64))

    @property
    def count(self) -> int:
        """Shares that were measured."""
        return int(sum(counts.sum() for counts in self._counts.values()))

    @property
    def mean(self) -> float:
        """Their mean, which hides the worst ones; 1 where nothing was left out."""
        return self._sum / self.count if self.count else 1.0

    @property
    def low(self) -> float:
        """The 5th percentile: 95 of 100 shares are at least this; 1 where nothing was left out."""
        return _percentile(sum(self._counts.values(), np.zeros(_PARTS + 1, np.int64)))

    @property
    def worst(self) -> tuple[int, float] | None:
        """The layer with the smallest 5th percentile, and that; None where nothing was left out."""
        lows = [(_percentile(counts), layer) for layer, counts in self._counts.items()]
        return min(lows)[::-1] if lows else None

    def text(self) -> str:
        """In a line, for people."""
        if (worst := self.worst) is None:
            return "sparse prefill: nothing was left out"
        layer, low = worst
        return (
            f"sparse prefill: 95 of 100 sampled queries saw {self.low:.1%} of their attention or more"
            f" (mean {self.mean:.1%}; layer {layer}: {low:.1%}), {self.steps} steps"
        )


def _percentile(counts: npt.NDArray[np.int64]) -> float:
    total = counts.sum()
    if not total:
        return 1.0
    return int(np.searchsorted(np.cumsum(counts), _LOW * total, side="right")) / _PARTS
