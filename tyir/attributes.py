"""Attributes: the immutable, uniqued values that ops carry (`tyir.attribute` says what that means)."""

from __future__ import annotations

import math
import struct
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Final, cast, final

import numpy as np
import numpy.typing as npt

from tyir.attribute import Attribute
from tyir.types import FloatType, IndexType, IntegerType, TensorType, Type, from_dtype, i64, storage_dtype

__all__ = [
    "AffineAttr",
    "ArrayAttr",
    "Attribute",
    "BoolAttr",
    "DenseArrayAttr",
    "DenseElementsAttr",
    "DenseResourceAttr",
    "DictAttr",
    "FloatAttr",
    "IntegerAttr",
    "OpaqueAttr",
    "StringAttr",
    "SymbolRefAttr",
    "UnitAttr",
]


@final
class UnitAttr(Attribute):
    """`unit`: presence is the information; printed as a bare key."""

    __slots__ = ()


@final
class BoolAttr(Attribute):
    """`true` or `false` (MLIR's `i1` integer attribute)."""

    __slots__ = ("value",)
    _args_are_key = False

    def __init__(self, value: bool) -> None:
        self.value: Final = bool(value)


@final
class IntegerAttr(Attribute):
    """`3 : i64`.

    Values outside the type's range raise `ValueError`; unsigned spellings of signless types wrap as in MLIR.
    """

    __slots__ = ("type", "value")
    _args_are_key = False

    def __init__(self, value: int, type: Type) -> None:
        if isinstance(type, IntegerType):
            value = type.wrap(int(value))
        elif not isinstance(type, IndexType):
            raise TypeError(f"integer attribute needs an integer or index type, got {type}")
        self.value: Final = int(value)
        self.type: Final = type


@final
class FloatAttr(Attribute):
    """`1.0e-5 : f32`; the value is rounded to the type, overflow becomes infinity as in MLIR."""

    __slots__ = ("type", "value")
    _args_are_key = False

    def __init__(self, value: float, type: FloatType) -> None:
        self.value: Final = type.round(float(value))
        self.type: Final = type

    def _key(self) -> Any:
        return (struct.pack("<d", self.value), self.type)


@final
class StringAttr(Attribute):
    """`"text"`."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value: Final = value


@final
class SymbolRefAttr(Attribute):
    """`@root::@nested`: a reference to a symbol by path."""

    __slots__ = ("path",)

    def __init__(self, *path: str) -> None:
        self.path: Final = tuple(path)

    @property
    def root(self) -> str:
        return self.path[0]

    @property
    def leaf(self) -> str:
        return self.path[-1]


@final
class ArrayAttr(Attribute):
    """`[a, b, c]`: attributes of any kind."""

    __slots__ = ("items",)
    _args_are_key = False

    def __init__(self, items: Iterable[Attribute]) -> None:
        self.items: Final = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Attribute]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Attribute:
        return self.items[index]


@final
class DictAttr(Attribute):
    """`{a = 1 : i64, b}`: an immutable mapping with sorted keys; also what an op's properties and attributes
    are.
    """

    __slots__ = ("_map",)
    _args_are_key = False

    def __init__(
        self, entries: DictAttr | Mapping[str, Attribute] | Iterable[tuple[str, Attribute]] = ()
    ) -> None:
        given = (
            entries
            if type(entries) is dict
            else dict(entries._map if isinstance(entries, DictAttr) else entries)
        )
        self._map: Final[dict[str, Attribute]] = {key: given[key] for key in sorted(given)}

    def _key(self) -> Any:
        return tuple(self._map.items())

    @staticmethod
    def of(entries: Mapping[str, Attribute]) -> DictAttr:
        """The dictionary of these entries, as the constructor gives it, made only if there is none yet."""
        items = tuple(sorted(entries.items()))  # keys differ: values are never compared
        found: DictAttr | None = DictAttr._by_key.get(items)
        return DictAttr(dict(items)) if found is None else found

    def __getitem__(self, key: str) -> Any:
        return self._map[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self._map.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._map

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def keys(self) -> KeysView[str]:
        return self._map.keys()

    def values(self) -> ValuesView[Any]:
        return self._map.values()

    def items(self) -> ItemsView[str, Any]:
        return self._map.items()

    def updated(self, **entries: Attribute) -> DictAttr:
        """A dictionary with `entries` set; write keys that hold dots through `with_entry`."""
        return DictAttr({**self._map, **entries})

    def with_entry(self, key: str, value: Attribute) -> DictAttr:
        return DictAttr({**self._map, key: value})

    def without(self, *keys: str) -> DictAttr:
        return DictAttr({k: v for k, v in self._map.items() if k not in keys})


@final
class DenseArrayAttr(Attribute):
    """`array<i64: 1, 2>`: numbers of one of the types i1, i8, i16, i32, i64, f32, f64."""

    __slots__ = ("element", "values")
    _args_are_key = False

    def __init__(self, element: IntegerType | FloatType, values: Iterable[int | float]) -> None:
        numbers: tuple[int | float, ...]
        if isinstance(element, FloatType):
            numbers = tuple(element.round(float(v)) for v in values)
        else:
            numbers = tuple(element.wrap(int(v)) for v in values)
        self.element: Final = element
        self.values: Final = numbers

    def _key(self) -> Any:
        if isinstance(self.element, FloatType):
            return (self.element, struct.pack(f"<{len(self.values)}d", *self.values))
        return (self.element, self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[int | float]:
        return iter(self.values)

    @staticmethod
    def i64(values: Iterable[int]) -> DenseArrayAttr:
        return DenseArrayAttr(i64, values)

    def ints(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self.values)


@final
class DenseElementsAttr(Attribute):
    """`dense<...> : tensor<4xf32>`: a small constant tensor, held as little-endian bytes (sub-byte elements
    one per byte).

    `data` holds either every element or exactly one (a splat).
    """

    __slots__ = ("data", "type")

    def __init__(self, data: bytes, type: Type) -> None:
        self.data: Final = data
        self.type: Final = type

    @staticmethod
    def from_numpy(array: npt.NDArray[Any]) -> DenseElementsAttr:
        """The constant whose type is `array`'s shape and dtype."""
        array = np.asarray(array)
        return DenseElementsAttr(
            np.ascontiguousarray(array).tobytes(), TensorType(array.shape, from_dtype(array.dtype))
        )

    @property
    def is_splat(self) -> bool:
        assert isinstance(self.type, TensorType)
        itemsize = storage_dtype(self.type.element).itemsize
        return len(self.data) == itemsize and math.prod(self.type.static_shape) != 1

    def to_numpy(self) -> npt.NDArray[Any]:
        """The elements, broadcast when a splat; dtype is the element type's storage dtype
        (`tyir.types.storage_dtype`).
        """
        assert isinstance(self.type, TensorType)
        flat = np.frombuffer(self.data, storage_dtype(self.type.element))
        shape = self.type.static_shape
        return np.broadcast_to(flat, shape).copy() if self.is_splat else flat.reshape(shape)


@final
class DenseResourceAttr(Attribute):
    """`dense_resource<key> : tensor<..>`: the blob stands in the file's metadata section
    (`Module.resources`).
    """

    __slots__ = ("key", "type")

    def __init__(self, key: str, type: Type) -> None:
        self.key: Final = key
        self.type: Final = type


@final
class AffineAttr(Attribute):
    """`affine_map<...>`, `affine_set<...>` or `strided<...>`, kept as text: tyir passes them through
    untouched.
    """

    __slots__ = ("kind", "text")

    def __init__(self, kind: str, text: str) -> None:
        self.kind: Final = kind
        self.text: Final = text


@final
class OpaqueAttr(Attribute):
    """`#dialect.name<body>` of a dialect tyir does not know; `body` is kept as text, including its brackets,
    or empty.
    """

    __slots__ = ("body", "name")

    def __init__(self, name: str, body: str = "") -> None:
        self.name: Final = name
        self.body: Final = body
