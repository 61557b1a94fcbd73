"""A folder of artifacts takes the place of an older one, as a whole and without loss.

    with replacing(Path("out/4die"), writes) as folder:     # an empty folder beside the target
        ...                                                 # written at leisure
    # out/4die is the new folder; what failed, was interrupted or killed left the old one

While it is made the new folder stands in a workplace beside the target, which its writer holds a lock on:

    out/.4die.k3x9a_2q/lock     held by flock for as long as the writer lives
    out/.4die.k3x9a_2q/new      what is written; after the exchange, what was replaced
    out/.4die.k3x9a_2q/old      what is replaced, where the system cannot exchange two folders
    out/.4die.k3x9a_2q/journal  what of `new` is complete, if the writer says so (`journal_of`)
    out/.4die.k3x9a_2q/left     what writers that were killed have left, to go on from (`left_behind`)

The two folders are exchanged in one step (`renameat2` with RENAME_EXCHANGE); where that does not exist, by
two renames, and whatever goes wrong between them puts the old one back.  Workplaces of writers that were
killed are cleared away by the next compile of the same target, a replaced folder that they hold is put back;
what they have written is at the next one's disposal until it ends, if there is a journal of it.  An interrupt
(Ctrl-C) leaves a workplace with a journal as a kill does.

What somebody else has put into the old folder goes over to the new one, by hard links made before the
exchange; what cannot go over, or has a name that is going to be written, is refused before the work starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.manifest import FORMAT, MANIFEST
from tyir.process.files import load_json

__all__ = ["check_target", "check_writable", "journal_of", "left_behind", "replacing"]

Writes = Callable[[str, bool], bool]
"""Whether a compile writes something of this name (relative, forward slashes), in the way of which a file, or
with True a folder, of somebody else would be."""

_LOCK, _NEW, _OLD, _TRIAL, _GONE = "lock", "new", "old", "trial", "gone"
_JOURNAL, _LEFT = "journal", "left"
_MADE_NAME: Final = re.compile(r"[a-z0-9_]{8}")  # what `tempfile.mkdtemp` appends
_ATTEMPTS: Final = 20  # against other compiles of the same target, which come and go in between


# ------------------------------------------------------------------------------------- what may be replaced


def check_target(target: Path, writes: Writes) -> None:
    """`TyirError` when what stands at `target` may not or cannot be replaced: something that no compile has
    written, or a folder with files of somebody else that cannot go over to the new one; and when nothing can
    be made beside it.
    """
    move = "choose another -o, or move it away"
    try:
        if os.path.islink(os.path.realpath(target)):
            raise TyirError(f"{target} is a link to itself", help="remove it, or choose another -o")
        check_writable(target)
        if not target.exists():
            return
        ours = _ours(target)
        if not target.is_dir() or (ours is None and any(target.iterdir())):
            raise TyirError(f"{target} exists and was not written by tyir-compile", help=move)
        if os.path.ismount(target):
            raise TyirError(
                f"{target} is where a file system is mounted, which cannot be replaced",
                help=f"give a folder below it: -o {target}",
            )
        device = target.stat().st_dev
        problems = [
            Diagnostic(f"{target / name} {why}", help=move)
            for name, status in _foreign(target, ours or set())
            for why in (
                *["is on a file system of its own"][: status.st_dev != device],
                *["was not written by tyir-compile, which is going to write a file of that name"][
                    : writes(name, stat.S_ISDIR(status.st_mode))
                ],
            )
        ]
    except OSError as error:
        raise TyirError(f"cannot look at {target}: {error.strerror}", help="choose another -o") from None
    if problems:
        raise TyirError(problems)


def check_writable(target: Path) -> None:
    """`TyirError` where the file system takes no file beside the target, or beside the first of the folders
    above it that is missing.  It is asked to: permissions alone do not tell (read-only mounts, quotas).
    """
    above = next(p for p in Path(os.path.realpath(target)).parents if os.path.lexists(p))
    try:
        try:  # a file without a name: whoever is killed here leaves nothing
            os.close(os.open(above, os.O_TMPFILE | os.O_WRONLY, 0o600))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            os.rmdir(tempfile.mkdtemp(prefix=".tyir-", dir=above))  # where there are no such files
    except OSError as error:
        raise TyirError(
            f"cannot write to {target.parent}: {error.strerror}", help="choose another -o"
        ) from None


def _ours(folder: Path) -> set[str] | None:
    """The files that a compile has written into a folder, by its manifest; None when it has written none."""
    try:
        manifest = load_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    files = manifest.get("files")
    return {MANIFEST, *files} if isinstance(files, dict) else None


def _foreign(folder: Path, ours: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """What a folder holds beside `ours`, folders before what is in them; links are not followed."""
    folders = {name[:i] for name in ours for i, c in enumerate(name) if c == "/"}

    def below(prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(folder / prefix) as entries:
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            name, status = prefix + entry.name, entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if name not in folders:
                    yield name, status
                yield from below(f"{name}/")
            elif name not in ours:
                yield name, status

    yield from below("")


# ------------------------------------------------------------------------------------------ the replacement


@contextmanager
def replacing(target: Path, writes: Writes) -> Iterator[Path]:
    """An empty folder that takes `target`'s place at the end; after an exception `target` is as it was.

    A link at `target` stays, the folder that it leads to is replaced.  `TyirError` for what `check_target`
    refuses and for files that cannot be read or written, by their names.
    """
    real = Path(os.path.realpath(target))
    with _parents(real.parent):
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            with _turn(real.parent):
                _clear_away(real, None)
                check_target(target, writes)
        except OSError as error:
            raise TyirError(
                f"cannot write to {target.parent}: {error.strerror}", help="choose another -o"
            ) from None
        with _replacement(real, target, writes) as folder:
            yield folder


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Folders above the target that are not there yet are gone again after an exception, if nothing is in
    them: what an interrupted writer leaves to go on from stays.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _replacement(real: Path, target: Path, writes: Writes) -> Iterator[Path]:
    """The folder that is written, in a workplace beside `real`, and takes its place at the end."""
    with _workplace(real, target) as place:
        folder = place / _NEW
        try:
            folder.mkdir()
            with _turn(real.parent):
                _clear_away(real, place / _LEFT)
                _carry_over(real, place / _TRIAL)
            shutil.rmtree(place / _TRIAL, ignore_errors=True)
            yield folder
            with _turn(real.parent):
                check_target(target, writes)  # somebody may have been at it meanwhile
                _carry_over(real, folder)
                _put_in_place(folder, real, place / _OLD)
                _rescue(place / _OLD, real, newer=True)
                if not _rescue(folder, real, newer=True):
                    os.rename(folder, place / _OLD)  # which `_dispose` keeps
        except OSError as error:
            raise _file_error(error, place, target, real) from error


def journal_of(folder: Path) -> Path:
    """Where the writer of a new folder may say what of it is complete; it is gone when the folder is."""
    return folder.parent / _JOURNAL


def left_behind(folder: Path) -> list[tuple[Path, Path]]:
    """Folders that killed writers of the same target have left, with their journals; what is moved out of
    them stays, the rest goes with the new folder's workplace.
    """
    left = folder.parent / _LEFT
    return [(p / _NEW, p / _JOURNAL) for p in sorted(left.iterdir())] if left.is_dir() else []


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Other compiles into `folder` wait with their replacement: between two renames one of them would find no
    target, or half of an answer about it.  Without locks in the file system all go on at once.
    """
    # An interrupt between the lock and the body that it is for leaves it held, and the same thread, which
    # cleans up, would wait for itself.  A thread never takes two turns at once.
    if (left := getattr(_turns, "mine", None)) is not None:
        left.close()
    mine = _turns.mine = _FolderLock(folder)
    try:
        mine.take()
        yield
    finally:
        mine.close()


class _FolderLock:
    """A lock on a folder, open until it is closed, once however often."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def take(self) -> None:
        """Wait for it; a file system without locks gives none."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        """Give it back."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_turns: Final = threading.local()


def _put_in_place(folder: Path, target: Path, aside: Path) -> None:
    """Rename `folder` to `target`; what stood there is then at `folder`, or at `aside`.

    Whatever interrupts it, `target` is the old folder or the new one, or `aside` holds the old one, which
    `_dispose` puts back.
    """
    for attempt in range(_ATTEMPTS):
        try:
            if not os.path.lexists(target):
                os.rename(folder, target)
            elif not _exchange(folder, target):
                os.rename(target, aside)
                os.rename(folder, target)
            return
        except OSError as error:
            # another compile of this target came first, or took away what stood there
            again = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
            if error.errno not in again or attempt + 1 == _ATTEMPTS or not folder.exists():
                raise
            if aside.exists():
                _put_back(aside, target)


def _put_back(aside: Path, target: Path) -> None:
    """The replaced folder to its place, unless another compile has filled that meanwhile."""
    if not os.path.lexists(target):
        with contextlib.suppress(OSError):
            os.rename(aside, target)
    if os.path.lexists(aside) and os.path.lexists(target) and _rescue(aside, target, newer=False):
        # a deletion that is interrupted is not to be taken for a folder without a manifest
        gone = aside.with_name(_GONE)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(aside, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot (renameat2(2))."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _carry_over(source: Path, folder: Path) -> None:
    """Hard links in `folder` to what `source` holds beside the artifacts; copies where there are no links."""
    if (ours := _ours(source)) is None:
        return
    for name, status in _foreign(source, ours):
        own, new = source / name, folder / name
        try:
            if stat.S_ISDIR(status.st_mode):
                new.mkdir(parents=True, exist_ok=True)
                shutil.copystat(own, new)
                continue
            new.parent.mkdir(parents=True, exist_ok=True)
            _link(own, new, status)
        except FileNotFoundError:
            if os.path.lexists(own):
                raise  # otherwise its owner has removed it meanwhile


def _link(own: Path, new: Path, status: os.stat_result) -> None:
    try:
        os.link(own, new, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOENT):
            raise
        try:
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                raise error  # a copy of a pipe, a socket or a device would be another one
            shutil.copy2(own, new, follow_symlinks=False)
        except OSError as failed:
            raise TyirError(
                f"{own} was not written by tyir-compile and cannot go over to the new folder:"
                f" {failed.strerror or failed}",
                help="move it away, or choose another -o",
            ) from None


def _rescue(replaced: Path, target: Path, *, newer: bool) -> bool:
    """Move what is somebody else's from a replaced folder to the one that stands in its place; whether the
    replaced one may be deleted then.

    With `newer` it comes before a file of the same name: it has arrived since that was carried over.
    """
    if not replaced.is_dir():
        return True
    if (ours := _ours(replaced)) is None:
        return not any(replaced.iterdir())
    written, all_there = _ours(target) or set(), True
    for name, status in _foreign(replaced, ours):
        own, new = replaced / name, target / name
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(status.st_mode):
                new.mkdir(parents=True, exist_ok=True)
            elif not os.path.lexists(new) or (newer and name not in written and not _same(status, new)):
                os.replace(own, new)
            else:
                all_there &= _same(status, new)
    return all_there


def _same(status: os.stat_result, other: Path) -> bool:
    try:
        return os.path.samestat(status, other.lstat())
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------- workplaces


@contextmanager
def _workplace(real: Path, target: Path) -> Iterator[Path]:
    """A locked folder beside the target, gone at the end."""
    try:
        place, lock = _make_workplace(real)
    except OSError as error:
        raise TyirError(
            f"cannot write to {target.parent}: {error.strerror}", help="choose another -o"
        ) from None
    resumable = False
    try:
        yield place
    except KeyboardInterrupt:
        resumable = _has_journal(place)
        raise
    finally:
        with _turn(real.parent):
            _dispose(place, real, keep=resumable)
        os.close(lock)


def _has_journal(place: Path) -> bool:
    with contextlib.suppress(OSError):
        return (place / _JOURNAL).stat().st_size > 0 or (place / _LEFT).exists()
    return False


def _make_workplace(target: Path) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another compile took it for one that was left behind
        with contextlib.suppress(OSError):  # without locks nobody dares to clear it away
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return place, lock
        os.close(lock)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target.parent))


def _dispose(place: Path, target: Path, *, keep: bool = False) -> None:
    """Remove a workplace whose lock is held, or with `keep` what another compile does not go on from; a
    replaced folder goes back where nothing stands in its place.

    The lock goes last: what is killed on the way can be cleared away again.
    """
    if (place / _OLD).exists():
        _put_back(place / _OLD, target)
        if (place / _OLD).exists():
            return  # it holds the only copy of something
    if keep:
        return
    for name in (_NEW, _TRIAL, _GONE, _LEFT):
        shutil.rmtree(place / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(place / _JOURNAL)
    with contextlib.suppress(OSError):
        if os.listdir(place) == [_LOCK]:
            os.unlink(place / _LOCK)
        os.rmdir(place)


def _clear_away(target: Path, left: Path | None) -> None:
    """Remove the workplaces of this target whose writers are gone; what they have left with a journal goes
    to `left`, or stays when that is None.
    """
    prefix = f".{target.name}."
    with os.scandir(target.parent) as entries:
        found = [e.name for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False)]
    for name in sorted(found):
        if not _MADE_NAME.fullmatch(name.removeprefix(prefix)):
            continue
        place = target.parent / name
        try:
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                os.rmdir(place)  # killed before it had written anything
            continue
        except OSError:
            continue  # not one of ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left is not None:
                _take_over(place, left)
            _dispose(place, target, keep=left is None and _has_journal(place))
        except OSError:
            pass  # its writer lives, or the file system has no locks
        finally:
            os.close(lock)


def _take_over(place: Path, left: Path) -> None:
    """Move what a workplace holds with a journal to `left`: its own, and what it had taken over itself."""
    for each in (place, *((place / _LEFT).iterdir() if (place / _LEFT).is_dir() else ())):
        if not ((each / _NEW).is_dir() and (each / _JOURNAL).is_file()):
            continue
        left.mkdir(exist_ok=True)
        taken = Path(tempfile.mkdtemp(dir=left))
        os.rename(each / _JOURNAL, taken / _JOURNAL)
        os.rename(each / _NEW, taken / _NEW)


# ------------------------------------------------------------------------------------------------- messages

_HELP: Final = {
    errno.ENOSPC: "free some space, or choose another -o",
    errno.EDQUOT: "free some space, or choose another -o",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another -o",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter -o",
    errno.EACCES: "choose another -o, or get the right to write there",
    errno.EPERM: "choose another -o, or get the right to write there",
    errno.EROFS: "choose another -o",
    errno.EEXIST: "move it away, or choose another -o",
    errno.ENOENT: "it was removed while the compile ran; compile again",
}


def _file_error(error: OSError, place: Path, target: Path, real: Path) -> TyirError:
    """What went wrong with which file: one of the artifacts, or one that they are made of."""
    names = [
        Path(os.fsdecode(n)) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, Path))
    ]
    own = (place / _NEW, place, real, target)
    why = error.strerror or str(error)
    for name in names:
        if not any(name.is_relative_to(folder) for folder in own):
            return TyirError(f"{name}: {why}", help="the file is needed for the artifacts")
    what = next(
        (target / n.relative_to(folder) for folder in own for n in names if n.is_relative_to(folder)), target
    )
    help = _HELP.get(error.errno or 0, "compile again, or choose another -o")
    if (place / _OLD).exists() and not os.path.lexists(real):
        help = f"what stood there before is in {place / _OLD}: move it back"
    return TyirError(f"cannot write {what}: {why}", help=help)
