"""What the rules of `raise-aten` match and insert with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.layers import carry
from tyir.location import UNKNOWN, Location, fuse, module_path
from tyir.traits import Pure
from tyir.types import TensorType, Type, f16, f32

__all__ = [
    "dims_of",
    "either_order",
    "element_of",
    "insert",
    "is_constant",
    "is_last",
    "made_by",
    "merged_locations",
    "scalar_of",
    "through_float",
    "with_element_of",
]

_OpT = TypeVar("_OpT", bound=Op)


def made_by(value: Value | None, kind: type[_OpT]) -> _OpT | None:
    """The op that defines `value` when it is a `kind`."""
    return value.op if value is not None and isinstance(value.op, kind) else None


def dims_of(value: Value) -> tuple[int | None, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.dims


def element_of(value: Value) -> Type:
    assert isinstance(value.type, TensorType)
    return value.type.element


def either_order(op: aten.Mul | aten.Add) -> Iterator[tuple[Value, Value]]:
    """Both orders of a commutative op's two tensors."""
    if op.y is not None:
        yield op.x, op.y
        yield op.y, op.x


def through_float(value: Value) -> Value:
    """The value before f16 <-> f32 conversions."""
    while (to := made_by(value, aten.To)) is not None and {element_of(to.x), element_of(to.out)} <= {
        f16,
        f32,
    }:
        value = to.x
    return value


def is_constant(value: Value) -> bool:
    """Whether the value is made of weights and constants alone."""
    op = value.op
    return op is not None and op.has_trait(Pure) and all(map(is_constant, op.operands))


def scalar_of(value: Value) -> float | None:
    """The number that a constant without dimensions holds, before conversions between float types."""
    constant = made_by(through_float(value), ty.Constant)
    return float(constant.value.to_numpy()) if constant is not None and not dims_of(constant.out) else None


def is_last(dim: int, value: Value) -> bool:
    return dim % len(dims_of(value)) == len(dims_of(value)) - 1


def insert(root: Op, new: _OpT, *matched: Op | None) -> _OpT:
    """Insert `new` before the root, in its place of the model, with one location per module that the matched
    ops came from.
    """
    new.loc = merged_locations([*(op.loc for op in matched if op is not None), root.loc])
    new.insert_before(root)
    return named(carry(new, *matched, root))


def with_element_of(type: Type, value: Value, root: Op) -> Value | None:
    """`value` with the element type of `type`: models round to f16 in different places of one pattern, and
    `cast_back` removes what meets.  None when shapes differ.
    """
    assert isinstance(type, TensorType) and isinstance(value.type, TensorType)
    if value.type.dims != type.dims:
        return None
    return value if value.type is type else insert(root, ty.Cast(value, element=type.element)).out


def named(op: _OpT) -> _OpT:
    """Name the results after the op, so that the text does not carry names of ops that are gone."""
    for value in op.results:
        value.name = op.name.partition(".")[2]
    return op


def merged_locations(locations: list[Location]) -> Location:
    """Fused locations with one entry, the last, for each module path: an RMS norm is one place of the model,
    not six lines of it.
    """
    by_module: dict[str | None, Location] = {}
    for location in locations:
        if location is not UNKNOWN:
            path = module_path(location)
            by_module.pop(path, None)
            by_module[path] = location
    return fuse(by_module.values())
