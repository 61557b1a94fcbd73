"""Reading the checkpoint that `ty.global`s refer to, one tensor at a time, by memory map.

A module remembers size and header hash of every file it was imported from (`tyir.files`), so that
`check_files` notices an exchanged checkpoint before anything is computed from it.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.artifacts.files import file_inside
from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dtypes import by_safetensors
from tyir.execution.storage import packed_shape, unpack
from tyir.process.files import open_regular, parse_json
from tyir.types import TensorType, i64, storage_dtype

__all__ = [
    "CheckpointReader",
    "FileEntry",
    "FileStamp",
    "TensorReference",
    "WeightSource",
    "check_files",
    "checkpoint_of",
    "give_back_pages",
    "read_safetensors",
    "safetensors_header",
    "tensors_of",
]

Array = npt.NDArray[Any]


_MAX_HEADER: Final = 100_000_000  # the limit of the safetensors library
_OTHER_HEADER: Final = 2**20
_ELSEWHERE: Final = re.compile(r".+\.safetensors|pytorch_model[-\w]*\.bin")


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
    if not isinstance(stamps, DictAttr):
        raise TyirError(f"tyir.files is {stamps}, not a dictionary", help="import the checkpoint again")
    problems: list[Diagnostic] = []
    for name, wanted in stamps.items():
        path, size = folder / name, wanted.get("size") if isinstance(wanted, DictAttr) else None
        try:
            found = FileStamp.of(_weights_file(folder, name))
        except (OSError, TyirError) as error:
            why = error.strerror if isinstance(error, OSError) else error.diagnostics[0].message
            problems.append(
                Diagnostic(
                    f"checkpoint file {path} cannot be read: {why}",
                    help="restore the file, or import the checkpoint again",
                )
            )
            continue
        if found.attribute() is not wanted:
            changed = (
                f"{found.size} bytes instead of {size.value}"
                if isinstance(size, IntegerAttr) and found.size != size.value
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


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A tensor of a safetensors file: bytes `start` to `end` of the file."""

    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def _entry(base: int, data_offsets: Sequence[int], dtype: str, shape: Sequence[int]) -> FileEntry:
    start, end = data_offsets
    if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
        raise ValueError
    return FileEntry(base + start, base + end, dtype, tuple(shape))


def _entries(data: npt.NDArray[np.uint8], path: Path) -> dict[str, FileEntry]:
    return safetensors_header(data, path)[0]


def safetensors_header(
    data: npt.NDArray[np.uint8], path: Path
) -> tuple[dict[str, FileEntry], dict[str, Any]]:
    """The tensors that the header of a safetensors file lists (https://huggingface.co/docs/safetensors), and
    its `__metadata__`; `TyirError` when it is not one.
    """
    damaged = TyirError(f"{path} is damaged: its header is not one of safetensors", help=_RESTORE)
    base = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if not 8 < base <= min(len(data), 8 + _MAX_HEADER):
        raise damaged
    try:
        header = parse_json(data[8:base].tobytes(), finite=True)
        metadata = dict(header.pop("__metadata__", {}))
        found = {key: _entry(base, **entry) for key, entry in header.items()}
        for entry in found.values():
            wanted = math.prod(entry.shape) * by_safetensors[entry.dtype].storage.itemsize
            if not base <= entry.start <= entry.end <= len(data) or entry.end - entry.start != wanted:
                raise damaged
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    return found, metadata


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a `.params` file as read-only views, as stored (format:
    https://huggingface.co/docs/safetensors).

    `TyirError` when the file cannot be read or is damaged.
    """
    return tensors_of(_mapped(path.parent, path.name), path)


def tensors_of(data: npt.NDArray[np.uint8], path: Path) -> dict[str, Array]:
    """The same of the bytes of such a file; `path` is for messages."""
    return {
        key: data[e.start : e.end].view(by_safetensors[e.dtype].storage).reshape(e.shape)
        for key, e in _entries(data, path).items()
    }


_RESTORE: Final = "restore the file, or make it again"


def _weights_file(folder: Path, name: str) -> Path:
    """The file of a checkpoint: one inside its folder, or of another that it is made with (an adapter's base,
    a LLaVA's tower), which is named by its whole path.  That is a safetensors file, whose header must list
    what is read of it, or one that torch saved a model's weights as.
    """
    base = Path(name)
    if base.is_absolute() and _ELSEWHERE.fullmatch(base.name):
        return file_inside(base.parent, base.name)
    return file_inside(folder, name)


def _mapped(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """The bytes of a file inside a folder."""
    try:
        with open_regular(_weights_file(folder, name)) as file:
            return np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise TyirError(
            f"cannot read weights from {folder / name}: {error}",
            help="the IR refers to the checkpoint it was imported from; restore the file or import again",
        ) from None


def give_back_pages(mapped: npt.NDArray[np.uint8], begin: int, end: int) -> None:
    """Let the system have the pages of a mapped file that were read, of the bytes `begin`..`end`; they are
    read again when needed.
    """
    mapping = getattr(mapped, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        begin -= begin % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class CheckpointReader:
    """`WeightSource` over a checkpoint folder, or a folder of artifacts.

    Arrays are read-only views of the mapped file: no tensor is held in memory.  What a reference says is
    believed of no file: it names one inside the folder, as many bytes as its type takes, and where the file
    lists its tensors, bytes of the one that it names.  `TyirError` by the name of the op and the file
    otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}

    def _map(self, file: str) -> npt.NDArray[np.uint8]:
        if file not in self._maps:
            self._maps[file] = self._open(file)
        return self._maps[file]

    def give_back(self, ref: TensorReference | None = None) -> None:
        """Let the system have the pages that were read, of one tensor or of all: a walk over a whole model
        then takes no more memory than what is being worked on.  Arrays stay as they are, and read their bytes
        from the file again.
        """
        for array in [self._map(ref.file)] if ref is not None else list(self._maps.values()):
            begin, end = (0, len(array)) if ref is None else (ref.offset, ref.offset + ref.nbytes)
            give_back_pages(array, begin, end)

    def _open(self, file: str) -> npt.NDArray[np.uint8]:
        return _mapped(self.folder, file)

    @lru_cache(maxsize=64)  # noqa: B019
    def _entries(self, file: str) -> dict[str, FileEntry]:
        listed = file.endswith((".params", ".safetensors"))
        return _entries(self._map(file), self.folder / file) if listed else {}

    def read(self, ref: TensorReference) -> Array:
        """The tensor [shape of `ref.type`] in the storage dtype of its element type, 4-bit elements one per
        byte.
        """
        return unpack(self.read_packed(ref), ref.type)

    def read_packed(self, ref: TensorReference) -> Array:
        """The tensor as it is stored (`tyir.execution.storage.packed_shape`)."""
        try:
            if problem := self._problem(ref):
                raise TyirError(problem, help="the file is truncated or not the one the IR was made with")
            raw = self._map(ref.file)[ref.offset : ref.offset + ref.nbytes]
            return raw.view(storage_dtype(ref.type.element)).reshape(packed_shape(ref.type))
        except TyirError as error:
            first = error.diagnostics[0]
            raise TyirError(f"@{ref.sym_name}: {first.message}", help=first.help) from None

    def _problem(self, ref: TensorReference) -> str | None:
        """What is wrong with a reference."""
        if not ref.type.is_storable:
            return f"{ref.type} has no size"
        wanted = math.prod(packed_shape(ref.type)) * storage_dtype(ref.type.element).itemsize
        if ref.nbytes != wanted:
            return f"{ref.type} takes {wanted} bytes, nbytes is {ref.nbytes}"
        if ref.offset < 0:
            return f"the offset {ref.offset} in {ref.file} is negative"
        path, begin, end = self.folder / ref.file, ref.offset, ref.offset + ref.nbytes
        if end > len(self._map(ref.file)):
            return (
                f"{path} ends at byte {len(self._map(ref.file))}, but tensor {ref.key} needs bytes"
                f" {begin}..{end}"
            )
        entries = self._entries(ref.file)
        if not entries:
            return None
        entry = entries.get(ref.key)
        if entry is None:
            return f"{path} has no tensor {ref.key}"
        whole = ref.file.endswith(".params")  # a checkpoint's tensor may be referred to in parts
        if (
            (begin, end) != (entry.start, entry.end)
            if whole
            else not entry.start <= begin <= end <= entry.end
        ):
            return f"{path} has {ref.key} in bytes {entry.start}..{entry.end}, not in {begin}..{end}"
        if (begin - entry.start) % storage_dtype(ref.type.element).itemsize:
            return f"byte {begin} of {path} is within an element of {ref.key}"
        return None
