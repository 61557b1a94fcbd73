"""The table of element types agrees with numpy, with the IR's types and with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tyir.backends.edge10.params import ParamsFile
from tyir.dialects.ty import Param
from tyir.dtypes import DTYPES, Dtype
from tyir.types import (
    FloatType,
    IntegerType,
    TensorType,
    Type,
    bit_width,
    from_dtype,
    scalar_type,
    storage_dtype,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.element)
def test_one_row(dtype: Dtype) -> None:
    kind = scalar_type(dtype.element)
    assert kind is not None and str(kind) == dtype.element
    assert storage_dtype(kind) == dtype.storage
    assert dtype.storage.itemsize == max(bit_width(kind), 8) // 8
    if isinstance(kind, FloatType) and dtype.storage.kind != "f":
        return  # numpy has no such type
    assert from_dtype(dtype.storage) is kind
    data = save({"x": np.zeros(2, dtype.storage)})
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]["dtype"] == dtype.safetensors


def test_names_that_are_not_scalar_types() -> None:
    for name in ("", "f8", "i0", "u8", "i16777216", "si", "tensor", "i1x", "none"):
        assert scalar_type(name) is None
    assert scalar_type("i16777215") is IntegerType((1 << 24) - 1)


@pytest.mark.parametrize(
    ("element", "name"),
    [("ui4", "U8"), ("i4", "I8"), ("ui16", "U16"), ("bf16", "BF16"), ("f8E5M2", "F8_E5M2"), ("i1", "BOOL")],
)
def test_names_in_params_files(element: str, name: str, tmp_path: Path) -> None:
    kind = scalar_type(element)
    assert isinstance(kind, Type)
    file = ParamsFile(tmp_path / "a.params", [Param(sym_name="w", type=TensorType((2, 4), kind))])
    assert json.loads(file.layout.header)["w"]["dtype"] == name
