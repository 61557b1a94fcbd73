"""What pieces of a compile are made from, as keys of the cache; and what an interrupted compile has left.

A key holds everything that a piece depends on: the IR, the options, the target, the stored tensors by file,
size, time of change and place (as git's index knows files), and the tools: tyir's own sources, the versions
of the libraries that compute, the C++ compiler.  Whatever changes, the key is another one.

While weights are written, a journal beside them says which blocks are complete, with their CRC-32.  A compile
of the same target that finds what a killed one has left takes its files over, reads the blocks of the same
keys again, and computes only the others.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyir
from tyir.dialects.ty import GetGlobal, Global, Param
from tyir.execution.weights import WeightSource
from tyir.interpreter import SymbolIndex
from tyir.printer import print_op
from tyir.process.cache import cache_key
from tyir.text.attribute_printer import AttributeText

__all__ = ["Done", "Journal", "TensorKeys", "left_blocks", "tool_identity"]

_LIBRARIES: Final = ("apache-tvm", "numpy", "torch", "transformers", "gguf")
_SOURCES: Final = ("tyir", "tyir.passes", "tyir.frontends", "tyir.backends")
_RECENT: Final = 2.0  # seconds: a file that has changed since may change again within its clock's tick


@functools.cache
def tool_identity() -> str:
    """A hash of what computes: tyir's sources, the libraries' versions, the interpreter."""
    parts: list[str | bytes] = [sys.version]
    for name in _LIBRARIES:
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} -")
    for package in _SOURCES:
        for folder in _folders_of(package):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".py", ".toml", ".lark", ".c") and "__pycache__" not in path.parts:
                    parts += [f"{package} {path.relative_to(folder).as_posix()}", path.read_bytes()]
    return cache_key(*parts)


def _folders_of(package: str) -> list[Path]:
    module = tyir if package == "tyir" else importlib.import_module(package)
    return [Path(folder) for folder in module.__path__]


@functools.cache
def compiler_identity(command: str) -> str:
    """The C++ compiler that links: its file, size and time of change."""
    path = shutil.which(command) or command
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"


@functools.cache
def compiler_version(command: str) -> str:
    """What the C++ compiler says of itself: the same on every machine that has the same."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return command
    return done.stdout.partition("\n")[0]


class TensorKeys:
    """Keys of parameters: equal where the bytes are equal."""

    def __init__(self, weights: WeightSource) -> None:
        self._folder: Path | None = getattr(weights, "folder", None)
        self._files: dict[str, str] = {}
        self._symbols = SymbolIndex()
        self._texts = AttributeText()

    def of(self, param: Param) -> str | None:
        """The key of a parameter's tensor; None when its sources cannot be told from others."""
        parts = [tool_identity(), print_op(param, locations=False, texts=self._texts)]
        for op in param.body:
            if not isinstance(op, GetGlobal):
                continue
            target = self._symbols.lookup(param, op.symbol.leaf)
            if not isinstance(target, Global) or not (file := self._identity(target.file)):
                return None
            parts.append(f"{file} {target.offset} {target.nbytes} {target.type}")
        return cache_key(*parts)

    def _identity(self, name: str) -> str:
        if name not in self._files:
            self._files[name] = file_identity(self._folder / name) if self._folder is not None else ""
        return self._files[name]


def file_identity(path: Path) -> str:
    """What tells a file from every other and from what it was before; empty where it has changed just now."""
    try:
        status = path.stat()
    except OSError:
        return ""
    if time.time() - max(status.st_mtime, status.st_ctime) < _RECENT:
        return ""
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join((os.path.realpath(path), *map(str, numbers)))


@dataclass(frozen=True, slots=True)
class Done:
    """A block that has been written: `nbytes` of the tensor `key`, with this CRC-32."""

    nbytes: int
    key: str
    crc: int


class Journal:
    """Says in a file which blocks are complete.  Lines are appended whole; several threads may."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = None if path is None else os.open(path, flags, 0o600)

    def add(self, file: str, offset: int, done: Done) -> None:
        if self._descriptor is not None:
            line = json.dumps([file, offset, done.nbytes, done.key, done.crc]) + "\n"
            with self._lock:
                os.write(self._descriptor, line.encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def left_blocks(journals: Iterable[Path]) -> Mapping[str, dict[int, Done]]:
    """What journals say, by file and offset; lines that are no entries (a torn last one) are passed over."""
    found: dict[str, dict[int, Done]] = {}
    for path in journals:
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                file, offset, nbytes, key, crc = json.loads(line)
            except (ValueError, TypeError):
                continue
            if all(type(n) is int for n in (offset, nbytes, crc)) and isinstance(file, str):
                found.setdefault(file, {})[offset] = Done(nbytes, str(key), crc)
    return found
