"""Decoder linears get 4-bit weights, by round-to-nearest over groups of input channels.

    %y = ty.linear(%x, %w, %b)
    -->
    %q, %s, %z = ty.quantize_groups(%w) {group_size = 128}
    %y = ty.quantized_linear(%x, %q, %s, %z, %b) {group_size = 128}

Only linears inside decoder layers whose weight is a weight expression are touched; embedding and head stay as they are, as in AWQ checkpoints.
Runs before kv-materialize and partition-dies, which cut the MLP in whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tyir.constexpr import ConstantExpressions
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.ty import Linear, QuantizedLinear, QuantizeGroups, tensor_type
from tyir.ir import Op
from tyir.location import layer_of, module_path
from tyir.pipeline import Pass, PassContext

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round-to-nearest asymmetric int4 weights for the linears of the decoder layers."""

    group_size: int = 128

    def run(self, op: Op, context: PassContext) -> None:
        constants = ConstantExpressions()
        linears = [op for op in op.walk_type(Linear) if layer_of(op.loc) is not None and constants.is_constant(op.weight)]
        self._check_group_size(linears)
        for linear in linears:
            groups = QuantizeGroups(linear.weight, group_size=self.group_size, loc=linear.loc).insert_before(linear)
            new = QuantizedLinear(
                linear.x,
                groups.q,
                groups.scales,
                groups.zeros,
                linear.bias,
                group_size=self.group_size,
                element=linear.element,
                loc=linear.loc,
            ).insert_before(linear)
            linear.replace_with(new)
        context.statistics["quantized"] = len(linears)

    def _check_group_size(self, linears: Sequence[Linear]) -> None:
        """`TyirError` naming every linear whose input channels are no whole number of groups, with the largest size that suits them all."""
        channels = [tensor_type(linear.weight).static_shape[1] for linear in linears]
        bad = [(linear, k) for linear, k in zip(linears, channels) if self.group_size < 1 or k % self.group_size]
        if bad:
            common = math.gcd(*channels)
            nearest = max(d for d in range(1, max(min(self.group_size, common), 1) + 1) if common % d == 0)
            raise TyirError(
                Diagnostic(
                    f"group size {self.group_size} does not divide the {k} input channels of {module_path(linear.loc)}",
                    help=f"group-size={nearest} divides the input channels of every decoder linear",
                )
                for linear, k in bad
            )
