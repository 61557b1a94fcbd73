"""Files that are opened once: what is checked is what is used, whatever happens to their names meanwhile.

    folder = OpenedFolder(Path("out/4die"))
    file = folder.file("config.json")       # relative to the folder as it was opened
    file.check({"size": 610, "sha256": "..."})
    file.read(), file.map()                 # the bytes that were checked

A folder that is renamed, replaced or deleted while it is open goes on being the one that was opened.  Bytes
that are read are compared with what the check has seen; a mapped file is shared with whoever writes into it,
which `unchanged` notices afterwards.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.files import check_link, is_relative_name
from tyir.diagnostics import TyirError
from tyir.process.files import kind_of
from tyir.process.seen import SeenFiles

__all__ = ["OpenedFile", "OpenedFolder"]

_PIECE: Final = 1 << 20
_LARGE: Final = 1 << 20  # bytes: less is hashed in a moment
_DAMAGED: Final = "compile the model again, or restore the file"


class OpenedFile:
    """A regular file; `path` is what it was called when it was opened, for messages."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)
        self._stamp = _stamp(self._status)
        self._sha256: str | None = None
        self._map: npt.NDArray[np.uint8] | None = None
        weakref.finalize(self, os.close, descriptor)

    @property
    def size(self) -> int:
        """Bytes when it was opened."""
        return self._stamp[0]

    def sha256(self) -> str:
        """The hash of its bytes in hexadecimal digits, computed once."""
        if self._sha256 is None:
            digest, offset = hashlib.sha256(), 0
            while piece := os.pread(self._descriptor, _PIECE, offset):
                digest.update(piece)
                offset += len(piece)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def problem(self, record: Mapping[str, Any], seen: SeenFiles | None = None) -> str | None:
        """In what the file is not the one that `record` describes; `seen` is believed of a large one."""
        if self.size != record["size"]:
            return f"{self.path} has {self.size} bytes, {record['size']} were written"
        sha256 = record["sha256"]
        if seen is None or self.size < _LARGE or self._sha256 is not None:
            return None if self.sha256() == sha256 else self._changed()
        if seen.has(self._status, sha256):
            self._sha256 = sha256
        elif self.sha256() != sha256:
            return self._changed()
        else:
            seen.note(self._status, sha256)
        return None

    def _changed(self) -> str:
        return f"{self.path} has changed since it was compiled (its hash differs)"

    def check(self, record: Mapping[str, Any]) -> None:
        """`TyirError` unless the file is the one that `record` describes."""
        if (problem := self.problem(record)) is not None:
            raise TyirError(problem, help=_DAMAGED)

    def read(self) -> bytes:
        """All bytes; `TyirError` when they are not those that were hashed, or cannot be read."""
        try:
            data = b"".join(self._pieces())
        except OSError as error:
            raise TyirError(f"cannot read {self.path}: {error.strerror}", help=_DAMAGED) from None
        if self._sha256 is not None and hashlib.sha256(data).hexdigest() != self._sha256:
            raise self._written_to()
        return data

    def _pieces(self) -> list[bytes]:
        pieces: list[bytes] = []
        offset = 0
        while piece := os.pread(self._descriptor, max(self.size, _PIECE), offset):
            pieces.append(piece)
            offset += len(piece)
        return pieces

    def map(self) -> npt.NDArray[np.uint8]:
        """The bytes as a read-only mapping, made once."""
        if self._map is None:
            try:
                # a file of no bytes cannot be mapped
                mapped = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ) if self.size else b""
            except (OSError, ValueError) as error:
                raise TyirError(f"cannot map {self.path}: {error}", help=_DAMAGED) from None
            if isinstance(mapped, mmap.mmap):
                _in_large_pages(mapped)
            self._map = np.frombuffer(mapped, np.uint8)
        return self._map

    def unchanged(self) -> None:
        """`TyirError` when somebody has written into the file since it was opened."""
        if _stamp(os.fstat(self._descriptor)) != self._stamp:
            raise self._written_to()

    def _written_to(self) -> TyirError:
        return TyirError(
            f"{self.path} has been written to while it was in use",
            help="run again when nothing writes to the artifacts; replace a folder as a whole, by a rename",
        )


def _in_large_pages(mapped: mmap.mmap) -> None:
    """Lets the system read the file in pages of 2 MB, which it does of some file systems: weights then come
    faster, from the disk and into compiled code.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class OpenedFolder:
    """A folder, and the files of it that have been asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the folder; `OSError` when there is none."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[str, OpenedFile] = {}
        weakref.finalize(self, os.close, self._descriptor)

    def file(self, name: str) -> OpenedFile:
        """The file `name`, relative with forward slashes, opened the first time it is asked for.

        `TyirError` for a name that leads out of the folder; `OSError` when it cannot be opened or is not a
        regular file.
        """
        if name not in self._files:
            # without O_NONBLOCK the opening of a pipe waits for a writer
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                descriptor = os.open(self.inside(name), flags, dir_fd=self._descriptor)
            except ValueError as error:  # a zero byte in the name
                raise OSError(0, str(error)) from None
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                os.close(descriptor)
                raise OSError(0, f"it is {kind_of(mode)}, not a regular file")
            self._files[name] = OpenedFile(self.path / name, descriptor)
        return self._files[name]

    def find(self, name: str) -> OpenedFile | None:
        """The file, or None where none of that name can be opened."""
        try:
            return self.file(name)
        except OSError:
            return None

    def has_link(self, name: str) -> bool:
        """Whether something of that name lies in the folder, be it a link to nothing."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def inside(self, name: str) -> str:
        """`name`; `TyirError` when it leads out of the folder, by its text or by a link."""
        if not is_relative_name(name):
            raise TyirError(
                f"{name[:120]!r} leads out of the artifact folder {self.path}",
                help="artifacts refer to files of their own folder only; compile the model again",
            )
        here = Path(f"/proc/self/fd/{self._descriptor}")  # this folder, wherever it has been moved
        check_link(here if here.exists() else self.path, name, self.path / name)
        return name
