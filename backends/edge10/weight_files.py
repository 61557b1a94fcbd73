"""The `.params` files of a compile: which tensor goes where, and how the files come to be.

Tensors of the checkpoint that all lengths of a die use are in common_die{i}.params; beside a length's program
are those that only it uses, and the tables that are computed from options alone (rotary positions), so that
another size of the caches leaves the large files as they are.

A file is a link to the cache's where that has it, is continued where a compile that was killed has left it,
and is written otherwise; while `running`, threads do so beside the rest of the compile.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tyir.backends.edge10.params import ParamsFile, write_params
from tyir.backends.pieces import Done, Journal, TensorKeys, left_blocks
from tyir.backends.replacing import journal_of, left_behind
from tyir.backends.workers import Workers
from tyir.diagnostics import TyirError
from tyir.dialects.ty import Param
from tyir.execution.weights import CheckpointReader
from tyir.process.cache import Cache, cache_key
from tyir.process.stopwatch import Stopwatch

__all__ = ["Places", "WeightFiles"]

_SPARE: Final = 64 << 20  # bytes beside the weights: programs, libraries, file systems' own


class Places:
    """Where each die's parameters went: the file, and its name in the folder."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, Param, int | None], tuple[ParamsFile, str]] = {}

    def add(self, die: int, param: Param, file: ParamsFile, name: str, seqlen: int | None = None) -> None:
        """A parameter of all lengths, or as one of them has it."""
        self._places[die, param, seqlen] = file, name

    def of(self, die: int, param: Param, seqlen: int) -> tuple[ParamsFile, str]:
        """Where the program of a length finds a parameter."""
        own = self._places.get((die, param, seqlen))
        return self._places[die, param, None] if own is None else own


@dataclass
class WeightFiles:
    """The files of a compile into `folder`; `places` says what is in them."""

    folder: Path
    weights: CheckpointReader
    places: Places = field(default_factory=Places)
    files: list[ParamsFile] = field(default_factory=list)

    def add(self, name: str, params: list[Param]) -> ParamsFile:
        """One more file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(ParamsFile(path, params))
        return self.files[-1]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file by name, when all are written."""
        return {self._name(f): f.sha256 for f in self.files if f.sha256 is not None}

    @contextmanager
    def running(
        self,
        jobs: int,
        cache: Cache | None,
        *,
        progress: bool,
        watch: Stopwatch,
        workers: Workers | None = None,
    ) -> Iterator[None]:
        """The files are written while the block runs, and are complete after it; with one job, before it.

        `TyirError` for tensors that cannot be computed with, and at once where there is no room for all.
        """
        keys = TensorKeys(self.weights)
        for file in self.files:
            found = {param: keys.of(param) for param in file.params}
            file.keys = {param: key for param, key in found.items() if key is not None}
        stop = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
            writing = pool.submit(self._write, jobs, cache, stop, progress, workers)
            try:
                if jobs == 1:
                    with watch.stage("weights"):
                        writing.result()
                    yield
                else:
                    yield
                    with watch.stage("rest of weights"):
                        writing.result()
            except BaseException:
                stop.set()
                raise

    def _write(
        self,
        jobs: int,
        cache: Cache | None,
        stop: threading.Event,
        progress: bool,
        workers: Workers | None,
    ) -> None:
        whole = {file: key for file in self.files if (key := _file_key(file)) is not None}
        if cache is not None:
            _take(cache, whole, jobs)
        missing = [file for file in self.files if file.sha256 is None]
        self._continue(missing)
        _check_room(self.folder, missing)
        journal = Journal(journal_of(self.folder) if any(file.keys for file in missing) else None)

        def written(file: ParamsFile, offset: int, done: Done) -> None:
            journal.add(self._name(file), offset, done)

        try:
            write_params(
                missing,
                self.weights,
                jobs=jobs,
                progress=progress,
                journal=written,
                stop=stop,
                workers=workers,
            )
        finally:
            journal.close()
        for file in missing:
            if cache is not None and file in whole and file.sha256 is not None:
                cache.put(whole[file], file.path, file.sha256)

    def _continue(self, files: list[ParamsFile]) -> None:
        """Take over what compiles of the same target have left of these files."""
        for folder, journal in left_behind(self.folder):
            blocks: Mapping[str, Mapping[int, Done]] = left_blocks([journal])
            for file in files:
                left = folder / self._name(file)
                if file.left or self._name(file) not in blocks or left.is_symlink() or not left.is_file():
                    continue
                if left.stat().st_nlink == 1:  # otherwise it is a whole one of the cache's
                    left.rename(file.path)
                    file.left = blocks[self._name(file)]

    def _name(self, file: ParamsFile) -> str:
        return file.path.relative_to(self.folder).as_posix()


def _file_key(file: ParamsFile) -> str | None:
    """The key of a whole file, where all its tensors have one."""
    if len(file.keys) != len(file.params):
        return None
    return cache_key("params", file.layout.start, *(file.keys[param] for param in file.params))


def _take(cache: Cache, files: Mapping[ParamsFile, str], jobs: int) -> None:
    """The files that the cache has, their bytes verified."""

    def take(item: tuple[ParamsFile, str]) -> None:
        file, key = item
        file.sha256 = cache.take(key, file.path)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(take, files.items()))


def _check_room(folder: Path, files: list[ParamsFile]) -> None:
    there = sum(f.path.stat().st_blocks * 512 for f in files if f.left)
    needed = sum(f.layout.size for f in files) - there + _SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TyirError(
            f"the artifacts need {needed / 1e9:.1f} GB, {folder.parent.parent} has {free / 1e9:.1f} GB free",
            help="free some space, or choose another -o",
        )
