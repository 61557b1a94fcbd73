"""From the literal of `dense<...> : type` to the bytes of a constant, and from the bits of a float to its
value.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr
from tyir.text.attribute_printer import dense_shape
from tyir.text.lexer import has_too_many_digits
from tyir.types import FloatType, IndexType, IntegerType, Type, storage_dtype

__all__ = ["DenseLiteral", "dense_from_literal", "float_from_bits"]

_FP8: Final = {
    "f8E4M3FN": (4, 3, 7),
    "f8E5M2": (5, 2, 15),
}  # exponent bits, mantissa bits, bias (OCP 8-bit floating point specification 1.0)


@dataclass(frozen=True, slots=True)
class DenseLiteral:
    """A scalar, a nested list or a hex string, as written."""

    kind: Literal["hex", "list", "float", "integer", "bool"]
    value: Any


def float_from_bits(bits: int, name: str) -> float:
    """The value of a bit pattern of a float format."""
    if name == "f64":
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    if name == "f16":
        return float(np.uint16(bits).view(np.float16))
    if name in _FP8:
        return _fp8_from_bits(bits, name)
    shift = {"f32": 0, "bf16": 16, "tf32": 13}[name]
    return float(struct.unpack("<f", struct.pack("<I", bits << shift))[0])


def _fp8_from_bits(bits: int, name: str) -> float:
    exponent_bits, mantissa_bits, bias = _FP8[name]
    sign = -1.0 if bits & 0x80 else 1.0
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    if name == "f8E4M3FN" and bits & 0x7F == 0x7F:
        return math.nan
    if name == "f8E5M2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def dense_from_literal(literal: DenseLiteral | None, shaped: Type) -> DenseElementsAttr:
    """The constant; `ValueError` where literal and type do not fit."""
    shape, element = dense_shape(shaped)
    if not isinstance(element, (IntegerType, FloatType, IndexType)):
        raise ValueError(f"dense constants of {element} are not supported")
    if isinstance(element, IntegerType) and element.width > 64:
        raise ValueError(f"dense constants of {element} are not supported: at most 64 bits")
    size = math.prod(shape)
    if literal is None:
        if size:
            raise ValueError(f"dense<> is empty but {shaped} has {size} elements")
        return DenseElementsAttr(b"", shaped)
    if literal.kind == "hex":
        return DenseElementsAttr(_hex_bytes(literal.value, size, element, shaped), shaped)
    flat: list[DenseLiteral] = []
    found = _flatten(literal, flat)
    if found and found != shape:
        raise ValueError(f"the list is {'x'.join(map(str, found))} but the type is {shaped}")
    if not found and size == 0:
        raise ValueError(f"{shaped} has no elements: write dense<>")
    return DenseElementsAttr(_encode(flat, element), shaped)


def _flatten(literal: DenseLiteral, into: list[DenseLiteral]) -> tuple[int, ...]:
    if literal.kind != "list":
        into.append(literal)
        return ()
    shapes = {_flatten(item, into) for item in literal.value}
    if len(shapes) > 1:
        raise ValueError("the nested lists have different lengths")
    return (len(literal.value), *(shapes.pop() if shapes else ()))


def _hex_bytes(text: str, size: int, element: Type, shaped: Type) -> bytes:
    if not text.startswith("0x"):
        raise ValueError('a string constant must be hex: "0x..."')
    try:
        data = bytes.fromhex(text[2:])
    except ValueError:
        raise ValueError('a hex constant has two hex digits a byte: "0x003C"') from None
    dtype = storage_dtype(element)
    if dtype == np.bool_:
        return (
            np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:size].tobytes()
            if len(data) * 8 >= size
            else _wrong(data, size, shaped)
        )
    if len(data) != size * dtype.itemsize and (len(data) != dtype.itemsize or not size):
        return _wrong(data, size * dtype.itemsize, shaped)
    return data


def _wrong(data: bytes, wanted: int, shaped: Type) -> bytes:
    raise ValueError(f"{len(data)} bytes of hex do not fill {shaped}, which takes {wanted}")


def _encode(flat: list[DenseLiteral], element: Type) -> bytes:
    dtype = storage_dtype(element)
    if isinstance(element, FloatType):
        return _encode_floats([_float(x, element) for x in flat], element, dtype)
    assert isinstance(element, (IntegerType, IndexType))
    numbers = [_integer(x, element) for x in flat]
    return np.array(numbers, dtype).tobytes()


def _float(literal: DenseLiteral, element: FloatType) -> float:
    if literal.kind == "float":
        return element.round(float(literal.value))
    if literal.kind == "integer" and literal.value.startswith("0x"):
        bits = int(literal.value, 16)
        if bits >> element.width:
            raise ValueError(f"{literal.value} has more bits than {element}")
        return float_from_bits(bits, element.name)
    raise ValueError(
        f"'{literal.value}' is not a float: write {literal.value}.0"
        if literal.kind == "integer"
        else f"'{literal.value}' is not a float"
    )


def _integer(literal: DenseLiteral, element: IntegerType | IndexType) -> int:
    if literal.kind == "bool":
        if not (isinstance(element, IntegerType) and element.width == 1):
            raise ValueError(f"'{literal.value}' is not of type {element}")
        return int(literal.value == "true")
    if literal.kind == "float":
        raise ValueError(f"'{literal.value}' is not of type {element}")
    if has_too_many_digits(literal.value):
        raise ValueError(f"an integer of {len(literal.value)} digits fits no type")
    value = int(literal.value, 0) if "x" in literal.value else int(literal.value)
    if isinstance(element, IntegerType):
        return element.wrap(value)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"integer constant {value} out of range for index")
    return value


def _encode_floats(values: list[float], element: FloatType, dtype: np.dtype[Any]) -> bytes:
    with np.errstate(over="ignore"):
        if element.name == "bf16":
            bits: npt.NDArray[np.uint32] = np.array(values, np.float32).view(np.uint32)
            return (
                ((bits >> 16) | np.where(np.isnan(np.array(values)), 0x40, 0).astype(np.uint32))
                .astype(np.uint16)
                .tobytes()
            )
        if element.name in _FP8:
            return bytes([_fp8_to_bits(v, element.name) for v in values])
        return np.array(values, dtype).tobytes()


@cache
def _fp8_values(name: str) -> list[tuple[float, int]]:
    """The finite values that are not negative, ascending, with their bits."""
    return [(value, bits) for bits in range(0x80) if math.isfinite(value := abs(float_from_bits(bits, name)))]


def _fp8_to_bits(value: float, name: str) -> int:
    """Nearest even; what overflows becomes infinity (f8E5M2) or NaN (f8E4M3FN, which has no infinity)."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    finite = _fp8_values(name)
    largest, top = finite[-1]
    step = largest - finite[-2][0]
    if abs(value) >= largest + step / 2:
        return sign | (0x7C if name == "f8E5M2" else 0x7F)
    above = bisect_left(finite, (abs(value), 0))
    nearest = min(finite[max(above - 1, 0) : above + 1], key=lambda p: (abs(p[0] - abs(value)), p[1] & 1))
    return sign | min(nearest[1], top)
