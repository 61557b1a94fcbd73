"""What a user wants to know from the timing engine: time to first token, time per output token, what bounds them, and how sure that is.

Times are simulated device time plus the machine's host constant per step.  Figures that hang on assumed constants come as an interval: every assumed
constant at its faster bound, as the file has it, at its slower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tyir.dialects import edge10
from tyir.runtime_sim.chunks import plan_chunks
from tyir.runtime_sim.engine import Record, Timing, simulate
from tyir.runtime_sim.program import EdgeProgram
from tyir.targets.command_times import macs
from tyir.targets.machine import Constant, Machine

__all__ = ["Interval", "LayerCost", "OpCost", "Predictor", "Sensitivity", "layer_costs", "op_costs", "unit_shares"]

_EXACT_STEPS: Final = 8  # a prompt of more steps is interpolated between simulated positions
UNITS: Final = ("dram", "ewdma", "eidma", "ebdma", "eodma", "dequant", "cube", "drain", "vector", "d2d")


@dataclass(frozen=True)
class Interval:
    """A figure with all assumed constants at their faster bound, as given, and at their slower bound."""

    fast: float
    point: float
    slow: float


@dataclass(frozen=True)
class Sensitivity:
    """How far one assumed constant, moved alone between its bounds, moves a figure."""

    name: str
    constant: Constant
    at_low: float
    at_high: float

    @property
    def swing(self) -> float:
        return abs(self.at_high - self.at_low)


class Predictor:
    """Figures of a compiled model on a machine.  `programs(seqlen)` gives all dies' programs; `seqlens` are the compiled lengths, `capacity` the cache's."""

    def __init__(self, programs: Callable[[int], Sequence[EdgeProgram]], seqlens: Sequence[int], capacity: int, machine: Machine) -> None:
        self._programs = programs
        self.seqlens = tuple(seqlens)
        self.capacity = capacity
        self.machine = machine
        self._steps: dict[tuple[int, int], Timing] = {}

    def on(self, machine: Machine) -> Predictor:
        """The same programs on another machine."""
        return Predictor(self._programs, self.seqlens, self.capacity, machine)

    def step(self, seqlen: int, pos: int) -> Timing:
        """One step, simulated once."""
        key = (seqlen, pos)
        if key not in self._steps:
            self._steps[key] = simulate(self._programs(seqlen), self.machine, pos)
        return self._steps[key]

    def tpot_ns(self, pos: int) -> float:
        """Time per output token when `pos` tokens are cached: one step of the shortest length, and the host's constant."""
        return self.step(min(self.seqlens), pos).total_ns + self.machine.host.step_us * 1000

    def ttft_ns(self, tokens: int) -> float:
        """Time to first token of a prompt: its chunks one after the other (`plan_chunks`), the host's constant for each.

        Steps of one length differ only in the cached rows they read; of more than eight of them, eight are simulated and the others interpolated.
        """
        chunks = list(plan_chunks(tokens, 0, self.seqlens, self.capacity))
        total = len(chunks) * self.machine.host.step_us * 1000
        for seqlen in {c.seqlen for c in chunks}:
            total += self._sum_of_steps(seqlen, [c.start for c in chunks if c.seqlen == seqlen])
        return total

    def _sum_of_steps(self, seqlen: int, starts: Sequence[int]) -> float:
        if len(starts) <= _EXACT_STEPS:
            return sum(self.step(seqlen, p).total_ns for p in starts)
        chosen = sorted({starts[round(i * (len(starts) - 1) / (_EXACT_STEPS - 1))] for i in range(_EXACT_STEPS)})
        times = [self.step(seqlen, p).total_ns for p in chosen]
        return float(np.interp(starts, chosen, times).sum())

    def interval(self, figure: Callable[[Predictor], float]) -> Interval:
        """A figure of this predictor with its bounds: `interval(lambda p: p.tpot_ns(100))`."""
        bounds = {name for name, _ in self.machine.assumed()}
        fast = self.machine.with_bounds({n: _high_is_fast(n) for n in bounds})
        slow = self.machine.with_bounds({n: not _high_is_fast(n) for n in bounds})
        ends = [figure(self.on(fast)), figure(self), figure(self.on(slow))]
        return Interval(*ends)

    def sensitivities(self, figure: Callable[[Predictor], float]) -> list[Sensitivity]:
        """Which assumed constant moves a figure how far, the most important first."""
        found = []
        for name, constant in self.machine.assumed():
            low, high = (figure(self.on(self.machine.with_bounds({name: end}))) for end in (False, True))
            found.append(Sensitivity(name, constant, low, high))
        return sorted(found, key=lambda s: -s.swing)


def _high_is_fast(name: str) -> bool:
    """Rates, efficiencies and counts help; times, cycles and overheads hurt."""
    return not name.endswith(("_ns", "_us", "_cycles", "overhead_bytes"))


@dataclass(frozen=True)
class OpCost:
    """What one op of the model costs in a step, over all layers: `time_ns` is by how much it delays the end of everything before it on the main die."""

    source: str
    path: str
    calls: int
    commands: int
    time_ns: float
    dram_bytes: int
    macs: int
    bound_by: str = "dram"


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of a step (layer -1: what stands outside the layers), by the rule of `op_costs`, and the unit busiest with it."""

    layer: int
    time_ns: float
    bound_by: str


def layer_costs(timing: Timing, die: int = 0) -> list[LayerCost]:
    """The step's time divided among the layers, in their order."""
    times: dict[int, float] = {}
    busy: dict[int, dict[str, float]] = {}
    latest = min((r.start for r in timing.records[die]), default=0.0)
    for record in timing.records[die]:
        layer = record.command.layer
        times[layer] = times.get(layer, 0.0) + max(0.0, record.end - latest)
        latest = max(latest, record.end)
        _add_busy(busy.setdefault(layer, {}), record)
    return [LayerCost(layer, time, _busiest(busy[layer])) for layer, time in sorted(times.items())]


def _add_busy(busy: dict[str, float], record: Record) -> None:
    """A command's time on its unit; the DMA queues count as DRAM, by the time that their data moves."""
    unit = "dram" if record.command.unit in ("ewdma", "eidma", "ebdma", "eodma") else record.command.unit
    busy[unit] = busy.get(unit, 0.0) + record.end - record.data


def _busiest(busy: dict[str, float]) -> str:
    return max(busy, key=lambda unit: busy[unit], default="dram")


def op_costs(timing: Timing, die: int = 0) -> list[OpCost]:
    """The step's time divided among the model's ops, the most expensive first; the times add up to the step's without its launch.

    Commands overlap, so "the time of an op" needs a rule: in program order, an op is charged with what it adds to the latest end so far.
    """
    groups: dict[tuple[str, str], list[float]] = {}
    instances: dict[tuple[str, str], set[int]] = {}
    busy: dict[tuple[str, str], dict[str, float]] = {}
    latest = min((r.start for r in timing.records[die]), default=0.0)
    for record in timing.records[die]:
        command = record.command
        path = command.path.replace(f".{command.layer}.", ".*.") if command.layer >= 0 else command.path
        key = (command.source, path)
        entry = groups.setdefault(key, [0.0, 0.0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += max(0.0, record.end - latest)
        latest = max(latest, record.end)
        entry[2] += record.dram_bytes
        entry[3] += macs(command.op, command.scalars) if isinstance(command.op, edge10.Matmul) else 0
        instances.setdefault(key, set()).add(command.layer)
        _add_busy(busy.setdefault(key, {}), record)
    rows = [OpCost(s, p, len(instances[s, p]), int(e[0]), e[1], int(e[2]), int(e[3]), _busiest(busy[s, p])) for (s, p), e in groups.items()]
    return sorted(rows, key=lambda r: (-r.time_ns, r.path))


def unit_shares(timing: Timing) -> Mapping[str, float]:
    """Busy share of each unit on the die where it is busiest; `dram` is any transfer moving data."""
    return {unit: timing.share(unit) for unit in UNITS}
