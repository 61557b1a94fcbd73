"""Forgets all locations.

%y = ty.silu(%x) loc("model.layers.0.mlp")      -->   %y = ty.silu(%x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.ir import Op
from tyir.location import UNKNOWN
from tyir.pipeline import Pass, PassContext

__all__ = ["StripDebuginfo"]


@dataclass(frozen=True)
class StripDebuginfo(Pass):
    """Forget all locations."""

    anchor: ClassVar[str] = "any"

    def run(self, op: Op, context: PassContext) -> None:
        for inner in op.walk():
            inner.loc = UNKNOWN
            for region in inner.regions:
                for block in region.blocks:
                    block.arg_locs = ()
