"""Opening files that somebody else has chosen: regular ones only, and no more bytes than are expected.

A named pipe in place of a file would be waited for, a device would never end; both are refused by what they
are before anything is read.  All failures are `OSError`s whose `strerror` completes "cannot read x: ...", or
of a JSON file `ValueError`s.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from os import PathLike
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import did_you_mean

__all__ = [
    "MAX_JSON",
    "download_hint",
    "json_kind",
    "kind_of",
    "load_json",
    "missing_hint",
    "open_regular",
    "parse_json",
    "read_regular",
    "stand_in",
]

_MAX_DIGITS: Final = 400  # of a number; a float has 309 before the point at most
MAX_JSON: Final = 64 << 20  # bytes; the index of a checkpoint of 100,000 tensors has 10 MB
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

# What downloads leave in the place of a file: how it begins, what it is, and what brings the file itself.
_FETCH: Final = "git lfs pull, in its folder, brings the files themselves; so does hf download"
_STAND_INS: Final = (
    ((b"version https://git-lfs.github.com/spec/",), "a Git LFS pointer", _FETCH),
    (
        (b"<!doctype html", b"<html"),
        "a web page",
        "the page says why the file was not sent: log in, or accept the model's terms, and download again",
    ),
)
_JSON_KINDS: Final = ((bool, "boolean"), (str, "string"), (int | float, "number"), (list, "list"))

AnyPath = str | os.PathLike[str]


def open_regular(path: AnyPath) -> BufferedReader:
    """A regular file, open for reading bytes.

    `OSError` when it is anything else (which is never waited for), or when it cannot be opened.
    """
    try:
        _check_regular(os.stat(path), path)
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller's to close
    except ValueError:  # a NUL byte, or characters that file names do not have in this locale
        raise OSError(errno.EINVAL, "the system has no file of such a name", os.fspath(path)) from None
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        said = f"it is a link to {os.readlink(path)}, where there is no file"
        raise FileNotFoundError(error.errno, said, os.fspath(path)) from None
    try:
        _check_regular(os.fstat(file.fileno()), path)  # exchanged since it was looked at
    except OSError:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(found: os.stat_result, path: AnyPath) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, f"it is {kind_of(found.st_mode)}, not a regular file", os.fspath(path))


def kind_of(mode: int) -> str:
    """What something is that is no regular file, by its `st_mode`: "a named pipe"."""
    return next((name for test, name in _KINDS if test(mode)), "something else")


def read_regular(path: AnyPath, limit: int) -> bytes:
    """The bytes of a regular file; `OSError` when there are more than `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    size = max(size, len(data))
    if size > limit:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {limit} such a file may have")
    return data


def stand_in(data: bytes) -> tuple[str, str] | None:
    """What a file is whose download brought something in its place, by how it begins, and what to do: ("a Git
    LFS pointer", "git lfs pull ..").  None for everything else.
    """
    start = data[:1024].lstrip().lower()
    return next(((what, help) for begins, what, help in _STAND_INS if start.startswith(begins)), None)


def json_kind(value: Any) -> str:
    """What JSON calls a value that was read from it: "list", "null"."""
    return next((name for kind, name in _JSON_KINDS if isinstance(value, kind)), "null")


def load_json(path: AnyPath, limit: int = MAX_JSON) -> Any:
    """What a JSON file holds.  Errors: `OSError`, and the `ValueError`s of `parse_json`."""
    return parse_json(read_regular(path, limit))


def parse_json(data: bytes, *, finite: bool = False) -> Any:
    """What a JSON text (RFC 8259) of UTF-8 holds.

    `ValueError` (`UnicodeDecodeError`, `JSONDecodeError` with its line) for what is not JSON, and for more
    than `json.loads` refuses: a key given twice, of which readers take different ones, numbers of hundreds of
    digits, and lists in lists beyond what Python's stack holds.  NaN and infinity, which `json` writes though
    JSON has none, are read unless all numbers must be `finite`.
    """
    strict: dict[str, Any] = {"parse_constant": _not_a_number, "parse_float": _finite} if finite else {}
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole, **strict)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def missing_hint(path: PathLike[str] | str) -> str:
    """What to do where a path names nothing: download the model that it names, or take what it nearly names;
    empty where neither is to be seen.
    """
    if hint := download_hint(path):
        return hint
    try:
        beside = os.listdir(Path(path).parent)
    except OSError:
        return ""
    return did_you_mean(Path(path).name, sorted(beside))


def download_hint(path: PathLike[str] | str) -> str:
    """What to do where a path names nothing and has the form of a model's name on the hub, `org/model`, or of
    its page there; empty for other paths.
    """
    parts = Path(path).parts
    if parts[:1] in (("https:",), ("http:",)) and parts[1:2] == ("huggingface.co",):
        parts = parts[2:4]
    elif Path(path).exists() or Path(path).parent.exists():
        return ""
    if len(parts) != 2 or ".." in parts or Path(*parts).is_absolute():
        return ""
    return f"a model of the hub is downloaded first: hf download {'/'.join(parts)} --local-dir {parts[1]}"


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"key '{_repeated(key for key, _ in pairs)}' is given twice")
    return found


def _repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key[:100]
        seen.add(key)
    raise AssertionError("no key is repeated")
