"""Element types in numpy and in safetensors files: the one table of them.

numpy has no bf16 and no fp8: they are held as raw bits in unsigned words.  Names of element types are those
of the IR's text (`tyir.types.scalar_type` gives the type), names of files those of
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

__all__ = ["DTYPES", "Dtype", "by_element", "by_safetensors"]


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type by its three names."""

    element: str
    numpy: str
    safetensors: str

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype that holds one element."""
        return np.dtype(self.numpy)


DTYPES: Final = (
    Dtype("f64", "float64", "F64"),
    Dtype("f32", "float32", "F32"),
    Dtype("f16", "float16", "F16"),
    Dtype("bf16", "uint16", "BF16"),
    Dtype("f8E4M3FN", "uint8", "F8_E4M3"),
    Dtype("f8E5M2", "uint8", "F8_E5M2"),
    Dtype("i64", "int64", "I64"),
    Dtype("i32", "int32", "I32"),
    Dtype("i16", "int16", "I16"),
    Dtype("i8", "int8", "I8"),
    Dtype("ui64", "uint64", "U64"),
    Dtype("ui32", "uint32", "U32"),
    Dtype("ui16", "uint16", "U16"),
    Dtype("ui8", "uint8", "U8"),
    Dtype("i1", "bool", "BOOL"),
)

by_element: Final = {dtype.element: dtype for dtype in DTYPES}
by_safetensors: Final = {dtype.safetensors: dtype for dtype in DTYPES}
