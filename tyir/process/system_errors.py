"""What the system refuses a command, said as the user's to mend: memory, threads, files, standard output.

Such an error may come from any library and in any disguise; it is not a bug of anybody's.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

from tyir.diagnostics import Diagnostic
from tyir.process.streams import output_error, silence_output

__all__ = ["system_error"]

_NO_MEMORY: Final = (
    "allocate memory",  # "cannot" of the system, "can't" of torch, "unable to" of numpy
    "failed to map segment",  # the dynamic loader
    "cannot map",
    "bad_alloc",
    "out of memory",
)
_CURES: Final = {
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more files to give",
    errno.ENOSPC: "free some space, or write somewhere else",
    errno.EDQUOT: "free some space, or write somewhere else",
    errno.EFBIG: "allow larger files (ulimit -f), or write somewhere else",
    errno.EROFS: "write somewhere else",
    errno.EACCES: "give yourself the permission, or use another place",
    errno.EPERM: "give yourself the permission, or use another place",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "mend the symbolic link, which leads to itself",
    errno.EAGAIN: "allow more processes and threads (ulimit -u)",
}


def system_error(error: BaseException) -> Diagnostic | None:
    """What to say of an error that the system is the cause of; None when it is not."""
    chain = _chain(error)
    if any(_is_memory(e) or _is_incomplete_python(e) for e in chain):
        return Diagnostic(
            "there is not enough memory", help="allow more (ulimit -v), or close other programs"
        )
    if any(isinstance(e, RuntimeError) and "start new thread" in str(e) for e in chain):
        return Diagnostic("no thread can be started", help=_CURES[errno.EAGAIN])
    if not isinstance(error, OSError):
        return None
    if (output := output_error()) is error and output is not None:
        silence_output()
        return Diagnostic(
            f"cannot write to standard output: {output.strerror}",
            help="it is closed; write to a file with -o"
            if output.errno == errno.EBADF
            else _CURES.get(output.errno or 0, "write to a file with -o"),
        )
    if error.errno in (errno.ENOENT, errno.ESTALE) and not _has_current_folder():
        return Diagnostic(
            "the current folder does not exist any more", help="change to one that exists and try again"
        )
    names = " -> ".join(
        os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)
    )
    reason = error.strerror or str(error) or type(error).__name__
    return Diagnostic(f"{names}: {reason}" if names else reason, help=_CURES.get(error.errno or 0, ""))


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error not in found and len(found) < 10:
        found.append(error)
        error = error.__cause__ or error.__context__ or error
    return found


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower() if isinstance(error, (ImportError, RuntimeError, OSError, SystemError)) else ""
    return any(sign in text for sign in _NO_MEMORY)


def _is_incomplete_python(error: BaseException) -> bool:
    """A module of Python's own that lacks a part, under a limit of memory: one that has several to choose
    from (hashlib) passes over the cause for which it could load none.
    """
    if not isinstance(error, ImportError) or error.name not in sys.stdlib_module_names:
        return False
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
