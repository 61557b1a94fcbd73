"""How tensors lie in files and in a die's memory: little endian, row major, two 4-bit elements to a byte,
rows padded to whole bytes.

The first of two neighbouring 4-bit elements is the low nibble.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.types import TensorType, bit_width, storage_dtype

__all__ = ["pack", "packed_shape", "unpack"]

Array = npt.NDArray[Any]


def packed_shape(type: TensorType) -> tuple[int, ...]:
    """The shape of the packed array: that of the tensor, or with half the last dimension for 4-bit
    elements.
    """
    shape = type.static_shape
    return (*shape[:-1], (shape[-1] + 1) // 2) if bit_width(type.element) == 4 else shape


def pack(array: Array, type: TensorType) -> Array:
    """The array as stored: uint8 pairs for 4-bit elements, itself (contiguous) otherwise."""
    if bit_width(type.element) != 4:
        return np.ascontiguousarray(array, dtype=storage_dtype(type.element))
    if array.shape[-1] % 2:
        array = np.concatenate([array, np.zeros((*array.shape[:-1], 1), array.dtype)], axis=-1)
    nibbles = array.astype(np.uint8) & 15
    return np.ascontiguousarray(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))


def unpack(stored: Array, type: TensorType) -> Array:
    """The inverse of `pack`: one element per entry, in the storage dtype of the element type."""
    if bit_width(type.element) != 4:
        return stored
    out = np.empty((*stored.shape[:-1], stored.shape[-1] * 2), np.uint8)
    out[..., 0::2] = stored & 15
    out[..., 1::2] = stored >> 4
    out = out[..., : type.static_shape[-1]]
    return out if storage_dtype(type.element) == np.uint8 else ((out ^ 8).astype(np.int8) - 8)
