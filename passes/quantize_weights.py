"""Decoder linears get 4-bit weights, by round-to-nearest over groups of input channels.

    %y = ty.linear(%x, %w, %b)
    -->
    %q, %s, %z = ty.quantize_groups(%w) {group_size = 128}
    %y = ty.quantized_linear(%x, %q, %s, %z, %b) {group_size = 128}

Only linears inside decoder layers whose weight is a weight expression are touched; embedding and head stay as they are, as in AWQ checkpoints.
Runs before kv-materialize and partition-dies, which cut the MLP in whole groups.
"""

from __future__ import annotations

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
        linears = [l for l in op.walk_type(Linear) if layer_of(l.loc) is not None and constants.is_constant(l.weight)]
        problems = [d for l in linears if (d := self._problem(l))]
        if problems:
            raise TyirError(problems)
        for linear in linears:
            groups = QuantizeGroups(linear.weight, group_size=self.group_size, loc=linear.loc).insert_before(linear)
            new = QuantizedLinear(
                linear.x, groups.q, groups.scales, groups.zeros, linear.bias, group_size=self.group_size, element=linear.element, loc=linear.loc
            ).insert_before(linear)
            linear.replace_with(new)
        context.statistics["quantized"] = len(linears)

    def _problem(self, linear: Linear) -> Diagnostic | None:
        channels = tensor_type(linear.weight).static_shape[1]
        if self.group_size > 0 and channels % self.group_size == 0:
            return None
        nearest = max(g for g in (16, 32, 64, 128, 256, channels) if channels % g == 0) if channels % 16 == 0 else channels
        return Diagnostic(
            f"group size {self.group_size} does not divide the {channels} input channels of {module_path(linear.loc)}",
            help=f"use group-size={nearest}",
        )
