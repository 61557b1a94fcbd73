"""What caches of 8 and of 4 bits store for a row of keys or values, and how it is read.

8 bits: a row has one f16 scale, what is read is f16(q * scale).

4 bits, in groups of channels as in QServe (arXiv:2405.04532), with the code of zero as weights have it:

A row of D channels is D / 2 bytes: byte j holds the codes of channel j (low half) and of channel j + D / 2,
which are a rotary pair.  Neighbouring bytes form groups of 32 channels, of 16 where 32 does not divide D: a
pair that is far above the others costs its own group alone, and turning it changes nothing of which group
that is.

A group has one word of 16 bits: an f16 scale, whose last four bits are the code of zero instead.  So zero is
exact, scales have 6 bits behind the point, and code times scale has no more bits than f16: reading rounds
nothing.

Of a cache, `rows_of` is what attention reads, whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, operand, result
from tyir.traits import Pure
from tyir.types import TensorType, Type, f16, i8, ui8, ui16

__all__ = [
    "QuantizeGroups",
    "QuantizeRows",
    "channel_groups",
    "dequantize_groups",
    "dequantize_rows",
    "quantize_groups",
    "quantize_rows",
    "rows_of",
    "scales_type",
]

Array = npt.NDArray[Any]
_MOST: Final = 32  # channels that share a scale
_LEAST: Final = 16  # with fewer the scales take as much as the codes
_ZERO: Final = 15  # the bits of a word that are the code of zero


def channel_groups(dim: int) -> int:
    """Groups of a row of `dim` channels; 0 where no group of 32 or 16 channels divides it."""
    size = math.gcd(dim, _MOST)
    return dim // size if size >= _LEAST else 0


class QuantizeRows(DeclaredOp, name="kv.quantize_rows", traits=(Pure,)):
    """Symmetric 8-bit quantisation of each row of D elements: rows f16 [b, s, G, D] -> q i8 of that shape and
    scales f16 [b, s, G].

    scale = f16(max|x| / 127);  q = clamp(round(x / scale), -127, 127), halves to even; 0 where the scale is
    0.
    """

    rows: Value = operand()
    q: Value = result()
    scales: Value = result()

    def infer(self) -> tuple[Type, ...]:
        t = tensor_type(self.rows)
        return t.with_element(i8), TensorType(t.dims[:-1], f16)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.rows)
        if t.rank != 4 or t.element is not f16:
            yield f"rows are f16 [b, s, heads, D]; got {t}"

    def evaluate(self, rows: Array) -> tuple[Array, Array]:
        return quantize_rows(rows)


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """What `kv.quantize_rows` computes: rows f16 [.., D] -> i8 [.., D] and scales f16 [..]."""
    wide = rows.astype(np.float32)
    scales = as_type(np.abs(wide).max(axis=-1) / np.float32(127), f16)
    divisor = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)[..., None]
    q = np.fmax(np.fmin(np.rint(wide / divisor), np.float32(127)), np.float32(-127))
    return np.where(scales[..., None] > 0, q, 0).astype(np.int8), scales


def dequantize_rows(q: Array, scales: Array) -> npt.NDArray[np.float16]:
    """f16(q * scale): q [.., D] i8, scales [..] f16."""
    return (q.astype(np.float32) * scales[..., None].astype(np.float32)).astype(np.float16)


class QuantizeGroups(QuantizeRows, name="kv.quantize_groups"):
    """4-bit quantisation of each group of channels: rows f16 [b, s, G, D] -> q ui8 [b, s, G, D / 2] and
    scales ui16 [b, s, G, N], one for each of N groups of 32 channels, or 16 where 32 does not divide D.

    Byte j of q holds the codes of channels j (low) and j + D / 2 (high); a group's are neighbouring bytes.
    With low = min(x, 0) and high = max(x, 0) over a group: scale = f16((high - low) / 15), its bits rounded
    up to a multiple of 16;  zero = round(-low / scale);  code = clamp(round(x / scale) + zero, 0, 15), halves
    to even; all 0 where the scale is 0.  A word is the scale's bits + zero; what is read is (code - zero) *
    scale.
    """

    def infer(self) -> tuple[Type, ...]:
        t = tensor_type(self.rows, 4)
        groups = channel_groups(t.dims[-1] or 0)
        return (
            TensorType((*t.dims[:-1], (t.dims[-1] or 0) // 2), ui8),
            TensorType((*t.dims[:-1], groups), ui16),
        )

    def verify(self) -> Iterator[str]:
        yield from super().verify()
        dim = tensor_type(self.rows, 4).dims[-1] or 0
        if not channel_groups(dim):
            yield f"rows of {dim} channels are not whole groups of {_LEAST}"

    def evaluate(self, rows: Array) -> tuple[Array, Array]:
        return quantize_groups(rows, channel_groups(rows.shape[-1]))


def quantize_groups(rows: Array, groups: int) -> tuple[Array, Array]:
    """What `kv.quantize_groups` computes: rows f16 [.., D] -> ui8 [.., D / 2] and ui16 [.., groups]."""
    *outer, dim = rows.shape
    # [.., half, group, pair] -> [.., group, half, pair]
    wide = rows.astype(np.float32).reshape(*outer, 2, groups, dim // 2 // groups).swapaxes(-3, -2)
    low, high = np.minimum(wide.min(axis=(-2, -1)), 0), np.maximum(wide.max(axis=(-2, -1)), 0)
    with np.errstate(over="ignore", invalid="ignore"):  # replays of plans compute on whatever lies there
        steps = ((high - low) / np.float32(15)).astype(np.float16).view(np.uint16)
        steps = (steps + np.uint16(_ZERO)) & np.uint16(0xFFFF - _ZERO)
        scales = steps.view(np.float16).astype(np.float32)
        divisor = np.where(scales > 0, scales, np.float32(1))
        zeros = np.fmin(np.rint(-low / divisor), np.float32(_ZERO))
        codes = np.rint(wide / divisor[..., None, None]) + zeros[..., None, None]
        codes = np.fmax(np.fmin(codes, np.float32(_ZERO)), np.float32(0))
        is_known = scales > 0
        codes = np.where(is_known[..., None, None], codes, 0).astype(np.uint8)
        words = steps | np.where(is_known, zeros, 0).astype(np.uint16)
    first, second = codes[..., 0, :], codes[..., 1, :]
    return (first | second << 4).reshape(*outer, dim // 2), words


def dequantize_groups(q: Array, words: Array) -> npt.NDArray[np.float16]:
    """(code - zero) * scale: q ui8 [.., D / 2] and words ui16 [.., N] -> [.., D]."""
    *outer, half = q.shape
    groups = words.shape[-1]
    by_group = q.reshape(*outer, groups, half // groups)
    codes = np.stack([by_group & 15, by_group >> 4], axis=-3).astype(np.float32)
    scales = (words & np.uint16(0xFFFF - _ZERO)).view(np.float16).astype(np.float32)
    zeros = (words & np.uint16(_ZERO)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = (codes - zeros[..., None, :, None]) * scales[..., None, :, None]
        return rows.astype(np.float16).reshape(*outer, 2 * half)


def scales_type(cache: Value) -> TensorType | None:
    """The type of the scales that a cache needs beside it; None for one that holds f16."""
    kind = tensor_type(cache)
    if kind.element in (i8, ui8):
        kind = tensor_type(cache, 4)
    if kind.element is i8:
        return TensorType(kind.dims[:-1], f16)
    if kind.element is ui8:
        return TensorType((*kind.dims[:-1], channel_groups(2 * (kind.dims[-1] or 0))), ui16)
    return None


def rows_of(stored: Array, scales: Array | None) -> Array:
    """Rows [.., D] f16 of what a cache holds, and of the scales beside it."""
    if scales is None:
        return stored
    return dequantize_rows(stored, scales) if stored.dtype == np.int8 else dequantize_groups(stored, scales)
