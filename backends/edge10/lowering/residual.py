"""A residual sum that waits in DRAM while an MLP of many tokens needs the SRAM.

    %s1 = add(%h, ...);  %n = rms_norm(%s1);  gated MLP of %n;  %s2 = add(%s1, %mlp)
    -->
    %s1 and %n at one place of SRAM, %s1 besides in a DRAM buffer: written there block by block as it is made, and read from there, block by block, for %s2

Blocks go to and fro while others are computed: this costs transfers, of which there are enough to spare,
and no time.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping

from tyir.backends.edge10.lowering.columns import Summing
from tyir.backends.edge10.lowering.gated import gated_products
from tyir.dialects.ty import RmsNorm
from tyir.ir import Op, Value
from tyir.traits import Gated

__all__ = ["waiting_sums"]


def waiting_sums(sums: Mapping[Op, Summing]) -> dict[Value, Value]:
    """The sums that only a norm and the sum after the MLP read, and the norm's output, which only the MLP
    reads.
    """
    found: dict[Value, Value] = {}
    for summing in sums.values():
        value = summing.residual
        norm = next((user for user in value.uses if isinstance(user, RmsNorm)), None)
        if value.op in sums and len(value.uses) == 2 and norm is not None and _is_mlp_of(norm.out, summing):
            found[value] = norm.out
    return found


def _is_mlp_of(x: Value, summing: Summing) -> bool:
    """Whether a sum's product ends a gated MLP that is all that reads `x`."""
    silu = None if summing.product is None else summing.product.x.op
    products = gated_products(silu) if silu is not None and silu.has_trait(Gated) else None
    return products is not None and products[0].x is x and len(x.uses) == 2
