"""The short form of declared ops, which people read; nothing of it is written by hand for an op, all follows from the declaration.

    %y = ty.linear %x, %w {tyir.die = 0 : i64} : (tensor<1x?x8xf16>, tensor<4x8xf16>) -> tensor<1x?x4xf16>
    func.func @main {function_type = (tensor<4xf16>) -> tensor<4xf16>} ({
    ^bb0(%x: tensor<4xf16>):
      %y = ty.silu %x : tensor<4xf16>
      func.return %y : tensor<4xf16>
    })

Against the generic form: no quotes and no parentheses around operands; `sym_name` stands behind the op's name; properties and attributes share one
dictionary in front of the regions (the declaration says which is which); one type that all operands and results have is written once, and ops without
operands and results need none when they have a dictionary or regions.  Ops that this cannot say (undeclared names, properties that the op does not have)
are printed in the generic form; both forms may stand in one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tyir.attributes import DictAttr, StringAttr
from tyir.ir import EMPTY_DICT, Op
from tyir.opdef import DeclaredOp
from tyir.types import FunctionType, Type

__all__ = ["SHORT_NAME", "common_type", "merged_entries", "split_entries"]

SHORT_NAME: Final = r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z0-9_$]+)+"
_SYMBOL: Final = "sym_name"


def merged_entries(cls: type[Op], properties: DictAttr, attributes: DictAttr) -> tuple[str | None, DictAttr] | None:
    """The symbol and the one dictionary of the short form; None when the op has to be written in the generic form."""
    if not issubclass(cls, DeclaredOp):
        return None
    declared = cls.property_names
    if any(key not in declared for key in properties) or any(key in declared for key in attributes):
        return None
    symbol = properties.get(_SYMBOL)
    if isinstance(symbol, StringAttr):
        properties = properties.without(_SYMBOL)
    merged = DictAttr({**dict(properties.items()), **dict(attributes.items())}) if len(attributes) else properties
    return (symbol.value if isinstance(symbol, StringAttr) else None), merged


def split_entries(cls: type[DeclaredOp], symbol: str | None, entries: DictAttr) -> tuple[DictAttr, DictAttr]:
    """Properties and attributes of an op from its short form."""
    declared = cls.property_names
    properties = {key: value for key, value in entries.items() if key in declared}
    if symbol is not None:
        properties[_SYMBOL] = StringAttr(symbol)
    rest = {key: value for key, value in entries.items() if key not in declared}
    return DictAttr(properties), DictAttr(rest) if rest else EMPTY_DICT


def common_type(types: Sequence[Type]) -> Type | None:
    """The type that stands for all of them, if they are equal; a function type would be taken for a signature."""
    first = types[0] if types else None
    return first if first is not None and not isinstance(first, FunctionType) and all(t is first for t in types) else None
