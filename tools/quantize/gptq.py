"""GPTQ (Frantar et al., arXiv 2210.17323): weights are rounded one input channel after another, and what
rounding did to the output is made up for by the channels that are still to come.

Channels keep their order (no act-order), so that groups are contiguous; scales and zero points are those of
the ranges it is given.  The targets are the unquantised model's outputs: what the layers before did wrong is
made up for as well.
"""

from __future__ import annotations

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


def gptq_rounded(
    weight: Tensor, columns: Tensor | None, ranges: Tensor, moments: Moments, grid: Grid, path: str
) -> Quantized:
    """q, scales and zeros of a folded weight [N, K], for the ranges [2, N, K/g].

    Channels that no token excites (a zero on the diagonal) are rounded to nearest.  `TyirError` when the
    moments of `path` cannot be factored.
    """
    k = weight.shape[1]
    size = grid.group_size
    scales, zeros = scales_and_zeros(ranges[0], ranges[1], grid)
    targets = moments.targets if columns is None else moments.targets / columns
    factor, damping = _damped(moments, columns, path)
    # the weight of least error, without rounding; damping holds it near the one there is
    work = torch.cholesky_solve((targets + damping * weight).T, factor).T.contiguous()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    q = torch.empty_like(weight)
    for start in range(0, k, size):
        of = slice(start, start + size)
        s, z = scales[:, start // size, None], zeros[:, start // size, None]
        part, wrong = work[:, of], torch.empty_like(work[:, of])
        for i in range(size):
            column = part[:, i : i + 1]
            whole = (torch.round(column / s) + z).clamp_(0, grid.highest)
            q[:, start + i : start + i + 1] = whole
            off = (column - (whole - z) * s) / upper[start + i, start + i]
            wrong[:, i : i + 1] = off
            part[:, i:] -= off * upper[start + i, start + i : start + size]
        work[:, start + size :] -= wrong @ upper[of, start + size :]
    return q, scales, zeros


def _damped(moments: Moments, columns: Tensor | None, path: str) -> tuple[Tensor, float]:
    """The Cholesky factor of the damped moments of the divided inputs, and the damping."""
    second = moments.inputs.second.clone()
    if columns is not None:
        second /= columns
        second /= columns[:, None]
    diagonal = second.diagonal()
    damping = _DAMPING * float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = 1.0
    added = 0.0
    for _ in range(_ATTEMPTS):
        diagonal += damping - added
        added = damping
        factor, failed = torch.linalg.cholesky_ex(second)
        if not int(failed):
            return factor, damping
        damping *= 10
    raise TyirError(
        f"{path}: the moments of its inputs cannot be factored",
        help="give more or more varied calibration text, or use --method awq",
    )
