"""How many threads the libraries below may start, decided before they do.

TVM, OpenMP, BLAS and the tokenizers' Rust code make pools of as many threads as a variable of the environment
says, or as there are processors; where the system refuses one of them, they end the process.  So what cannot
be meant is corrected first, and where not even one thread for each processor can be had there is one in all.
"""

from __future__ import annotations

import os
import threading
from typing import Final

__all__ = ["limit_threads"]

_VARIABLES: Final = (
    "TVM_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


def limit_threads() -> None:
    """Correct the environment's numbers of threads, for libraries that are loaded afterwards.

    One that is not a positive number is removed, one beyond the processors becomes theirs.
    """
    processors = os.cpu_count() or 1
    if not _can_start(processors):
        os.environ.update(dict.fromkeys(_VARIABLES, "1"))
        return
    for name in _VARIABLES:
        asked = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP has a list, of nested loops
        if not (asked.isdecimal() and asked.strip("0")):
            os.environ.pop(name, None)
        elif len(asked) > 9 or int(asked) > processors:
            os.environ[name] = str(processors)


def _can_start(count: int) -> bool:
    """Whether so many threads can be started besides this one."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(count)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        return False
    finally:
        done.set()
        for thread in started:
            thread.join()
    return True
