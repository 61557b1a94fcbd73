"""What a manifest says of one program: its files, and the tensors it takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from annotated_types import Interval, MaxLen, MinLen

from tyir.artifacts.schema import Matches, closed
from tyir.types import scalar_type, storage_dtype

__all__ = ["MAX_DIES", "Count", "DieProgram", "Element", "FileName", "Name", "TensorInfo"]

MAX_DIES: Final = 16

Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
FileName = Annotated[
    str,
    Matches(
        "[A-Za-z0-9_][A-Za-z0-9_.=-]{0,200}(/[A-Za-z0-9_][A-Za-z0-9_.=-]{0,200}){0,20}",
        "the path of a file inside the folder, as the compiler names them",
    ),
]
Name = Annotated[str, Matches("[A-Za-z0-9_][A-Za-z0-9_.$-]*"), MaxLen(200)]
Element = Annotated[str, Matches("f16|bf16|f32|f64|i1|[su]?i(4|8|16|32|64)")]


@closed
@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a program: `dtype` in IR spelling (f16, i32), `alias` the index of the input an
    output updates in place.
    """

    name: Name
    shape: Annotated[tuple[Count, ...], MaxLen(8)]
    dtype: Element
    alias: Annotated[int, Interval(ge=0, le=2**15)] | None = None

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of a buffer for it."""
        element = scalar_type(self.dtype)
        assert element is not None, "`Element` has such names only"
        return storage_dtype(element)


@closed
@dataclass(frozen=True)
class DieProgram:
    """The files of one die at one sequence length (of a vision tower: number of patches)."""

    die: Annotated[int, Interval(ge=0, lt=MAX_DIES)]
    seqlen: Count
    function: Name
    library: FileName
    program: FileName
    ir: FileName
    constants: FileName
    params: FileName
    inputs: Annotated[tuple[TensorInfo, ...], MinLen(1)]
    outputs: Annotated[tuple[TensorInfo, ...], MinLen(1)]

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        return (self.library, self.program, self.ir, self.constants, self.params)
