"""Who computes a product whose columns a fusion takes: the product alone, or a gated MLP that ends in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import Columns
from tyir.backends.edge10.lowering.context import Area, Lowering
from tyir.backends.edge10.lowering.fused.fusion import ColumnSource, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.mlp import Mlp
from tyir.backends.edge10.lowering.ops.linear import InputTiles, lower_product
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects.ty import Linear, QuantizedLinear
from tyir.ir import Op, Value

__all__ = ["column_source"]


def column_source(value: Value, room: Room) -> ColumnSource | None:
    """What makes `value`, if that is a product and one op alone reads it."""
    if not isinstance(value.op, (Linear, QuantizedLinear)) or len(value.uses) != 1:
        return None
    fusion = room.fusions.get(value.op)
    return fusion if isinstance(fusion, Mlp) else _Alone(value.op)


@dataclass(frozen=True)
class _Alone:
    """A product that is no other fusion's."""

    product: Linear | QuantizedLinear

    @property
    def ops(self) -> Sequence[Op]:
        return (self.product,)

    @property
    def scratch(self) -> Scratch | None:
        return None

    def results_area(self, lowering: Lowering) -> Area:
        return lowering.results_area(lowering.place(self.product.x).in_sram)

    def lower_into(self, lowering: Lowering, scratch: ScratchPlace | None, results: Columns) -> None:
        lower_product(self.product, lowering, InputTiles(self.product.x, lowering), results)
