"""Decoder linears get 4-bit weights, by round-to-nearest over groups of input channels.

    %y = ty.linear(%x, %w, %b)
    -->
    %q, %s, %z = ty.quantize_groups(%w) {group_size = 128}
    %y = ty.quantized_linear(%x, %q, %s, %z, %b) {group_size = 128}

Only linears inside decoder layers whose weight is a weight expression are touched; embedding, head and vision
towers stay as they are, as in AWQ checkpoints, unless `lm-head` asks for the head.  Runs after awq-fold,
whose clamped weights it takes as they are, and before kv-materialize and partition-dies, which cut the MLP in
whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, QuantizeGroups, tensor_type
from tyir.ir import Op
from tyir.layers import carry, is_named_in, layer_of, path_of, require_layers
from tyir.manifest import record, recorded
from tyir.passes._parameters import ParameterUses
from tyir.pipeline import Pass, PassContext
from tyir.vision.graphs import VISION, graph_kind

__all__ = ["QuantizeWeights", "decoder_linears", "largest_group_size"]


def decoder_linears(op: Op) -> list[Linear]:
    """The linears of decoder layers whose weights are known when the model is compiled; a tower's layers are
    none.
    """
    known = {use.user for use in ParameterUses(op) if use.index == 1}
    seeing = _of_towers(op)
    return [
        linear
        for linear in op.walk_type(Linear)
        if linear in known and linear not in seeing and layer_of(linear) is not None
    ]


def _of_towers(op: Op) -> set[Linear]:
    """The linears of vision towers."""
    towers = [f for f in op.walk_type(Func) if graph_kind(f) == VISION]
    return {inner for tower in towers for inner in tower.walk_type(Linear)}


def largest_group_size(channels: Iterable[int], most: int) -> int:
    """The largest size of groups, `most` at most, that divides all these numbers of input channels.

    >>> largest_group_size([160, 352], 128)
    32
    """
    common = math.gcd(*channels)
    return max(d for d in range(1, max(min(most, common), 1) + 1) if common % d == 0)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round-to-nearest 4-bit weights for the linears of the decoder layers.

    `zero-point=false`: symmetric, with zero in the middle.  `lm-head=true`: the output head too.  `skip`:
    module paths, or runs of whole components of them (`mlp.down_proj`), that stay as they are.
    """

    stage: ClassVar[tuple[str, ...]] = ("ty",)

    group_size: int = 128
    zero_point: bool = True
    lm_head: bool = False
    skip: tuple[str, ...] = ()

    def run(self, op: Op, context: PassContext) -> None:
        require_layers(op, "no linear can be chosen")
        linears = self._chosen(op)
        self._check_group_size(linears)
        for linear in linears:
            groups = QuantizeGroups(
                linear.weight,
                group_size=self.group_size,
                symmetric=None if self.zero_point else True,
                loc=linear.loc,
            )
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
        weights = "awq" if "awq" in recorded(op) else "int4"
        record(op, weights=weights, group_size=self.group_size)

    def _chosen(self, root: Op) -> list[Linear]:
        """The linears to quantise; `TyirError` for names that skip nothing."""
        uses = ParameterUses(root)
        names = {use.user: uses.path(use) for use in uses if isinstance(use.user, Linear) and use.index == 1}
        paths = {op: {p for p in (names[op], path_of(op)) if p} for op in names}
        known = {p for each in paths.values() for p in each}
        if unused := [name for name in self.skip if not any(is_named_in(p, (name,)) for p in known)]:
            raise TyirError(
                Diagnostic(
                    f"skip={name}: no linear of the model has such a path",
                    help=did_you_mean(name, known)
                    or "give whole components of module paths, such as mlp.down_proj or model.layers.0",
                )
                for name in unused
            )
        head = _head(root) if self.lm_head else None
        seeing = _of_towers(root)
        return [
            op
            for op in root.walk_type(Linear)
            if op in names
            and op not in seeing
            and (layer_of(op) is not None or op is head)
            and not any(is_named_in(p, self.skip) for p in paths[op])
        ]

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


def _head(root: Op) -> Linear | None:
    """The linear outside of the layers whose rows are the vocabulary: the last one."""
    outside = [op for op in root.walk_type(Linear) if layer_of(op) is None]
    return outside[-1] if outside else None
