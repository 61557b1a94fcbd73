"""What the search knows of a linear's inputs: second moments over the calibration tokens.

With x [K] what enters the linear in the model as far as it is quantised, y [N] what the unquantised linear
gives in the unquantised model, and W' [N, K] any weight in its place, the squared error of the output is

    sum |W' x - y|^2 = sum over rows of  W' H W'^T - 2 W' T^T + |y|^2       H = sum x x^T,  T = sum y x^T

so that no token is looked at again, however many weights are tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Inputs", "Moments"]

Tensor = Any


class Inputs:
    """Of inputs x [K] that one or more linears share: H [K, K] and the mean of |x| [K]."""

    def __init__(self, channels: int, device: str) -> None:
        self.second = torch.zeros(channels, channels, device=device)
        self._magnitude = torch.zeros(channels, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in tokens [T, K]."""
        self.second.addmm_(x.T, x)
        self._magnitude += x.abs().sum(0)
        self.tokens += len(x)

    @property
    def magnitude(self) -> Tensor:
        return self._magnitude / max(self.tokens, 1)


@dataclass
class Moments:
    """Of one linear [N, K]: its inputs, T [N, K], and the energy of its targets (sum of y^2)."""

    inputs: Inputs
    targets: Tensor
    energy: float = 0.0

    def add_targets(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens x [T, K] with the outputs [T, N] they should have."""
        self.targets.addmm_(y.T, x)
        self.energy += float(y.square().sum(dtype=torch.float64))

    def error(self, weight: Tensor) -> float:
        """Mean squared error of the outputs with a weight [N, K], relative to their mean square."""
        total = ((weight @ self.inputs.second - 2 * self.targets) * weight).sum(dtype=torch.float64)
        return max(float(total) + self.energy, 0.0) / (self.energy or 1.0)
