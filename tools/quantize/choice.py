"""Which of several quantisations of a model is taken: by a stretch of text apart from what was searched.

Windows between those that were searched share their chapters, names and author: what was fitted to the ones
is good for the others as well, and says nothing of another text.  So the stretch is the end of the text, with
a gap before it.

The losses of two candidates on one window have most of their scatter in common, so what is compared is their
difference, window by window, with the standard error of its mean.  Windows side by side are not independent
either: the error is taken over means of consecutive blocks (the method of batch means).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["apart", "chosen", "difference"]

Tensor = Any
_PART: Final = 5  # the last of so many parts judges
_GAP: Final = 1  # windows between
_LEAST: Final = 8  # windows that judge
_BLOCKS: Final = 16
_SURE: Final = 2.0  # standard errors


def apart(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [S, T] in the order of a text: those to search on, and those to judge by, [0, T] if too few."""
    count = len(windows) // _PART
    if count < _LEAST:
        return windows, windows[:0]
    return windows[: -count - _GAP], windows[-count:]


def difference(losses: Tensor, others: Tensor) -> tuple[float, float]:
    """By how much losses [S] of windows in the order of the text lie above others [S] of the same ones, on
    average, and the standard error of that.
    """
    each = (losses - others).double()
    blocks = [block.mean() for block in each.tensor_split(min(_BLOCKS, len(each)))]
    mean = sum(float(block) for block in blocks) / len(blocks)
    scatter = sum((float(block) - mean) ** 2 for block in blocks) / max(len(blocks) - 1, 1)
    return float(each.mean()), math.sqrt(scatter / len(blocks))


def chosen(nearest: Tensor, candidates: Sequence[Tensor]) -> int | None:
    """Which candidate is taken, None for rounding to nearest, from each one's losses [S] on judging windows.

    Candidates stand in the order of trust.  The first is taken unless rounding to nearest is better; each
    other one only if it is better than whatever would be taken instead, and than rounding to nearest, by
    more than chance.
    """
    taken, best = None, nearest
    for index, losses in enumerate(candidates):
        sure = _SURE if index else 0.0
        if all(mean < -sure * error for mean, error in (difference(losses, o) for o in (nearest, best))):
            taken, best = index, losses
    return taken
