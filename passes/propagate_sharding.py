"""Every value of the step gets its placement, from the annotated ones forward.

    %h = ty.linear(%x, %up)   {tyir.sharding = {axis = 2, ...}}          %h = ... {tyir.sharding = {axis = 2, ...}, sdy.sharding = ...}
    %a = ty.silu_mul(%g, %h)                                    -->      %a = ... {tyir.sharding = {axis = 2, ...}, sdy.sharding = ...}
    %y = ty.linear(%a, %down)                                            %y = ... {tyir.sharding = "partial", sdy.sharding = ... unreduced={"die"}}

A top-k over a cut vocabulary becomes the dies' candidates and their merge.  No collective is inserted yet:
where an op needs whole what is partial or cut, insert-collectives does it.  The second step of
partition-dies.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.sdy import Mesh
from tyir.dialects.ty import MergeTopK, TopK, TopKCandidates, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op
from tyir.layers import carry
from tyir.passes._placement import executing_dies, placement_of, rule_for
from tyir.pipeline import Pass, PassContext
from tyir.sharding import Placement, Split, shardy_attribute, to_attribute
from tyir.types import TensorType

__all__ = ["PropagateSharding", "propagate", "set_placement"]


@dataclass(frozen=True)
class PropagateSharding(Pass):
    """Placements for all values, by one rule per op."""

    stage: ClassVar[tuple[str, ...]] = ("sharded",)

    def run(self, op: Op, context: PassContext) -> None:
        mesh = next(op.walk_type(Mesh), None)
        if mesh is None or mesh.dies == 1:
            return
        axes = [name for name, _ in mesh.axes]
        assert isinstance(op, Module)
        for function in [f for f in op.body if isinstance(f, Func)]:
            propagate(function, axes)


def propagate(function: Func, axes: Sequence[str]) -> None:
    """The placements of a function's values, along the mesh's `axes`."""
    constants = ConstantExpressions()
    for inner in list(function.body):
        if isinstance(inner, TopK):
            inner = _in_parts(inner)
        if inner.results and not constants.is_constant(inner.results[0]):
            set_placement(inner, rule_for(inner)[1], axes)


def _in_parts(top: TopK) -> Op:
    """The op itself, or, when the axis it looks along is cut, the dies' candidates that take its place before
    a merge.
    """
    placement = placement_of(top.x)
    if not isinstance(placement, Split) or placement.axis != tensor_type(top.x).rank - 1:
        return top
    sizes = tuple(size for _, size in placement.ranges)
    candidates = TopKCandidates(top.x, k=top.k, sizes=sizes, softcap=top.softcap, loc=top.loc)
    carry(candidates, top).insert_before(top)
    counts = candidates.counts()
    merge = MergeTopK(candidates.out, k=top.k, counts=counts, softcap=top.softcap, loc=top.loc)
    carry(merge, top).insert_before(top)
    top.replace_with(list(merge.results))
    return candidates


def set_placement(op: Op, placement: Placement, axes: Sequence[str]) -> None:
    """Write the placement of an op's first result, in our words and in Shardy's."""
    attributes = op.attributes.without("tyir.sharding", "sdy.sharding")
    written = to_attribute(placement)
    type = op.results[0].type
    if written is not None and isinstance(type, TensorType):
        attributes = attributes.with_entry("tyir.sharding", written)
        if len(op.results) == 1:
            own = (
                [axis for axis in axes if axis != "stage"] if executing_dies(op) else axes
            )  # a stage's op is cut within its stage
            attributes = attributes.with_entry("sdy.sharding", shardy_attribute(placement, type.rank, own))
    op.attributes = attributes
