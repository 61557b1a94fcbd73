"""A computation in a process beside this one, which is a copy of it and so has in memory all that it needs.

    with Beside.start(lambda: build(modules)) as beside:     # at the same time ...
        ...                                                  # ... as this
        built = beside.result()                              # what it gave; what it raised is raised here

A copy has one thread, the one that made it: what other threads were doing (a lock that is held, a pool that
is told to work) would never be finished in it.  `possible` says whether this process can be copied.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Final, Generic, NoReturn, Self, TypeVar

__all__ = ["Beside", "Lost", "possible"]

Result = TypeVar("Result")

# Libraries that have threads of their own, which Python does not count.
_WITH_THREADS: Final = ("torch", "tvm")
_GRACE: Final = 5.0  # seconds for a process that is told to end


class Lost(Exception):
    """The process ended without a word (it was killed, or what it had to say cannot be pickled): what it
    computed has to be computed again.
    """


def possible() -> bool:
    """Whether this process can be copied: it has one thread, and nothing loaded that may have others."""
    return (
        hasattr(os, "fork")
        and threading.active_count() == 1
        and not any(sys.modules.get(name) is not None for name in _WITH_THREADS)
    )


class Beside(Generic[Result]):
    """A function at work in a process of its own; a context manager, behind which the process is gone."""

    def __init__(self, process: int, answer: int, alive: int) -> None:
        self._process: int | None = process
        self._answer, self._alive = answer, alive

    @classmethod
    def start(cls, make: Callable[[], Result]) -> Beside[Result]:
        """Begin `make()`; what it gives, or raises, is pickled.  The process must be `possible` to copy.

        `OSError` where the system refuses another process.
        """
        answer, told = os.pipe()
        ended, alive = os.pipe()  # its other end closes when this process ends, however it does
        try:
            with warnings.catch_warnings():  # Python counts idle threads of numpy's BLAS, which knows of fork
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
        except OSError:
            for descriptor in (answer, told, ended, alive):
                os.close(descriptor)
            raise
        if process == 0:
            os.close(answer)
            os.close(alive)
            _work(make, told, ended)
        os.close(told)
        os.close(ended)
        return cls(process, answer, alive)

    def result(self) -> Result:
        """What the function gave; waits for it.  Raises what it raised, and `Lost`."""
        with open(self._answer, "rb", closefd=False) as pipe:
            data = pipe.read()
        self._wait()
        try:
            given, value = pickle.loads(data)
        except (EOFError, pickle.UnpicklingError):
            raise Lost from None
        if given:
            result: Result = value
            return result
        raise value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        os.close(self._answer)
        os.close(self._alive)

    def _wait(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._process, 0)
            self._process = None

    def _end(self) -> None:
        """Tell the process to end, so that it cleans up behind itself; make it end if it does not."""
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            os.kill(self._process, signal.SIGTERM)
            until = time.monotonic() + _GRACE
            while time.monotonic() < until:
                if os.waitpid(self._process, os.WNOHANG)[0]:
                    self._process = None
                    return
                time.sleep(0.005)
            os.kill(self._process, signal.SIGKILL)
        self._wait()


def _work(make: Callable[[], object], told: int, ended: int) -> NoReturn:
    """What the copy does; what is done at exit is the original's."""

    def end_with_the_original() -> None:
        os.read(ended, 1)
        os._exit(1)

    try:
        gc.freeze()  # what the original made stays: the collector would look at all of it, and so copy it
        threading.Thread(target=end_with_the_original, daemon=True).start()
        try:
            answer: tuple[bool, object] = True, make()
        except Exception as error:
            answer = False, error
        with open(told, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
    finally:
        os._exit(0)
