"""Rules of the verifier that look beyond one op: symbols, calls, weight references, in-place updates and
aliased results.
"""

from __future__ import annotations

from collections.abc import Iterator

from tyir.attributes import IntegerAttr, SymbolRefAttr
from tyir.diagnostics import did_you_mean
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import GetGlobal, Global, Param
from tyir.ir import Block, Op, Value
from tyir.traits import InPlace, Symbol, SymbolTable
from tyir.types import FunctionType

__all__ = [
    "SymbolTables",
    "alias_of_result",
    "check_call",
    "check_function",
    "check_get_global",
    "check_in_place",
    "check_symbols",
]


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


def check_symbols(table_op: Op, tables: SymbolTables) -> Iterator[tuple[Op, str]]:
    """Unique symbols in one table."""
    table = tables.table(table_op)
    for region in table_op.regions:
        for block in region.blocks:
            for op in block:
                name = op.sym_name
                if name is not None and (Symbol in op.traits or not op.registered) and table[name] is not op:
                    yield op, f"redefines symbol @{name}"


def _missing(reference: SymbolRefAttr, names: list[str]) -> str:
    hint = did_you_mean(reference.root, names)
    return f"refers to {reference}, which is not defined{'; ' + hint if hint else ''}"


def check_call(call: Call, tables: SymbolTables) -> Iterator[str]:
    """The callee exists in the module of the call, types agree, and aliased arguments are not read
    afterwards.
    """
    callee = call.properties.get("callee")
    if not isinstance(callee, SymbolRefAttr):
        return  # the declaration check has said so
    table_op = tables.nearest(call)
    target = tables.resolve(callee, table_op, outward=False)
    if target is None:
        yield _missing(
            callee,
            (
                [n for n, o in tables.table(table_op).items() if isinstance(o, Func)]
                if table_op is not None
                else []
            ),
        )
        return
    if not isinstance(target, Func):
        yield f"calls {callee}, which is a '{target.name}' and no function"
        return
    wanted = target.properties.get("function_type")
    actual = FunctionType(tuple(v.type for v in call.operands), tuple(v.type for v in call.results))
    if isinstance(wanted, FunctionType) and wanted is not actual:
        yield f"calls {callee} as {actual} but it is {wanted}"
        return
    for index in range(len(call.results)):
        alias = alias_of_result(target, index)
        if alias is not None and alias < len(call.operands):
            yield from _later_uses(call, call.operands[alias], tables)


def check_get_global(op: GetGlobal, tables: SymbolTables) -> Iterator[str]:
    """The weight exists in an enclosing module and has the result's type.

    The initializer of a ty.param sees the checkpoint's tensors only (as `tyir.interpreter.lookup_symbol`
    does).
    """
    symbol = op.properties.get("symbol")
    if not isinstance(symbol, SymbolRefAttr):
        return
    in_initializer = isinstance(op.parent_op, Param)
    target = tables.resolve(symbol, tables.nearest(op), outward=True, only=Global if in_initializer else Op)
    if target is None:
        yield _missing(symbol, tables.visible_names(op))
    elif not isinstance(target, (Global, Param)):
        yield f"refers to {symbol}, which is a '{target.name}' and neither a ty.global nor a ty.param"
    elif op.results and target.properties.get("type") is not op.results[0].type:
        yield f"has type {op.results[0].type} but {symbol} is {target.properties.get('type')}"


def check_in_place(op: Op, tables: SymbolTables) -> Iterator[str]:
    """Operand 0 of an in-place op has no later use."""
    if op.operands:
        yield from _later_uses(op, op.operands[0], tables)


def _later_uses(op: Op, value: Value, tables: SymbolTables) -> Iterator[str]:
    if len(value.uses) < 2 or op.block is None:
        return
    order = tables.order(op.block)
    for user in value.users:
        if user is op:
            continue
        at: Op | None = user
        while at is not None and at.block is not op.block:
            at = at.parent_op
        if at is not None and at is not op and order[at] > order[op]:
            yield f"updates {_name(value)} in place, but '{user.name}' reads it afterwards"
            return


def _name(value: Value) -> str:
    return f"%{value.name}" if value.name else f"operand of type {value.type}"


def alias_of_result(function: Func, index: int) -> int | None:
    """The argument that result `index` is (`tyir.alias` in `res_attrs`), or None."""
    value = function.res_attr(index).get("tyir.alias")
    return value.value if isinstance(value, IntegerAttr) else None


def check_function(function: Func, tables: SymbolTables) -> Iterator[str]:
    """Every result with `tyir.alias = i` is argument i after in-place updates."""
    if function.properties.get("res_attrs") is None:
        return
    blocks = function.regions[0].blocks if function.regions else []
    returns = [b.last_op for b in blocks if isinstance(b.last_op, Return)]
    for index in range(len(function.function_type.results)):
        alias = alias_of_result(function, index)
        if alias is None:
            continue
        if not 0 <= alias < len(function.function_type.inputs):
            yield (
                f"result {index} has tyir.alias = {alias}, but there are {len(function.function_type.inputs)}"
                " arguments"
            )
            continue
        for terminator in returns:
            if terminator is not None and index < len(terminator.operands):
                problem = _trace_alias(function, terminator.operands[index], alias, tables)
                if problem:
                    yield f"result {index} has tyir.alias = {alias}, but {problem}"


def _trace_alias(function: Func, value: Value, alias: int, tables: SymbolTables) -> str:
    """Follow in-place updates back to the argument; what is wrong, or an empty string."""
    while value.op is not None:
        op = value.op
        if not op.registered:
            return ""  # nobody knows what it does
        if InPlace in op.traits and value.index == 0 and op.operands:
            value = op.operands[0]
            continue
        source: int | None = None
        if isinstance(op, Call) and isinstance(op.properties.get("callee"), SymbolRefAttr):
            target = tables.resolve(op.callee, tables.nearest(op), outward=False)
            source = alias_of_result(target, value.index) if isinstance(target, Func) else None
        if source is None or not 0 <= source < len(op.operands):
            return f"what is returned is made by '{op.name}', which does not update that argument in place"
        value = op.operands[source]
    if value.owner is not function.regions[0].blocks[0] or value.index != alias:
        return f"what is returned is argument {value.index}"
    return ""
