"""The machine's memory: what of it is free, and what the process holds though nothing in it is used."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tyir.process.cores import control_groups

__all__ = ["available_memory", "return_free_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE: Final = 4 << 20  # bytes of a block that is given back as soon as it is freed
_KEPT: Final = 32 << 20  # bytes of others that may stay with the process


def available_memory(
    system: Path = Path("/proc/meminfo"), groups: Sequence[Path] | None = None
) -> int | None:
    """Bytes that programs may still take, of the machine and of the process's control groups; None where the
    system does not say.

    What a control group holds of files that are not in use counts as free: it goes when it is needed.
    """
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(x for x in system.read_text().splitlines() if x.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    for folder in control_groups() if groups is None else groups:
        with suppress(OSError, ValueError, StopIteration):  # a group without a limit says "max"
            limit = int((folder / "memory.max").read_text())
            statistics = (folder / "memory.stat").read_text().splitlines()
            files = next(int(x.split()[1]) for x in statistics if x.startswith("inactive_file "))
            found.append(limit - int((folder / "memory.current").read_text()) + files)
    return max(min(found), 0) if found else None


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
