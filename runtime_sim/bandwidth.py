"""A bandwidth that transfers under way at the same time share equally (processor sharing), by events.

Every transfer gets the same rate, so a clock that runs at that rate ("bytes served to each") tells when each is done: it is, when the clock has advanced by its
size since it began.  Only the next end is ever looked at, and a change of the number of transfers changes only the speed of the clock.
"""

from __future__ import annotations

import math

__all__ = ["SharedBandwidth"]


class SharedBandwidth:
    """`rate` bytes per nanosecond divided equally among the transfers; none gets more than `port`.

    `next_end` is when the first of them ends if nothing changes (infinity without transfers), `busy_ns` for how long there was at least one.
    """

    __slots__ = ("_goals", "_now", "_served", "_speed", "busy_ns", "next_end", "port", "rate")

    def __init__(self, rate: float, port: float) -> None:
        self.rate, self.port = rate, port
        self.next_end = math.inf
        self.busy_ns = 0.0
        self._goals: dict[int, float] = {}
        self._served = self._now = 0.0
        self._speed = 0.0

    def begin(self, now: float, key: int, nbytes: float) -> None:
        """A transfer of `nbytes` begins; `now` never goes back."""
        self._advance(now)
        self._goals[key] = self._served + nbytes
        self._share()

    def end(self) -> int:
        """Let time pass until `next_end` and take out the transfer that ends then; of several the one that began first."""
        self._advance(self.next_end)
        key = min(self._goals, key=self._goals.__getitem__)
        self._served = self._goals.pop(key)
        self._share()
        return key

    def _advance(self, now: float) -> None:
        if self._goals:
            self.busy_ns += now - self._now
            self._served += (now - self._now) * self._speed
        self._now = now

    def _share(self) -> None:
        if not self._goals:
            self.next_end, self._served = math.inf, 0.0  # from zero, for the sake of rounding
            return
        self._speed = min(self.port, self.rate / len(self._goals))
        self.next_end = self._now + max(0.0, min(self._goals.values()) - self._served) / self._speed
