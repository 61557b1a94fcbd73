"""Which bytes a file had when it was read last, so that gigabytes are not read again each time they are opened.

    seen = SeenFiles(default_folder() / "checked")
    if not seen.has(status, sha256):
        ...                              # read the file, then
        seen.note(status, sha256)

    FOLDER/802-1f3a    a file by its device and inode: what tells it from others and from what it was before, and
                       the SHA-256 that its bytes had

A note is believed for a day, by the user who could have written it alone, as long as the machine has not been
started anew and the file has its size and its times of change, which lie so far back that a later change would have
given it others.  What a disk loses in that day is not noticed.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

__all__ = ["BELIEVED", "TICK", "SeenFiles", "boot", "not_ours", "open_own", "text_of"]

BELIEVED: Final = 24 * 3600.0  # seconds for which bytes that were right are not read again
TICK: Final = 2_000_000_000  # nanoseconds after which every file system gives a change another time
_NOTE: Final = 1000  # characters
_MOST: Final = 1000  # notes, before those are removed that nobody believes any more


class SeenFiles:
    """Notes in `folder`; whatever the system refuses is no error: the file is then read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, status: os.stat_result, sha256: str) -> bool:
        """Whether the bytes of a file had this SHA-256 within a day, and it has not changed since."""
        note = self._note(status)
        try:
            if not_ours(self.folder.lstat()) is not None or text_of(note) != _said(status, sha256):
                return False
            noted = note.lstat()
        except OSError:
            return False
        fresh = 0 <= time.time() - noted.st_mtime <= BELIEVED
        return fresh and noted.st_mtime_ns - max(status.st_mtime_ns, status.st_ctime_ns) >= TICK

    def note(self, status: os.stat_result, sha256: str) -> None:
        """The bytes of a file have just been read, with this SHA-256; `status` is of before they were."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not_ours(self.folder.lstat()) is not None:
                return
            descriptor, name = tempfile.mkstemp(prefix=".part-", dir=self.folder)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(_said(status, sha256))
                os.replace(name, self._note(status))
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._tidy()

    def _tidy(self) -> None:
        names = os.listdir(self.folder)
        for name in names if len(names) > _MOST else ():
            path = self.folder / name
            if time.time() - path.lstat().st_mtime > BELIEVED:
                path.unlink(missing_ok=True)

    def _note(self, status: os.stat_result) -> Path:
        return self.folder / f"{status.st_dev:x}-{status.st_ino:x}"


def _said(status: os.stat_result, sha256: str) -> str:
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join((*map(str, numbers), boot(), sha256))


@functools.cache
def boot() -> str:
    """Since when the machine runs: what was written before it stopped may not be what is on the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def text_of(note: Path) -> str | None:
    """What a note of one's own says; None where there is none."""
    try:
        with open(open_own(note), encoding="utf-8", errors="replace") as file:
            return file.read(_NOTE)
    except OSError:
        return None


def not_ours(status: os.stat_result) -> str | None:
    """Why something may have been written by somebody else."""
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    return None


def open_own(path: Path) -> int:
    """A regular file of the user's own, open for reading; `OSError` for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not_ours(status) is not None:
        os.close(descriptor)
        raise OSError(errno.EPERM, "not a file of one's own", str(path))
    return descriptor
