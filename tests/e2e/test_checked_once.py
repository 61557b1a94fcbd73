"""A large file of artifacts whose hash is known is not read again, unless anything speaks against it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.opened import OpenedFile
from tyir.process import seen as seen_module
from tyir.process.seen import SeenFiles

Compiled = Callable[[int, str], Path]
WEIGHTS = "batch_1/common_die0.params"  # the only file of more than a megabyte


@pytest.fixture
def small(artifacts: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts of one's own; a file that has just been made is told from a later one by its times."""
    monkeypatch.setattr(seen_module, "TICK", 0)
    return Path(shutil.copytree(artifacts(1, "fp16"), tmp_path / "1die"))


def test_artifacts_are_hashed_once(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, hashed, compute = SeenFiles(tmp_path / "notes"), [], OpenedFile.sha256

    def counted(file: OpenedFile) -> str:
        hashed.append(file.path.name)
        return compute(file)

    monkeypatch.setattr(OpenedFile, "sha256", counted)
    Artifacts.open(small, seen=seen)
    files = len(hashed)
    assert files > 5 and hashed.count("common_die0.params") == 1
    Artifacts.open(small, seen=seen)
    assert len(hashed) == 2 * files - 1 and hashed.count("common_die0.params") == 1
    Artifacts.open(small)  # as tyir-verify does
    assert hashed.count("common_die0.params") == 2


def test_damage_after_the_first_time_is_found(tmp_path: Path, small: Path) -> None:
    seen, file = SeenFiles(tmp_path / "notes"), small / WEIGHTS
    Artifacts.open(small, seen=seen)
    before = file.stat()
    time.sleep(0.02)
    with file.open("r+b") as data:
        data.seek(1000)
        data.write(b"!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TyirError, match=r"common_die0\.params has changed since it was compiled"):
        Artifacts.open(small, seen=seen)


def test_what_is_executed_is_hashed_always(tmp_path: Path, small: Path) -> None:
    seen, file = SeenFiles(tmp_path / "notes"), small / WEIGHTS
    with file.open("r+b") as data:
        data.write(b"!")
    manifest = json.loads((small / "manifest.json").read_text())
    seen.note(file.stat(), manifest["files"][WEIGHTS]["sha256"])  # a lie
    opened = Artifacts.open(small, seen=seen)
    with pytest.raises(TyirError, match=r"common_die0\.params has been written to"):
        opened.executable(WEIGHTS)
