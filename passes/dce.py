"""Deletes pure ops whose results nobody uses, and what only they used; blocks that no path from the entry
reaches.

    %d = ty.transpose(%x); func.return(%y)      -->   func.return(%y)

Algorithm: blocks inside out, ops last to first; an op is dead when it is pure and all users of its results
are dead.  One pass finds everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tyir.checking.dominance import unreachable_blocks
from tyir.ir import Op, Region
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import blocks_below, erase_all
from tyir.traits import Pure

__all__ = ["Dce"]


@dataclass(frozen=True)
class Dce(Pass):
    """Delete unused pure ops and unreachable blocks."""

    anchor: ClassVar[str] = "any"

    def run(self, op: Op, context: PassContext) -> None:
        deleted = eliminate_dead_code(op)
        context.count("dce.deleted", deleted)
        if not deleted:
            context.nothing_changed()


def eliminate_dead_code(root: Op) -> int:
    """Delete below `root`; returns how many ops were deleted."""
    dead: dict[Op, None] = {}
    pure: dict[type[Op], bool] = {}
    blocks = blocks_below(root)
    unreachable = erase_unreachable_blocks(
        dict.fromkeys(b.region for b in blocks if b.region is not None and len(b.region.blocks) > 1)
    )
    for block in reversed(blocks if not unreachable else blocks_below(root)):
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
    return len(dead) + unreachable


def erase_unreachable_blocks(regions: Iterable[Region]) -> int:
    """Erase the blocks of declared ops' regions that no path from the entry reaches; returns how many ops
    were in them.
    """
    erased = 0
    for region in regions:
        if region.op is None or not region.op.registered:
            continue  # what the order of blocks means there is unknown
        gone = unreachable_blocks(region)
        ops = [op for block in gone for op in block]
        erased += sum(1 for op in ops for _ in op.walk())
        erase_all(ops)
        for block in gone:
            region.blocks.remove(block)
            block.region = None
    return erased


def _is_dead(op: Op, dead: dict[Op, None]) -> bool:
    for result in op.results:
        for user in result.uses:
            if user not in dead:
                return False
    return True
