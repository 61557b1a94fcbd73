"""How long messages and exchanges between the processes of a group take, without a model.

Each is done by all processes at once, as a step is: the first tells the others, and does its own part.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from tyir.execution.lockstep import Layout, Meet, Meeting, OneProcess
from tyir.runtime_sim.processes.gloo import Gloo, GlooLinks

__all__ = ["exchanges", "meetings", "round_trips"]

_TAG: Final = 1 << 30  # no die's
_WORK: Final = bytes(1 << 14)


def round_trips(gloo: Gloo, rank: int, nbytes: int, count: int) -> list[float]:
    """Seconds of messages to the second process and back; the others do nothing."""
    found = []
    data = np.zeros(nbytes, np.uint8)
    for _ in range(count if rank < 2 else 0):
        start = time.perf_counter()
        if rank == 0:
            gloo.finish(gloo.send(1, _TAG, data))
            gloo.recv(1, _TAG, nbytes)
        else:
            gloo.recv(0, _TAG, nbytes)
            gloo.finish(gloo.send(0, _TAG, data))
        found.append(time.perf_counter() - start)
    return found


def exchanges(links: GlooLinks, nbytes: int, count: int, between: float) -> list[float]:
    """Seconds that each of `count` collectives of all dies takes, `nbytes` a die, when every process computes
    for `between` seconds before it.
    """
    request = _collective(nbytes)
    found = []
    for _ in range(count):
        start = _compute(between)
        links.meet(request, [request.operand] * len(links.dies))
        found.append(time.perf_counter() - start)
    return found


def meetings(dies: int, nbytes: int, count: int, between: float) -> list[float]:
    """The same of dies that all run in threads of this process: what an exchange takes the place of."""
    meeting, request = Meeting(OneProcess(dies)), _collective(nbytes)

    def die(number: int) -> list[float]:
        found = []
        for _ in range(count):
            start = _compute(between)
            meeting.ask(number, request)
            found.append(time.perf_counter() - start)
        return found

    with ThreadPoolExecutor(dies) as pool:
        return next(pool.map(die, range(dies)))


def _collective(nbytes: int) -> Meet:
    layout = Layout((nbytes,), np.dtype(np.uint8))
    operand = np.zeros(nbytes, np.uint8)
    return Meet("measure", (), operand, lambda parts: operand, lambda number: layout, "measure")


def _compute(seconds: float) -> float:
    """Keeps a core busy, as compiled code does without Python's lock; when it ended."""
    until = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until:
        hashlib.sha256(_WORK)
    return now
