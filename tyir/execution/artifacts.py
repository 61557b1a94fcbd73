"""An artifact folder, opened: its manifest and every file that it lists, each opened once.

    artifacts = Artifacts.open(Path("out/4die"))
    artifacts.manifest.options.dies
    artifacts.text("batch_1/seqlen_8/llm_die0.ir")

Whoever runs, times or compares artifacts reads them through this, so that what was checked is what is used:
a compile may replace the folder meanwhile, and nothing of the new one is mixed in.  Only listed files are
ever parsed as programs, mapped as weights or executed; what is executed is hashed whether or not the rest is.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.opened import OpenedFile, OpenedFolder
from tyir.execution.weights import CheckpointReader
from tyir.manifest import MANIFEST, Manifest, no_manifest
from tyir.process.seen import SeenFiles

__all__ = ["ArtifactWeights", "Artifacts"]

_MOST_BYTES: Final = 64 << 20  # of a manifest; 16 dies, 8 lengths and 100 layers take 8 MB


class Artifacts:
    """Made by `open`."""

    def __init__(self, folder: OpenedFolder, manifest: Manifest, sha256: str, *, checked: bool) -> None:
        self._folder = folder
        self.manifest = manifest
        self.sha256 = sha256  # of the manifest's bytes: what names these artifacts wherever they lie
        self.checked = checked

    @property
    def path(self) -> Path:
        """What the folder was called when it was opened, for messages."""
        return self._folder.path

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        check: bool = True,
        seen: SeenFiles | None = None,
        used: Callable[[Manifest], Collection[str]] | None = None,
    ) -> Self:
        """Open the folder, read its manifest, open every file it lists and (with `check`) verify size and
        hash of each; where only some are `used`, those.  The hash of a large one that `seen` has noted is not
        computed again: what is executed is hashed always.

        `TyirError` lists everything that is wrong.
        """
        path = Path(path)
        try:
            folder = OpenedFolder(path)
            data = _manifest_of(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise no_manifest(path) from None
        except OSError as error:
            raise TyirError(
                f"cannot read {path / MANIFEST}: {error.strerror}", help="compile the model again"
            ) from None
        manifest = Manifest.parse(data, path / MANIFEST, check=check)
        artifacts = cls(folder, manifest, hashlib.sha256(data).hexdigest(), checked=check)
        artifacts._open_all(manifest.files if used is None else used(manifest), seen)
        return artifacts

    def _open_all(self, used: Collection[str], seen: SeenFiles | None) -> None:
        problems: list[str] = []
        for name, record in sorted(self.manifest.files.items()):
            if name not in used:
                continue
            try:
                file = self._folder.file(name)
            except FileNotFoundError:
                if self.checked or self._folder.has_link(name):
                    problems.append(f"{self.path / name} is missing")
                # otherwise it is missed when it is needed
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise TyirError(
                        f"{self.path} has {len(self.manifest.files)} files, more than this process may open",
                        help="raise the limit: ulimit -n 4096",
                    ) from None
                problems.append(f"{self.path / name} cannot be opened: {error.strerror}")
            else:
                if self.checked and (problem := file.problem(record, seen)) is not None:
                    problems.append(problem)
        if problems:
            raise TyirError(
                Diagnostic(problem, help="compile the model again, or restore the file")
                for problem in problems
            )

    def listed(self, name: str) -> OpenedFile:
        """A file of the manifest's list; `TyirError` for any other name and for one that is missing."""
        if name not in self.manifest.files:
            self._folder.inside(name)
            raise TyirError(
                f"the artifacts refer to '{name}', which {self.path / MANIFEST} does not list",
                help="compile the model again",
            )
        file = self._folder.find(name)
        if file is None:
            raise TyirError(
                f"{self.path / name} is missing", help="compile the model again, or restore the file"
            )
        return file

    def read(self, name: str) -> bytes:
        """The bytes of a listed file."""
        return self.listed(name).read()

    def executable(self, name: str) -> bytes:
        """The bytes of a listed file that are going to be executed, hashed even where nothing else is.

        `TyirError` when they are not what was written.
        """
        file = self.listed(name)
        file.check(self.manifest.files[name])
        return file.read()

    def map(self, name: str) -> npt.NDArray[np.uint8]:
        """A listed file as a read-only mapping."""
        return self.listed(name).map()

    def find(self, name: str) -> OpenedFile | None:
        """A file of the folder that need not be listed: data that a user may have put there."""
        return self._folder.find(name)

    def content(self, name: str) -> str:
        """The SHA-256 of what a listed file holds, which without a check need not be what the list says."""
        return self.listed(name).sha256()

    def unchanged(self) -> None:
        """`TyirError` when somebody has written into the weights since they were opened."""
        for name in self.manifest.files:
            if name.endswith(".params"):
                self.listed(name).unchanged()


def _manifest_of(folder: OpenedFolder) -> bytes:
    file = folder.file(MANIFEST)
    if file.size > _MOST_BYTES:
        raise TyirError(f"{file.path} has {file.size} bytes, more than the {_MOST_BYTES} of a manifest")
    return file.read()


class ArtifactWeights(CheckpointReader):
    """`WeightSource` over artifacts: maps listed files only."""

    def __init__(self, artifacts: Artifacts) -> None:
        super().__init__(artifacts.path)
        self._artifacts = artifacts

    def _open(self, file: str) -> npt.NDArray[np.uint8]:
        return self._artifacts.map(file)
