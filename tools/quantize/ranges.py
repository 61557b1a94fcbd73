"""The range of every group of weights, chosen for the output of the linear it belongs to.

A group's lowest and highest value are tried in pairs.  Each pair rounds the group's weights in another way;
what counts is the error of the whole output, given what the other groups of the row have become: groups are
visited in order, and one makes up for what those around it did (coordinate descent, exact in every step).
Rows are independent of each other and go in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from tyir.tools.quantize.arithmetic import (
    dequantized,
    extremes,
    quantized,
    scales_and_zeros,
    to_f16,
)
from tyir.tools.quantize.moments import Moments
from tyir.tools.quantize.settings import Grid, Work

__all__ = ["search_ranges"]

Tensor = Any
_ROWS: Final = 1024  # so many rows of a group stay in a core's cache
_NARROWEST: Final = {3: 0.44, 4: 0.6, 8: 0.9}  # the smallest part of the full range that is tried


def search_ranges(weight: Tensor, columns: Tensor | None, moments: Moments, grid: Grid, work: Work) -> Tensor:
    """The ranges [2, N, K/g] of a folded weight [N, K] whose columns were scaled by `columns` [K]."""
    n, k = weight.shape
    size = grid.group_size
    widest = extremes(weight, grid)
    ranges = widest.clone()
    second = moments.inputs.second
    # the weight in the coordinates of the inputs as they are, before they are divided by the scales
    back = torch.ones(k, device=weight.device) if columns is None else 1 / columns
    current = dequantized(quantized(weight, None, grid), grid) * back
    for _ in range(work.sweeps):
        for group in range(k // size):
            of = slice(group * size, (group + 1) * size)
            block = second[of, of]
            pull = current @ second[:, of]
            pull -= current[:, of] @ block
            pull -= moments.targets[:, of]
            pull *= 2 * back[of]
            curvature = block * back[of] * back[of][:, None]
            for start in range(0, n, _ROWS):
                rows = slice(start, min(start + _ROWS, n))
                found = _best(
                    weight[rows, of].contiguous(),
                    (pull[rows], curvature),
                    (widest[:, rows, group, None], ranges[:, rows, group, None]),
                    grid,
                    work.points,
                )
                current[rows, of] = found[0] * back[of]
                ranges[:, rows, group] = found[1][..., 0]
    return ranges


def _best(
    weight: Tensor, error: tuple[Tensor, Tensor], ranges: tuple[Tensor, Tensor], grid: Grid, points: int
) -> tuple[Tensor, Tensor]:
    """The de-quantised weight [R, g] and its range [2, R, 1] that give the least error.

    `error`: the linear part [R, g] and the curvature [g, g]; `ranges`: the widest and the present.
    """
    pull, curvature = error
    widest, present = ranges
    low, high = present[0].clone(), present[1].clone()
    best = _rounded(weight, low, high, grid)
    least = _error(best, pull, curvature)
    for a, b in _fractions(grid, points):
        tried_low, tried_high = to_f16(widest[0] * a), to_f16(widest[1] * b)
        tried = _rounded(weight, tried_low, tried_high, grid)
        cost = _error(tried, pull, curvature)
        better = (cost < least)[:, None]
        least = torch.where(better[:, 0], cost, least)
        best = torch.where(better, tried, best)
        low, high = torch.where(better, tried_low, low), torch.where(better, tried_high, high)
    return best, torch.stack([low, high])


def _fractions(grid: Grid, points: int) -> Iterator[tuple[float, float]]:
    """Parts of the widest range, the whole first; the same at both ends where zero is in the middle."""
    step = (1 - _NARROWEST[grid.bits]) / points
    if not grid.zero_point:
        fine = step / 4
        yield from ((1 - fine * i, 1 - fine * i) for i in range(4 * points))
        return
    yield from ((1 - step * i, 1 - step * j) for i in range(points) for j in range(points))


def _rounded(weight: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """`dequantized(quantized(...))` of one group, whose range lies within its weights' own: then clamping
    the whole numbers is clamping the weights, as rounding is monotonous.  Not rounded to f16 at the end.
    """
    scales, zeros = scales_and_zeros(low, high, grid)
    least = (torch.round(low / scales) + zeros).clamp_(0, grid.highest)
    most = (torch.round(high / scales) + zeros).clamp_(0, grid.highest)
    q = torch.round(weight / scales).add_(zeros)
    return torch.minimum(torch.maximum(q, least, out=q), most, out=q).sub_(zeros).mul_(scales)


def _error(weight: Tensor, pull: Tensor, curvature: Tensor) -> Tensor:
    """What depends on this group of the squared error of each row [R]."""
    return (weight @ curvature).add_(pull).mul_(weight).sum(1)
