"""JSON values as attributes, and back: what modules and manifests say of a model in common."""

from __future__ import annotations

from typing import Any

from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
)
from tyir.types import f64, i64

__all__ = ["to_attribute", "to_json"]


def to_attribute(value: Any) -> Attribute:
    """A JSON value as an attribute; None inside of an object is left out."""
    if isinstance(value, bool):
        return BoolAttr(value)
    if isinstance(value, int):
        return IntegerAttr(value, i64)
    if isinstance(value, float):
        return FloatAttr(value, f64)
    if isinstance(value, dict):
        return DictAttr({str(k): to_attribute(v) for k, v in value.items() if v is not None})
    if isinstance(value, (list, tuple)):
        return ArrayAttr([to_attribute(v) for v in value])
    return StringAttr(str(value))


def to_json(attribute: Attribute) -> Any:
    """An attribute of plain values as Python data."""
    if isinstance(attribute, DictAttr):
        return {k: to_json(v) for k, v in attribute.items()}
    if isinstance(attribute, ArrayAttr):
        return [to_json(a) for a in attribute]
    if isinstance(attribute, DenseArrayAttr):
        return list(attribute.values)
    if isinstance(attribute, (StringAttr, IntegerAttr, FloatAttr, BoolAttr)):
        return attribute.value
    return str(attribute)
