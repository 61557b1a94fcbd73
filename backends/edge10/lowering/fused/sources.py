"""Who computes a product whose columns a fusion takes: the product alone, or a gated MLP that ends in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import Columns
from tyir.backends.edge10.lowering.context import Area, Lowering
from tyir.backends.edge10.lowering.fused.fusion import ColumnSource, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.mlp import Mlp
from tyir.backends.edge10.lowering.ops.linear import lower_rows, product_scratch
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects.ty import Linear, QuantizedLinear
from tyir.ir import Op, Value

__all__ = ["Alone", "column_source"]


def column_source(value: Value, room: Room) -> ColumnSource | None:
    """What makes `value`, if that is a product and one op alone reads it."""
    if not isinstance(value.op, (Linear, QuantizedLinear)) or len(value.uses) != 1:
        return None
    fusion = room.fusions.get(value.op)
    if isinstance(fusion, Mlp):
        return fusion
    return Alone(value.op, product_scratch(value.op, room.arena, room.machine, room.plan, room.held))


@dataclass(frozen=True)
class Alone:
    """A product that is no other fusion's; `scratch` is for rows of an x that lies in DRAM."""

    product: Linear | QuantizedLinear
    scratch: Scratch | None

    @property
    def ops(self) -> Sequence[Op]:
        return (self.product,)

    def results_area(self, lowering: Lowering) -> Area:
        return lowering.results_area(lowering.place(self.product.x).in_sram or self.scratch is not None)

    def lower_into(self, lowering: Lowering, scratch: ScratchPlace | None, results: Columns) -> None:
        rows = None
        if self.scratch is not None and scratch is not None:
            rows = Area(scratch[0], self.scratch.sram_bytes)
        lower_rows(self.product, lowering, results, rows)
