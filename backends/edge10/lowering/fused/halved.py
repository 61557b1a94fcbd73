"""A norm and the product after it: the rows of a norm are made in two halves, and the product begins with the
first while the second is being made.

    %n = rms_norm(%x);  %k = linear(%n, %wk)   -->   n[: half];  n[half :];     tile of k: rows [: half], rows [half :];  other tiles: all rows

Only the first tile of the first product that is lowered can gain: for all others the norm is done.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.context import Lowering
from tyir.backends.edge10.lowering.fused.fusion import Room, ScratchPlace
from tyir.backends.edge10.lowering.ops.rowwise import lower_rowwise
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects.ty import Linear, Norm, QuantizedLinear
from tyir.ir import Op

__all__ = ["Halved"]


@dataclass(frozen=True)
class Halved:
    """A norm and the product that begins with its first half (`Lowering.halved`)."""

    norm: Norm
    product: Linear | QuantizedLinear

    @classmethod
    def match(cls, op: Op, room: Room) -> Halved | None:
        if not isinstance(op, Norm):
            return None
        readers = [u for u in op.out.uses if isinstance(u, (Linear, QuantizedLinear)) and u.x is op.out]
        return cls(op, min(readers, key=room.turn)) if readers else None

    @property
    def anchor(self) -> Op:
        return self.norm

    @property
    def others(self) -> Sequence[Op]:
        """None: the product has its own turn, alone or in a fusion of its own."""
        return ()

    @property
    def scratch(self) -> Scratch | None:
        return None

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        lower_rowwise(self.norm, lowering)
