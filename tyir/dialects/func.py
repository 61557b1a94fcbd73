"""`func`: functions, calls and returns, with MLIR's names and properties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY

from tyir.attributes import ArrayAttr, Attribute, DictAttr, SymbolRefAttr
from tyir.ir import Block, Region, Value
from tyir.opdef import DeclaredOp, attr, region, variadic_operand, variadic_result
from tyir.traits import IsolatedFromAbove, Symbol, Terminator
from tyir.types import FunctionType, Type

__all__ = ["Call", "Func", "Return"]


class Func(DeclaredOp, name="func.func", traits=(IsolatedFromAbove, Symbol)):
    """A function.

    `arg_attrs` and `res_attrs` are one dictionary per argument and result (`tyir.name`, `tyir.alias`, ...).
    """

    _: KW_ONLY
    sym_name: str = attr()
    function_type: FunctionType = attr()
    arg_attrs: ArrayAttr | None = attr(default=None)
    res_attrs: ArrayAttr | None = attr(default=None)
    sym_visibility: str | None = attr(default=None)
    body_region: Region = region()

    @classmethod
    def make(cls, name: str, arg_types: Sequence[Type], arg_names: Sequence[str | None] = ()) -> Func:
        """A function with an entry block and no results yet; call `refresh_type` once the return is in
        place.
        """
        entry = Block(arg_types, arg_names)
        return Func(
            sym_name=name, function_type=FunctionType(tuple(arg_types), ()), body_region=Region([entry])
        )

    @property
    def args(self) -> list[Value]:
        return self.body.args

    @property
    def is_external(self) -> bool:
        return not self.regions[0].blocks

    def refresh_type(self) -> None:
        """Make `function_type` say what the entry block and the return op are."""
        terminator = self.regions[0].blocks[-1].terminator
        self.function_type = FunctionType(
            tuple(a.type for a in self.args), tuple(v.type for v in terminator.operands)
        )

    def arg_attr(self, index: int) -> DictAttr:
        """The dictionary of one argument, empty when none was given."""
        return _entry(self.arg_attrs, index)

    def res_attr(self, index: int) -> DictAttr:
        """The dictionary of one result, empty when none was given."""
        return _entry(self.res_attrs, index)

    def set_arg_attrs(self, dicts: Sequence[DictAttr]) -> None:
        self.arg_attrs = ArrayAttr(dicts) if any(len(d) for d in dicts) else None

    def set_res_attrs(self, dicts: Sequence[DictAttr]) -> None:
        self.res_attrs = ArrayAttr(dicts) if any(len(d) for d in dicts) else None

    def verify(self) -> Iterator[str]:
        if self.is_external:
            return
        inputs = tuple(a.type for a in self.args)
        if inputs != self.function_type.inputs:
            yield (
                f"function type takes ({', '.join(map(str, self.function_type.inputs))}) but the entry block"
                f" has ({', '.join(map(str, inputs))})"
            )
        for what, dicts, count in (
            ("arg_attrs", self.arg_attrs, len(inputs)),
            ("res_attrs", self.res_attrs, len(self.function_type.results)),
        ):
            if dicts is not None and len(dicts) != count:
                yield f"{what} has {len(dicts)} entries for {count} values"


def _entry(dicts: Attribute | None, index: int) -> DictAttr:
    """The dictionary at a place of a list of them; empty where there is none."""
    entry = dicts[index] if isinstance(dicts, ArrayAttr) and index < len(dicts) else None
    return entry if isinstance(entry, DictAttr) else DictAttr()


class Return(DeclaredOp, name="func.return", traits=(Terminator,)):
    """Ends a function with its results."""

    values: Sequence[Value] = variadic_operand(default=())

    def verify(self) -> Iterator[str]:
        parent = self.parent_op
        if not isinstance(parent, Func):
            yield "must be inside func.func"
            return
        function_type = parent.properties.get("function_type")
        if not isinstance(function_type, FunctionType):
            return  # the function's own declaration is at fault
        if tuple(v.type for v in self.operands) != function_type.results:
            wanted = ", ".join(map(str, function_type.results))
            yield (
                f"returns ({', '.join(str(v.type) for v in self.operands)}) but @{parent.sym_name} is"
                f" declared to return ({wanted})"
            )


class Call(DeclaredOp, name="func.call"):
    """Calls a function of the same module."""

    args: Sequence[Value] = variadic_operand(default=())
    _: KW_ONLY
    callee: SymbolRefAttr = attr()
    values: Sequence[Value] = variadic_result()
