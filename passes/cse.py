"""Common subexpression elimination: of equal pure ops the first one that dominates the others remains.

    %c1 = ty.rope_table() {...}; ...; %c2 = ty.rope_table() {...}      -->   uses of %c2 become %c1

Two ops are equal when class, operands (in any order if `Commutative`), properties, attributes and result
types are; where they come from (location, layer, module path) does not count, the remaining op keeps its
own.  A result that is updated in place is left alone: whoever shared it would read what has been overwritten.
Algorithm: one walk in dominance order with a replacement map.  Attributes are uniqued, so a key is a tuple of
identities.  Blocks that control never reaches are not looked into; only what they use is renamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tyir.attributes import DictAttr
from tyir.checking.dominance import DominanceTree, unreachable_blocks
from tyir.checking.in_place import Overwrites
from tyir.ir import Block, Op, Region, Value
from tyir.layers import without_place
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import erase_all
from tyir.traits import Commutative, IsolatedFromAbove, Pure

__all__ = ["Cse"]

Known = dict[tuple[Any, ...], Op]


@dataclass(frozen=True)
class Cse(Pass):
    """Merge equal pure ops."""

    anchor: ClassVar[str] = "any"

    def run(self, op: Op, context: PassContext) -> None:
        merged = merge_equal(op)
        context.count("cse.merged", merged)
        if not merged:
            context.nothing_changed()


@dataclass(slots=True)
class _Level:
    """A block being walked: its ops, and what is known there (dominating and enclosing blocks' ops by
    key).
    """

    ops: Iterator[Op]
    known: list[Known]
    own: Known = field(default_factory=dict)


def merge_equal(root: Op) -> int:
    """Merge below `root`; returns how many ops were deleted."""
    replaced: dict[Value, Value] = {}
    dead: list[Op] = []
    modes: dict[type[Op], int] = {}  # 0: not pure, 1: pure, 2: pure and commutative
    counted: dict[DictAttr, DictAttr] = {}  # attributes without the place in the model
    overwritten, shared = Overwrites(), set[Op]()  # shared: known not to be updated in place
    unreachable: list[Block] = []
    levels = _open(root, [], unreachable)
    while levels:
        level = levels[-1]
        own, outer = level.own, level.known
        for op in level.ops:
            operands = op._operands
            if replaced and operands:
                operands = _replace_operands(op, operands, replaced)
            if op.regions:
                known = [] if IsolatedFromAbove in op.traits else [*outer, own]
                levels.extend(_open(op, known, unreachable))
                break
            cls = type(op)
            mode = modes.get(cls)
            if mode is None:
                mode = modes[cls] = 0 if Pure not in cls.traits else 2 if Commutative in cls.traits else 1
            if not mode:
                continue
            if mode == 2:
                operands = _in_fixed_order(operands)
            attributes = counted.get(op.attributes)
            if attributes is None:
                attributes = counted[op.attributes] = without_place(op.attributes)
            results = op.results
            key: tuple[Any, ...]
            if len(results) == 1:
                key = (cls, operands, op.properties, attributes, results[0].type)
            else:
                key = (cls, operands, op.properties, attributes, *[r.type for r in results])
            first = own.get(key)
            if first is None and outer:
                first = next((k[key] for k in outer if key in k), None)
            if first is None:
                own[key] = op
                continue
            if first not in shared:
                if any(map(overwritten, first.results)):
                    own[key] = op
                    continue
                shared.add(first)
            if any(map(overwritten, results)):
                continue
            for old, new in zip(results, first.results):
                replaced[old] = new
                if new.name is None:
                    new.name = old.name
            dead.append(op)
        else:
            levels.pop()
    for block in unreachable:
        for top in block:
            for op in top.walk():
                _replace_operands(op, op._operands, replaced)
    _finish(replaced, dead)
    return len(dead)


def _in_fixed_order(operands: tuple[Value, ...]) -> tuple[Value, ...]:
    """The same tuple for all orders of the same operands."""
    if len(operands) == 2:
        first, second = operands
        return operands if id(first) <= id(second) else (second, first)
    return tuple(sorted(operands, key=id))


def _replace_operands(op: Op, operands: tuple[Value, ...], replaced: dict[Value, Value]) -> tuple[Value, ...]:
    for value in operands:
        if value in replaced:
            break
    else:
        return operands
    changed = []
    for value in operands:
        new = replaced.get(value, value)
        if new is not value:
            new.uses.append(op)
        changed.append(new)
    op._operands = result = tuple(changed)
    return result


def _finish(replaced: dict[Value, Value], dead: list[Op]) -> None:
    """Uses that the walk has moved are taken from the old values' lists, then the merged ops go."""
    for old in replaced:
        old.uses = []
    erase_all(dead)


def _open(op: Op, known: list[Known], unreachable: list[Block]) -> list[_Level]:
    """The levels of an op's blocks, the first to be walked last in the list; `unreachable` gets the blocks
    that have none.
    """
    levels: list[_Level] = []
    for region in op.regions:
        levels.extend(_region_levels(region, known))
        unreachable += unreachable_blocks(region)
    levels.reverse()
    return levels


def _region_levels(region: Region, known: list[Known]) -> Iterator[_Level]:
    if len(region.blocks) <= 1:
        for block in region.blocks:
            yield _Level(iter(block), known)
        return
    tree = DominanceTree(region)
    own: dict[Block, Known] = {}
    for block in tree.preorder():
        own[block] = {}
        above = [own[b] for b in tree.strict_dominators(block)]
        yield _Level(iter(block), [*known, *above], own[block])
