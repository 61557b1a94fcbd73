"""Rules of the verifier that look beyond one op: symbols, calls, in-place updates and aliased results."""

from __future__ import annotations

from collections.abc import Iterator

from tyir.attributes import SymbolRefAttr
from tyir.checking.in_place import overwritten_operands, read_afterwards
from tyir.checking.symbols import SymbolTables
from tyir.dialects.func import Call, Func, Return
from tyir.execution.entry_points import alias_of
from tyir.ir import Op, Value
from tyir.traits import InPlace, Symbol
from tyir.types import FunctionType

__all__ = [
    "check_call",
    "check_function",
    "check_in_place",
    "check_symbols",
]


def check_symbols(table_op: Op, tables: SymbolTables) -> Iterator[tuple[Op, str]]:
    """Unique symbols in one table."""
    table = tables.table(table_op)
    for region in table_op.regions:
        for block in region.blocks:
            for op in block:
                name = op.sym_name
                if name is not None and (Symbol in op.traits or not op.registered) and table[name] is not op:
                    yield op, f"redefines symbol @{name}"


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
        yield tables.missing(
            callee,
            (
                [n for n, o in tables.table(table_op).items() if isinstance(o, Func)]
                if table_op is not None
                else []
            ),
        )
        return
    if not isinstance(target, Func):
        yield f"calls {callee}, which is a '{target.name}' and not a function"
        return
    wanted = target.properties.get("function_type")
    actual = FunctionType(tuple(v.type for v in call.operands), tuple(v.type for v in call.results))
    if isinstance(wanted, FunctionType) and wanted is not actual:
        yield f"calls {callee} as {actual} but it is {wanted}"
        return
    yield from check_in_place(call, tables)


def check_in_place(op: Op, tables: SymbolTables) -> Iterator[str]:
    """Nobody reads what an op updates in place afterwards."""
    for value in overwritten_operands(op, tables):
        reader = read_afterwards(op, value, tables)
        if reader is op:
            yield f"updates {_name(value)} in place, but reads it again in the loop's next turn"
        elif reader is not None:
            yield f"updates {_name(value)} in place, but '{reader.name}' reads it afterwards"


def _name(value: Value) -> str:
    return f"%{value.name}" if value.name else f"operand of type {value.type}"


def check_function(function: Func, tables: SymbolTables) -> Iterator[str]:
    """Every result with `tyir.alias = i` is argument i after in-place updates."""
    if function.properties.get("res_attrs") is None:
        return
    blocks = function.regions[0].blocks if function.regions else []
    returns = [b.last_op for b in blocks if isinstance(b.last_op, Return)]
    for index in range(len(function.function_type.results)):
        alias = alias_of(function, index)
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
            source = alias_of(target, value.index) if isinstance(target, Func) else None
        if source is None or not 0 <= source < len(op.operands):
            return f"what is returned is made by '{op.name}', which does not update that argument in place"
        value = op.operands[source]
    if value.owner is not function.regions[0].blocks[0] or value.index != alias:
        return f"what is returned is argument {value.index}"
    return ""
