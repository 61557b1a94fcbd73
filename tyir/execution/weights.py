"""Reading the checkpoint that `ty.global`s refer to, one tensor at a time, by memory map.

A module remembers size and header hash of every file it was imported from (`tyir.files`), so that
`check_files` notices an exchanged checkpoint before anything is computed from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dtypes import by_safetensors
from tyir.execution.storage import packed_shape, unpack
from tyir.process.files import open_regular
from tyir.types import TensorType, i64, storage_dtype

__all__ = [
    "CheckpointReader",
    "FileStamp",
    "TensorReference",
    "WeightSource",
    "check_files",
    "checkpoint_of",
    "read_safetensors",
]

Array = npt.NDArray[Any]


_MAX_HEADER: Final = 100_000_000  # the limit of the safetensors library
_OTHER_HEADER: Final = 2**20


class TensorReference(Protocol):
    """A tensor of a file: what ops with the trait `StoredTensor` say."""

    type: TensorType
    file: str
    key: str
    offset: int
    nbytes: int

    @property
    def sym_name(self) -> str | None: ...


class WeightSource(Protocol):
    """Whatever gives the array of a tensor of the checkpoint."""

    def read(self, ref: TensorReference, /) -> Array: ...


def checkpoint_of(module: Module) -> Path:
    """The checkpoint folder an imported module refers to (`tyir.checkpoint`)."""
    value = module.attributes.get("tyir.checkpoint")
    if not isinstance(value, StringAttr):
        raise TyirError(
            "the module does not say where its weights are",
            help='set {tyir.checkpoint = "<folder>"} on the module, as tyir-import does',
        )
    return Path(value.value)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What identifies a tensor file without reading its tensors: its size in bytes and the SHA-256 of its
    header (length word included).

    A file that does not begin with the length of a safetensors header (GGUF, a torch archive) is identified
    by its first MiB.
    """

    size: int
    header_sha256: str

    @staticmethod
    def of(path: Path) -> FileStamp:
        """The stamp of a file; `OSError` when it cannot be read.  Only the header is read."""
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            count = int.from_bytes(length, "little")
            header = file.read(count if count <= _MAX_HEADER else _OTHER_HEADER)
        return FileStamp(size, hashlib.sha256(length + header).hexdigest())

    def attribute(self) -> DictAttr:
        return DictAttr(
            {"size": IntegerAttr(self.size, i64), "header_sha256": StringAttr(self.header_sha256)}
        )


def check_files(module: Module) -> None:
    """Compare every file of `tyir.files` with what lies in the checkpoint folder; `TyirError` names each one
    that is gone or has changed.
    """
    stamps = module.attributes.get("tyir.files", DictAttr())
    folder = checkpoint_of(module)
    problems: list[Diagnostic] = []
    for name, wanted in stamps.items():
        path = folder / name
        try:
            found = FileStamp.of(path)
        except OSError as error:
            problems.append(
                Diagnostic(
                    f"checkpoint file {path} cannot be read: {error.strerror}",
                    help="restore the file, or import the checkpoint again",
                )
            )
            continue
        if found.attribute() is not wanted:
            changed = (
                f"{found.size} bytes instead of {wanted['size'].value}"
                if found.size != wanted["size"].value
                else "another header"
            )
            problems.append(
                Diagnostic(
                    f"checkpoint file {path} has changed since it was imported: {changed}",
                    help="import the checkpoint again",
                )
            )
    if problems:
        raise TyirError(problems)


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a `.params` file as read-only views, as stored (format:
    https://huggingface.co/docs/safetensors).
    """
    with open_regular(path) as file:
        data = np.memmap(file, np.uint8, "r")
    base = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:base].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = by_safetensors[entry["dtype"]].storage
        tensors[key] = data[base + start : base + end].view(dtype).reshape(entry["shape"])
    return tensors


class CheckpointReader:
    """`WeightSource` over a checkpoint folder.

    Arrays are read-only views of the mapped file: no tensor is held in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @lru_cache(maxsize=64)  # noqa: B019 - a reader lives as long as one compile
    def _map(self, file: str) -> npt.NDArray[np.uint8]:
        path = self.folder / file
        try:
            with open_regular(path) as mapped:
                return np.memmap(mapped, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise TyirError(
                f"cannot read weights from {path}: {error}",
                help="the IR refers to the checkpoint it was imported from; restore the file or import again",
            ) from None

    def read(self, ref: TensorReference) -> Array:
        """The tensor [shape of `ref.type`] in the storage dtype of its element type, 4-bit elements one per
        byte.
        """
        return unpack(self.read_packed(ref), ref.type)

    def read_packed(self, ref: TensorReference) -> Array:
        """The tensor as it is stored (`tyir.execution.storage.packed_shape`)."""
        data = self._map(ref.file)
        if ref.offset + ref.nbytes > len(data):
            raise TyirError(
                f"{self.folder / ref.file} ends at byte {len(data)}, but tensor {ref.key} needs bytes"
                f" {ref.offset}..{ref.offset + ref.nbytes}",
                help="the file is truncated or not the one the IR was imported from",
            )
        raw = data[ref.offset : ref.offset + ref.nbytes]
        return raw.view(storage_dtype(ref.type.element)).reshape(packed_shape(ref.type))
