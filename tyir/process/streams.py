"""Standard input, output and error of a command, whatever it was started with.

A command may be started with any of the three closed, full or read by nobody, and in a locale whose encoding
is not UTF-8.  `adopt_streams` makes them usable: text is UTF-8, a closed descriptor is not given to the next
file opened (into which a library would then write its messages), what cannot be said on standard error is
lost without changing what the command does.  Names of files that are not UTF-8 go out as the bytes they are.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Final

__all__ = ["adopt_streams", "finish_output", "output_error", "read_input", "silence_output"]

_AS_BYTES: Final = "tyir-as-bytes"


def _as_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """How characters that UTF-8 lacks are written: bytes of a file's name as themselves, others escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class _Said(io.TextIOWrapper):
    """Standard error: lines at once, and nothing happens when nobody can read them."""

    def __init__(self, before: io.TextIOWrapper) -> None:
        super().__init__(before.buffer, "utf-8", _AS_BYTES, line_buffering=True)
        self._before = before  # which closes the descriptor when it goes

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Output(io.TextIOWrapper):
    """Standard output, which remembers why something could not be written: not everybody passes it on."""

    failure: OSError | None = None

    def __init__(self, before: io.TextIOWrapper) -> None:
        super().__init__(before.buffer, "utf-8", _AS_BYTES, line_buffering=before.line_buffering)
        self._before = before

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error
            raise


class _Closed(io.TextIOBase):
    """Standard output that was closed before the command began: an error for who writes to it."""

    encoding = "utf-8"
    failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.failure = OSError(errno.EBADF, os.strerror(errno.EBADF))
        raise self.failure


def adopt_streams() -> None:
    """Make the process's standard streams usable; see the module's docstring."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest free descriptor is this one
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    codecs.register_error(_AS_BYTES, _as_bytes)
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _Output(sys.stdout)
    elif sys.stdout is None:
        sys.stdout = _Closed()
    if type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _Said(sys.stderr)
    elif sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors=_AS_BYTES)  # noqa: SIM115


def read_input(limit: int) -> bytes:
    """All of standard input; `OSError` when it is closed, cannot be read or has more than `limit` bytes."""
    if sys.stdin is None:
        raise OSError(errno.EBADF, "it is closed")
    if not hasattr(sys.stdin, "buffer"):  # put there by whoever called the command as a function
        return sys.stdin.read().encode("utf-8", "surrogateescape")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than the {limit} bytes that are read")
    return data


def finish_output() -> None:
    """Write what is left of standard output; `OSError` when something could not be written."""
    sys.stdout.flush()
    if (failure := output_error()) is not None:
        raise failure


def output_error() -> OSError | None:
    """Why something could not be written to standard output, if that has happened."""
    return sys.stdout.failure if isinstance(sys.stdout, _Output | _Closed) else None


def silence_output() -> None:
    """Keep the interpreter from complaining about standard output once more when it ends."""
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return
    try:
        os.dup2(sink, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(sink)
