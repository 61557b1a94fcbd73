"""Ctrl-C between two pieces of work, never within one: what is done is whole, and nothing goes on behind.

    for chunk in chunks:
        with interrupts_wait():
            run(chunk)                  # a stroke meanwhile counts when this block is left

What handles the signal is what handled it before, later.  A second stroke does not wait.  In threads, which
get no signals, nothing is changed.
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
    """Handles a SIGINT that came during the block at its end: mostly by raising `KeyboardInterrupt`."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    struck: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        struck.append(frame)
        signal.signal(signal.SIGINT, handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if struck:
        handler(signal.SIGINT, struck[0])
