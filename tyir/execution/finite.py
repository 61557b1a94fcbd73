"""Whether arrays hold numbers to compute with: NaN, infinity, values that f16 has no room for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["DAMAGED", "F16_LARGEST", "RESCALE", "all_finite", "not_finite", "number_problem"]

Array = npt.NDArray[Any]

F16_LARGEST: Final = 65504.0
_F16_LIMIT: Final = 65520.0  # from here on rounding gives infinity

DAMAGED: Final = "the checkpoint is damaged; download it again"
RESCALE: Final = "the weights need rescaling before they fit f16"


def all_finite(array: Array) -> bool:
    """Whether there is neither NaN nor infinity; arrays that are not of floating point have none.

    Of f16, which processors compute with in f32, by its bits: exponents of all ones are neither.
    """
    if array.dtype.kind != "f" or not array.size:
        return True
    if array.dtype == np.float16:
        return int((array.view(np.uint16) & np.uint16(0x7FFF)).max()) < 0x7C00
    return bool(np.isfinite(array).all())


def not_finite(array: Array) -> str:
    """`3 NaN and 2 infinite values`; empty when there are none."""
    if all_finite(array):
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
