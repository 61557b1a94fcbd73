"""What one of each thing takes, from what kernels take that have different numbers of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["least_squares"]


def least_squares(rows: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Values of 0 or more by name: for rows of (how many of each, time) those that lie nearest to the times,
    by the sum of squares of the relative errors.

    `ValueError` for a time that is not positive.
    """
    if not all(time > 0 for _, time in rows):
        raise ValueError("a time is not positive")
    names = list(dict.fromkeys(name for counts, _ in rows for name in counts))
    matrix = np.array([[counts.get(name, 0) / time for name in names] for counts, time in rows])
    scale = np.linalg.norm(matrix, axis=0)
    matrix = matrix / scale
    wanted = np.ones(len(rows))
    # Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23: a set of values above 0 that grows
    # by the one whose growth helps most, and loses those that would fall below
    value = np.zeros(len(names))
    above = np.zeros(len(names), bool)
    for _ in range(10 * len(names)):
        gradient = matrix.T @ (wanted - matrix @ value)
        gradient[above] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10:
            break
        above[best] = True
        while True:
            trial = np.zeros(len(names))
            trial[above] = np.linalg.lstsq(matrix[:, above], wanted, rcond=None)[0]
            if (trial[above] > 0).all():
                break
            falling = above & (trial <= 0)
            step = float(np.min(value[falling] / (value[falling] - trial[falling])))
            value = value + step * (trial - value)
            above &= value > 1e-12
            value[~above] = 0
        value = trial
    return dict(zip(names, (value / scale).tolist()))
