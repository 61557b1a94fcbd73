"""What the process holds of the machine's memory though nothing in it is used."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

__all__ = ["return_free_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE: Final = 4 << 20  # bytes of a block that is given back as soon as it is freed
_KEPT: Final = 32 << 20  # bytes of others that may stay with the process


def return_free_memory() -> None:
    """Let the system have what was freed, and from now on large blocks at once: a walk over pieces of equal
    size then takes no more memory for the last of them than for the first.

    Otherwise the C library keeps blocks of up to 32 MiB, for each thread by itself, and finds less and less
    use for them as sizes mix.  Where it is not glibc, nothing is done.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any | None:
    """The C library, told to map large blocks each by itself; its malloc_trim(3) gives back whole pages."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows has no library without a name
        return None
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    return library
