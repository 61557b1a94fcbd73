"""Deletes pure ops whose results nobody uses, and what only they used.

    %d = ty.transpose(%x); func.return(%y)      -->   func.return(%y)

Algorithm: blocks inside out, ops last to first; an op is dead when it is pure and all users of its results are dead.  One pass finds everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.ir import Op
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import blocks_below, erase_all
from tyir.traits import Pure

__all__ = ["Dce"]


@dataclass(frozen=True)
class Dce(Pass):
    """Delete unused pure ops."""

    anchor: ClassVar[str] = "any"

    def run(self, op: Op, context: PassContext) -> None:
        context.count("dce.deleted", eliminate_dead_code(op))


def eliminate_dead_code(root: Op) -> int:
    """Delete below `root`; returns how many ops were deleted."""
    dead: dict[Op, None] = {}
    pure: dict[type[Op], bool] = {}
    for block in reversed(blocks_below(root)):
        op = block.last_op
        while op is not None:
            cls = type(op)
            is_pure = pure.get(cls)
            if is_pure is None:
                is_pure = pure[cls] = Pure in cls.traits
            if is_pure and _is_dead(op, dead):
                dead[op] = None
                if op.regions:
                    dead.update(dict.fromkeys(op.walk()))
            op = op._prev
    outermost = [op for op in dead if op.parent_op not in dead]
    erase_all(outermost)
    return len(dead)


def _is_dead(op: Op, dead: dict[Op, None]) -> bool:
    for result in op.results:
        for user in result.uses:
            if user not in dead:
                return False
    return True
