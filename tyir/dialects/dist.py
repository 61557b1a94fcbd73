"""`dist`: what dies do together.  Each die's program holds the same collectives in the same order; they are executed in lockstep.

After `partition-dies` the file holds one `sdy.mesh` and one module `@die{i}` per die.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, optional_operand, result
from tyir.traits import Collective

__all__ = ["AllGather", "AllReduce"]

Array = npt.NDArray[Any]


class AllReduce(DeclaredOp, name="dist.all_reduce", traits=(Collective,)):
    """The sum of all dies' operands, on every die: added in f32 in die order, rounded once, so that every die gets the same bits.

    A die that has nothing to add (more dies than heads) takes part without an operand.
    """

    x: Value | None = optional_operand(default=None)
    out: Value = result()

    def verify(self) -> Iterator[str]:
        if self.x is not None and self.x.type is not self.out.type:
            yield f"operand {self.x.type} and result {self.out.type} differ"

    def combine(self, parts: Sequence[Array | None]) -> Array:
        """The result from the operands of all dies, in die order; None for a die that adds nothing."""
        present = [part for part in parts if part is not None]
        total = present[0].astype(np.float32)
        for part in present[1:]:
            total = total + part.astype(np.float32)
        return as_type(total, tensor_type(self.out).element)


class AllGather(DeclaredOp, name="dist.all_gather", traits=(Collective,)):
    """All dies' operands joined along `axis`, in die order; `sizes` are the dies' lengths along it, which may differ.

    A die whose length is 0 takes part without an operand.  Until localize-dies the operand has its global shape.
    """

    x: Value | None = optional_operand(default=None)
    _: KW_ONLY
    axis: int = attr()
    sizes: tuple[int, ...] = attr()
    out: Value = result()

    def verify(self) -> Iterator[str]:
        out = tensor_type(self.out)
        if out.dims[self.axis] != sum(self.sizes):
            yield f"sizes {list(self.sizes)} add up to {sum(self.sizes)}, the result {out} has {out.dims[self.axis]} along axis {self.axis}"
        elif self.x is not None and tensor_type(self.x).dims[self.axis] not in (*self.sizes, sum(self.sizes)):
            yield f"operand {self.x.type} has none of the sizes {list(self.sizes)} along axis {self.axis}"

    def combine(self, parts: Sequence[Array | None]) -> Array:
        """The result from the operands of all dies, in die order; None for a die whose length is 0."""
        return np.concatenate([part for part in parts if part is not None], axis=self.axis)
