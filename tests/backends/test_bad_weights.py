"""Weights that are no f16 numbers are named as they are stored, without a library's warnings before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import SymbolRefAttr
from tyir.backends.edge10.params import ParamsFile, write_params
from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.ty import GetGlobal, Global, Param
from tyir.execution.weights import TensorReference
from tyir.ir import Block, Region, Value
from tyir.types import TensorType, Type, bf16, f16, f32

Array = npt.NDArray[Any]
KEY = "model.layers.3.mlp.up_proj.weight"


class Stored:
    """A weight source of one array."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def read(self, ref: TensorReference) -> Array:
        return self.array


def write(array: Array, element: Type, int4: bool, path: Path) -> None:
    """Write the parameters that are made of one stored tensor: itself in f16, or its 4-bit groups."""
    module, made = Module.empty(), []
    type = TensorType(array.shape, element)
    nbytes = array.nbytes
    module.body.append(
        Global(sym_name=KEY, type=type, file="model.safetensors", key=KEY, offset=0, nbytes=nbytes)
    )
    for number in range(3 if int4 else 1):
        block = Block()
        value: Value = block.append(GetGlobal(symbol=SymbolRefAttr(KEY), result_types=[type])).results[0]
        if element is not f16:
            value = block.append(ty.Cast(value, element=f16)).results[0]
        if int4:
            value = block.append(ty.QuantizeGroups(value, group_size=8)).results[number]
        block.append(ty.Yield(value=value))
        made.append(Param(sym_name=f"p{number}", type=ty.tensor_type(value), initializer=Region([block])))
        module.body.append(made[-1])
    write_params([ParamsFile(path / "a.params", made)], Stored(array))


def spoilt(element: Type, *values: float) -> Array:
    """A weight [16, 32] that holds these values."""
    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    weight[2, : len(values)] = values
    if element is bf16:
        return (weight.view(np.uint32) >> 16).astype(np.uint16)
    return weight.astype(np.float16 if element is f16 else np.float32)


@pytest.mark.parametrize("int4", [False, True], ids=["f16", "int4"])
@pytest.mark.parametrize(
    ("element", "values", "wanted"),
    [
        (f16, [np.nan], "holds 1 NaN value\n"),
        (f16, [np.inf, -np.inf], "holds 2 infinite values\n"),
        (f32, [np.nan, np.inf], "holds 1 NaN and 1 infinite values\n"),
        (bf16, [-np.inf], "holds 1 infinite value\n"),
        (f32, [70000.0, -1e6], "holds 2 values beyond the f16 range of 65504 (largest 1e+06)"),
        (bf16, [131072.0], "holds 1 value beyond the f16 range of 65504 (largest 131072)"),
    ],
)
def test_the_stored_tensor_is_named(
    tmp_path: Path, element: Type, values: list[float], wanted: str, int4: bool
) -> None:
    with pytest.raises(TyirError) as caught:  # warnings are errors here
        write(spoilt(element, *values), element, int4, tmp_path)
    message = str(caught.value)
    assert f"model.safetensors: tensor '{KEY}' {wanted}" in message and message.count("error:") == 1
    assert ("download it again" in message) == ("beyond" not in wanted)


@pytest.mark.parametrize("element", [f16, f32, bf16])
@pytest.mark.parametrize("values", [[65504.0, -65504.0], [0.0], [1e-30]])
def test_the_largest_and_the_smallest_are_fine(tmp_path: Path, element: Type, values: list[float]) -> None:
    if element is bf16:
        values = [65280.0 if abs(v) > 1 else v for v in values]  # the largest bf16 that f16 holds
    write(spoilt(element, *values), element, False, tmp_path)
