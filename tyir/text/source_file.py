"""Reading IR files: every failure is an error with a place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError
from tyir.process.files import read_regular

__all__ = ["MAX_SOURCE", "decode_source", "read_source"]

MAX_SOURCE: Final = 1 << 30  # bytes; a module of 100,000 ops has 20 MB, weights never stand in the text


def read_source(path: str | Path) -> str:
    """The text of a file; `TyirError` when it cannot be read or is not UTF-8."""
    try:
        data = read_regular(path, MAX_SOURCE)
    except OSError as error:
        raise TyirError(
            f"cannot read {path}: {error.strerror}", help="give a file of IR, as tyir-import writes it"
        ) from None
    return decode_source(data, str(path))


def decode_source(data: bytes, name: str) -> str:
    """UTF-8 to text; `TyirError` with line and column of the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, col = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
        raise TyirError(
            f"byte 0x{data[error.start]:02X} is not UTF-8",
            where=f"{name}:{line}:{col}",
            help="give a file of IR, as tyir-import writes it, or mend this line",
        ) from None
