"""What a step of each compiled length costs on this computer: the scheduler's ways through a prompt go by it.

Padding is free where memory is the bound, and costs time where it is not: only a measurement tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tyir.runtime_sim.session.batch_session import BatchSession

__all__ = ["step_costs"]

_RUNS: Final = 3  # the least of them counts: whatever else runs makes steps slower, never faster
_ENOUGH: Final = 0.5  # seconds that a length is measured for at most, the first run excepted


def step_costs(session: BatchSession, now: Callable[[], float] = time.perf_counter) -> dict[int, float]:
    """Seconds of a step by its length, with a token in every sequence.

    What the session holds is forgotten.
    """
    session.reset()
    costs = {}
    for seqlen in sorted(session.manifest.options.dense_seqlens):
        begun, least = now(), float("inf")
        for _ in range(_RUNS):
            before = now()
            session.step([[0] for _ in session.tokens], seqlen)
            after = now()
            least = min(least, after - before)
            for sequence in range(len(session.tokens)):
                session.rewind(sequence, 0)
            if after - begun > _ENOUGH:
                break
        costs[seqlen] = least
    return costs
