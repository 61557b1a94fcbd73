"""Reading the checkpoint that `ty.global`s refer to, one tensor at a time, by memory map."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Global
from tyir.types import storage_dtype

__all__ = ["CheckpointReader", "WeightSource", "checkpoint_of"]

Array = npt.NDArray[Any]


class WeightSource(Protocol):
    """Whatever gives the array of a `ty.global`."""

    def read(self, ref: Global) -> Array: ...


def checkpoint_of(module: Module) -> Path:
    """The checkpoint folder an imported module refers to (`tyir.checkpoint`)."""
    value = module.attributes.get("tyir.checkpoint")
    if not isinstance(value, StringAttr):
        raise TyirError("the module does not say where its weights are", help='set {tyir.checkpoint = "<folder>"} on the module, as tyir-import does')
    return Path(value.value)


class CheckpointReader:
    """`WeightSource` over a checkpoint folder.  Arrays are read-only views of the mapped file: no tensor is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @lru_cache(maxsize=64)  # noqa: B019 - a reader lives as long as one compile
    def _map(self, file: str) -> npt.NDArray[np.uint8]:
        path = self.folder / file
        try:
            return np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise TyirError(f"cannot read weights from {path}: {error}", help="the IR refers to the checkpoint it was imported from; restore the file or import again") from None

    def read(self, ref: Global) -> Array:
        """The tensor [shape of `ref.type`] in the storage dtype of its element type."""
        data = self._map(ref.file)
        if ref.offset + ref.nbytes > len(data):
            raise TyirError(
                f"{self.folder / ref.file} ends at byte {len(data)}, but tensor {ref.key} needs bytes {ref.offset}..{ref.offset + ref.nbytes}",
                help="the file is truncated or not the one the IR was imported from",
            )
        raw = data[ref.offset : ref.offset + ref.nbytes]
        return raw.view(storage_dtype(ref.type.element)).reshape(ref.type.static_shape)
