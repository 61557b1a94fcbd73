"""Collectives where an op needs whole what the dies have in parts (still with global shapes).

    %y = ty.linear(%a, %down) {tyir.sharding = "partial"}        %y = ty.linear(%a, %down) {tyir.sharding = "partial"}
    %z = ty.add(%x, %y)                                  -->     %r = dist.all_reduce(%y)
                                                                 %z = ty.add(%x, %r)

Each value is joined once, right before its first such use, and all its users take the joined one: two all-reduces a decoder layer, one for the embedding,
one gather of the logits.  The third step of partition-dies.
"""

from __future__ import annotations

from dataclasses import dataclass

from tyir.dialects.builtin import Module
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import Append
from tyir.ir import Op, Value
from tyir.passes._placement import placement_of, rule_for
from tyir.pipeline import Pass, PassContext
from tyir.sharding import REPLICATED, Split

__all__ = ["InsertCollectives"]


@dataclass(frozen=True)
class InsertCollectives(Pass):
    """`dist.all_reduce` for addends and `dist.all_gather` for cut values that are needed whole."""

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        for function in [f for f in op.body if isinstance(f, Func)]:
            for inner in function.body:
                wanted = rule_for(inner)[0]
                for index, placement in enumerate(wanted):
                    value = inner.operands[index]
                    if isinstance(inner, Return) and isinstance(value.op, Append):
                        continue  # caches stay where they are
                    if placement_of(value) != placement:
                        _join(value, inner)
            context.statistics["collectives"] = sum(isinstance(o, (AllReduce, AllGather)) for o in function.body)


def _join(value: Value, user: Op) -> None:
    """Make the value available in full before `user`."""
    placement = placement_of(value)
    if placement is REPLICATED:
        return  # needed in parts: each die cuts its own (localize-dies)
    assert value.op is not None, "only caches are arguments with a placement, and they are never joined"
    collective: Op
    if isinstance(placement, Split):
        sizes = tuple(s for _, s in placement.ranges)
        collective = AllGather(value, axis=placement.axis, sizes=sizes, loc=value.op.loc, result_types=[value.type])
    else:
        collective = AllReduce(value, loc=value.op.loc, result_types=[value.type])
    collective.insert_before(user)
    value.replace_all_uses_with(collective.results[0], unless=lambda other: other is collective)
