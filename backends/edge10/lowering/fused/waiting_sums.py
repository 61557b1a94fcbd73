"""A residual sum that waits in DRAM while an MLP of many tokens needs the SRAM.

    %s1 = add(%h, ...);  %n = rms_norm(%s1);  gated MLP of %n;  %s2 = add(%s1, %mlp)
    -->
    %s1 and %n at one place of SRAM, %s1 besides in a DRAM buffer: written there block by block as it is made, and read from there, block by block, for %s2

Blocks go to and fro while others are computed: this costs transfers, of which there are enough to spare,
and no time.  It is no `Fusion`: the ops stay where they are lowered; their places are decided here, before the
groups of the function are.
"""  # noqa: E501

from __future__ import annotations

from tyir.backends.edge10.lowering.columns import block_of
from tyir.backends.edge10.lowering.fused.fusion import Room
from tyir.backends.edge10.lowering.fused.gated import gated_products
from tyir.backends.edge10.lowering.fused.summed import Summed
from tyir.dialects.ty import Linear, Norm, QuantizedLinear
from tyir.ir import Value

__all__ = ["waiting_sums"]


def waiting_sums(room: Room) -> dict[Value, Value]:
    """The sums that only a norm and the sum after the MLP read, and the norm's output, which only the MLP
    reads; of sums that are made in blocks of columns of a size that all know.
    """
    sums = {
        op: summed
        for op in room.function.body
        if (summed := Summed.match(op, room)) is not None and block_of(summed.add.out, room.machine)
    }
    found: dict[Value, Value] = {}
    for summed in sums.values():
        value = summed.residual
        norm = next((user for user in value.uses if isinstance(user, Norm)), None)
        if value.op in sums and len(value.uses) == 2 and norm is not None and _is_mlp_of(norm.out, summed):
            found[value] = norm.out
    return found


def _is_mlp_of(x: Value, summed: Summed) -> bool:
    """Whether a sum's product ends a gated MLP that is all that reads `x`."""
    product = summed.product
    gated = gated_products(product.x.op) if isinstance(product, (Linear, QuantizedLinear)) else None
    return gated is not None and gated.gate.x is x and len(x.uses) == 2
