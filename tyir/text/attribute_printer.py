"""The text of attributes, types and locations: the inverse of `tyir.text.attribute_parser`.

What must hold: the text of an attribute, parsed, is the same (uniqued) object; mlir-opt and xDSL read it too.
Attributes are immutable, so the text of each is computed once per `AttributeText` and remembered.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir import attributes as a
from tyir import location as l
from tyir import types as t
from tyir.attributes import Attribute

__all__ = ["ELIDED", "AttributeText", "attribute_text", "escape", "float_text", "key_text", "symbol_text"]

_BARE_ID: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*")
_EMPTY: Final = a.DictAttr()
_UNIT: Final = a.UnitAttr()
ELIDED: Final = "__elided__"  # the resource key that stands for a constant left out of the text, as in MLIR
_VECTOR: Final = re.compile(r"((?:\d+x)*)(\w+)")
_LARGE: Final = 100  # elements beyond which a dense constant is printed as hex, as MLIR does


def escape(text: str) -> str:
    r"""A string literal: `"`, `\`, control and non-ASCII bytes as `\HH` of the UTF-8 encoding."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    encoded = text.encode("utf-8", "surrogateescape")
    return (
        '"' + "".join(chr(b) if 32 <= b < 127 and b not in (34, 92) else f"\\{b:02X}" for b in encoded) + '"'
    )


def key_text(key: str) -> str:
    """A dictionary key: bare when it can be."""
    return key if _BARE_ID.fullmatch(key) else escape(key)


def symbol_text(name: str) -> str:
    """`@name`, quoted when it must be."""
    return "@" + key_text(name)


def float_bits(value: float, name: str) -> tuple[int, int]:
    """The bit pattern of `value` in a float format, and the number of hex digits that hold it."""
    if name == "f64":
        return struct.unpack("<Q", struct.pack("<d", value))[0], 16
    if name == "f16":
        return int(np.float16(value).view(np.uint16)), 4
    with np.errstate(all="ignore"):
        single = int(np.float32(value).view(np.uint32))
    if name == "f32":
        return single, 8
    if name == "bf16":
        return (single >> 16) | (0x40 if math.isnan(value) else 0), 4
    if name == "tf32":
        return (single >> 13) | (0x200 if math.isnan(value) else 0), 5
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if name == "f8E5M2" and math.isinf(value):
        return sign | 0x7C, 2
    return sign | 0x7F, 2  # both fp8 formats: the NaN with all bits set


def float_text(value: float, name: str) -> str:
    """A float literal of type `name`: the shortest of the three forms of MLIR that reads back to the same
    value.
    """
    if not math.isfinite(value):
        bits, digits = float_bits(value, name)
        return f"0x{bits:0{digits}X}"
    text = f"{value:.6e}"
    if (
        name not in ("f16", "bf16") and _rounded(text, name) != value
    ):  # tf32 and fp8 constants are kept in f32
        text = f"{value:.{16 if name == 'f64' else 8}e}"
    return text


def _rounded(text: str, name: str) -> float:
    return float(text) if name == "f64" else float(np.float32(text))


def _number(value: Any, element: t.Type) -> str:
    if isinstance(element, t.FloatType):
        return float_text(float(value), element.name)
    if isinstance(element, t.IntegerType) and element.width == 1:
        return "true" if value else "false"
    return str(int(value))


def _nested(numbers: Sequence[str], shape: Sequence[int]) -> str:
    if not shape:
        return numbers[0]
    if len(shape) == 1:
        return "[" + ", ".join(numbers) + "]"
    step = len(numbers) // shape[0]
    return (
        "[" + ", ".join(_nested(numbers[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])) + "]"
    )


def _dense_body(data: bytes, shape: Sequence[int], element: t.Type) -> str:
    dtype = t.storage_dtype(element)
    flat: npt.NDArray[Any] = np.frombuffer(data, dtype)
    if flat.size == 0:
        return ""
    is_bits = isinstance(element, t.FloatType) and element.name.startswith("f8")
    if is_bits or (
        flat.size > _LARGE
        and dtype != np.bool_
        and not (isinstance(element, t.FloatType) and element.name == "tf32")
    ):
        return f'"0x{data.hex().upper()}"'
    if isinstance(element, t.FloatType) and element.name == "bf16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    numbers = [_number(v, element) for v in flat.tolist()]
    return numbers[0] if flat.size == 1 and math.prod(shape) >= 1 else _nested(numbers, shape)


class AttributeText:
    """Texts of attributes, remembered.  Call it with an attribute.

    With `short`, integers are i64 and floats f64 unless they say otherwise (the parser reads them so).  With
    `elide`, dense constants of more elements, and resources whatever their size, are left out:
    `dense_resource<__elided__>`.  `properties` and `attributes` of ops, with the braces around them, are kept
    by who writes them.
    """

    def __init__(self, elide: int | None = None, short: bool = False) -> None:
        self.elide = elide
        self.short = short
        self.properties: dict[Attribute, str] = {_EMPTY: ""}
        self.attributes: dict[Attribute, str] = {_EMPTY: ""}
        self._memo: dict[Attribute, str] = {}
        self._keys: dict[str, str] = {}

    def __call__(self, attribute: Attribute) -> str:
        text = self._memo.get(attribute)
        if text is None:
            text = self._memo[attribute] = _WRITERS[type(attribute)](self, attribute)
        return text

    def entries(self, entries: a.DictAttr) -> str:
        """`a = 1 : i64, b`: what stands between the braces."""
        memo, keys = self._memo, self._keys
        parts: list[str] = []
        value: Any
        for key, value in entries._map.items():
            text = keys.get(key)
            if text is None:
                text = keys[key] = key_text(key)
            kind = type(value)
            if kind is a.StringAttr:  # mostly met once: not remembered
                text = f"{text} = {escape(value.value)}"
            elif kind is a.DenseResourceAttr:
                text = f"{text} = {_WRITERS[kind](self, value)}"
            elif value is not _UNIT:
                text = f"{text} = {memo.get(value) or self(value)}"
            parts.append(text)
        return ", ".join(parts)

    def types(self, types: Iterable[Attribute]) -> str:
        """`(a, b)`."""
        return "(" + ", ".join([self(x) for x in types]) + ")"

    def results(self, types: Sequence[Attribute]) -> str:
        """What follows `->`: one type bare unless it is a function type, otherwise parenthesised."""
        if len(types) == 1 and not isinstance(types[0], t.FunctionType):
            return self(types[0])
        return self.types(types)

    def location(self, loc: Attribute) -> str:
        """What stands between the parentheses of `loc(...)`."""
        return self(loc)[4:-1]

    # -- one writer per class
    # ---------------------------------------------------------------------------------------
    def _tensor(self, x: t.TensorType) -> str:
        dims = "*x" if x.shape is None else "".join("?x" if d is None else f"{d}x" for d in x.shape)
        encoding = "" if x.encoding is None else ", " + self(x.encoding)
        return f"tensor<{dims}{self(x.element)}{encoding}>"

    def _dense(self, x: a.DenseElementsAttr) -> str:
        shape, element = dense_shape(x.type)
        splat = len(x.data) == t.storage_dtype(element).itemsize
        if self.elide is not None and math.prod(shape) > self.elide and not splat:
            return f"dense_resource<{ELIDED}> : {self(x.type)}"
        return f"dense<{_dense_body(x.data, shape, element)}> : {self(x.type)}"

    def _float(self, x: a.FloatAttr) -> str:
        text = float_text(x.value, x.type.name)
        return (
            text
            if self.short and x.type is t.f64 and not text.startswith("0x")
            else f"{text} : {x.type.name}"
        )

    def _array(self, x: a.DenseArrayAttr) -> str:
        numbers = ", ".join([_number(v, x.element) for v in x.values])
        return f"array<{self(x.element)}{': ' if numbers else ''}{numbers}>"

    def _name_loc(self, x: l.NameLoc) -> str:
        child = "" if x.child is None else f"({self.location(x.child)})"
        return f"loc({escape(x.name)}{child})"

    def _fused(self, x: l.FusedLoc) -> str:
        return "loc(fused[" + ", ".join(self.location(p) for p in x.parts) + "])"


def dense_shape(shaped: t.Type) -> tuple[tuple[int, ...], t.Type]:
    """Shape and element type of the type of a dense constant (a static tensor or vector); `ValueError`
    otherwise.
    """
    if isinstance(shaped, t.TensorType):
        return shaped.static_shape, shaped.element
    if isinstance(shaped, t.VectorType):
        match = _VECTOR.fullmatch(shaped.body)
        element = t.scalar_type(match[2]) if match is not None else None
        if match is not None and element is not None:
            return tuple(int(d) for d in match[1].split("x")[:-1]), element
    raise ValueError(f"{shaped} is not a static tensor or vector type")


_WRITERS: Final[dict[type[Attribute], Callable[[AttributeText, Any], str]]] = {
    a.UnitAttr: lambda p, x: "unit",
    a.BoolAttr: lambda p, x: "true" if x.value else "false",
    a.IntegerAttr: lambda p, x: str(x.value) if p.short and x.type is t.i64 else f"{x.value} : {p(x.type)}",
    a.FloatAttr: AttributeText._float,
    a.StringAttr: lambda p, x: escape(x.value),
    a.SymbolRefAttr: lambda p, x: "::".join(symbol_text(n) for n in x.path),
    a.ArrayAttr: lambda p, x: "[" + ", ".join([p(i) for i in x.items]) + "]",
    a.DictAttr: lambda p, x: "{" + p.entries(x) + "}",
    a.DenseArrayAttr: AttributeText._array,
    a.DenseElementsAttr: AttributeText._dense,
    a.DenseResourceAttr: lambda p, x: f"dense_resource<{x.key if p.elide is None else ELIDED}> : {p(x.type)}",
    a.AffineAttr: lambda p, x: f"{x.kind}<{x.text}>",
    a.OpaqueAttr: lambda p, x: f"#{x.name}{x.body}",
    t.IntegerType: lambda p, x: f"{x.signedness}i{x.width}",
    t.IndexType: lambda p, x: "index",
    t.FloatType: lambda p, x: x.name,
    t.NoneType: lambda p, x: "none",
    t.ComplexType: lambda p, x: f"complex<{p(x.element)}>",
    t.TupleType: lambda p, x: "tuple<" + ", ".join([p(i) for i in x.items]) + ">",
    t.FunctionType: lambda p, x: f"{p.types(x.inputs)} -> {p.results(x.results)}",
    t.TensorType: AttributeText._tensor,
    t.VectorType: lambda p, x: f"vector<{x.body}>",
    t.MemRefType: lambda p, x: f"memref<{x.body}>",
    t.OpaqueType: lambda p, x: f"!{x.name}{x.body}",
    l.UnknownLoc: lambda p, x: "loc(unknown)",
    l.FileLoc: lambda p, x: f"loc({escape(x.file)}:{x.line}:{x.col})",
    l.NameLoc: AttributeText._name_loc,
    l.FusedLoc: AttributeText._fused,
    l.CallSiteLoc: lambda p, x: f"loc(callsite({p.location(x.callee)} at {p.location(x.caller)}))",
}


def attribute_text(attribute: Attribute) -> str:
    """The text of one attribute, type or location."""
    return AttributeText()(attribute)
