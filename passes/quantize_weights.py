"""Decoder linears get 4-bit weights, by round-to-nearest over groups of input channels.

    %y = ty.linear(%x, %w, %b)
    -->
    %q, %s, %z = ty.quantize_groups(%w) {group_size = 128}
    %y = ty.quantized_linear(%x, %q, %s, %z, %b) {group_size = 128}

Only linears inside decoder layers whose weight is a weight expression are touched; embedding, head and vision
towers stay as they are, as in AWQ checkpoints. Runs before kv-materialize and partition-dies, which cut the
MLP in whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, QuantizeGroups, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op
from tyir.layers import carry, layer_of, path_of, require_layers
from tyir.manifest import record
from tyir.pipeline import Pass, PassContext
from tyir.vision.graphs import VISION, graph_kind

__all__ = ["QuantizeWeights", "decoder_linears", "largest_group_size"]


def decoder_linears(op: Op) -> list[Linear]:
    """The linears of decoder layers whose weights are known when the model is compiled; a tower's layers are
    none.
    """
    constants = ConstantExpressions()
    towers = [f for f in op.walk_type(Func) if graph_kind(f) == VISION]
    seeing = {inner for tower in towers for inner in tower.walk_type(Linear)}
    return [
        linear
        for linear in op.walk_type(Linear)
        if linear not in seeing and layer_of(linear) is not None and constants.is_constant(linear.weight)
    ]


def largest_group_size(channels: Iterable[int], most: int) -> int:
    """The largest size of groups, `most` at most, that divides all these numbers of input channels.

    >>> largest_group_size([160, 352], 128)
    32
    """
    common = math.gcd(*channels)
    return max(d for d in range(1, max(min(most, common), 1) + 1) if common % d == 0)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round-to-nearest asymmetric int4 weights for the linears of the decoder layers."""

    stage: ClassVar[tuple[str, ...]] = ("ty",)

    group_size: int = 128

    def run(self, op: Op, context: PassContext) -> None:
        require_layers(op, "no linear can be chosen")
        linears = decoder_linears(op)
        self._check_group_size(linears)
        for linear in linears:
            groups = QuantizeGroups(linear.weight, group_size=self.group_size, loc=linear.loc)
            carry(groups, linear).insert_before(linear)
            new = QuantizedLinear(
                linear.x,
                groups.q,
                groups.scales,
                groups.zeros,
                linear.bias,
                group_size=self.group_size,
                element=linear.element,
                loc=linear.loc,
            )
            linear.replace_with(carry(new, linear).insert_before(linear))
        context.statistics["quantized"] = len(linears)
        record(op, weights="int4", group_size=self.group_size)

    def _check_group_size(self, linears: Sequence[Linear]) -> None:
        """`TyirError` naming the numbers of input channels that are no whole number of groups, with the
        largest size that suits all linears.
        """
        by_channels: dict[int, list[Linear]] = {}
        for linear in linears:
            by_channels.setdefault(tensor_type(linear.weight).static_shape[1], []).append(linear)
        bad = {k: some for k, some in by_channels.items() if self.group_size < 1 or k % self.group_size}
        if bad:
            nearest = largest_group_size(by_channels, self.group_size)
            raise TyirError(
                Diagnostic(
                    f"group size {self.group_size} does not divide the {k} input channels of"
                    f" {path_of(some[0])}"
                    + (f" and {len(some) - 1} more linear{'s' * (len(some) > 2)}" if len(some) > 1 else ""),
                    help=f"group-size={nearest} divides the input channels of every decoder linear",
                )
                for k, some in bad.items()
            )
