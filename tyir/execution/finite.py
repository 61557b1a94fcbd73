"""Whether arrays hold numbers to compute with: NaN, infinity, values that f16 has no room for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["DAMAGED", "F16_LARGEST", "RESCALE", "not_finite", "number_problem"]

Array = npt.NDArray[Any]

F16_LARGEST: Final = 65504.0
_F16_LIMIT: Final = 65520.0  # from here on rounding gives infinity

DAMAGED: Final = "the checkpoint is damaged; download it again"
RESCALE: Final = "the weights need rescaling before they fit f16"


def not_finite(array: Array) -> str:
    """`3 NaN and 2 infinite values`; empty when there are none."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return ""
    counts = (int(np.isnan(array).sum()), "NaN"), (int(np.isinf(array).sum()), "infinite")
    kinds = " and ".join(f"{count} {word}" for count, word in counts if count)
    return f"{kinds} value{'' if kinds.startswith('1 ') and ' and ' not in kinds else 's'}"


def number_problem(array: Array, *, f16: bool) -> tuple[str, str] | None:
    """What an array holds that cannot be computed with, in f16 or in f32, and what to do; None: nothing."""
    if bad := not_finite(array):
        return f"holds {bad}", DAMAGED
    if not f16 or array.dtype.kind != "f" or not array.size:
        return None
    largest = float(max(array.max(), -array.min()))
    if largest < _F16_LIMIT:
        return None
    count = int((np.abs(array) >= _F16_LIMIT).sum())
    return (
        f"holds {count} value{'' if count == 1 else 's'} beyond the f16 range of {F16_LARGEST:.0f}"
        f" (largest {largest:.6g})",
        RESCALE,
    )
