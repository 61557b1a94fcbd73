"""How long messages and exchanges between the processes of a group take, without a model.

Each is done by all processes at once, as a step is: the first tells the others, and does its own part.
"""

from __future__ import annotations

import time

import numpy as np

from tyir.execution.lockstep import Layout, Meet
from tyir.runtime_sim.processes.gloo import Gloo, GlooLinks

__all__ = ["exchanges", "round_trips"]

_TAG = 1 << 30  # no die's


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
    layout = Layout((nbytes,), np.dtype(np.uint8))
    operand = np.zeros(nbytes, np.uint8)
    meet = Meet("measure", (), operand, lambda parts: operand, lambda number: layout, "measure")
    found = []
    for _ in range(count):
        until = time.perf_counter() + between
        while (start := time.perf_counter()) < until:
            np.dot(operand[:64], operand[:64])
        links.meet(meet, [operand] * len(links.dies))
        found.append(time.perf_counter() - start)
    return found
