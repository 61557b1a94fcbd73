"""Reads every parameter of a checkpoint once and reports what cannot be computed with: NaN, infinity, values
beyond the f16 range.

One parameter is in memory at a time.  A quantised weight is checked as it is used, de-quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from tyir.diagnostics import Diagnostic
from tyir.execution.finite import number_problem
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import parameter_array
from tyir.frontends.weights import Weights

__all__ = ["value_problems"]


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
        if (problem := number_problem(array, f16=dtype == "f16")) is not None:
            yield Diagnostic(f"'{found[1]}' {problem[0]}", where=where, help=problem[1])
