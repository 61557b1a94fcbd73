"""`builtin`: the module, and the cast that stands between types while they are converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, Self

from tyir.ir import Block, Op, Region, Value
from tyir.opdef import DeclaredOp, attr, region, variadic_operand, variadic_result
from tyir.traits import IsolatedFromAbove, NoTerminator, Pure, Symbol, SymbolTable

__all__ = ["Module", "UnrealizedConversionCast"]


class Module(
    DeclaredOp, name="builtin.module", traits=(IsolatedFromAbove, NoTerminator, Symbol, SymbolTable)
):
    """A list of functions, globals and nested modules.  The outermost op of every file.

    `resources` holds the blobs of the file's `{-# ... #-}` section by key: alignment and raw little-endian
    bytes.
    """

    __slots__ = ("resources",)

    _: KW_ONLY
    sym_name: str | None = attr(default=None)
    body_region: Region = region()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = object.__new__(cls)
        self._start_resources()
        return self

    def _start_resources(
        self,
    ) -> None:  # a method, so that type checkers do not take the slot for a field of the constructor
        self.resources: dict[str, tuple[int, bytes]] = {}

    @classmethod
    def empty(cls, sym_name: str | None = None) -> Module:
        """A module with an empty body."""
        return Module(sym_name=sym_name, body_region=Region([Block()]))

    def clone(self, mapping: dict[Value, Value] | None = None) -> Module:
        """A detached deep copy, blobs included."""
        new = super().clone(mapping)
        new.resources.update(self.resources)
        return new

    def lookup(self, name: str) -> Op | None:
        """The op that defines a symbol directly in this module."""
        for op in self.body:
            if op.sym_name == name:
                return op
        return None


class UnrealizedConversionCast(DeclaredOp, name="builtin.unrealized_conversion_cast", traits=(Pure,)):
    """The same values in other types, while a conversion is under way (`tyir.type_conversion`)."""

    inputs: Sequence[Value] = variadic_operand(default=())
    outputs: Sequence[Value] = variadic_result()
