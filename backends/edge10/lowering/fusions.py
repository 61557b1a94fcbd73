"""The kinds of fusion, in the order in which they are decided.

    of a layer     rows          blocks of rows go through the whole layer, one after the other     (`layer_lowering`)
    of its places  waiting sums  a residual sum leaves its place in SRAM to the MLP                 (`layer_lowering`)
    of its ops     `FUSIONS`     ops are lowered together, at the turn of the last                  (`groups`)

The first two say where and for how many rows a function is lowered, and must be known before it is.  Of the
others, a later kind may contain an earlier one: an MLP's last product may be summed.
"""  # noqa: E501

from __future__ import annotations

from typing import Final

from tyir.backends.edge10.lowering.fused.fusion import Fusion
from tyir.backends.edge10.lowering.fused.gated import Gated
from tyir.backends.edge10.lowering.fused.gathered import Gathered
from tyir.backends.edge10.lowering.fused.halved import Halved
from tyir.backends.edge10.lowering.fused.mlp import Mlp
from tyir.backends.edge10.lowering.fused.ranked import Ranked
from tyir.backends.edge10.lowering.fused.roped import Roped
from tyir.backends.edge10.lowering.fused.summed import Summed

__all__ = ["FUSIONS"]

FUSIONS: Final[tuple[type[Fusion], ...]] = (
    Mlp,  # gate, up, gated activation and down, a part of the inner channels at a time
    Gated,  # gate, up and gated activation, where that is not an MLP's
    Summed,  # product, all_reduce and residual sum, a block of columns at a time
    Gathered,  # product and all_gather, a block of columns at a time
    Ranked,  # product and top_k, a block of columns at a time
    Roped,  # product and rotary embedding of many rows, some heads at a time
    Halved,  # norm and the product after it, which begins with the first half of the rows
)
