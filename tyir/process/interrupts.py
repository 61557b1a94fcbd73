"""Ctrl-C between two pieces of work, never within one: what is done is whole, and nothing goes on behind.

    for chunk in chunks:
        with interrupts_wait():
            run(chunk)                  # a stroke meanwhile is raised when this block is left

A second stroke does not wait.  Where a program has a handler of its own for SIGINT, and in threads, which get
none, nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interrupts_wait"]


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Raises `KeyboardInterrupt` at the end of the block for a SIGINT that came during it."""
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    struck = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal struck
        struck = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if struck:
        raise KeyboardInterrupt
