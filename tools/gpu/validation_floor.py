"""How near any smooth model could come to the measurements.

The errors that are left when each held-out row is predicted from its measured neighbours.

A floor for judging a model, not one: it sees half of the answers.  For every row of the held-out half of a
kind, the logarithm of (measured / predicted) is taken from the `_NEIGHBOURS` nearest rows of the training
half (distance in the logarithms of what was run), weighted by distance; what remains is noise and switches
between kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.tools.gpu.validation_data import Row
from tyir.tools.gpu.validation_fit import is_training

__all__ = ["neighbour_floor"]

_NEIGHBOURS: Final = 6
_LEAST_ROWS: Final = 200


def neighbour_floor(rows: Sequence[Row], machine: Accelerator) -> float | None:
    """Mean absolute error, in per cent, of the model corrected by its errors at measured neighbours.

    None for fewer than 200 rows.
    """
    if len(rows) < _LEAST_ROWS:
        return None
    ratio = np.log([r.us * 1000 / r.predict(machine) for r in rows])
    place = np.log(np.array([r.shape for r in rows], dtype=float))
    known = np.array([is_training(r) for r in rows])
    if not known.any() or known.all():
        return None
    left = [_remaining(place[i], ratio[i], place[known], ratio[known]) for i in np.nonzero(~known)[0]]
    return float(np.mean(left) * 100)


def _remaining(place: Any, ratio: float, places: Any, ratios: Any) -> float:
    """Relative error after the correction by the nearest rows."""
    distance = np.abs(places - place).sum(axis=1)
    nearest = np.argpartition(distance, _NEIGHBOURS)[:_NEIGHBOURS]
    weight = 1 / (distance[nearest] + 0.1)
    return float(abs(np.exp((weight * ratios[nearest]).sum() / weight.sum() - ratio) - 1))
