"""Which files a name found in a file may mean: regular ones inside a folder, and nothing that links or `..`
lead to outside of it.

Whoever wrote a manifest or an `.ir` chose the names in it, so none is opened before it has been here.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Final

from tyir.diagnostics import TyirError
from tyir.process.files import kind_of

__all__ = ["check_link", "file_inside", "is_relative_name"]

_LONGEST_PART: Final = 255  # bytes of a name, NAME_MAX of the file systems in use


def is_relative_name(name: str) -> bool:
    """Whether a name is a path below a folder, whatever lies there: relative, without `..`, of a length and
    of characters that file systems take.
    """
    if not name or "\0" in name or "\\" in name or len(name) > 4000:
        return False
    try:
        parts = [os.fsencode(part) for part in name.split("/")]
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return all(part not in (b"", b".", b"..") and len(part) <= _LONGEST_PART for part in parts)


def file_inside(folder: Path, name: str) -> Path:
    """The regular file that `name` means in `folder`, opened by nobody yet.

    `TyirError` for a name that is not relative or has `..`, a link that leads out of the folder, a pipe, a
    device and a folder; `OSError` for what is missing is passed on.

    A folder of a Hugging Face cache is made of links to its blobs (`snapshots/REVISION/f ->
    ../../blobs/HASH`, https://huggingface.co/docs/huggingface_hub/guides/manage-cache), which are followed.
    """
    if not is_relative_name(name):
        raise TyirError(
            f"{_shown(name)} is not a path inside {folder}",
            help="files are named relative to that folder, without '..'; make the file that names it again",
        )
    path = folder / PurePosixPath(name)
    kind = path.stat().st_mode  # fails for links in a circle
    check_link(folder, name, path, *_blobs(folder.resolve()))
    if not stat.S_ISREG(kind):
        raise TyirError(
            f"{path} is not a file with contents: it is {kind_of(kind)}", help="put the file there"
        )
    return path


def check_link(folder: Path, name: str, shown: Path, *allowed: Path) -> None:
    """`TyirError`, with the path as `shown`, when links lead `name` out of `folder` and all `allowed` ones;
    `OSError` for links in a circle.
    """
    try:
        real = (folder / name).resolve()
    except RuntimeError:  # of Path before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
    if not any(real.is_relative_to(each) for each in (folder.resolve(), *allowed)):
        raise TyirError(
            f"{shown} is a link out of its folder, to {real}", help="put a copy of the file in its place"
        )


def _blobs(folder: Path) -> list[Path]:
    """Where the links of a cache's snapshot lead."""
    snapshots = next((p for p in folder.parents if p.name == "snapshots"), None)
    return [snapshots.parent / "blobs"] if snapshots is not None else []


def _shown(name: str) -> str:
    shown = repr(name)
    return shown if len(shown) <= 120 else f"{shown[:110]}...' ({len(name)} characters)"
