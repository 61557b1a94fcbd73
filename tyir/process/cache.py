"""A content-addressed cache on disk: pieces of work that are made once, whoever asks for them again.

    cache = Cache.open(default_folder(), limit=20 << 30)
    if (digest := cache.take(key, path)) is None:     # path is now the piece, its bytes verified
        make(path)
        cache.put(key, path)

    FOLDER/CACHEDIR.TAG             for programs that make back-ups (bford.info/cachedir)
    FOLDER/pieces/e3/e3b0...        a piece, called by the SHA-256 of its bytes
    FOLDER/keys/3f/3fa9...-e3b0...  an empty file: the hash of what a piece was made from, and the piece
    FOLDER/seen/e3/e3b0...          what tells the piece's file from others, as of when its bytes were right
    FOLDER/checked/                 the same of files outside of the cache (`tyir.process.seen`)

Files appear by rename or by link, complete or not at all, so any number of processes may use one cache.
A piece is believed only when nobody but the user could have written it (owner and permissions of the folders
and of the piece), and only as far as its bytes have the SHA-256 that it is called by: what is damaged is
removed and made again.  Large pieces are hard links where the file system has them, read-only ones, which
cost neither time nor space; small ones are copied.  The bytes of a linked one are not read again within a day
of when they were right, as long as the machine has not been started anew and the file has its size and time
of change, which lies so far back that a later change would have given it another.  When there is more than
`limit` bytes of pieces that nobody else has a link to, those that have not been used for longest go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError
from tyir.process.seen import BELIEVED, TICK, SeenFiles, boot, not_ours, open_own, text_of

__all__ = ["DEFAULT_LIMIT", "Cache", "cache_key", "checked_files", "default_folder"]

DEFAULT_LIMIT: Final = 20 << 30  # bytes
_LINKED: Final = 1 << 20  # bytes from which on a piece is linked, not copied
_STALE: Final = 24 * 3600.0  # seconds after which a temporary file is nobody's any more
_KEY: Final = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})")
_TEMPORARY: Final = ".part-"
_TAG: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# The cache of tyir-compile; it may be deleted.\n"


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tyir`, or `~/.cache/tyir` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "tyir"


def checked_files() -> SeenFiles:
    """Files that need not be hashed again, because that was done a short time ago."""
    return SeenFiles(default_folder() / "checked")


def cache_key(*parts: str | bytes) -> str:
    """A key from all that a piece is made from; parts are not run together."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


@dataclass(frozen=True)
class Cache:
    """A cache in `folder`, of at most `limit` bytes; made by `open`."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    @classmethod
    def open(cls, folder: Path, limit: int = DEFAULT_LIMIT) -> Cache:
        """The cache in a folder, which is made if it is missing.

        `TyirError` where it cannot be made or written, and where somebody else could have written into it.
        """
        elsewhere = "use --cache-dir with a folder of your own, or --no-cache"
        try:
            for each in (folder, folder / "pieces", folder / "keys", folder / "seen"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
                if (problem := not_ours(each.stat())) is not None:
                    raise TyirError(f"the cache folder {each} {problem}", help=elsewhere)
            tag = folder / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(_TAG)
            if not os.access(folder / "pieces", os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise TyirError(
                f"the cache folder {folder} cannot be used: {error.strerror}", help=elsewhere
            ) from None
        return cls(folder, limit)

    def take(self, key: str, path: Path) -> str | None:
        """Make `path` the piece of this key and return its SHA-256; None when there is no such piece."""
        return next((sha256 for sha256 in self._named(key) if self.bring(sha256, path)), None)

    def bring(self, sha256: str, path: Path) -> bool:
        """Make `path` the piece of this SHA-256; False when there is none.

        `OSError` when there is no space for it.
        """
        piece = self._piece(sha256)
        try:
            descriptor = open_own(piece)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
            if linked := _link(piece, path, status):
                if self._is_as_seen(sha256, status):
                    _used(piece)
                    return True
            else:
                _copy(descriptor, path)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise
            return False
        finally:
            os.close(descriptor)
        _used(piece)
        if _sha256_of(path) == sha256:
            if linked:
                self._see(sha256, status, read=True)
            return True
        path.unlink(missing_ok=True)
        piece.unlink(missing_ok=True)  # damaged
        return False

    def read(self, key: str) -> bytes | None:
        """The bytes of a small piece."""
        for sha256 in self._named(key):
            with contextlib.suppress(OSError):
                descriptor = open_own(self._piece(sha256))
                with open(descriptor, "rb") as file:
                    data = file.read()
                if hashlib.sha256(data).hexdigest() == sha256:
                    _used(self._piece(sha256))
                    return data
                self._piece(sha256).unlink()
        return None

    def has(self, sha256: str) -> bool:
        """Whether there is a piece of this SHA-256, as far as one can tell without reading it."""
        return self._piece(sha256).exists()

    def put(self, key: str | None, path: Path, sha256: str | None = None) -> None:
        """Keep the file `path`, of this SHA-256 if that is known, as the piece of a key.

        A file that becomes a link is read-only from then on; its bytes are believed when it is put a second
        time, unchanged, with a tick of the clock in between.  Whatever the system refuses is no error: the
        piece is then made again next time.
        """
        with contextlib.suppress(OSError):
            if path.lstat().st_size <= self.limit:
                digest = sha256 or _sha256_of(path)
                if not self.has(digest):
                    self._add(path, digest)
                self._name(key, digest)
                self._see(digest, self._piece(digest).lstat(), read=False)

    def write(self, key: str, data: bytes) -> None:
        """Keep bytes as the piece of a key."""
        with contextlib.suppress(OSError):
            digest = hashlib.sha256(data).hexdigest()
            if not self.has(digest):
                self._publish(self._piece(digest), data)
            self._name(key, digest)

    def _add(self, path: Path, digest: str) -> None:
        piece = self._piece(digest)
        piece.parent.mkdir(mode=0o700, exist_ok=True)
        if path.lstat().st_size >= _LINKED:
            mode = stat.S_IMODE(path.lstat().st_mode)
            path.chmod(0o444)
            try:
                os.link(path, piece, follow_symlinks=False)
                return
            except FileExistsError:
                return
            except OSError:
                path.chmod(mode)  # another file system, or one without links
        self._publish(piece, path)

    def _name(self, key: str | None, digest: str) -> None:
        if key is not None:
            name = self.folder / "keys" / key[:2] / f"{key}-{digest}"
            name.parent.mkdir(mode=0o700, exist_ok=True)
            name.touch(mode=0o400)

    def _see(self, sha256: str, status: os.stat_result, *, read: bool) -> None:
        """Note that a file has the bytes of a piece now; `read`: they have just been read.

        What says otherwise stays unless they have: who puts a piece has hashed it some time before.
        """
        if status.st_size < _LINKED:
            return
        note = self._note(sha256)
        with contextlib.suppress(OSError):
            known = text_of(note)
            if known == _identity(status):
                os.utime(note)
            elif read or known is None:
                note.parent.mkdir(mode=0o700, exist_ok=True)
                self._publish(note, _identity(status).encode())

    def _is_as_seen(self, sha256: str, status: os.stat_result) -> bool:
        """Whether the bytes of a file were right within a day, and it has not changed since."""
        note = self._note(sha256)
        try:
            if not_ours(note.parent.lstat()) is not None or text_of(note) != _identity(status):
                return False
            seen = note.lstat()
        except OSError:
            return False
        fresh = 0 <= time.time() - seen.st_mtime <= BELIEVED
        return fresh and seen.st_mtime_ns - status.st_mtime_ns >= TICK  # two times of one file system

    def _note(self, sha256: str) -> Path:
        return self.folder / "seen" / sha256[:2] / sha256

    def _named(self, key: str) -> Iterator[str]:
        """The pieces of a key, in folders that nobody but the user could have written."""
        folder = self.folder / "keys" / key[:2]
        try:
            names = sorted(os.listdir(folder)) if not_ours(folder.lstat()) is None else []
        except OSError:
            return
        for name in names:
            if (found := _KEY.fullmatch(name)) and found[1] == key:
                yield found[2]

    def _piece(self, sha256: str) -> Path:
        return self.folder / "pieces" / sha256[:2] / sha256

    def trim(self) -> None:
        """Remove what has not been used for longest, until the cache is within its limit.

        Pieces that artifacts are linked to take no room of their own and stay.  Somebody who is at it already
        is left to it.
        """
        with contextlib.suppress(OSError):
            descriptor = os.open(self.folder / "pieces", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._trim()
            finally:
                os.close(descriptor)

    def _trim(self) -> None:
        found: list[tuple[int, int, Path]] = []
        for path in _below(self.folder / "pieces"):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if path.name.startswith(_TEMPORARY):
                    if time.time() - status.st_mtime > _STALE:
                        path.unlink()
                elif status.st_nlink == 1:
                    found.append((status.st_atime_ns, status.st_size, path))
        room = self.limit - sum(size for _, size, _ in found)
        if room >= 0:
            return
        for _, size, path in sorted(found):
            if room >= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                room += size
        for path in _below(self.folder / "keys"):
            if not self.has(path.name.partition("-")[2]):
                path.unlink(missing_ok=True)
        for path in _below(self.folder / "seen"):
            if not self.has(path.name):
                path.unlink(missing_ok=True)

    def _publish(self, piece: Path, content: Path | bytes) -> None:
        piece.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=piece.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
            temporary.chmod(0o444)
            temporary.replace(piece)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _below(folder: Path) -> Iterator[Path]:
    for each in folder.iterdir():
        if len(each.name) == 2 and each.is_dir():
            yield from each.iterdir()


def _identity(status: os.stat_result) -> str:
    """What tells a file from others, and from what it was before: not links, which change its st_ctime."""
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return " ".join((*map(str, numbers), boot()))


def _sha256_of(path: Path) -> str:
    descriptor = open_own(path)
    with open(descriptor, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(piece: Path, path: Path, status: os.stat_result) -> bool:
    if status.st_size < _LINKED:
        return False
    try:
        os.link(piece, path, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        return False  # another file system, or one without links
    if not os.path.samestat(status, path.lstat()):
        path.unlink()
        return False
    return True


def _copy(descriptor: int, path: Path) -> None:
    with open(descriptor, "rb", closefd=False) as source, path.open("xb") as file:
        source.seek(0)
        shutil.copyfileobj(source, file, 1 << 20)


def _used(piece: Path) -> None:
    """So that it goes last; an artifact that is linked to it keeps its time of change."""
    with contextlib.suppress(OSError):
        os.utime(piece, ns=(time.time_ns(), piece.stat().st_mtime_ns))
