"""`pytorch_model.bin`: where each tensor lies in the file, found without reading data and without executing
the pickle.

`torch.load(weights_only=True)` admits tensors and plain containers only; in fake-tensor mode it notes each
storage's offset in the zip archive instead of reading it (torch.serialization).  Loaded lazily: imports
torch.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tyir.diagnostics import TyirError
from tyir.frontends.checkpoint import ELEMENTS, StoredTensor
from tyir.process.files import open_regular, stand_in
from tyir.types import TensorType

__all__ = ["read_torch_file"]

_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAX_PICKLE: Final = 64 << 20  # bytes; 100 for each tensor
_CONVERT: Final = (
    "load it with torch.load(weights_only=True) and save the model with save_pretrained, which writes"
    " safetensors"
)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote, by name.

    `TyirError` when it holds anything else, or in a way that cannot be mapped.
    """
    _check_archive(path)
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        message = (
            f"{path.name} holds Python objects other than tensors, which are never loaded: they could run"
            " code"
        )
        raise TyirError(message, where=str(path), help="use the model's safetensors files") from None
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        raise TyirError(
            f"{path.name} cannot be read: {text}",
            where=str(path),
            help="the file is damaged; download it again",
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        raise TyirError(f"{path.name} is not a dictionary of tensors", where=str(path), help=_CONVERT)
    size = path.stat().st_size
    return {name: _stored(name, tensor, path, size) for name, tensor in content.items()}


def _check_archive(path: Path) -> None:
    """Refuse what is not an archive, or one that unpacks to more than it should: torch reads the pickle
    whole.
    """
    try:
        with open_regular(path) as file:
            instead = stand_in(file.peek())
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
    except OSError as error:
        raise TyirError(
            f"cannot read {path.name}: {error.strerror}", where=str(path), help="download the file again"
        ) from None
    except (zipfile.BadZipFile, ValueError, RuntimeError):
        if instead is not None:
            message = f"{path.name} is {instead[0]}, not the file itself"
            raise TyirError(message, where=str(path), help=instead[1]) from None
        raise TyirError(
            f"{path.name} is no archive as torch.save has written since version 1.6, or it is truncated",
            where=str(path),
            help=_CONVERT,
        ) from None
    pickled = max((r.file_size for r in records if r.filename.endswith("data.pkl")), default=0)
    packed = next((r.filename for r in records if r.compress_type != zipfile.ZIP_STORED), None)
    if pickled > _MAX_PICKLE or packed is not None:
        what = (
            f"record '{packed}' is compressed"
            if packed is not None
            else f"its list of tensors has {pickled} bytes, more than the {_MAX_PICKLE} it may have"
        )
        raise TyirError(f"{path.name} was not written by torch.save: {what}", where=str(path), help=_CONVERT)


def _stored(name: str, tensor: Any, path: Path, size: int) -> StoredTensor:
    if tensor.dtype not in _NAMES:
        raise TyirError(
            f"tensor '{name}' has dtype {tensor.dtype}",
            where=str(path),
            help=f"known: {', '.join(map(str, _NAMES))}",
        )
    if not tensor.is_contiguous():
        raise TyirError(
            f"tensor '{name}' is a strided view, which cannot be mapped", where=str(path), help=_CONVERT
        )
    type = TensorType(tuple(tensor.shape), ELEMENTS[_NAMES[tensor.dtype]])
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    nbytes = tensor.numel() * tensor.element_size()
    start = None if offset is None else offset + tensor.storage_offset() * tensor.element_size()
    if start is None or start + nbytes > size:
        raise TyirError(
            f"tensor '{name}' lies outside the file",
            where=str(path),
            help="the file is damaged; download it again",
        )
    return StoredTensor(name, path.name, type, start, nbytes)
