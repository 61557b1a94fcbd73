"""Collectives where an op needs whole what the dies have in parts (still with global shapes).

    %y = ty.linear(%a, %down) {tyir.sharding = "partial"}        %y = ty.linear(%a, %down) {tyir.sharding = "partial"}
    %z = ty.add(%x, %y)                                  -->     %r = dist.all_reduce(%y)
                                                                 %z = ty.add(%x, %r)

Each value is joined once, right before its first such use, and all its users take the joined one: two
all-reduces a decoder layer, one for the embedding, one gather of the logits.  What the dies of one
pipeline stage have and those of the next need is handed on (`dist.collective_permute`).  The third step of
partition-dies.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import ClassVar

from tyir.attributes import DenseArrayAttr
from tyir.dialects.builtin import Module
from tyir.dialects.dist import AllGather, AllReduce, CollectivePermute
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import Append
from tyir.dialects.sdy import Mesh
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.layers import carry, place
from tyir.location import NameLoc
from tyir.passes._placement import executing_dies, holding_dies, placement_of, rule_for
from tyir.pipeline import Pass, PassContext
from tyir.sharding import REPLICATED, Split

__all__ = ["InsertCollectives"]


@dataclass(frozen=True)
class InsertCollectives(Pass):
    """`dist.all_reduce` for addends and `dist.all_gather` for cut values that are needed whole."""

    stage: ClassVar[tuple[str, ...]] = ("sharded",)

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        for function in [f for f in op.body if isinstance(f, Func)]:
            constants = ConstantExpressions()
            mesh = next(op.walk_type(Mesh), None)
            handed: dict[tuple[Value, tuple[int, ...]], Value] = {}
            for inner in function.body:
                wanted = rule_for(inner)[0]
                for index, placement in enumerate(wanted):
                    value = inner.operands[index]
                    if isinstance(inner, Return) and isinstance(value.op, Append):
                        continue  # caches stay where they are
                    if placement_of(value) != placement:
                        _join(value, inner, mesh)
                    if (
                        mesh is not None
                        and not isinstance(inner, CollectivePermute)
                        and not constants.is_constant(inner.operands[index])
                    ):
                        _hand_on(inner, index, tuple(range(mesh.dies)), handed)
            context.statistics["collectives"] = sum(
                isinstance(o, (AllReduce, AllGather, CollectivePermute)) for o in function.body
            )


def _hand_on(
    user: Op, index: int, everybody: tuple[int, ...], handed: dict[tuple[Value, tuple[int, ...]], Value]
) -> None:
    """Bring an operand that other dies have to the dies that execute `user`; the dies of two stages in pairs,
    in turn when they are more.
    """
    value = user.operands[index]
    have, need = holding_dies(value) or everybody, executing_dies(user) or everybody
    missing = [die for die in need if die not in have]
    if not missing:
        return
    if (value, need) not in handed:
        pairs = [number for target, source in zip(missing, cycle(have)) for number in (source, target)]
        path = f"stage_boundary.{need[0]}"
        permute = CollectivePermute(value, pairs=tuple(pairs), loc=NameLoc(path))
        place(permute, path)
        if need != everybody:
            permute.set_attribute("tyir.dies", DenseArrayAttr.i64(need))
        handed[value, need] = permute.insert_before(user).result
    user.set_operand(index, handed[value, need])


def _join(value: Value, user: Op, mesh: Mesh | None) -> None:
    """Make the value available in full before `user`."""
    placement = placement_of(value)
    if placement is REPLICATED:
        return  # needed in parts: each die cuts its own (localize-dies)
    assert value.op is not None, "only caches are arguments with a placement, and they are never joined"
    collective: Op
    dies = holding_dies(value)
    if isinstance(placement, Split):
        sizes = tuple(s for die, (_, s) in enumerate(placement.ranges) if not dies or die in dies)
        collective = AllGather(
            value,
            axis=placement.axis,
            sizes=sizes,
            dies=dies or None,
            loc=value.op.loc,
            result_types=[value.type],
        )
    else:
        axes = dict(mesh.axes) if mesh is not None else {}
        group = axes["die"] if "group" in axes else None
        collective = AllReduce(
            value, dies=dies or None, group=group, loc=value.op.loc, result_types=[value.type]
        )
    if dies:
        collective.set_attribute("tyir.dies", DenseArrayAttr.i64(dies))
    carry(collective, value.op).insert_before(user)
    value.replace_all_uses_with(collective.results[0], unless=lambda other: other is collective)
