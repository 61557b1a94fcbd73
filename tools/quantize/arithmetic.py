"""The arithmetic of the pass awq-fold and of `ty.quantize_groups`, on torch tensors, bit for bit.

Shapes: a weight [N, K] has K/g groups a row; scales of rows [N] and of columns [K]; ranges [2, N, K/g].
"""

from __future__ import annotations

from typing import Any

import torch

from tyir.tools.quantize.settings import Grid

__all__ = ["Quantized", "dequantized", "extremes", "folded", "is_finite", "quantized", "to_f16"]

Tensor = Any  # torch is not followed by the type check
Quantized = tuple[Any, Any, Any]
"""q [N, K] (whole numbers in f32), scales [N, K/g] (f16 values in f32), zeros [N, K/g]."""


def to_f16(x: Tensor) -> Tensor:
    """x rounded to f16, as f32."""
    return x.to(torch.float16).to(torch.float32)


def is_finite(x: Tensor) -> bool:
    """Whether all values are; without another tensor of its size, which torch.isfinite makes."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(x))


def folded(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """f16(weight / rows * columns) in f32 [N, K]; not clamped yet."""
    w = weight.to(torch.float32)
    if rows is not None:
        w = w / rows[:, None]
    if columns is not None:
        w = w * columns
    return to_f16(w)


def extremes(weight: Tensor, grid: Grid) -> Tensor:
    """The widest range of each group [2, N, K/g], zero inside: what rounding to nearest takes."""
    groups = weight.reshape(weight.shape[0], -1, grid.group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if not grid.zero_point:
        high = torch.maximum(-low, high)
        low = -high
    return torch.stack([low, high])


def scales_and_zeros(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups whose clamped weights reach from `low` to `high`."""
    if grid.zero_point:
        scales = to_f16((high - low).clamp(min=1e-5) / grid.highest)
        return scales, (-torch.round(low / scales)).clamp(0, grid.highest)
    scales = to_f16(torch.maximum(-low, high).clamp(min=1e-5) / (grid.middle - 1))
    return scales, torch.full_like(scales, grid.middle)


def quantized(weight: Tensor, ranges: Tensor | None, grid: Grid) -> Quantized:
    """Clamp a folded weight to its ranges and quantise it."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, grid.group_size)
    if ranges is not None:
        groups = to_f16(torch.minimum(torch.maximum(groups, ranges[0][..., None]), ranges[1][..., None]))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales, zeros = scales_and_zeros(low, high, grid)
    q = (torch.round(groups / scales[..., None]) + zeros[..., None]).clamp(0, grid.highest)
    return q.reshape(n, k), scales, zeros


def dequantized(numbers: Quantized, grid: Grid) -> Tensor:
    """f16((q - zero) * scale), as f32 [N, K]."""
    q, scales, zeros = numbers
    groups = q.reshape(q.shape[0], -1, grid.group_size)
    return to_f16((groups - zeros[..., None]) * scales[..., None]).reshape(q.shape)
