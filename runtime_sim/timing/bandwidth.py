"""A bandwidth that transfers under way at the same time share equally (processor sharing), by events.

Every transfer gets the same rate, so a clock that runs at that rate ("bytes served to each") tells when each
is done: it is, when the clock has advanced by its size since it began.  Only the next end is ever looked at,
and a change of the number of transfers changes only the speed of the clock.
"""

from __future__ import annotations

import math

__all__ = ["SharedBandwidth"]


class SharedBandwidth:
    """`rate` bytes per nanosecond divided equally among the transfers; none gets more than `port`.

    `next_end` is when the first of them ends if nothing changes (infinity without transfers), `busy_ns` for
    how long there was at least one.
    """

    __slots__ = ("_first", "_goal", "_goals", "_now", "_served", "_speed", "_speeds", "busy_ns", "next_end")

    def __init__(self, rate: float, port: float, most: int) -> None:
        self._speeds = [
            0.0,
            *(min(port, rate / count) for count in range(1, most + 1)),
        ]  # of the clock, with so many transfers
        self._speed = 0.0
        self._goals: dict[int, float] = {}  # what the clock will show at each transfer's end
        self._first, self._goal = -1, math.inf  # the transfer that ends first
        self._served = self._now = self.busy_ns = 0.0
        self.next_end = math.inf

    def begin(self, now: float, key: int, nbytes: float) -> None:
        """A transfer of `nbytes` begins; `now` never goes back."""
        goals = self._goals
        if goals:
            elapsed = now - self._now
            self.busy_ns += elapsed
            self._served += elapsed * self._speed
        self._now = now
        goals[key] = goal = self._served + nbytes
        if goal < self._goal:
            self._first, self._goal = key, goal
        self._speed = speed = self._speeds[len(goals)]
        left = self._goal - self._served
        self.next_end = now + left / speed if left > 0 else now

    def end(self) -> int:
        """Let time pass until `next_end` and take out the transfer that ends then; of several the one that
        began first.
        """
        now, key, goals = self.next_end, self._first, self._goals
        self.busy_ns += now - self._now
        self._now = now
        self._served = served = goals.pop(key)
        if goals:
            self._first = first = min(goals, key=goals.__getitem__)
            self._goal = goals[first]
            self._speed = speed = self._speeds[len(goals)]
            self.next_end = now + max(0.0, self._goal - served) / speed
        else:
            self._first, self._goal, self.next_end = -1, math.inf, math.inf
            self._served = 0.0  # from zero again, for the sake of rounding
        return key
