"""GPTQ (Frantar et al., arXiv 2210.17323): weights are rounded one input channel after another, and what
rounding did to the output is made up for by the channels that are still to come.

In the form that Chee et al. (arXiv 2307.13304, theorem 6) show to be the same: with the moments H = R R^T,
R upper triangular, channel k is rounded after (w_j - q_j) R_jk / R_kk of every channel j before it has been
added, so that H is factored once and not inverted.

Loud channels come first, when most of the others can still make up for them; scales and zero points are those
of the ranges it is given, so that groups stay contiguous whatever the order (the original's act-order with
static groups).  Then channels are rounded again, given all others, as often as the work allows (coordinate
descent: QuantEase, arXiv 2309.01885).  The targets are the unquantised model's outputs: what the layers
before did wrong is made up for as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from tyir.diagnostics import TyirError
from tyir.tools.quantize.arithmetic import Quantized, scales_and_zeros
from tyir.tools.quantize.moments import Moments
from tyir.tools.quantize.settings import Grid

__all__ = ["gptq_rounded"]

Tensor = Any
_DAMPING: Final = 0.01  # of the mean of the diagonal; ten times as much when that is not enough
_ATTEMPTS: Final = 4
_BLOCK: Final = 32  # channels between two products with all others


def gptq_rounded(
    weight: Tensor,
    columns: Tensor | None,
    ranges: Tensor,
    moments: Moments,
    grid: Grid,
    path: str,
    sweeps: int = 0,
) -> Quantized:
    """q, scales and zeros of a folded weight [N, K], for the ranges [2, N, K/g]; `sweeps` of rounding again.

    Channels that no token excites (a zero on the diagonal) are rounded to nearest.  `TyirError` when the
    moments of `path` cannot be factored.
    """
    scales, zeros = scales_and_zeros(ranges[0], ranges[1], grid)
    loudness = moments.inputs.second.diagonal()
    if columns is not None:
        loudness = loudness / columns.square()
    # the last is taken first
    order = torch.sort(loudness, stable=True).indices
    steps = _Steps(scales.T.contiguous(), zeros.T.contiguous(), (order // grid.group_size).tolist())
    factor, damping = _factored(moments, columns, order, path)
    best = _best(weight, columns, moments, order, factor, damping)
    q, off = _rounded(best, factor, steps, grid)
    if sweeps:
        del factor  # before there is another of its size
        _round_again(q, off.neg_(), _damped(moments, columns, order, damping), steps, grid, sweeps)
    found = torch.empty_like(weight)
    found[:, order] = q.T
    return found, scales, zeros


@dataclass(frozen=True)
class _Steps:
    """Scales and zero points [K/g, R], and the group of every channel in the order they are taken in."""

    scales: Tensor
    zeros: Tensor
    groups: list[int]

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points [R] of a channel."""
        return self.scales[self.groups[k]], self.zeros[self.groups[k]]

    def values(self, q: Tensor, k: int) -> Tensor:
        """What the numbers [R] of a channel stand for."""
        scales, zeros = self.of(k)
        return (q - zeros).mul_(scales)


def _best(
    weight: Tensor, columns: Tensor | None, moments: Moments, order: Tensor, factor: Tensor, damping: float
) -> Tensor:
    """The weight of least error [K, R], channels in this order, without rounding; damping holds it near the
    one there is.
    """
    targets = moments.targets if columns is None else moments.targets / columns
    best = torch.add(targets, weight, alpha=damping).T[order]
    del targets
    for triangle, upper in ((factor, False), (factor.T, True)):  # cholesky_solve would copy the factor
        best = torch.linalg.solve_triangular(triangle, best, upper=upper)
    return best.contiguous()


def _rounded(off: Tensor, factor: Tensor, steps: _Steps, grid: Grid) -> tuple[Tensor, Tensor]:
    """q [K, R] of some rows' best weights [K, R], the last channel first; the best weights, changed in place,
    become what rounding takes away from them.
    """
    q = torch.empty_like(off)
    diagonal = factor.diagonal()
    for end in range(len(off), 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        carried = factor[start:, start:end] / diagonal[start:end]
        part = torch.addmm(off[start:end], carried[end - start :].T, off[end:])
        for i in reversed(range(end - start)):
            k = start + i
            scales, zeros = steps.of(k)
            torch.div(part[i], scales, out=q[k]).round_().add_(zeros).clamp_(0, grid.highest)
            off[k] -= steps.values(q[k], k)
            if i:
                part[:i].addr_(carried[i, :i], off[k])
    return q, off


def _round_again(q: Tensor, off: Tensor, second: Tensor, steps: _Steps, grid: Grid, sweeps: int) -> None:
    """Round every channel of q [K, R] again, given the others, in place; `off` [K, R]: how far each weight is
    from the best one.
    """
    diagonal = second.diagonal().tolist()
    for _ in range(sweeps):
        for end in range(len(q), 0, -_BLOCK):
            start = max(end - _BLOCK, 0)
            pull = second[start:end] @ off
            block = second[start:end, start:end]
            for i in reversed(range(end - start)):
                k = start + i
                scales, _ = steps.of(k)
                change = (pull[i] / -diagonal[k]).div_(scales).add_(q[k]).round_()
                change.clamp_(0, grid.highest).sub_(q[k])
                q[k] += change
                change *= scales
                off[k] += change
                if i:
                    pull[:i].addr_(block[i, :i], change)


def _damped(moments: Moments, columns: Tensor | None, order: Tensor, damping: float) -> Tensor:
    """The damped moments of the divided inputs, channels in this order."""
    second = moments.inputs.second[order[:, None], order]
    if columns is not None:
        second /= columns[order]
        second /= columns[order][:, None]
    diagonal = second.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping
    return second


def _factored(moments: Moments, columns: Tensor | None, order: Tensor, path: str) -> tuple[Tensor, float]:
    """The lower Cholesky factor of the damped moments in this order, and the damping."""
    diagonal = moments.inputs.second.diagonal()
    mean = float((diagonal if columns is None else diagonal / columns.square()).mean())
    damping = _DAMPING * mean or 1.0
    for _ in range(_ATTEMPTS):
        # symmetric, and laid out as LAPACK takes it: factored where it is
        factor = _damped(moments, columns, order, damping).T
        info = torch.empty(0, dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if not int(info):
            return factor, damping
        damping *= 10
    raise TyirError(
        f"{path}: the moments of its inputs cannot be factored",
        help="give more or more varied calibration text, or use --method awq",
    )
