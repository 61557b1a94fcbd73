"""Reads every parameter of a checkpoint once and reports what cannot be computed with: NaN, infinity, values
beyond the f16 range.

One parameter is in memory at a time.  A quantised weight is checked as it is used, de-quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np

from tyir.diagnostics import Diagnostic
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import parameter_array
from tyir.frontends.weights import Weights

__all__ = ["value_problems"]

_F16_LIMIT: Final = 65520.0  # from here on rounding gives infinity


def value_problems(weights: Weights, dtype: str, skip: Collection[str] = ()) -> Iterator[Diagnostic]:
    """One problem per parameter that holds a value which is not a number of `dtype` ("f16" or "f32");
    parameters in `skip` are left out.
    """
    reader, seen, where = (
        CheckpointReader(weights.checkpoint.folder),
        set(skip),
        str(weights.checkpoint.folder),
    )
    for name in weights.shapes:
        found = weights.find(name)
        if found is None or found[1] in seen or name in skip:
            continue
        seen.add(found[1])
        array = np.asarray(parameter_array(weights, name, reader))
        nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        if nans or infinities:
            what = " and ".join(
                f"{count} {word}" for count, word in ((nans, "NaN"), (infinities, "infinite")) if count
            )
            yield Diagnostic(
                f"'{found[1]}' holds {what} values",
                where=where,
                help="the checkpoint is damaged; download it again",
            )
        elif dtype == "f16" and array.size and (largest := float(np.abs(array).max())) >= _F16_LIMIT:
            count = int((np.abs(array) >= _F16_LIMIT).sum())
            message = (
                f"'{found[1]}' holds {count} values beyond the f16 range of 65504 (largest {largest:.6g})"
            )
            yield Diagnostic(message, where=where, help="the weights need rescaling before they fit f16")
