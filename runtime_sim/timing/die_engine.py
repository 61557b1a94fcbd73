"""One die's time: when each of its commands starts and ends, given when the collectives begin and end.

What a command on a compute unit waits for is known to end at certain times, or is not known yet; when
everything is known, so are its own start and end, at once and for good.  Only transfers must be followed in
the order of time, because they share the DRAM: their beginnings and ends are the only events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tyir.dialects import edge10
from tyir.runtime_sim.timing.bandwidth import SharedBandwidth
from tyir.runtime_sim.timing.unroll import Step

__all__ = ["DieEngine", "Durations"]

_UNITS: Final = len(edge10.UNITS)
_QUEUES: Final = 4  # the first units are the DMA queues
_D2D: Final = edge10.UNITS.index("d2d")
_UNKNOWN: Final = -1.0


@dataclass(frozen=True)
class Durations:
    """A machine's figures for one die: `work[kind]` is a command's ns on its unit, for a transfer its bytes'
    worth of DRAM time; `issue[kind]` the ns of issuing a transfer.
    """

    work: Sequence[float]
    issue: Sequence[float]
    fetch_ns: float
    latency_ns: float
    outstanding: int
    dram_rate: float
    port_rate: float


class DieEngine:
    """The state of one die.  `end[i]` is negative while command i's end is not known.

    `run` goes as far as it can: to the end, or to the time at which the die waits for others.  Then `arrival`
    is the command and the time since when the die waits with a collective, and the others' arrivals decide
    what to `join`; `part_end` is when the die's own part of it is done, and those of all dies when to
    `leave`.
    """

    def __init__(self, step: Step, durations: Durations) -> None:
        count = len(step)
        self.step, self.durations = step, durations
        self.start, self.data, self.end = [0.0] * count, [0.0] * count, [_UNKNOWN] * count
        self.dram = SharedBandwidth(durations.dram_rate, durations.port_rate, _QUEUES + 1)
        self.queues: list[list[int]] = [[] for _ in range(_UNITS)]
        appends = [self.queues[edge10.UNITS.index(kind.unit)].append for kind in step.kinds]
        for index, kind in enumerate(step.kind):
            appends[kind](index)
        self.taken = [0] * _UNITS  # commands of each unit whose start is known
        self.moved = [0] * _QUEUES  # transfers of each queue that are done
        self.free = [0.0] * _UNITS  # when each unit can take its next command
        self.begins = [
            math.inf
        ] * _UNITS  # when each queue's next transfer begins to move data, where that is known
        self.waiting: dict[int, list[int]] = {}  # command -> units whose next command waits for it
        self.blocked = [False] * _UNITS
        self.limit = math.inf  # events after this time depend on other dies
        self.arrival: tuple[int, float] | None = None
        self.part_end = 0.0
        self._links_end = 0.0
        self._collective_bytes = 0.0
        self._settle(list(range(_UNITS)))

    # -- events
    # ---------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Let transfers begin and end, in the order of time, up to `limit`."""
        dram, begins, queues, data, work, kind = (
            self.dram,
            self.begins,
            self.queues,
            self.data,
            self.durations.work,
            self.step.kind,
        )
        while True:
            begin = min(begins)
            if dram.next_end <= begin:
                if dram.next_end > self.limit or dram.next_end == math.inf:
                    return
                self._transfer_done(dram.next_end, dram.end())
            elif begin > self.limit:
                return
            else:
                unit = begins.index(begin)
                begins[unit] = math.inf
                if unit == _D2D:
                    dram.begin(begin, unit, self._collective_bytes)
                else:
                    index = queues[unit][self.moved[unit]]
                    data[index] = begin
                    dram.begin(begin, unit, work[kind[index]])

    def _transfer_done(self, now: float, unit: int) -> None:
        if unit == _D2D:
            self.limit = self.part_end = max(now, self._links_end)
            return
        queue, moved = self.queues[unit], self.moved[unit]
        index = queue[moved]
        self.end[index] = now
        self.moved[unit] = moved = moved + 1
        if moved < self.taken[unit]:
            self.begins[unit] = max(self.data[queue[moved]], now)
        units = self._released(index)
        if not self.blocked[unit]:
            units.append(unit)
        self._settle(units)

    def _released(self, index: int) -> list[int]:
        """The units whose next command waited for this one."""
        units = self.waiting.pop(index, [])
        for unit in units:
            self.blocked[unit] = False
        return units

    # -- commands whose times are known
    # -------------------------------------------------------------------------------
    def _settle(self, units: list[int]) -> None:
        """Give the next commands of these units their times, and those of units that waited for them, as far
        as they are known.
        """
        end, near, base, queues, taken, free = (
            self.end,
            self.step.near,
            self.step.base,
            self.queues,
            self.taken,
            self.free,
        )
        start, data, kind, work, waiting = (
            self.start,
            self.data,
            self.step.kind,
            self.durations.work,
            self.waiting,
        )
        fetch = self.durations.fetch_ns
        while units:
            unit = units.pop()
            if self.blocked[unit]:
                continue  # it was among them twice, and waits again
            queue, position = queues[unit], taken[unit]
            while position < len(queue):
                if unit < _QUEUES and position - self.moved[unit] >= self.durations.outstanding:
                    break  # tried again when a transfer of the queue is done
                index = queue[position]
                time, first = free[unit] + fetch, base[index]
                for dep in near[index]:
                    done = end[first + dep]
                    if done > time:
                        time = done
                    elif done < 0:
                        waiting.setdefault(first + dep, []).append(unit)
                        self.blocked[unit] = True
                        break
                else:
                    if unit == _D2D:
                        if self.arrival is None:
                            self.arrival = index, time
                            self.limit = time
                        break
                    start[index] = time
                    position += 1
                    if unit < _QUEUES:
                        self._issue(unit, position, index, time)
                    else:
                        data[index] = time
                        free[unit] = end[index] = time + work[kind[index]]
                        if index in waiting:
                            units += self._released(index)
                    continue
                break
            taken[unit] = position

    def _issue(self, unit: int, position: int, index: int, time: float) -> None:
        """A transfer is issued: its data may move after the latency and after the transfer before it."""
        done = position - 1 - self.durations.outstanding
        if done >= 0:
            time = max(time, self.end[self.queues[unit][done]])
            self.start[index] = time
        self.free[unit] = time + self.durations.issue[self.step.kind[index]]
        self.data[index] = self.free[unit] + self.durations.latency_ns
        if self.moved[unit] == position - 1:
            before = self.end[self.queues[unit][position - 2]] if position > 1 else 0.0
            self.begins[unit] = max(self.data[index], before)

    # -- collectives
    # ------------------------------------------------------------------------------------------------
    def join(self, begin: float, links_ns: float, dram_bytes: float) -> None:
        """All dies have arrived: the collective begins, takes the links for `links_ns` and the die's DRAM for
        `dram_bytes`' worth of it.
        """
        assert self.arrival is not None
        index, _ = self.arrival
        self.start[index] = self.data[index] = begin
        self._links_end = begin + links_ns
        if dram_bytes:
            self._collective_bytes, self.begins[_D2D] = dram_bytes, begin
            self.limit = math.inf
        else:
            self.limit = self.part_end = self._links_end

    def leave(self, end: float) -> None:
        """The collective is done on all dies."""
        assert self.arrival is not None
        index, _ = self.arrival
        self.arrival = None
        self.limit = math.inf
        self.end[index] = self.free[_D2D] = end
        self.taken[_D2D] += 1
        self._settle([*self._released(index), _D2D])
