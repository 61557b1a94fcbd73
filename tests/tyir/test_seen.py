"""Files whose hashes are known are not read again, unless anything speaks against it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from tyir.process import seen as seen_module
from tyir.process.seen import SeenFiles


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has just been made is told from a later one by its times."""
    monkeypatch.setattr(seen_module, "TICK", 0)


@pytest.fixture
def noted(tmp_path: Path) -> tuple[SeenFiles, Path, str]:
    path, seen = tmp_path / "file", SeenFiles(tmp_path / "notes" / "checked")
    path.write_bytes(b"x" * 100)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert not seen.has(path.stat(), sha256)
    seen.note(path.stat(), sha256)
    assert seen.has(path.stat(), sha256)
    return seen, path, sha256


Noted = tuple[SeenFiles, Path, str]


def note_of(seen: SeenFiles) -> Path:
    (note,) = seen.folder.iterdir()
    return note


def test_another_hash_is_not_believed(noted: Noted) -> None:
    seen, path, _ = noted
    assert not seen.has(path.stat(), "0" * 64)


def test_a_change_that_puts_the_time_back_is_seen(noted: Noted) -> None:
    seen, path, sha256 = noted
    before = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"y" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not seen.has(path.stat(), sha256)


def test_a_change_within_a_tick_of_the_clock_could_not_be_seen(
    noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, path, sha256 = noted
    monkeypatch.setattr(seen_module, "TICK", 2_000_000_000)
    assert not seen.has(path.stat(), sha256)


def test_a_copy_is_another_file(noted: Noted) -> None:
    seen, path, sha256 = noted
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    assert not seen.has(copy.stat(), sha256)


@pytest.mark.parametrize("age", [-3600, 25 * 3600])
def test_notes_are_believed_for_a_day(noted: Noted, age: int) -> None:
    seen, path, sha256 = noted
    when = time.time() - age
    os.utime(note_of(seen), (when, when))
    assert not seen.has(path.stat(), sha256)


def test_nor_after_the_machine_was_started_anew(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, path, sha256 = noted
    monkeypatch.setattr(seen_module, "boot", lambda: "another")
    assert not seen.has(path.stat(), sha256)


def test_nor_where_others_could_have_written_them(noted: Noted) -> None:
    seen, path, sha256 = noted
    note_of(seen).chmod(0o622)
    assert not seen.has(path.stat(), sha256)
    note_of(seen).chmod(0o600)
    assert seen.has(path.stat(), sha256)
    seen.folder.chmod(0o777)
    assert not seen.has(path.stat(), sha256)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    seen = SeenFiles(path / "notes")
    seen.note(path.stat(), "0" * 64)
    assert not seen.has(path.stat(), "0" * 64)


def test_old_notes_go(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, path, sha256 = noted
    monkeypatch.setattr(seen_module, "_MOST", 1)
    old = time.time() - 25 * 3600
    os.utime(note_of(seen), (old, old))
    other = path.with_name("other")
    other.write_bytes(b"x")
    seen.note(other.stat(), sha256)
    assert len(list(seen.folder.iterdir())) == 1
