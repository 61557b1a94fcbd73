"""Laying out safetensors files before their data is there: header first, tensors streamed after it.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header padded with
spaces, data).  The library's writers take the whole file's tensors at once, which a file of weights that are
computed one at a time cannot give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from tyir.dtypes import by_safetensors

__all__ = ["SafetensorsLayout", "Slot"]

_ALIGNMENT: Final = 64  # the data starts on a cache line


@dataclass(frozen=True)
class Slot:
    """Where a tensor's bytes lie in its file."""

    offset: int
    nbytes: int


class SafetensorsLayout:
    """The layout of one file: `tensors` gives the dtype, as safetensors calls it, and the shape of each.

    They stand in that order and without holes (the format allows none).
    """

    def __init__(
        self, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position, relative = 0, {}
        for name, (dtype, shape) in tensors.items():
            nbytes = by_safetensors[dtype].storage.itemsize
            for dimension in shape:
                nbytes *= dimension
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + nbytes],
            }
            relative[name] = (position, nbytes)
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self.header: Final = text + b" " * (-(8 + len(text)) % _ALIGNMENT)
        self.start: Final = len(self.header).to_bytes(8, "little") + self.header  # what the data follows
        base = len(self.start)
        self.size: Final = base + position
        self.slots: Final = {name: Slot(base + offset, nbytes) for name, (offset, nbytes) in relative.items()}

    def create(self, path: Path) -> IO[bytes]:
        """The file at its full size with its header; tensors are then written at their offsets."""
        file = path.open("wb")
        file.write(self.start)
        file.truncate(self.size)
        return file
