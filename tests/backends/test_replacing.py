"""A folder takes another one's place as a whole: whatever interrupts it, one of the two is there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tyir.backends import replacing as module
from tyir.backends.edge10.compile import _writes, check_target
from tyir.backends.replacing import replacing
from tyir.diagnostics import TyirError
from tyir.manifest import FORMAT, Manifest
from tyir.tools.cli import run_tool

FILES = ("config.json", "batch_1/common_die0.params", "batch_1/seqlen_8/llm_die0.so")


def fill(folder: Path, name: str, files: Sequence[str] = FILES) -> None:
    """Something like artifacts: every file says whose it is."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(name)
    manifest = {"format": FORMAT, "files": {file: {} for file in files}, "name": name}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def whose(folder: Path) -> str:
    """The name in all files of the manifest, which must be one."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {(folder / file).read_text() for file in manifest["files"]} | {manifest["name"]}
    (name,) = names
    return str(name)


def compiled(target: Path, name: str, files: Sequence[str] = FILES) -> None:
    with replacing(target, _writes()) as folder:
        fill(folder, name, files)


def start(work: Callable[[], object]) -> int:
    """A process that does `work` as a tool does."""
    number = os.fork()
    if number == 0:
        code = 99
        with contextlib.suppress(BaseException):
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = run_tool(lambda argv: int(work() or 0))([])
        os._exit(code)
    return number


def end_of(number: int) -> int:
    """The exit code of a process; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def left(folder: Path) -> list[str]:
    """Nothing of a folder that is not there: what a compile has made for itself is gone when it fails."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in entries if p.name.startswith("."))


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system that can exchange two folders."""
    if request.param == "renames":
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    return str(request.param)


HOW = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "error", "bug")
CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "error": 1, "bug": 1}


def strike(how: str) -> None:
    if how == "error":
        raise OSError(errno.EIO, "Input/output error")
    if how == "bug":
        raise RuntimeError("a bug")
    os.kill(os.getpid(), getattr(signal, how))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fresh", [False, True])
def test_whatever_strikes_at_a_rename_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, how: str, fresh: bool
) -> None:
    """Before, between and after the system calls that move folders: the old one or the new one, whole; what
    is somebody else's is there; nothing is left but by SIGKILL, and that by the next compile.
    """
    moves = 1 if fresh or way == "exchange" else 2
    for when in range(moves + 1):
        target = tmp_path / f"out{when}" / "1die"
        if not fresh:
            compiled(target, "old")
            (target / "chat.npz").write_text("mine")

        def work(target: Path = target, when: int = when) -> None:
            done = 0

            def counted(move: Callable[..., object]) -> Callable[..., object]:
                def moved(one: Path, other: Path) -> object:
                    nonlocal done
                    if done == when:
                        done += 100  # once
                        strike(how)
                    result = move(one, other)
                    done += result is not False
                    if done == when == moves:
                        done += 100
                        strike(how)
                    return result

                return moved

            monkeypatch.setattr(os, "rename", counted(os.rename))
            monkeypatch.setattr(module, "_exchange", counted(module._exchange))
            compiled(target, "new")

        assert end_of(start(work)) == CODES[how]
        if how == "SIGKILL":
            assert left(target.parent), "or the test does not strike where it should"
        else:
            assert left(target.parent) == []
            if fresh:
                assert not target.exists() or whose(target) == "new"
            else:
                assert whose(target) == ("new" if when == moves else "old")
                assert (target / "chat.npz").read_text() == "mine"
        with pytest.raises(TyirError, match="no space"), replacing(target, _writes()):
            raise OSError(errno.ENOSPC, "no space")
        if not fresh:  # what a killed writer had moved aside is back, though the next compile failed too
            assert whose(target) == ("new" if when == moves else "old")
        compiled(target, "third")
        assert whose(target) == "third" and left(target.parent) == []
        assert fresh or (target / "chat.npz").read_text() == "mine"


@pytest.mark.parametrize("signals", [("SIGKILL",), ("SIGTERM", "SIGINT", "SIGHUP")])
@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_signals_at_random_moments(tmp_path: Path, way: str, signals: tuple[str, ...], rounds: int) -> None:
    target, chance = tmp_path / "1die", random.Random(3)
    compiled(target, "0")
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("mine")

    ready, go = os.pipe()

    def work() -> None:
        os.write(go, b"!")
        for name in range(10_000):
            compiled(target, str(name))

    for _ in range(rounds):
        number = start(work)
        assert os.read(ready, 1) == b"!"
        time.sleep(chance.uniform(0.005, 0.05))
        os.kill(number, getattr(signal, chance.choice(signals)))
        assert end_of(number) in CODES.values()
        if way == "exchange":
            whose(target)
        with contextlib.suppress(TyirError), replacing(target, _writes()):
            raise OSError(errno.ENOSPC, "no space")
        whose(target)
        assert (target / "notes" / "a.txt").read_text() == "mine"
        assert left(tmp_path) == []


def test_an_interrupt_between_a_lock_and_its_use(tmp_path: Path, way: str) -> None:
    """It leaves the lock held, for which the clean-up waits next: of its own thread."""
    compiled(tmp_path / "1die", "0")

    def work() -> None:
        signal.alarm(60)  # instead of for ever
        held = module._turn(tmp_path)
        held.__enter__()
        compiled(tmp_path / "1die", "1")

    assert end_of(start(work)) == 0
    assert whose(tmp_path / "1die") == "1"


def test_writers_of_one_target_at_once(tmp_path: Path, way: str) -> None:
    """Each result is whole, the last one stands, and nobody clears away what another one is writing."""
    target = tmp_path / "1die"
    compiled(target, "0")
    (target / "chat.npz").write_text("mine")

    def work(name: str) -> Callable[[], None]:
        return lambda: [compiled(target, f"{name}{i}") for i in range(25)] and None

    writers = [start(work(name)) for name in "abc"]
    seen = set[str]()
    while writers:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number:
            assert os.waitstatus_to_exitcode(status) == 0
            writers.remove(number)
        if way == "exchange":
            opened = os.open(target, os.O_RDONLY)  # never missing
            os.close(opened)
        with contextlib.suppress(FileNotFoundError, ValueError):
            seen.add(whose(target))
    assert whose(target)[0] in "abc" and (target / "chat.npz").read_text() == "mine"
    assert left(tmp_path) == []


# --------------------------------------------------------------------------------------- what is not ours


def regular(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def unreadable(path: Path) -> None:
    path.write_text("secret")
    path.chmod(0)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def hard_link(path: Path) -> None:
    (path.parents[1] / "elsewhere").write_text("linked")
    os.link(path.parents[1] / "elsewhere", path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # addresses are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    (path / "deep" / "er").mkdir(parents=True)
    (path / "deep" / "er" / "a").write_text("a")
    (path / "empty").mkdir()


def executable(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o4755)


KINDS = (regular, unreadable, pipe, link, dangling, hard_link, unix_socket, folder, executable)
NAMES = ("tokenizer.json", "chat.npz", "zeile\n\udcff", "batch_1/seqlen_8/notes.txt", "batch_1/seqlen_4/x")


def look(path: Path) -> list[tuple[str, int, int, int, bytes | str]]:
    """All there is to see of what stands at a path."""
    found: list[tuple[str, int, int, int, bytes | str]] = []
    for each in [path, *sorted(path.rglob("*"))] if path.is_dir() and not path.is_symlink() else [path]:
        status = each.lstat()
        content: bytes | str = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(each)
        elif stat.S_ISREG(status.st_mode):
            content = each.read_bytes() if os.access(each, os.R_OK) else b"?"
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        time = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        found.append((each.relative_to(path).as_posix(), status.st_mode, size, time, content))
    return found


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_what_somebody_else_has_put_there_goes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, make: Callable[[Path], None], links: bool
) -> None:
    """With hard links, and where the file system has none: there the kinds that cannot be copied either are
    refused before the work starts.
    """
    target = tmp_path / "1die"
    compiled(target, "old")
    for name in NAMES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        make(target / name) if make is not hard_link or name == NAMES[0] else regular(target / name)
    before = [look(target / name) for name in NAMES]
    if not links:

        def no_links(*args: object, **options: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    if not links and make in (pipe, unix_socket):
        with (
            pytest.raises(TyirError, match=r"1die.*(tokenizer\.json|batch_1)"),
            replacing(target, _writes()),
        ):
            pytest.fail("the work has started")
        assert whose(target) == "old"
    else:
        compiled(target, "new", FILES[:2])
        assert whose(target) == "new"
    assert [look(target / name) for name in NAMES] == before
    assert not (target / FILES[2]).exists() or whose(target) == "old"
    assert left(tmp_path) == []


def test_what_arrives_while_a_compile_runs_goes_over(tmp_path: Path, way: str) -> None:
    """Also what is replaced by its owner after it was first seen."""
    target = tmp_path / "1die"
    compiled(target, "old")
    (target / "chat.npz").write_text("first")
    with replacing(target, _writes()) as new:
        fill(new, "new")
        (target / "later.npz").write_text("later")
        (target / "other.npz").write_text("second")
        (target / "other.npz").rename(target / "chat.npz")
    assert whose(target) == "new"
    assert (target / "chat.npz").read_text() == "second" and (target / "later.npz").read_text() == "later"


@pytest.mark.parametrize("names", [("1die",), ("1die", "other")])
def test_a_link_to_itself_is_refused_before_the_work(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, leads_to in zip(names, (*names[1:], names[0])):
        (tmp_path / name).symlink_to(leads_to)
    for refused in (lambda: check_target(tmp_path / "1die"), lambda: compiled(tmp_path / "1die", "new")):
        with pytest.raises(TyirError, match="is a link to itself"):
            refused()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_folders_of_a_compile_that_failed_are_gone(tmp_path: Path) -> None:
    """Those that it has made, if nothing is in them."""
    (tmp_path / "there").mkdir()
    for other, gone in (("", "there/a"), ("there/a/b/kept", "there/a/b/1die")):
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / "there/a/b/1die", _writes()) as folder:
            if other:
                (tmp_path / other).write_text("mine")
            fill(folder, "new")
            raise ZeroDivisionError
        assert (tmp_path / "there").is_dir() and not (tmp_path / gone).exists()
        assert not other or (tmp_path / other).read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    ["embedding.params", "machine.toml", "batch_2", "batch_1/seqlen_9", "batch_1/seqlen_8/llm_die3.edge10",
     "batch_1/common_die1.params", "tokenizer.json"],
)  # fmt: skip
@pytest.mark.parametrize("make", [regular, link, dangling, pipe])
def test_a_name_that_is_going_to_be_written_is_refused_before_the_work(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """tokenizer.json only where the checkpoint has one."""
    target, checkpoint = tmp_path / "1die", tmp_path / "model"
    checkpoint.mkdir()
    compiled(target, "old")
    make(target / name)
    before = look(target)
    if name == "tokenizer.json":
        check_target(target)
        (checkpoint / name).write_text("{}")
    else:
        with pytest.raises(TyirError, match="was not written by tyir-compile"):
            check_target(target)
    with (
        pytest.raises(TyirError, match="is going to write a file of that name") as caught,
        replacing(target, _writes(checkpoint)),
    ):
        pytest.fail("the work has started")
    assert str(target / name) in str(caught.value)
    assert look(target) == before and left(tmp_path) == []


def web_page(target: Path) -> None:
    """manifest.json is a common name."""
    target.mkdir()
    (target / "manifest.json").write_text('{"name": "My page", "icons": []}')


def damaged_manifest(target: Path) -> None:
    fill(target, "old")
    (target / "manifest.json").write_text('{"format": "tyir-art')


def deep_manifest(target: Path) -> None:
    fill(target, "old")
    (target / "manifest.json").write_text("[" * 100_000)


def a_file(target: Path) -> None:
    target.write_text("thesis")


def a_pipe(target: Path) -> None:
    os.mkfifo(target)


def other_files(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("thesis")


def list_for_files(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": ["config.json"]}))


@pytest.mark.parametrize(
    "make", [web_page, damaged_manifest, deep_manifest, a_file, a_pipe, other_files, list_for_files]
)
def test_what_no_compile_has_written_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "1die"
    make(target)
    before = look(target)
    with pytest.raises(TyirError, match=r"1die exists and was not written by tyir-compile"):
        compiled(target, "new")
    assert look(target) == before and left(tmp_path) == []


@pytest.mark.parametrize("leads_to", ["artifacts", "nothing", "an empty folder"])
def test_a_link_stays_a_link(tmp_path: Path, way: str, leads_to: str) -> None:
    target, place = tmp_path / "out" / "1die", tmp_path / "disk" / "big"
    place.parent.mkdir()
    target.parent.mkdir()
    if leads_to == "artifacts":
        compiled(place, "old")
    elif leads_to == "an empty folder":
        place.mkdir()
    target.symlink_to("../disk/big")
    compiled(target, "new")
    assert target.is_symlink() and whose(place) == "new"
    assert left(place.parent) == left(target.parent) == []


@pytest.mark.parametrize("name", ["1die", "a" * 300, "\N{SNOWMAN}" * 100])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    """Below a file, or with a name that is too long."""
    (tmp_path / "file").write_text("")
    parent = tmp_path / ("file" if name == "1die" else name)
    with pytest.raises(TyirError, match=r"cannot (write to|look at) "):
        check_target(parent / "1die")
        compiled(parent / "1die", "new")


def test_only_workplaces_of_dead_writers_are_cleared_away(tmp_path: Path) -> None:
    """Neither folders of similar names, nor one whose writer lives."""
    target = tmp_path / "1die"
    for name in (".1die.backup", ".1die.my_notes", ".1die.abcdefgh", ".2die.abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("thesis")
    (tmp_path / ".1die.zyxwvuts").mkdir()  # killed before it had its lock
    (tmp_path / ".1die.lock_dir" / "lock").mkdir(parents=True)
    before = left(tmp_path)
    with replacing(target, _writes()) as first:
        fill(first, "first")
        compiled(target, "second")
        assert whose(first) == "first"
    assert whose(target) == "first"
    assert left(tmp_path) == [name for name in before if name != ".1die.zyxwvuts"]


def test_what_takes_the_target_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Between the last look and the exchange: it is not ours to delete."""
    target, put = tmp_path / "1die", module._put_in_place

    def late(folder: Path, real: Path, aside: Path) -> None:
        target.mkdir()
        (target / "thesis.tex").write_text("thesis")
        put(folder, real, aside)

    monkeypatch.setattr(module, "_put_in_place", late)
    compiled(target, "new")
    assert whose(target) == "new"
    (kept,) = tmp_path.glob(".1die.*/old/thesis.tex")
    assert kept.read_text() == "thesis"
    monkeypatch.undo()
    compiled(target, "newer")
    assert kept.read_text() == "thesis"


@pytest.mark.parametrize("there", ["nothing", "others", "the same name"])
def test_what_a_killed_compile_had_moved_aside_is_not_lost(tmp_path: Path, way: str, there: str) -> None:
    """Back to its place where nothing stands; otherwise what is somebody's goes over or stays where it is."""
    target, place = tmp_path / "1die", tmp_path / ".1die.abcdefgh"
    place.mkdir()
    (place / "lock").write_text("")
    compiled(place / "old", "old")
    (place / "old" / "chat.npz").write_text("mine")
    if there != "nothing":
        fill(target, "restored")
    if there == "the same name":
        (target / "chat.npz").write_text("another")
    if there == "nothing":
        with pytest.raises(TyirError, match="is gone: a compile that was to replace it was killed"):
            Manifest.load(target)
    compiled(target, "new")
    assert whose(target) == "new"
    if there == "the same name":
        assert (target / "chat.npz").read_text() == "another"
        assert (place / "old" / "chat.npz").read_text() == "mine"
    else:
        assert (target / "chat.npz").read_text() == "mine" and left(tmp_path) == []


# ----------------------------------------------------------------------------------------------- messages


@pytest.fixture
def checkpoint_beside(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint in the folder that the artifacts go to."""
    (tmp_path / "out" / "model").mkdir(parents=True)
    yield tmp_path / "out" / "model" / "config.json"


@pytest.mark.parametrize(
    ("number", "help"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "get the right"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "compile again"),
        (errno.ENOENT, "it was removed while"),
    ],
)
def test_a_file_error_names_its_file_and_its_cure(
    tmp_path: Path, checkpoint_beside: Path, number: int, help: str
) -> None:
    target = tmp_path / "out" / "1die"
    with (
        pytest.raises(TyirError, match=rf"model/config\.json: {os.strerror(number)}") as caught,
        replacing(target, _writes()),
    ):
        raise OSError(number, os.strerror(number), str(checkpoint_beside))
    assert "cannot write" not in str(caught.value) and help not in caught.value.render()
    with (
        pytest.raises(TyirError, match=rf"cannot write .*1die/no/a\.ir: {os.strerror(number)}") as caught,
        replacing(target, _writes()) as new,
    ):
        raise OSError(number, os.strerror(number), str(new / "no" / "a.ir"))
    assert help in caught.value.render()
    assert left(target.parent) == [] and not target.exists()
