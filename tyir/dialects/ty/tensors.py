"""What all `ty` ops compute with: ranked tensors, and numpy arrays rounded to an element type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.ir import Value
from tyir.types import TensorType, Type, storage_dtype

__all__ = ["Array", "as_type", "bf16_to_f32", "tensor_type"]

Array = npt.NDArray[Any]


def tensor_type(value: Value) -> TensorType:
    """The type of a value that must be a ranked tensor; `TyirError` when it is none."""
    if not isinstance(value.type, TensorType) or value.type.shape is None:
        raise TyirError(f"expected a ranked tensor, got {value.type}")
    return value.type


def as_type(array: Array, element: Type) -> Array:
    """`array` rounded to an element type; infinities from overflow are kept silently, as the chip does."""
    with np.errstate(over="ignore"):
        return array.astype(storage_dtype(element), copy=False)


def bf16_to_f32(words: Array) -> npt.NDArray[np.float32]:
    """bf16 bit patterns (uint16) to float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)
