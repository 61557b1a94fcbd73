"""Types of SSA values, and their correspondence to numpy dtypes.

    i1..iN  siN  uiN  index  f16 bf16 f32 f64 tf32 f8E4M3FN f8E5M2  none
    tensor<1x?x256xf16>   vector<..>   memref<..>   tuple<..>   complex<..>   (i32) -> f16   !dialect.name<body>

numpy has no bf16, no fp8 and no 4-bit integers.  At run time an `ui4`/`i4` tensor is one element per byte
(uint8/int8), a bf16 tensor is uint16 words; packing two nibbles into a byte is a matter of storage
(`tyir.execution.storage`).
"""  # noqa: E501

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from typing import Any, Final, Literal, cast, final

import numpy as np
import numpy.typing as npt

from tyir.attribute import Attribute
from tyir.dtypes import by_element

__all__ = [
    "ComplexType",
    "FloatType",
    "FunctionType",
    "IndexType",
    "IntegerType",
    "MemRefType",
    "NoneType",
    "OpaqueType",
    "TensorType",
    "TupleType",
    "Type",
    "VectorType",
    "bf16",
    "f16",
    "f32",
    "f64",
    "from_dtype",
    "i1",
    "i8",
    "i16",
    "i32",
    "i64",
    "index",
    "scalar_type",
    "storage_dtype",
    "ui4",
    "ui8",
]

Signedness = Literal["", "s", "u"]
MAX_WIDTH: Final = 1 << 24  # integers have fewer bits, as in MLIR


class Type(Attribute):
    """The type of an SSA value; usable wherever an attribute is."""

    __slots__ = ()


@final
class IntegerType(Type):
    """`i32` (signless), `si8`, `ui4`; 1 to 2**24-1 bits as in MLIR."""

    __slots__ = ("signedness", "width")

    def __init__(self, width: int, signedness: Signedness = "") -> None:
        if not 0 < width < MAX_WIDTH:
            raise ValueError(f"integer width {width} is not in 1..16777215")
        self.width: Final = width
        self.signedness: Final[Signedness] = signedness

    def wrap(self, value: int) -> int:
        """`value` as this type holds it: signless types accept the unsigned spelling (15 : i4 is -1 : i4);
        `ValueError` when out of range.
        """
        # by the bits that it takes: types may have 2**24, and their bounds as many
        bits = value.bit_length() if value >= 0 else (~value).bit_length()
        positive = self.width - (self.signedness == "s")
        negative = -1 if self.signedness == "u" else self.width - 1
        if bits > (positive if value >= 0 else negative):
            low = "0" if negative < 0 else f"-{_power(negative)}"
            high = str((1 << positive) - 1) if positive <= 64 else f"{_power(positive)}-1"
            raise ValueError(f"integer constant {_digits(value)} out of range for {self} ({low}..{high})")
        if self.signedness == "" and self.width > 1 and value >= 0 and bits == self.width:
            value -= 1 << self.width
        elif self.signedness == "" and self.width == 1:
            value &= 1
        return value


def _power(bits: int) -> str:
    return str(1 << bits) if bits <= 64 else f"2**{bits}"


def _digits(value: int) -> str:
    return str(value) if value.bit_length() <= 128 else f"of {value.bit_length()} bits"


@final
class IndexType(Type):
    """`index`: a size or an address of the host."""

    __slots__ = ()


_FLOAT_WIDTHS: Final = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 19, "f8E4M3FN": 8, "f8E5M2": 8}


@final
class FloatType(Type):
    """`f16 bf16 f32 f64 tf32 f8E4M3FN f8E5M2`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        if name not in _FLOAT_WIDTHS:
            raise ValueError(f"unknown float type {name}")
        self.name: Final = name

    @property
    def width(self) -> int:
        return _FLOAT_WIDTHS[self.name]

    def round(self, value: float) -> float:
        """`value` rounded to this format; overflow gives infinity.  (tf32 and fp8 constants are kept in
        f32.)
        """
        if self.name == "f64" or not math.isfinite(value):
            return value
        with np.errstate(over="ignore"):
            if self.name == "f16":
                return float(np.float16(value))
            single = float(np.float32(value))
        if self.name == "bf16" and math.isfinite(single):
            bits = struct.unpack("<I", struct.pack("<f", single))[0]
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            single = struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]
        return single


@final
class NoneType(Type):
    """`none`."""

    __slots__ = ()


@final
class ComplexType(Type):
    """`complex<f32>`."""

    __slots__ = ("element",)

    def __init__(self, element: Type) -> None:
        self.element: Final = element


@final
class TupleType(Type):
    """`tuple<i32, f32>`."""

    __slots__ = ("items",)

    def __init__(self, items: tuple[Type, ...]) -> None:
        self.items: Final = tuple(items)


@final
class FunctionType(Type):
    """`(inputs) -> (results)`."""

    __slots__ = ("inputs", "results")

    def __init__(self, inputs: tuple[Type, ...], results: tuple[Type, ...]) -> None:
        self.inputs: Final = tuple(inputs)
        self.results: Final = tuple(results)


@final
class TensorType(Type):
    """`tensor<1x?x256xf16>`; a dimension `None` is `?`, a shape `None` is unranked (`tensor<*xf16>`)."""

    __slots__ = ("element", "encoding", "shape")

    def __init__(
        self, shape: Iterable[int | None] | None, element: Type, encoding: Attribute | None = None
    ) -> None:
        self.shape: Final = None if shape is None else tuple(None if d is None else int(d) for d in shape)
        self.element: Final = element
        self.encoding: Final = encoding

    @property
    def rank(self) -> int:
        assert self.shape is not None, "unranked tensor"
        return len(self.shape)

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The shape of a ranked tensor."""
        assert self.shape is not None, "unranked tensor"
        return self.shape

    @property
    def is_static(self) -> bool:
        return self.shape is not None and None not in self.shape

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape; `ValueError` when a dimension is not known."""
        if self.shape is None or None in self.shape:
            raise ValueError(f"{self} has no static shape")
        return tuple(d for d in self.shape if d is not None)

    @property
    def size(self) -> int:
        return math.prod(self.static_shape)

    @property
    def is_storable(self) -> bool:
        """Whether `nbytes` is known: static, of elements that have a width."""
        return self.is_static and isinstance(self.element, (IntegerType, FloatType, IndexType))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensor (two 4-bit elements share a byte, rows are padded to whole bytes)."""
        shape = self.static_shape
        row = shape[-1] if shape else 1
        return math.prod(shape[:-1]) * ((row * bit_width(self.element) + 7) // 8)

    def with_shape(self, shape: Iterable[int | None]) -> TensorType:
        return TensorType(tuple(shape), self.element, self.encoding)

    def with_element(self, element: Type) -> TensorType:
        return TensorType(self.shape, element, self.encoding)


@final
class VectorType(Type):
    """`vector<4x[8]xf32>`, body kept as text: tyir passes vectors through."""

    __slots__ = ("body",)

    def __init__(self, body: str) -> None:
        self.body: Final = body


@final
class MemRefType(Type):
    """`memref<4x?xf32, ...>`, body kept as text: tyir passes memrefs through."""

    __slots__ = ("body",)

    def __init__(self, body: str) -> None:
        self.body: Final = body


@final
class OpaqueType(Type):
    """`!dialect.name<body>`: `body` keeps its brackets, or is empty.  edge10's token and address types are of
    this class.
    """

    __slots__ = ("body", "name")

    def __init__(self, name: str, body: str = "") -> None:
        self.name: Final = name
        self.body: Final = body


i1, i8, i16, i32, i64 = (IntegerType(w) for w in (1, 8, 16, 32, 64))
ui4, ui8, ui16, ui32, ui64 = (IntegerType(w, "u") for w in (4, 8, 16, 32, 64))
index = IndexType()
f16, bf16, f32, f64 = (FloatType(n) for n in ("f16", "bf16", "f32", "f64"))


def bit_width(element: Type) -> int:
    """Bits of one element; `index` is 64."""
    if isinstance(element, (IntegerType, FloatType)):
        return element.width
    if isinstance(element, IndexType):
        return 64
    raise TypeError(f"{element} has no bit width")


_SCALAR: Final = re.compile(r"([su]?)i([1-9][0-9]{0,7})")


def scalar_type(name: str) -> Type | None:
    """`f16`, `ui8`, `index`: the scalar type of a name; None when there is none."""
    if name in _FLOAT_WIDTHS:
        return FloatType(name)
    if name == "index":
        return index
    match = _SCALAR.fullmatch(name)
    if match is None or int(match[2]) >= MAX_WIDTH:
        return None
    return IntegerType(int(match[2]), cast("Signedness", match[1]))


_STORAGE: Final = {name: dtype.storage for name, dtype in by_element.items()}


def storage_dtype(element: Type) -> np.dtype[Any]:
    """The numpy dtype that holds one element; bf16 and fp8 are held as raw bits, sub-byte integers one per
    byte.
    """
    if isinstance(element, FloatType):
        return _STORAGE[element.name] if element.name in _STORAGE else np.dtype(np.float32)  # tf32
    if isinstance(element, IndexType):
        return np.dtype(np.int64)
    if isinstance(element, IntegerType):
        if element.width == 1 and element.signedness == "":
            return np.dtype(np.bool_)
        for width in (8, 16, 32, 64):
            if element.width <= width:
                return np.dtype(f"{'u' if element.signedness == 'u' else ''}int{width}")
    raise TypeError(f"no numpy dtype holds {element}")


def from_dtype(dtype: npt.DTypeLike) -> Type:
    """The element type of a numpy dtype (unsigned dtypes give `uiN`, signed ones the signless `iN`)."""
    d = np.dtype(dtype)
    if d.kind == "b":
        return i1
    if d.kind == "f":
        return FloatType(f"f{d.itemsize * 8}")
    if d.kind in "iu":
        return IntegerType(d.itemsize * 8, "u" if d.kind == "u" else "")
    raise TypeError(f"no element type for numpy dtype {d}")
