"""What is updated in place, and who would read it afterwards.

An op with the trait `InPlace` overwrites its operand 0; a call overwrites the arguments that its callee's
results are (`tyir.alias`).  The value overwritten must not be read on any path from there on: not in the rest
of the block, not in blocks that control reaches later, not in the next turn of a loop around the update.  On
a path through the value's own definition there is a new one.
"""

from __future__ import annotations

from collections.abc import Iterator

from tyir.attributes import SymbolRefAttr
from tyir.checking.symbols import SymbolTables
from tyir.dialects.func import Call, Func
from tyir.execution.entry_points import alias_of
from tyir.ir import Block, Op, Value
from tyir.traits import InPlace, IsolatedFromAbove

__all__ = ["Overwrites", "overwritten_operands", "read_afterwards"]


def overwritten_operands(op: Op, tables: SymbolTables) -> Iterator[Value]:
    """The operands that an op updates in place."""
    if InPlace in op.traits:
        yield from op.operands[:1]
    elif isinstance(op, Call):
        callee = op.properties.get("callee")
        table = tables.nearest(op) if isinstance(callee, SymbolRefAttr) else None
        target = None if table is None else tables.resolve(callee, table, outward=False)
        if not isinstance(target, Func):
            return
        for index in range(len(op.results)):
            alias = alias_of(target, index)
            if alias is not None and 0 <= alias < len(op.operands):
                yield op.operands[alias]


class Overwrites:
    """Answers whether somebody updates a value in place.  Rewrites must not let such a value live longer."""

    def __init__(self) -> None:
        self._tables = SymbolTables()

    def __call__(self, value: Value) -> bool:
        for user in value.uses:
            if InPlace in user.traits or isinstance(user, Call):
                for overwritten in overwritten_operands(user, self._tables):
                    if overwritten is value:
                        return True
        return False


def read_afterwards(op: Op, value: Value, tables: SymbolTables) -> Op | None:
    """An op that reads `value` after `op` has overwritten it: maybe `op` itself, in the next turn of a
    loop.
    """
    at: Op = op
    while at.block is not None and at.block.region is not None:
        block, region = at.block, at.block.region
        alone = len(region.blocks) == 1
        if alone and value.block is block and len(value.uses) == 1:
            return None
        later = set() if alone else _reached(block, value.block)
        order = tables.order(block)
        for user in value.users:
            place = _ancestor_in(user, block, later)
            if place is None:
                continue
            assert place.block is not None
            if place.block in later or (place is not at and order[place] > order[at]):
                return user
        if value.block is not None and value.block.region is region:
            return None
        parent = region.op
        if parent is None or IsolatedFromAbove in parent.traits:
            return None
        if parent.registered:
            return op  # a declared op with a region that sees outside is a loop
        at = parent
    return None


def _reached(block: Block, definition: Block | None) -> set[Block]:
    """The blocks that control may reach after `block`, without passing the start of `definition`."""
    reached: set[Block] = set()
    waiting = [block]
    while waiting:
        last = waiting.pop().last_op
        for successor in last.successors if last is not None else ():
            if successor not in reached and successor is not definition:
                reached.add(successor)
                waiting.append(successor)
    return reached


def _ancestor_in(op: Op, block: Block, others: set[Block]) -> Op | None:
    """The op around `op`, or itself, that stands in `block` or one of the others; None when it is in none."""
    at: Op | None = op
    while at is not None and at.block is not block and at.block not in others:
        at = at.parent_op
    return at
