"""`builtin`: the module."""

from __future__ import annotations

from typing import Any

from tyir.ir import Block, Op, Region, Value
from tyir.opdef import DeclaredOp, attr, region
from tyir.traits import IsolatedFromAbove, NoTerminator, Symbol, SymbolTable

__all__ = ["Module"]


class Module(DeclaredOp, name="builtin.module", traits=(IsolatedFromAbove, NoTerminator, Symbol, SymbolTable)):
    """A list of functions, globals and nested modules.  The outermost op of every file.

    `resources` holds the blobs of the file's `{-# ... #-}` section by key: alignment and raw little-endian bytes.
    """

    __slots__ = ("resources",)

    sym_name: str | None = attr(default=None)
    body_region: Region = region()
    resources: dict[str, tuple[int, bytes]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = object.__new__(cls)
        self.resources = {}
        return self

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
