"""What a step need not compute where no row of its results is wanted: the last norm, the head, what follows.

A step that returns one row of each sequence (`select-rows`) is told which by its argument `row`.  Of a
prompt's chunks before the last no row is wanted: `row` is negative, and everything behind the layers is left
out, on all dies alike.

    %h = call @layer_s8(..)
    dist.send(%h)                           where another stage goes on
    %one = ty.select_row(%h, %row)          or dist.recv, of a stage that is given that row
    %n = ty.rms_norm(%one, ..);  ..         the tail
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.func import Func, Return
from tyir.execution.entry_points import arguments
from tyir.ir import Op
from tyir.layers import layer_of
from tyir.traits import InPlace

__all__ = ["optional_tail", "rows_wanted"]

_FIRST: Final = ("ty.select_row", "dist.recv")


def optional_tail(main: Func) -> list[Op]:
    """The ops of an entry point of stage `program` that are left out where no row is wanted, in their order;
    none of a step that returns all rows.
    """
    if not arguments(main, "row"):
        return []
    ops = [op for op in main.body if not isinstance(op, Return)]
    behind = 1 + max((n for n, op in enumerate(ops) if _in_layers(op)), default=-1)
    first = next((n for n in range(behind, len(ops)) if ops[n].name in _FIRST), len(ops))
    return ops[first:]


def _in_layers(op: Op) -> bool:
    """Whether an op is of a decoder layer; what writes a cache is in any case."""
    return layer_of(op) is not None or op.has_trait(InPlace)


def rows_wanted(row: npt.NDArray[Any] | None) -> bool:
    """Whether a step given `row` i32 [b] computes its results; None of a step that takes none."""
    return row is None or bool((np.asarray(row) >= 0).any())
