"""What the search knows of a linear's inputs: second moments over the calibration tokens.

With x [K] what enters the linear in the model as far as it is quantised, y [N] what the unquantised linear
gives in the unquantised model, and W' [N, K] any weight in its place, the squared error of the output is

    sum |W' x - y|^2 = sum over rows of  W' H W'^T - 2 W' T^T + |y|^2       H = sum x x^T,  T = sum y x^T

so that no token is looked at again, however many weights are tried.

With what the loss says (`tyir.tools.quantize.loss_terms`) each token counts by its weight c, and a pull P
[N, K] is added: sum c |W' x - y|^2 + 2 W' P^T, a parabola in place of the loss.
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

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in tokens [T, K], each as often as its weight [T] says."""
        self.second.addmm_(x.T, x if weights is None else x * weights[:, None])
        self._magnitude += x.abs().sum(0)
        self.tokens += len(x)

    @property
    def magnitude(self) -> Tensor:
        return self._magnitude / max(self.tokens, 1)


@dataclass
class Moments:
    """Of one linear [N, K]: its inputs, T [N, K], the energy of its targets (sum of y^2), the pull [N, K]."""

    inputs: Inputs
    targets: Tensor
    energy: float = 0.0
    pull: Tensor | None = None

    def add_targets(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take in tokens x [T, K] with the outputs [T, N] they should have, and how much each counts [T]."""
        weighted = y if weights is None else y * weights[:, None]
        self.targets.addmm_(weighted.T, x)
        self.energy += float((weighted * y).sum(dtype=torch.float64))

    @property
    def wanted(self) -> Tensor:
        """T less the pull: where the parabola is least, for the inputs that there are."""
        return self.targets if self.pull is None else self.targets - self.pull

    def error(self, weight: Tensor) -> float:
        """Mean squared error of the outputs with a weight [N, K], relative to their mean square."""
        total = ((weight @ self.inputs.second - 2 * self.targets) * weight).sum(dtype=torch.float64)
        return max(float(total) + self.energy, 0.0) / (self.energy or 1.0)
