"""The range of every group of weights, chosen for the output of the linear it belongs to.

A group's lowest and highest value are tried in pairs.  Each pair rounds the group's weights in another way;
what counts is the error of the whole output, given what the other groups of the row have become: groups are
visited in order, and one makes up for what those around it did (coordinate descent, exact in every step).
Rows are independent of each other and go in parallel.

A group's pattern of roundings follows from its step, the width of the range over the number of steps, so
values between those of the grid are worth trying: later sweeps shift the grid, by two irrational steps that
leave no gaps (Roberts' R2 sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from tyir.tools.quantize.arithmetic import (
    dequantized,
    extremes,
    quantized,
    scales_and_zeros,
    to_f16,
)
from tyir.tools.quantize.by_rows import by_rows
from tyir.tools.quantize.moments import Moments
from tyir.tools.quantize.settings import Grid, Work

__all__ = ["search_ranges"]

Tensor = Any
_ROWS: Final = 512  # so many rows of a group stay in a core's cache
_R2: Final = (0.7548776662466927, 0.5698402909980532)  # 1/p and 1/p^2 of p^3 = p + 1
_NARROWEST: Final = {3: 0.44, 4: 0.6, 8: 0.9}  # the smallest part of the full range that is tried


def search_ranges(weight: Tensor, columns: Tensor | None, moments: Moments, grid: Grid, work: Work) -> Tensor:
    """The ranges [2, N, K/g] of a folded weight [N, K] whose columns were scaled by `columns` [K]."""
    # the weight in the coordinates of the inputs as they are, before they are divided by the scales
    back = torch.ones(weight.shape[1], device=weight.device) if columns is None else 1 / columns
    tried = [
        torch.tensor(_fractions(grid, work.points, _shift(sweep)), device=weight.device).T[..., None]
        for sweep in range(work.sweeps)
    ]
    wanted = moments.wanted

    def search(rows: slice) -> Tensor:
        return _descend(weight[rows], back, moments, wanted[rows], tried, grid)

    return torch.cat(by_rows(len(weight), _ROWS, weight.device.type, search), dim=1)


def _descend(
    weight: Tensor,
    back: Tensor,
    moments: Moments,
    targets: Tensor,
    tried: Sequence[Tensor],
    grid: Grid,
) -> Tensor:
    """The ranges [2, R, K/g] of rows [R, K] with their targets [R, K]; `tried`: parts of the widest range
    [2, P, 1] for each sweep.
    """
    size = grid.group_size
    widest = extremes(weight, grid)
    ranges = widest.clone()
    second = moments.inputs.second
    current = dequantized(quantized(weight, None, grid), grid) * back
    for fractions in tried:
        for group in range(weight.shape[1] // size):
            of = slice(group * size, (group + 1) * size)
            block = second[of, of]
            pull = current @ second[:, of]
            pull -= current[:, of] @ block
            pull -= targets[:, of]
            pull *= 2 * back[of]
            found, ranges[:, :, group] = _best(
                weight[:, of].contiguous(),
                (pull, block * back[of] * back[of][:, None]),
                torch.cat([ranges[:, None, :, group], to_f16(widest[:, None, :, group] * fractions)], dim=1),
                grid,
            )
            current[:, of] = found * back[of]
    return ranges


def _best(weight: Tensor, error: tuple[Tensor, Tensor], tried: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The de-quantised weight [R, g] and its range [2, R] that give the least error; the first of equals.

    `error`: the linear part [R, g] and the curvature [g, g]; `tried`: the ranges [2, P, R].

    A range lies within its weights' own, so that clamping the whole numbers is clamping the weights, as
    rounding is monotonous; the de-quantised weight is not rounded to f16 at the end.
    """
    pull, curvature = error
    scales, zeros = scales_and_zeros(tried[0], tried[1], grid)
    # whole numbers are counted from the zero point here: fewer steps for every weight
    least, most = (
        (torch.round(end / scales) + zeros).clamp_(0, grid.highest).sub_(zeros)[..., None] for end in tried
    )
    parts, scales = (1 / scales)[..., None], scales[..., None]

    def rounded(part: Tensor, least: Tensor, most: Tensor, scales: Tensor) -> Tensor:
        q = (weight * part).round_()
        return torch.minimum(torch.maximum(q, least, out=q), most, out=q).mul_(scales)

    costs = []
    for each in zip(parts, least, most, scales, strict=True):
        w = rounded(*each)
        costs.append((w @ curvature).add_(pull).mul_(w).sum(1))
    chosen = torch.stack(costs).argmin(0)
    rows = torch.arange(len(weight), device=weight.device)
    return rounded(*(each[chosen, rows] for each in (parts, least, most, scales))), tried[:, chosen, rows]


def _shift(sweep: int) -> tuple[float, float]:
    """By what parts of its steps a sweep's grid is shifted: the first two sweeps settle on the plain one."""
    first, second = (sweep * part % 1 if sweep > 1 else 0.0 for part in _R2)
    return first, second


def _fractions(grid: Grid, points: int, shift: tuple[float, float] = (0.0, 0.0)) -> list[tuple[float, float]]:
    """Parts of the widest range, the widest first; the same at both ends where zero is in the middle."""
    step = (1 - _NARROWEST[grid.bits]) / points
    low, high = shift
    if not grid.zero_point:
        fine = step / 4
        return [(1 - fine * (i + low), 1 - fine * (i + low)) for i in range(4 * points)]
    return [(1 - step * (i + low), 1 - step * (j + high)) for i in range(points) for j in range(points)]
