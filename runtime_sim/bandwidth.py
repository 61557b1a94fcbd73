"""A bandwidth that several transfers share fairly at the same time (processor sharing), by events."""

from __future__ import annotations

import math

__all__ = ["SharedBandwidth"]

_DONE = 1e-6  # bytes


class SharedBandwidth:
    """`rate` bytes per nanosecond divided equally among the active flows; a flow never gets more than its cap, what it leaves goes to the others."""

    __slots__ = ("_caps", "_flows", "_rates", "_since", "busy_ns", "moved", "rate", "version")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.version = 0
        self.busy_ns = 0.0
        self.moved = 0.0
        self._flows: dict[int, float] = {}
        self._caps: dict[int, float] = {}
        self._rates: dict[int, float] = {}
        self._since = 0.0

    def add(self, now: float, key: int, nbytes: float, cap: float) -> None:
        """A flow of `nbytes` begins."""
        self._advance(now)
        self._flows[key] = nbytes
        self._caps[key] = cap
        self.moved += nbytes
        self._share()

    def finished(self, now: float) -> list[int]:
        """Take out the flows that end now."""
        self._advance(now)
        # What is left of a flow is rounding when it would take less time than the clock can tell apart.
        done = [k for k, left in self._flows.items() if left <= _DONE or left / self._rates[k] <= math.ulp(now) * 4]
        for key in done:
            del self._flows[key], self._caps[key]
        if done:
            self._share()
        return done

    def next_end(self) -> float:
        """When the first of the active flows ends, if nothing changes; infinity without flows."""
        return self._since + min((left / self._rates[k] for k, left in self._flows.items()), default=math.inf)

    def _advance(self, now: float) -> None:
        elapsed = now - self._since
        if elapsed > 0 and self._flows:
            self.busy_ns += elapsed
            for key, rate in self._rates.items():
                self._flows[key] -= rate * elapsed
        self._since = now

    def _share(self) -> None:
        """Max-min fair rates: flows in order of their caps, each at most an equal part of what is left."""
        self.version += 1
        left, count = self.rate, len(self._flows)
        if count == 1:
            (key,) = self._flows
            self._rates = {key: min(self._caps[key], left)}
            return
        self._rates = {}
        for key in sorted(self._flows, key=lambda k: self._caps[k]):
            rate = min(self._caps[key], left / count)
            self._rates[key] = rate
            left, count = left - rate, count - 1
