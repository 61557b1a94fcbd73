"""AWQ's scales: input channels that carry large activations get finer steps (Lin et al., arXiv 2306.00978).

For the linears that read one producer: s = magnitude of the activations^r, or that over magnitude of the
weights^(1 - r); r from 0 to 1, and no scaling at all.  The scales of the least output error win.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from tyir.tools.quantize.arithmetic import dequantized, folded, quantized
from tyir.tools.quantize.by_rows import by_rows
from tyir.tools.quantize.moments import Inputs
from tyir.tools.quantize.settings import Grid

__all__ = ["ChosenScale", "search_scale"]

Tensor = Any
_SAMPLED: Final = 1 << 19  # weights of each reader that are looked at, in whole rows
_AT_ONCE: Final = 1 << 18  # weights that stay in a core's cache


@dataclass(frozen=True)
class ChosenScale:
    """`scale` [channels], None for no scaling; `ratio` and `duo` say how it was made, `error` and `identity`
    are the errors with and without it.
    """

    scale: Tensor | None
    ratio: float | None
    duo: bool
    error: float
    identity: float


def search_scale(
    weights: Sequence[Tensor], inputs: Inputs, head: int, repeats: int, grid: Grid, ratios: int = 20
) -> ChosenScale:
    """The scale of linears [N, K] that read the same `inputs` [K].

    The channels of a producer stand in the readers' columns in runs of `head`, each `repeats` times.
    `ratios`: how many steps there are from 0 to 1.
    """
    some = [w[:: -(-w.numel() // _SAMPLED)] for w in weights]
    size = grid.group_size
    blocks = torch.stack(
        [inputs.second[i : i + size, i : i + size] for i in range(0, len(inputs.second), size)]
    )
    tried = list(_candidates(some, inputs, head, repeats, grid, ratios))
    columns = [None, *(_of_columns(scale, head, repeats) for _, _, scale in tried)]

    def errors(weight: Tensor, rows: slice) -> list[float]:
        found = []
        for each in columns:
            rounded = dequantized(quantized(folded(weight[rows], None, each), None, grid), grid)
            off = (rounded if each is None else rounded / each) - weight[rows]
            by_group = off.reshape(len(off), -1, size).transpose(0, 1)
            found.append(float(((by_group @ blocks) * by_group).sum(dtype=torch.float64)))
        return found

    parts = [
        part
        for w in some
        for part in by_rows(len(w), _AT_ONCE // w.shape[1], w.device.type, partial(errors, w))
    ]
    identity, *scaled = (sum(each) for each in zip(*parts, strict=True))
    chosen = ChosenScale(None, None, False, identity, identity)
    for (ratio, duo, scale), found in zip(tried, scaled, strict=True):
        if found < chosen.error:
            chosen = ChosenScale(scale, ratio, duo, found, identity)
    return chosen


def _candidates(
    weights: Sequence[Tensor], inputs: Inputs, head: int, repeats: int, grid: Grid, ratios: int
) -> Iterator[tuple[float, bool, Tensor]]:
    joined = torch.cat(list(weights))
    groups = joined.abs().reshape(len(joined), -1, grid.group_size)
    of_weights = (groups / (groups.amax(2, keepdim=True) + 1e-6)).reshape(joined.shape).mean(0)
    of_weights = _of_channels(of_weights, head, repeats)
    of_inputs = _of_channels(inputs.magnitude, head, repeats)
    for duo in (False, True):
        for step in range(0 if duo else 1, ratios + 1):
            ratio = step / ratios
            scale = of_inputs**ratio
            if duo:
                scale = scale / (of_weights ** (1 - ratio) + 1e-4)
            scale = scale.clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if bool(torch.isfinite(scale).all()):
                yield ratio, duo, scale


def _of_channels(x: Tensor, head: int, repeats: int) -> Tensor:
    """The mean over the columns [K] that stand for one channel."""
    return x.reshape(-1, repeats, head).mean(1).reshape(-1)


def _of_columns(x: Tensor, head: int, repeats: int) -> Tensor:
    return x.reshape(-1, head).repeat_interleave(repeats, 0).reshape(-1)
