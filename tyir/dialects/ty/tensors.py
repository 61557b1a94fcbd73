"""What all `ty` ops compute with: ranked tensors, and numpy arrays rounded to an element type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.ir import Value
from tyir.types import TensorType, Type, storage_dtype

__all__ = ["Array", "as_type", "axis_in", "bf16_to_f32", "static_shape", "stored_bytes", "tensor_type"]

Array = npt.NDArray[Any]


def tensor_type(value: Value, rank: int | None = None, least: int = 0) -> TensorType:
    """The type of a value that must be a ranked tensor, of `rank` dimensions or of at least `least`;
    `TyirError` when it is not.
    """
    kind = value.type
    if not isinstance(kind, TensorType) or kind.shape is None:
        raise TyirError(f"needs a ranked tensor, got {kind}")
    if rank is not None and len(kind.shape) != rank:
        raise TyirError(f"needs a tensor of {_dimensions(rank)}, got {kind}")
    if len(kind.shape) < least:
        raise TyirError(f"needs a tensor of at least {_dimensions(least)}, got {kind}")
    return kind


def _dimensions(count: int) -> str:
    return f"{count} dimension{'' if count == 1 else 's'}"


def static_shape(value: Value, rank: int) -> tuple[int, ...]:
    """The shape of a value that must be a tensor of `rank` known dimensions; `TyirError` when it is not."""
    kind = tensor_type(value, rank)
    if not kind.is_static:
        raise TyirError(f"needs static dimensions, got {kind}")
    return kind.static_shape


def axis_in(axis: int, kind: TensorType) -> int:
    """An axis of a tensor, counted from the front; `TyirError` when there is none of that number."""
    if not 0 <= axis < kind.rank:
        raise TyirError(f"axis {axis} is not in 0..{kind.rank - 1}, got {kind}")
    return axis


def stored_bytes(kind: TensorType) -> int:
    """The bytes a tensor takes in a file or in memory; `TyirError` when its type does not say."""
    try:
        return kind.nbytes
    except (TypeError, ValueError):
        raise TyirError(f"needs a type of known size, got {kind}") from None


def as_type(array: Array, element: Type) -> Array:
    """`array` rounded to an element type; infinities from overflow are kept silently, as the chip does."""
    with np.errstate(over="ignore"):
        return array.astype(storage_dtype(element), copy=False)


def bf16_to_f32(words: Array) -> npt.NDArray[np.float32]:
    """bf16 bit patterns (uint16) to float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)
