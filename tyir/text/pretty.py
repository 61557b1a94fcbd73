"""The short form of declared ops, which people read; but for modules and functions nothing of it is written
by hand, all follows from the declaration.

    module {
      func.func @main(%x: tensor<4xf16> {tyir.name = "x"}) -> tensor<4xf16> attributes {tyir.stage = "ty"} {
        %w = ty.get_global @weight : tensor<4xf16>
        %y = ty.add %x, %w {tyir.die = 0} : tensor<4xf16>
        %z = call @layer(%y) : (tensor<4xf16>) -> tensor<4xf16>
        return %z : tensor<4xf16>
      }
    }

Against the generic form: no quotes; the op's symbol (`sym_name`, or the only property that refers to one)
stands behind its name; operands have no parentheses unless a symbol precedes them; properties and attributes
share one dictionary in front of the regions (the declaration says which is which); one type that all operands
and results have is written once (not by calls), an op without results lists its operands' types, and ops
without operands and results need none when they have a dictionary, regions or end their block.  Modules and
functions are written as MLIR writes them, `func.return` and `func.call` without their dialect.  Ops that this
cannot say (undeclared names, properties that the op does not have) are printed in the generic form; both
forms may stand in one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from tyir.attributes import ArrayAttr, Attribute, DictAttr, StringAttr, SymbolRefAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.ir import EMPTY_DICT, Op
from tyir.opdef import DeclaredOp
from tyir.types import FunctionType, Type

__all__ = [
    "FULL_NAMES",
    "SHORT_NAME",
    "SHORT_NAMES",
    "VISIBILITIES",
    "FunctionHead",
    "common_type",
    "function_head",
    "is_plain_module",
    "merged_entries",
    "split_entries",
]

SHORT_NAMES: Final = {Return.name: "return", Call.name: "call"}  # MLIR writes them without the dialect
FULL_NAMES: Final = {"module": Module.name, **{short: name for name, short in SHORT_NAMES.items()}}
SHORT_NAME: Final = (
    r"(?:[A-Za-z_][A-Za-z0-9_$]*+(?:\.[A-Za-z0-9_$]++)++|(?:module|return|call)(?![A-Za-z0-9_$.]))"
)
VISIBILITIES: Final = ("private", "public", "nested")
_SYMBOL: Final = "sym_name"


@cache
def _symbol_key(cls: type[DeclaredOp]) -> str | None:
    """The property that the symbol behind an op's name stands for."""
    if _SYMBOL in cls.property_names:
        return _SYMBOL
    references = [f.key for f in cls.attr_fields if f.codec.kind == "symbol"]
    return references[0] if len(references) == 1 else None


def merged_entries(
    cls: type[Op], properties: DictAttr, attributes: DictAttr
) -> tuple[SymbolRefAttr | None, DictAttr] | None:
    """The symbol and the one dictionary of the short form; None when the op has to be written in the generic
    form.
    """
    if not issubclass(cls, DeclaredOp):
        return None
    declared = cls.property_names
    if any(key not in declared for key in properties) or any(key in declared for key in attributes):
        return None
    key = _symbol_key(cls)
    symbol = properties.get(key) if key is not None else None
    if isinstance(symbol, StringAttr) and key == _SYMBOL:
        symbol = SymbolRefAttr(symbol.value)
    elif not isinstance(symbol, SymbolRefAttr) or key == _SYMBOL:
        symbol = None
    if symbol is not None and key is not None:
        properties = properties.without(key)
    merged = (
        DictAttr({**dict(properties.items()), **dict(attributes.items())}) if len(attributes) else properties
    )
    return symbol, merged


def split_entries(
    cls: type[DeclaredOp], symbol: SymbolRefAttr | None, entries: DictAttr
) -> tuple[DictAttr, DictAttr]:
    """Properties and attributes of an op from its short form.

    `ValueError` when the op has no place for the symbol.
    """
    declared = cls.property_names
    properties: dict[str, Attribute] = {key: value for key, value in entries.items() if key in declared}
    if symbol is not None:
        key = _symbol_key(cls)
        if key is None or (key == _SYMBOL and len(symbol.path) > 1):
            raise ValueError(
                f"'{cls.name}' neither defines a symbol nor refers to one"
                if key is None
                else f"'{cls.name}' defines a symbol: one name"
            )
        if key in properties:
            raise ValueError(
                f"the property '{key}' is given twice: behind the op's name and in its dictionary"
            )
        properties[key] = StringAttr(symbol.root) if key == _SYMBOL else symbol
    rest = {key: value for key, value in entries.items() if key not in declared}
    return DictAttr(properties), DictAttr(rest) if rest else EMPTY_DICT


def common_type(types: Sequence[Type]) -> Type | None:
    """The type that stands for all of them, if they are equal; a function type would be taken for a
    signature.
    """
    first = types[0] if types else None
    return (
        first
        if first is not None and not isinstance(first, FunctionType) and all(t is first for t in types)
        else None
    )


@dataclass(frozen=True)
class FunctionHead:
    """What stands in front of a function's body."""

    visibility: str  # empty when none is given
    symbol: str
    type: FunctionType
    arg_attrs: tuple[DictAttr, ...]
    res_attrs: tuple[DictAttr, ...]
    attributes: DictAttr


def function_head(op: Op) -> FunctionHead | None:
    """The head of a function; None when MLIR's form of functions cannot say all of the op."""
    merged = merged_entries(type(op), op.properties, op.attributes)
    if (
        type(op) is not Func
        or merged is None
        or merged[0] is None
        or len(op.regions) != 1
        or op._operands
        or op.results
        or op.successors
    ):
        return None
    kind, visibility = op.properties.get("function_type"), op.properties.get("sym_visibility")
    if not isinstance(kind, FunctionType) or (
        visibility is not None
        and (not isinstance(visibility, StringAttr) or visibility.value not in VISIBILITIES)
    ):
        return None
    blocks = op.regions[0].blocks
    if blocks and (blocks[0].label is not None or tuple([v.type for v in blocks[0].args]) != kind.inputs):
        return None
    args, results = (
        _dictionaries(op.properties.get("arg_attrs"), len(kind.inputs)),
        _dictionaries(op.properties.get("res_attrs"), len(kind.results)),
    )
    if args is None or results is None:
        return None
    rest = merged[1].without("function_type", "sym_visibility", "arg_attrs", "res_attrs")
    return FunctionHead(
        "" if visibility is None else visibility.value, merged[0].root, kind, args, results, rest
    )


def _dictionaries(entries: Attribute | None, count: int) -> tuple[DictAttr, ...] | None:
    """One dictionary per value; None when they cannot be written at the values."""
    if entries is None:
        return (EMPTY_DICT,) * count
    if (
        not isinstance(entries, ArrayAttr)
        or len(entries) != count
        or not any(isinstance(d, DictAttr) and len(d) for d in entries)
    ):
        return None
    found = tuple(d for d in entries if isinstance(d, DictAttr))
    return found if len(found) == count else None


def is_plain_module(op: Op) -> bool:
    """Whether `module @name attributes {...} { ... }` can say all of an op."""
    if (
        type(op) is not Module
        or merged_entries(type(op), op.properties, op.attributes) is None
        or op._operands
        or op.results
        or op.successors
    ):
        return False
    blocks = [block for region in op.regions for block in region.blocks]
    return len(op.regions) == 1 and len(blocks) == 1 and blocks[0].label is None and not blocks[0].args
