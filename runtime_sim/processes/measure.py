"""How long messages and exchanges between the processes of a group take, without a model.

Each is done by all processes at once, as a step is: the first tells the others, and does its own part.
"""

from __future__ import annotations

import hashlib
import time
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.dialects.dist import AllReduce
from tyir.execution.lockstep import Meet
from tyir.runtime_sim.processes.gloo import Gloo, GlooLinks
from tyir.types import TensorType, f16

__all__ = ["exchanges", "round_trips"]

_TAG: Final = 1 << 30  # no die's
_BETWEEN: Final = 3e-4  # seconds of computing: about a layer's half of a small model
_WORK: Final = bytes(1 << 12)


def round_trips(gloo: Gloo, rank: int, nbytes: int, count: int) -> list[float]:
    """Seconds of messages to the second process and back, after some computing; the others do nothing."""
    found = []
    data = np.zeros(nbytes, np.uint8)
    for _ in range(count if rank < 2 else 0):
        start = _compute() if rank == 0 else 0.0
        if rank == 0:
            gloo.finish(gloo.send(1, _TAG, data))
            gloo.recv(1, _TAG, nbytes)
        else:
            gloo.recv(0, _TAG, nbytes)
            gloo.finish(gloo.send(0, _TAG, data))
        found.append(time.perf_counter() - start)
    return found


def exchanges(links: GlooLinks, nbytes: int, count: int, rounds: int = 1) -> list[float]:
    """Seconds that each of `count` collectives of all dies takes from one to the next, `nbytes` a die, beside
    the computing before it, which is as long in each process.

    `rounds`: how often a core computes between two of them, for one process after the other, where there are
    fewer cores than processes.
    """
    operand = _operand(nbytes)
    request = _collective(nbytes).request(operand)
    assert isinstance(request, Meet)
    ends = []
    for _ in range(count + 1):
        _compute()
        links.meet(request, [operand] * len(links.dies))
        ends.append(time.perf_counter())
    return [after - before - rounds * _BETWEEN for before, after in pairwise(ends)]


def _compute() -> float:
    """Keeps a core busy, as compiled code does without Python's lock; when it ended.

    What a step meets after computing is not what it would meet without: processes that wait have gone to
    sleep meanwhile, and caches hold other things.
    """
    until = time.perf_counter() + _BETWEEN
    while (now := time.perf_counter()) < until:
        hashlib.sha256(_WORK)
    return now


def _collective(nbytes: int) -> AllReduce:
    return AllReduce(result_types=[TensorType((1, nbytes // 2), f16)])


def _operand(nbytes: int) -> npt.NDArray[np.float16]:
    return np.zeros((1, nbytes // 2), np.float16)
