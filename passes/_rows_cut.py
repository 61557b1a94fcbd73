"""A vision tower cut by rows of patches: each die takes some rows through all layers, with all weights.

    %h = ty.linear(%patches, %w)   {tyir.sharding = {axis = 1, ...}}      the rows of a die, cut where its windows end
    ...                                                                  norms, products, sums, attention within windows: nothing is exchanged
    %a = ty.attention(%q, %k, %v)                                        over all rows: keys and values are gathered before it

It costs weights on every die, and saves the sums over the dies: the more rows there are, the more it pays.
What merges rows into tokens has few of them and large weights: it may be cut by channels all the same.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tyir.dialects.func import Func
from tyir.dialects.ty import Attention, Linear, Norm, QuantizedLinear, Reshape, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.passes._placement import LINEAR, placement_of, rule_for
from tyir.passes._weight_times import weight_bytes, weight_ns
from tyir.passes.propagate_sharding import propagate, set_placement
from tyir.sharding import PARTIAL, Placement, Split
from tyir.targets.collectives import all_gather_ns, all_reduce_ns
from tyir.targets.machine import Machine
from tyir.types import f16

__all__ = ["RowsCut", "rows_cut"]


@dataclass(frozen=True)
class RowsCut:
    """The cut of a tower's rows, and the first op whose result is cut so; all else follows from it, but for
    ops that are cut by `channels`.
    """

    first: Op
    cut: Split
    channels: Mapping[Op, Placement] = field(default_factory=dict)

    def ns(self, function: Func, machine: Machine) -> float:
        """About how long the tower takes: products or weights of the die with most, and the collectives.

        Where the cut leads is seen on a copy.
        """
        copy = function.clone()
        for op, twin in zip(function.body, copy.body):
            placement = self.cut if op is self.first else self.channels.get(op)
            if placement is not None:
                set_placement(twin, placement, ("die",))
        propagate(copy, ("die",))
        constants, joined, total = ConstantExpressions(), set[Value](), 0.0
        for op in copy.body:
            if op.results and constants.is_constant(op.results[0]):
                continue
            if isinstance(op, LINEAR):
                total += weight_ns(weight_bytes(op) * _share(op), self._rows(op.out), machine)
                if placement_of(op.out) is PARTIAL:
                    total += all_reduce_ns(tensor_type(op.out).nbytes, f16, len(self.cut.ranges), machine)
            for value, wanted in zip(op.operands, rule_for(op)[0]):
                placed = placement_of(value)
                if isinstance(placed, Split) and placed != wanted and value not in joined:
                    joined.add(value)
                    type = tensor_type(value)
                    row = type.nbytes // type.static_shape[placed.axis]
                    total += all_gather_ns(1, [size * row for _, size in placed.ranges], machine)
        return total

    @staticmethod
    def _rows(value: Value) -> int:
        """Rows of a value on the die that has most of them."""
        *outer, _ = tensor_type(value).static_shape
        placed = placement_of(value)
        if isinstance(placed, Split) and placed.axis < len(outer):
            outer[placed.axis] = max(size for _, size in placed.ranges)
        return math.prod(outer)


def _share(op: Linear | QuantizedLinear) -> float:
    """The largest part of its weights that a die has."""
    for value, axis in ((op.out, tensor_type(op.out).rank - 1), (op.x, tensor_type(op.x).rank - 1)):
        placed = placement_of(value)
        if isinstance(placed, Split) and placed.axis == axis:
            return max(size for _, size in placed.ranges) / (tensor_type(value).dims[-1] or 1)
    return 1.0


def rows_cut(function: Func, dies: int) -> RowsCut | None:
    """How a tower's rows are cut over so many dies; None for what is no tower or has too few windows."""
    attentions = [a for a in function.walk_type(Attention) if not a.causal]
    shapes = {tensor_type(v).dims[:2] for a in attentions for v in (a.q, a.k)}
    if len(shapes) != 1:
        return None
    batch, rows = shapes.pop()
    if batch != 1 or rows is None:
        return None
    constants = ConstantExpressions()
    first = next(
        (
            op
            for op in function.body
            if isinstance(op, (*LINEAR, Norm))
            and not constants.is_constant(op.results[0])
            and tensor_type(op.results[0]).dims[:-1] == (1, rows)
        ),
        None,
    )
    ranges = _ranges(rows, dies, _bounds(function, attentions, rows))
    return None if first is None or ranges is None else RowsCut(first, Split(1, ranges))


def _bounds(function: Func, attentions: list[Attention], rows: int) -> list[int]:
    """Rows before which may be cut: where windows begin, and not within what a reshape makes one row."""
    unit = 1
    for op in function.walk_type(Reshape):
        before, after = tensor_type(op.operands[0]).dims[:2], tensor_type(op.result).dims[:2]
        if before == (1, rows) and after[0] == 1 and after[1] and rows % after[1] == 0:
            unit = math.lcm(unit, rows // after[1])
    bounds = set(range(0, rows, unit))
    for attention in attentions:
        if len(attention.spans()) > 1:
            bounds &= {low for low, _ in attention.spans()}
    return sorted(bounds)


def _ranges(rows: int, dies: int, bounds: list[int]) -> tuple[tuple[int, int], ...] | None:
    """`rows` in as many ranges as dies, cut at the bounds nearest to even ones; None when one is empty."""
    cuts = [min(bounds, key=lambda b: (abs(b * dies - die * rows), b)) for die in range(dies)]
    ends = [*cuts[1:], rows]
    ranges = tuple((low, high - low) for low, high in zip(cuts, ends))
    return ranges if all(size > 0 for _, size in ranges) else None
