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
_BETWEEN: Final = 3e-4  # seconds of computing
_TRIES: Final = 20
_BYTES: Final = bytes(1 << 12)


def round_trips(gloo: Gloo, rank: int, nbytes: int, count: int) -> list[float]:
    """Seconds of messages to the second process and back, after some computing; the others do nothing."""
    found = []
    data = np.zeros(nbytes, np.uint8)
    work = _Work() if rank == 0 else None
    for _ in range(count if rank < 2 else 0):
        if work is not None:
            work.do()
            start = time.perf_counter()
            gloo.finish(gloo.send(1, _TAG, data))
            gloo.recv(1, _TAG, nbytes)
            found.append(time.perf_counter() - start)
        else:
            gloo.recv(0, _TAG, nbytes)
            gloo.finish(gloo.send(0, _TAG, data))
    return found


def exchanges(links: GlooLinks, nbytes: int, count: int, rounds: int = 1) -> list[float]:
    """Seconds that each of `count` collectives of all dies takes from one to the next, `nbytes` a die, beside
    the computing before it, which is as much in each process: so it has in it what computing is slowed down
    by messages that come meanwhile.

    `rounds`: how often a core computes between two of them, for one process after the other, where there are
    fewer cores than processes.
    """
    operand = _operand(nbytes)
    request = _collective(nbytes).request(operand)
    assert isinstance(request, Meet)
    work = _Work()
    ends = []
    for _ in range(count + 1):
        work.do()
        links.meet(request, [operand] * len(links.dies))
        ends.append(time.perf_counter())
    return [after - before - rounds * work.seconds for before, after in pairwise(ends)]


class _Work:
    """Computing as compiled code does, without Python's lock; about half a layer of a small model each time.

    What a step meets after computing is not what it would meet without: processes that wait have gone to
    sleep meanwhile, and caches hold other things.
    """

    def __init__(self) -> None:
        self._times = 1
        alone = min(self._took() for _ in range(_TRIES))
        self._times = max(1, round(_BETWEEN / alone))
        self.seconds = min(self._took() for _ in range(_TRIES))

    def do(self) -> None:
        for _ in range(self._times):
            hashlib.sha256(_BYTES)

    def _took(self) -> float:
        start = time.perf_counter()
        self.do()
        return time.perf_counter() - start


def _collective(nbytes: int) -> AllReduce:
    return AllReduce(result_types=[TensorType((1, nbytes // 2), f16)])


def _operand(nbytes: int) -> npt.NDArray[np.float16]:
    return np.zeros((1, nbytes // 2), np.float16)
