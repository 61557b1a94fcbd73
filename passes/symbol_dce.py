"""Deletes private symbols that nothing live refers to.

    func.func @helper {sym_visibility = "private"} (no call of it)      -->   (deleted)

A symbol is private when `sym_visibility` says so.  Algorithm: mark from everything that is not a private
symbol, following symbol references in properties and attributes; what stays unmarked goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tyir.attributes import ArrayAttr, Attribute, DictAttr, StringAttr, SymbolRefAttr
from tyir.checking.symbols import SymbolTables
from tyir.ir import Op
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import erase_all

__all__ = ["SymbolDce"]


@dataclass(frozen=True)
class SymbolDce(Pass):
    """Delete unreferenced private symbols."""

    def run(self, op: Op, context: PassContext) -> None:
        dead = dead_symbols(op)
        erase_all(dead)
        context.count("symbol-dce.deleted", len(dead))
        if not dead:
            context.nothing_changed()


def is_private(op: Op) -> bool:
    """Whether an op defines a symbol that only its own module may use."""
    visibility = op.properties.get("sym_visibility") or op.attributes.get("sym_visibility")
    return op.sym_name is not None and isinstance(visibility, StringAttr) and visibility.value == "private"


def dead_symbols(root: Op) -> list[Op]:
    """The outermost private symbols below `root` that nothing live refers to."""
    tables = SymbolTables()
    live: set[Op] = set()
    stack = [root]
    while stack:
        op = stack.pop()
        if op in live:
            continue
        live.add(op)
        for reference in _references(op):
            target = tables.resolve(reference, tables.nearest(op), outward=True)
            if target is not None:
                stack.append(target)
        stack.extend(
            o for region in op.regions for block in region.blocks for o in block if not is_private(o)
        )
    return [
        op
        for op in root.walk()
        if is_private(op) and op not in live and (op.parent_op in live or op.parent_op is root)
    ]


def _references(op: Op) -> Iterator[SymbolRefAttr]:
    stack: list[Attribute] = [op.properties, op.attributes]
    while stack:
        attribute = stack.pop()
        if isinstance(attribute, SymbolRefAttr):
            yield attribute
        elif isinstance(attribute, DictAttr):
            stack.extend(attribute.values())
        elif isinstance(attribute, ArrayAttr):
            stack.extend(attribute.items)
