"""`quant`: how checkpoints store few-bit weights, undone exactly; and adapters added to weights.

The ops of weight expressions between a quantised checkpoint's words and `ty.quantized_linear`: whatever the
source, a linear ends with q [N, K], scales [N, K/g] and zeros [N, K/g], or with a dense weight where groups
are no ranges of columns or zero points no integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.ty import as_type, axis_in, static_shape, tensor_type
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.traits import Pure
from tyir.types import TensorType, Type, f16, i32, ui4, ui8

__all__ = [
    "AWQ_ORDER",
    "GGML_BLOCKS",
    "AddLowRank",
    "AddWrapping",
    "DequantizeIndexed",
    "GgmlDequantize",
    "GgmlQ40",
    "Unpack",
    "pack_words",
    "unpack_words",
]

Array = npt.NDArray[Any]
_PER_WORD: Final = 8
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns AutoAWQ puts into nibble i of a word


def pack_words(
    values: Array, axis: int, order: tuple[int, ...] = tuple(range(_PER_WORD))
) -> npt.NDArray[np.int32]:
    """The words that `quant.unpack` with the same axis and order makes `values` (0..15) of; the last word is
    filled up with zeros.
    """
    missing = -values.shape[axis] % _PER_WORD
    if missing:
        around = [(0, missing if i == axis else 0) for i in range(values.ndim)]
        values = np.pad(values, around)
    shape = (*values.shape[:axis], -1, _PER_WORD, *values.shape[axis + 1 :])
    parts = values.reshape(shape)
    words = np.zeros((*parts.shape[: axis + 1], *parts.shape[axis + 2 :]), np.uint32)
    for nibble, place in enumerate(order):
        words |= np.take(parts, place, axis=axis + 1).astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


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
        full = unpack_words(words, self.axis, self.order)
        return full[(slice(None),) * self.axis + (slice(0, self.size or None),)]


def unpack_words(words: Array, axis: int, order: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """All elements of words, an element a byte: element 8 c + order[i] along `axis` is nibble i of word c."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)  # shifts of negative words would bring in ones
    shape = list(words.shape)
    shape.insert(axis + 1, _PER_WORD)
    out = np.empty(shape, np.uint8)
    for nibble, place in enumerate(order):
        along = (slice(None),) * (axis + 1) + (place,)
        out[along] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


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


class DequantizeIndexed(DeclaredOp, name="quant.dequantize_indexed", traits=(Pure,)):
    """f16((q - zero) * scale) where column k takes the scale and zero point of group `groups`[k]: q [N, K]
    ui4, scales [N, G] f16, zeros [N, G] ui4, groups [K] -> [N, K] f16.

    What GPTQ's desc_act and compressed-tensors' actorder "group" store: groups are not ranges of columns.
    """

    q: Value = operand()
    scales: Value = operand()
    zeros: Value = operand()
    groups: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.q).with_element(f16)

    def verify(self) -> Iterator[str]:
        if tensor_type(self.groups).dims != tensor_type(self.q).dims[1:]:
            yield f"groups {self.groups.type} do not say a group for each column of {self.q.type}"

    def evaluate(self, q: Array, scales: Array, zeros: Array, groups: Array) -> Array:
        centred = q.astype(np.float32) - zeros[:, groups].astype(np.float32)
        return (centred * scales[:, groups].astype(np.float32)).astype(np.float16)


class AddLowRank(DeclaredOp, name="quant.add_low_rank", traits=(Pure,)):
    """w + scale * (b a), computed in f32 and rounded once to `element`: w [N, K], a [r, K], b [N, r].

    A weight with a LoRA adapter merged into it.
    """

    w: Value = operand()
    a: Value = operand()
    b: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    element: Type = attr(default=f16)
    out: Value = result()

    def infer(self) -> Type:
        return tensor_type(self.w).with_element(self.element)

    def verify(self) -> Iterator[str]:
        (n, k), a, b = static_shape(self.w, 2), static_shape(self.a, 2), static_shape(self.b, 2)
        if a != (a[0], k) or b != (n, a[0]):
            yield f"factors {self.a.type} and {self.b.type} do not make a matrix of {n}x{k}"

    def evaluate(self, w: Array, a: Array, b: Array) -> Array:
        w, a, b = (x.astype(np.float32, copy=False) for x in (w, a, b))
        return as_type(w + np.float32(self.scale) * (b @ a), self.element)


# ---------------------------------------------------------------------------------------------------- GGUF
# Elements and bytes of a block of each type that llama.cpp's quantisers write and the gguf package
# de-quantises.  Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, ...).
GGML_BLOCKS: Final[dict[str, tuple[int, int]]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
_UNKNOWN: Final = (1, 1)


def _ggml_values(data: Array, format: str) -> npt.NDArray[np.float32]:
    """Rows of blocks [n, bytes] in f32 [n, K], by ggml's own package; `TyirError` when it is missing or too
    old.
    """
    try:
        import gguf
    except ImportError:
        raise TyirError(
            f"weights of GGUF type {format} need the gguf package", help="pip install 'tyir[gguf]'"
        ) from None
    try:
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format])
    except (KeyError, NotImplementedError):
        raise TyirError(
            f"the installed gguf package does not read type {format}", help="pip install --upgrade gguf"
        ) from None
    return np.asarray(values, np.float32)


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
        elements, nbytes = GGML_BLOCKS.get(self.format, _UNKNOWN)
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
        rows = data.shape[0]
        out = np.empty(
            (rows, tensor_type(self.out).static_shape[1]), as_type(np.zeros(0), self.element).dtype
        )
        step = max(
            1, (1 << 22) // max(out.shape[1], 1)
        )  # some millions of elements at a time bound the f32 intermediates
        for start in range(0, rows, step):
            part = _ggml_values(np.ascontiguousarray(data[start : start + step]), self.format)
            out[start : start + step] = as_type(part, self.element)
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
        nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # all low ones first
        return nibbles.reshape(rows, -1), scales
