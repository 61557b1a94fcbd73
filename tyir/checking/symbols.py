"""Symbols by name, as the verifier and the passes look them up."""

from __future__ import annotations

from tyir.attributes import SymbolRefAttr
from tyir.diagnostics import did_you_mean
from tyir.ir import Block, Op
from tyir.traits import SymbolTable

__all__ = ["SymbolTables"]


class SymbolTables:
    """Symbols by name for each symbol table, and the order of ops in blocks; both made when first asked
    for.
    """

    def __init__(self) -> None:
        self._tables: dict[Op, dict[str, Op]] = {}
        self._orders: dict[Block, dict[Op, int]] = {}

    def table(self, op: Op) -> dict[str, Op]:
        """The symbols that stand directly in a symbol table; of several with one name, the first."""
        table = self._tables.get(op)
        if table is None:
            table = self._tables[op] = {}
            for region in op.regions:
                for block in region.blocks:
                    for inner in block:
                        if inner.sym_name is not None:
                            table.setdefault(inner.sym_name, inner)
        return table

    def nearest(self, op: Op) -> Op | None:
        """The innermost symbol table around `op`."""
        current = op.parent_op
        while current is not None and SymbolTable not in current.traits:
            current = current.parent_op
        return current

    def resolve(
        self, reference: SymbolRefAttr, table_op: Op | None, outward: bool, only: type[Op] = Op
    ) -> Op | None:
        """The op (of class `only`) a reference names, looked up in `table_op` and, if `outward`, in the
        tables around it.
        """
        while table_op is not None:
            found: Op | None = self.table(table_op).get(reference.root)
            for name in reference.path[1:]:
                found = (
                    self.table(found).get(name) if found is not None and SymbolTable in found.traits else None
                )
            if isinstance(found, only) or not outward:
                return found
            table_op = self.nearest(table_op)
        return None

    def missing(self, reference: SymbolRefAttr, names: list[str]) -> str:
        """The message for a reference to nothing, when these names might have been meant."""
        hint = did_you_mean(reference.root, names)
        return f"refers to {reference}, which is not defined{'; ' + hint if hint else ''}"

    def visible_names(self, op: Op) -> list[str]:
        names: list[str] = []
        table_op = self.nearest(op)
        while table_op is not None:
            names += self.table(table_op)
            table_op = self.nearest(table_op)
        return names

    def order(self, block: Block) -> dict[Op, int]:
        """Position of each op in its block."""
        order = self._orders.get(block)
        if order is None:
            order = self._orders[block] = {op: i for i, op in enumerate(block)}
        return order
