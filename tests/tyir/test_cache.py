"""The cache of pieces: verified, never somebody else's, safe for several at once, within its limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.process import cache as cache_module
from tyir.process.cache import Cache, cache_key, default_folder

KEY, OTHER = cache_key("a piece"), cache_key("another")
SMALL, LARGE = b"small", bytes(range(256)) * 8192  # copied and linked


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "cache")


def file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [SMALL, LARGE])
def test_a_piece_comes_back(cache: Cache, tmp_path: Path, data: bytes) -> None:
    made = file(tmp_path, "made", data)
    assert cache.take(KEY, tmp_path / "taken") is None
    cache.put(KEY, made)
    made.unlink()
    digest = cache.take(KEY, tmp_path / "taken")
    assert digest is not None and (tmp_path / "taken").read_bytes() == data
    assert cache.take(OTHER, tmp_path / "other") is None and not (tmp_path / "other").exists()
    assert ((tmp_path / "taken").stat().st_nlink > 1) == (data is LARGE)


def test_a_large_piece_that_is_linked_is_read_only(cache: Cache, tmp_path: Path) -> None:
    made = file(tmp_path, "made", LARGE)
    cache.put(KEY, made)
    assert made.stat().st_mode & 0o222 == 0


def test_bytes(cache: Cache) -> None:
    assert cache.read(KEY) is None
    cache.write(KEY, SMALL)
    assert cache.read(KEY) == SMALL


def pieces(cache: Cache) -> list[Path]:
    return [p for p in (cache.folder / "pieces").rglob("*") if p.is_file() or p.is_symlink()]


def flip(piece: Path) -> None:
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.chmod(0o644)
    piece.write_bytes(data)


def shorten(piece: Path) -> None:
    piece.chmod(0o644)
    os.truncate(piece, 2)


def to_link(piece: Path) -> None:
    elsewhere = piece.parents[3] / "elsewhere"
    piece.rename(elsewhere)
    piece.symlink_to(elsewhere)


def for_others(piece: Path) -> None:
    piece.chmod(0o666)


def folder_for_others(piece: Path) -> None:
    for folder in (piece.parents[1].parent / "keys").iterdir():
        folder.chmod(0o777)


def another_owner(piece: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(piece, 12345, 12345)


@pytest.mark.parametrize("data", [SMALL, LARGE])
@pytest.mark.parametrize("harm", [flip, shorten, to_link, for_others, folder_for_others, another_owner])
def test_what_is_damaged_or_could_be_somebody_elses_is_made_again(
    cache: Cache, tmp_path: Path, data: bytes, harm: Callable[[Path], None]
) -> None:
    made = file(tmp_path, "made", data)
    cache.put(KEY, made)
    made.unlink()
    (piece,) = pieces(cache)
    harm(piece)
    assert cache.take(KEY, tmp_path / "taken") is None and not (tmp_path / "taken").exists()
    assert cache.read(KEY) is None
    if harm in (flip, shorten):
        cache.put(KEY, file(tmp_path, "made", data))
        assert cache.take(KEY, tmp_path / "taken") is not None


def seen(cache: Cache, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes are read, from when the piece of `KEY` has been made and its bytes were right."""
    made = file(path, "made", LARGE)
    cache.put(KEY, made)
    os.utime(made, (time.time() - 3,) * 2)  # as if it had been written some time before
    assert cache.take(KEY, path / "first") is not None
    hashed: list[Path] = []
    original = cache_module._sha256_of
    monkeypatch.setattr(cache_module, "_sha256_of", lambda p: hashed.append(p) or original(p))
    return hashed


def test_bytes_that_were_right_are_not_read_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = seen(cache, tmp_path, monkeypatch)
    (tmp_path / "first").unlink()  # links come and go
    assert cache.take(KEY, tmp_path / "taken") is not None
    assert (tmp_path / "taken").read_bytes() == LARGE and hashed == []


def test_what_is_put_twice_is_believed_when_time_lies_between(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile puts a file when it is written, and again with the whole folder at its end."""
    hashed: list[Path] = []
    original = cache_module._sha256_of
    monkeypatch.setattr(cache_module, "_sha256_of", lambda p: hashed.append(p) or original(p))
    made = file(tmp_path, "made", LARGE)
    cache.put(KEY, made)
    assert cache.take(KEY, tmp_path / "first") is not None and len(hashed) == 2, "it was written just now"
    old = time.time() - 3
    os.utime(made, (old, old))
    (note,) = (cache.folder / "seen").glob("*/*")
    note.unlink()
    cache.put(KEY, made, hashed_sha256 := original(made))
    cache.put(None, made, hashed_sha256)
    assert cache.take(KEY, tmp_path / "second") is not None and len(hashed) == 2


def later(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = time.time() - 25 * 3600
    os.utime(note, (day, day))


def touched(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(piece)


def started_anew(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "boot", lambda: "another")


def note_for_others(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note.chmod(0o666)


def notes_for_others(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note.parent.chmod(0o777)


def just_written(cache: Cache, piece: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = piece.stat().st_mtime_ns
    os.utime(note, ns=(changed, changed + 10**9))


@pytest.mark.parametrize(
    "then", [later, touched, started_anew, note_for_others, notes_for_others, just_written]
)
def test_bytes_are_read_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Callable[..., None]
) -> None:
    hashed = seen(cache, tmp_path, monkeypatch)
    (piece,) = pieces(cache)
    (note,) = (cache.folder / "seen").glob("*/*")
    then(cache, piece, note, monkeypatch)
    assert cache.take(KEY, tmp_path / "taken") is not None
    assert hashed == [tmp_path / "taken"]


def test_a_change_after_bytes_were_right_is_found(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(cache, tmp_path, monkeypatch)
    (piece,) = pieces(cache)
    flip(piece)
    assert cache.take(KEY, tmp_path / "taken") is None and not piece.exists()
    cache.trim()


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o777)
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(TyirError, match="can be written by other users"):
        Cache.open(tmp_path / "shared")
    file(tmp_path, "in-the-way", b"")
    with pytest.raises(TyirError, match="cannot be used"):
        Cache.open(tmp_path / "in-the-way")


def test_the_default_is_that_of_the_desktop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tyir"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "tyir"


def test_what_was_not_used_for_longest_goes_and_what_is_linked_stays(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache", limit=3 * len(LARGE))
    names = [cache_key(str(i)) for i in range(5)]
    for i, key in enumerate(names):
        made = file(tmp_path, f"made{i}", LARGE[i:] + bytes(i))
        cache.put(key, made)
        if i != 1:
            made.unlink()  # what artifacts are linked to takes no room of its own
    of_content = {p.read_bytes()[0]: p for p in pieces(cache)}
    for age, i in enumerate((3, 0, 4, 1, 2)):
        os.utime(of_content[i], (age, age))
    cache.trim()
    assert [cache.take(key, tmp_path / f"t{i}") is not None for i, key in enumerate(names)] == [
        True, True, True, False, True,
    ]  # fmt: skip
    assert len(list((cache.folder / "keys").glob("*/*"))) == 4


def test_left_temporary_files_go(cache: Cache, tmp_path: Path) -> None:
    cache.write(KEY, SMALL)
    (folder,) = {p.parent for p in pieces(cache)}
    old, new = file(folder, ".part-old", b"x"), file(folder, ".part-new", b"x")
    os.utime(old, (time.time() - 90000,) * 2)
    cache.trim()
    assert not old.exists() and new.exists()


def test_several_at_once(tmp_path: Path) -> None:
    """Writers, readers and somebody who clears away, on the same few keys."""
    keys = {cache_key(str(i)): (LARGE if i % 2 else SMALL) + bytes([i]) for i in range(4)}
    wrong: list[str] = []

    def work(number: int) -> None:
        cache = Cache.open(tmp_path / "cache", limit=len(LARGE) * 2)
        for turn in range(30):
            for i, (key, data) in enumerate(keys.items()):
                path = tmp_path / f"{number}-{turn}-{i}"
                if cache.take(key, path) is None:
                    path.write_bytes(data)
                    cache.put(key, path)
                if path.read_bytes() != data:
                    wrong.append(key)
                path.unlink()
            cache.trim()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
