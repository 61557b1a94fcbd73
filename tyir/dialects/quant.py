"""`quant`: how checkpoints store few-bit weights, undone exactly.

The ops of weight expressions between a quantised checkpoint's words and `ty.quantized_linear`: whatever the
source, a linear ends with q [N, K], scales [N, K/g] and zeros [N, K/g].  Nothing here rounds, except
`quant.ggml_dequantize`, whose formats have no integer zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import as_type, axis_in, static_shape, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Pure
from tyir.types import TensorType, Type, f16, i32, ui4, ui8

__all__ = ["GGML_BLOCKS", "AddWrapping", "GgmlDequantize", "GgmlQ40", "Unpack"]

Array = npt.NDArray[Any]
_PER_WORD: Final = 8


class Unpack(DeclaredOp, name="quant.unpack", traits=(Pure,)):
    """Eight 4-bit elements of each 32-bit word, side by side along `axis`: element 8 c + order[i] is nibble i
    (bits 4i..4i+3) of word c.

    `order` 0,1,..,7 is GPTQ's and compressed-tensors', 0,2,4,6,1,3,5,7 AutoAWQ's.  `size` > 0 keeps the first
    `size` elements (the rest is padding).
    """

    words: Value = operand()
    _: KW_ONLY
    axis: int = attr()
    order: tuple[int, ...] = attr(default=(0, 1, 2, 3, 4, 5, 6, 7))
    size: int = attr(default=0, least=0)
    out: Value = result()

    def infer(self) -> Type:
        t = tensor_type(self.words)
        axis = axis_in(self.axis, t)
        full = static_shape(self.words, t.rank)[axis] * _PER_WORD
        return TensorType(tuple((self.size or full) if i == axis else d for i, d in enumerate(t.dims)), ui4)

    def verify(self) -> Iterator[str]:
        t = tensor_type(self.words)
        if t.element is not i32:
            yield f"words are i32, not {t.element}"
        if sorted(self.order) != list(range(_PER_WORD)):
            yield f"order {list(self.order)} is not a permutation of 0..7"
        if self.size > t.static_shape[self.axis] * _PER_WORD:
            yield (
                f"size {self.size} is more than the {t.static_shape[self.axis] * _PER_WORD} elements of the"
                " words"
            )

    def evaluate(self, words: Array) -> Array:
        unsigned = np.ascontiguousarray(words).view(np.uint32)  # shifts of negative words would bring in ones
        shape = list(words.shape)
        shape.insert(self.axis + 1, _PER_WORD)
        out = np.empty(shape, np.uint8)
        for nibble, place in enumerate(self.order):
            out[(slice(None),) * (self.axis + 1) + (place,)] = (
                unsigned >> np.uint32(4 * nibble)
            ) & np.uint32(15)
        full = out.reshape(*words.shape[: self.axis], -1, *words.shape[self.axis + 1 :])
        return full[(slice(None),) * self.axis + (slice(0, self.size or None),)]


class AddWrapping(DeclaredOp, name="quant.add_wrapping", traits=(Pure,)):
    """x + value modulo 16, for 4-bit x: GPTQ's first format stores zero points less one."""

    x: Value = operand()
    _: KW_ONLY
    value: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def verify(self) -> Iterator[str]:
        if tensor_type(self.x).element is not ui4:
            yield f"x is of ui4, not {tensor_type(self.x).element}"

    def evaluate(self, x: Array) -> Array:
        return (x + np.uint8(self.value % 16)) & np.uint8(15)


# ---------------------------------------------------------------------------------------------------- GGUF
# Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, block_q4_1, block_q8_0,
# block_q4_K, block_q6_K).


def _f16(data: Array) -> npt.NDArray[np.float32]:
    """Two bytes per f16, [..., 2 n] -> [..., n] as f32."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: Array) -> Array:
    """[B, n] bytes -> [B, 2 n]: all low nibbles, then all high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _q4_0(blocks: Array) -> npt.NDArray[np.float32]:
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(blocks: Array) -> npt.NDArray[np.float32]:
    return _f16(blocks[:, :2]) * _nibbles(blocks[:, 4:]).astype(np.float32) + _f16(blocks[:, 2:4])


def _q8_0(blocks: Array) -> npt.NDArray[np.float32]:
    return _f16(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _q4_k(blocks: Array) -> npt.NDArray[np.float32]:
    """256 elements in 8 groups: f16 d and dmin, twelve bytes of 6-bit scales and minima, 128 bytes of nibbles
    (per 64 elements: low, then high).
    """
    packed = blocks[:, 4:16]
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1).astype(np.float32) * _f16(
        blocks[:, 0:2]
    )
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1).astype(np.float32) * _f16(
        blocks[:, 2:4]
    )
    quants = blocks[:, 16:].reshape(-1, 4, 1, 32)
    q = np.concatenate([quants & 15, quants >> 4], axis=2).reshape(-1, 8, 32).astype(np.float32)
    return np.asarray(scales[:, :, None] * q - minima[:, :, None], np.float32).reshape(-1, 256)


def _q6_k(blocks: Array) -> npt.NDArray[np.float32]:
    """256 elements in 16 groups: 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 int8 scales, f16
    d; q - 32.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    lower = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 8, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    upper = np.concatenate([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 8, 32)
    q = (lower | (upper << 4)).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _f16(
        blocks[:, 208:210]
    )
    return np.asarray(scales[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32), np.float32).reshape(
        -1, 256
    )


# name: (elements, bytes) of a block and its values in f32
GGML_BLOCKS: Final[dict[str, tuple[int, int, Callable[[Array], npt.NDArray[np.float32]]]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q8_0": (32, 34, _q8_0),
    "Q4_K": (256, 144, _q4_k),
    "Q6_K": (256, 210, _q6_k),
}


class GgmlDequantize(DeclaredOp, name="quant.ggml_dequantize", traits=(Pure,)):
    """A GGUF tensor's rows of blocks [N, bytes] as a weight [N, K], computed in f32 as ggml does and rounded
    once to `element`.
    """

    data: Value = operand()
    _: KW_ONLY
    format: str = attr()
    element: Type = attr(default=f16)
    out: Value = result()

    def infer(self) -> Type:
        rows, width = static_shape(self.data, 2)
        elements, nbytes, _values = GGML_BLOCKS.get(self.format, (1, 1, _q4_0))
        return TensorType((rows, width // nbytes * elements), self.element)

    def verify(self) -> Iterator[str]:
        if self.format not in GGML_BLOCKS:
            yield f"format '{self.format}' is not one of {', '.join(GGML_BLOCKS)}"
        elif (
            tensor_type(self.data).element is not ui8
            or tensor_type(self.data).static_shape[1] % GGML_BLOCKS[self.format][1]
        ):
            yield f"{self.data.type} does not hold whole blocks of {GGML_BLOCKS[self.format][1]} bytes"

    def evaluate(self, data: Array) -> Array:
        _elements, nbytes, values = GGML_BLOCKS[self.format]
        rows = data.shape[0]
        out = np.empty(tensor_type(self.out).static_shape, as_type(np.zeros(0), self.element).dtype)
        step = max(
            1, (1 << 22) // max(out.shape[1], 1)
        )  # some millions of elements at a time bound the f32 intermediates
        for start in range(0, rows, step):
            part = values(np.ascontiguousarray(data[start : start + step]).reshape(-1, nbytes))
            out[start : start + step] = as_type(part, self.element).reshape(-1, out.shape[1])
        return out


class GgmlQ40(DeclaredOp, name="quant.ggml_q4_0", traits=(Pure,)):
    """GGUF's Q4_0 rows [N, 18 K/32 bytes] as they are: q [N, K] ui4 and scales [N, K/32] f16; the weight is
    (q - 8) * scale.
    """

    data: Value = operand()
    q: Value = result()
    scales: Value = result()

    def infer(self) -> tuple[Type, ...]:
        rows, width = static_shape(self.data, 2)
        return TensorType((rows, width // 18 * 32), ui4), TensorType((rows, width // 18), f16)

    def verify(self) -> Iterator[str]:
        if tensor_type(self.data).element is not ui8 or tensor_type(self.data).static_shape[1] % 18:
            yield f"{self.data.type} does not hold whole blocks of 18 bytes"

    def evaluate(self, data: Array) -> tuple[Array, Array]:
        rows = data.shape[0]
        blocks = data.reshape(-1, 18)
        scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").reshape(rows, -1)
        return _nibbles(blocks[:, 2:]).reshape(rows, -1), scales
