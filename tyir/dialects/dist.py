"""`dist`: what dies do together.  Each die's program holds the same collectives in the same order; they are executed in lockstep.

After `partition-dies` the file holds one `dist.mesh` and one module `@die{i}` per die.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Collective, Symbol
from tyir.types import Type

__all__ = ["AllGather", "AllReduce", "Mesh"]

Array = npt.NDArray[Any]


class Mesh(DeclaredOp, name="dist.mesh", traits=(Symbol,)):
    """The dies, as Shardy's mesh: axis names are implied (`die`), `sizes` gives the number of dies; `devices` lists them, the main die first."""

    sym_name: str = attr()
    sizes: tuple[int, ...] = attr()
    devices: tuple[int, ...] = attr()


class AllReduce(DeclaredOp, name="dist.all_reduce", traits=(Collective,)):
    """The sum of all dies' operands, on every die: added in f32 in die order, rounded once, so that every die gets the same bits."""

    x: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def combine(self, parts: Sequence[Array]) -> Array:
        """The result from the operands of all dies, in die order."""
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total = total + part.astype(np.float32)
        return as_type(total, tensor_type(self.out).element)


class AllGather(DeclaredOp, name="dist.all_gather", traits=(Collective,)):
    """All dies' operands joined along `axis`, in die order; `sizes` are the dies' lengths along it, which may differ."""

    x: Value = operand()
    axis: int = attr()
    sizes: tuple[int, ...] = attr()
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.x)
        return t.with_shape(sum(self.sizes) if i == self.axis else d for i, d in enumerate(t.dims))

    def combine(self, parts: Sequence[Array]) -> Array:
        """The result from the operands of all dies, in die order."""
        return np.concatenate(list(parts), axis=self.axis)
