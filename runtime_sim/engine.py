"""Time: when each command of each die starts and ends.  Events only, no ticking; the commands are the ones `functional` executes.

Rules
- A unit takes its commands in program order; a command starts when its tokens are done and its unit can take it.
- dequant, cube, drain, vector: one command at a time, dispatch (`sync.command_ns`) and then the time of `tyir.targets.command_times`.
- DMA queues: commands are issued one after the other (`sync.command_ns + dma.issue_ns`), up to `dma.outstanding` are in flight, so that the DRAM's latency
  is hidden behind the data of the transfers before; data moves in order, all queues of a die (and its collectives) sharing the DRAM bandwidth fairly.
- A collective starts when all dies have reached it, and ends at the same time on all of them.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.runtime_sim.bandwidth import SharedBandwidth
from tyir.runtime_sim.program import Command, EdgeProgram
from tyir.targets.command_times import Transfer, all_gather_ns, all_reduce_ns, collective_transfer, compute_ns, gather_transfer, transfer_of
from tyir.targets.machine import Machine

__all__ = ["DieTiming", "Record", "Timing", "simulate"]

_DMA: Final = ("ewdma", "eidma", "ebdma", "eodma")
_END, _DATA, _FLOW, _LINKS = range(
    4
)  # kinds of events: a command ends, a transfer's latency is over, a flow may have ended, a collective's links are done


class Record(NamedTuple):
    """When a command ran.  A transfer starts when it is issued; `data` is when its bytes begin to move (equal to `start` for other units)."""

    command: Command
    start: float
    data: float
    end: float
    dram_bytes: int


@dataclass(frozen=True)
class DieTiming:
    """One die's step: its commands with their times, and how long each unit is busy (`dram`: any transfer moves data)."""

    commands: Sequence[Command]
    start: Sequence[float]
    data: Sequence[float]
    end: Sequence[float]
    command_bytes: Sequence[int]
    busy: Mapping[str, float]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(map(Record, self.commands, self.start, self.data, self.end, self.command_bytes))

    @property
    def dram_bytes(self) -> int:
        return sum(self.command_bytes)


@dataclass(frozen=True)
class Timing:
    """One step on all dies, in nanoseconds from the launch of the program.  Dies whose programs are alike share one `DieTiming`."""

    total_ns: float
    dies: tuple[DieTiming, ...]
    pos: int
    seqlen: int

    @property
    def records(self) -> tuple[tuple[Record, ...], ...]:
        """Every command of every die."""
        return tuple(die.records for die in self.dies)

    @property
    def dram_bytes(self) -> tuple[int, ...]:
        return tuple(die.dram_bytes for die in self.dies)

    def share(self, unit: str) -> float:
        """The part of the step that a unit is busy, on the die where it is busiest."""
        return max(die.busy[unit] for die in self.dies) / self.total_ns if self.total_ns else 0.0

    @property
    def bound_by(self) -> str:
        """The unit (DRAM counts as one) with the largest busy share."""
        return max(("dram", "cube", "dequant", "vector", "d2d", "drain"), key=self.share)


def simulate(programs: Sequence[EdgeProgram], machine: Machine, pos: int) -> Timing:
    """Time one step of all dies at position `pos`.  Deterministic; `TyirError` when the dies' programs do not meet or a program cannot proceed."""
    with _without_collector():
        return _Simulation(programs, machine, pos).run()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Without the cycle collector: a step makes a million objects in no cycles, and looking through them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(slots=True)
class _Queue:
    """One unit's commands and how far it is: `issued` commands have been taken, `moved` have moved their data."""

    commands: list[int] = field(default_factory=list)
    issued: int = 0
    moved: int = 0
    in_flight: int = 0
    free_at: float = 0.0
    moving: bool = False


class _Die:
    """One die's state."""

    def __init__(self, number: int, program: EdgeProgram, machine: Machine, pos: int) -> None:
        self.number = number
        self.commands = program.expand(pos)
        count = len(self.commands)
        self.waiting = [len(c.deps) for c in self.commands]
        self.dependents: list[list[int]] = [[] for _ in range(count)]
        self.queues: dict[str, _Queue] = {u: _Queue() for u in edge10.UNITS}
        for command in self.commands:
            self.queues[command.unit].commands.append(command.index)
            for dep in command.deps:
                self.dependents[dep].append(command.index)
        self.start = [0.0] * count
        self.data = [0.0] * count
        self.end = [-1.0] * count
        self.ready = [False] * count  # transfers whose latency is over
        self.dram_bytes = [0] * count
        self.dram = SharedBandwidth(machine.dram_bytes_per_ns)


class _Simulation:
    def __init__(self, programs: Sequence[EdgeProgram], machine: Machine, pos: int) -> None:
        self.machine = machine
        self.pos = pos
        self.seqlen = programs[0].seqlen
        # Dies with the same program run alike to the nanosecond: one of each kind is simulated.
        kinds = {signature: number for number, signature in enumerate(dict.fromkeys(p.signature for p in programs))}
        self.kind = [kinds[p.signature] for p in programs]
        self.dies = [_Die(n, programs[self.kind.index(n)], machine, pos) for n in range(len(kinds))]
        self.events: list[tuple[float, int, int, int, int]] = []
        self.sequence = 0
        self.now = 0.0
        self.port = machine.sram.port_bytes_per_cycle / machine.cycle_ns
        self.issue_ns = machine.sync.command_ns + machine.dma.issue_ns
        self.outstanding = max(1, int(machine.dma.outstanding))
        self._times: dict[tuple[int, tuple[int, ...]], float] = {}
        self._transfers: dict[tuple[int, tuple[int, ...]], Transfer] = {}
        self._meeting: dict[int, dict[int, int]] = {}  # number of the collective -> die -> command
        self._collective_left: dict[int, int] = {}

    # -- the loop -------------------------------------------------------------------------------------------------
    def run(self) -> Timing:
        for die in self.dies:
            for unit in edge10.UNITS:
                self._advance(die, unit)
        while self.events:
            self.now, _, kind, number, index = heapq.heappop(self.events)
            if kind == _LINKS:
                self._part_done(index)
                continue
            die = self.dies[number]
            if kind == _END:
                self._finish(die, index)
            elif kind == _DATA:
                die.ready[index] = True
                self._move_next(die, die.commands[index].unit)
            elif index == die.dram.version:
                for key in die.dram.finished(self.now):
                    self._data_done(die, key)
                self._watch_dram(die)
        self._check_finished()
        return self._timing()

    def _push(self, time: float, kind: int, die: int, index: int) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (time, self.sequence, kind, die, index))

    def _advance(self, die: _Die, unit: str) -> None:
        """Start as many of a unit's next commands as can start now."""
        queue = die.queues[unit]
        limit = self.outstanding if unit in _DMA else 1
        while queue.issued < len(queue.commands) and queue.in_flight < limit:
            index = queue.commands[queue.issued]
            if die.waiting[index]:
                return
            queue.issued += 1
            queue.in_flight += 1
            if unit in _DMA:
                self._issue(die, queue, index)
            elif unit == "d2d":
                self._arrive(die, queue.issued - 1, index)
            else:
                die.start[index] = die.data[index] = self.now
                self._push(self.now + self._compute(die.commands[index]), _END, die.number, index)

    def _finish(self, die: _Die, index: int) -> None:
        """A command is done: release what waits for it."""
        die.end[index] = self.now
        unit = die.commands[index].unit
        die.queues[unit].in_flight -= 1
        units = [unit]
        for dependent in die.dependents[index]:
            die.waiting[dependent] -= 1
            if not die.waiting[dependent]:
                units.append(die.commands[dependent].unit)
        for name in sorted(set(units)) if len(units) > 1 else units:
            self._advance(die, name)

    # -- compute --------------------------------------------------------------------------------------------------
    def _compute(self, command: Command) -> float:
        key = (id(command.op), command.scalars)
        time = self._times.get(key)
        if time is None:
            time = self._times[key] = self.machine.sync.command_ns + compute_ns(command.op, command.scalars, self.machine)
        return time

    # -- transfers ------------------------------------------------------------------------------------------------
    def _transfer(self, command: Command) -> Transfer:
        key = (id(command.op), command.scalars)
        found = self._transfers.get(key)
        if found is None:
            op = command.op
            if isinstance(op, edge10.Gather):
                found = gather_transfer(op)
            else:
                assert isinstance(op, (edge10.Load, edge10.Store))
                given = iter(command.scalars)
                found = transfer_of([next(given) if s == edge10.DYNAMIC else s for s in op.shape], op.dram_strides)
            self._transfers[key] = found
        return found

    def _issue(self, die: _Die, queue: _Queue, index: int) -> None:
        start = max(self.now, queue.free_at)
        queue.free_at = start + self.issue_ns
        die.start[index] = start
        self._push(queue.free_at + self.machine.dram.latency_ns, _DATA, die.number, index)

    def _move_next(self, die: _Die, unit: str) -> None:
        """Let the queue's next transfer move its data if its latency is over and the one before it has moved."""
        queue = die.queues[unit]
        if queue.moving or queue.moved >= queue.issued or not die.ready[queue.commands[queue.moved]]:
            return
        index = queue.commands[queue.moved]
        transfer = self._transfer(die.commands[index])
        die.data[index] = self.now
        queue.moving = True
        die.dram_bytes[index] = transfer.nbytes
        die.dram.add(self.now, index, transfer.cost_bytes(self.machine), self.port)
        self._watch_dram(die)

    def _watch_dram(self, die: _Die) -> None:
        end = die.dram.next_end()
        if end != float("inf"):
            self._push(max(end, self.now), _FLOW, die.number, die.dram.version)

    def _data_done(self, die: _Die, index: int) -> None:
        """A flow has ended: a transfer is done, or a die's part of a collective is."""
        unit = die.commands[index].unit
        if unit == "d2d":
            self._part_done(die.queues["d2d"].issued - 1)
            return
        queue = die.queues[unit]
        queue.moving = False
        queue.moved += 1
        self._finish(die, index)
        self._move_next(die, unit)

    # -- collectives ----------------------------------------------------------------------------------------------
    def _arrive(self, die: _Die, number: int, index: int) -> None:
        """A die has reached its `number`-th collective; when all have, it begins."""
        meeting = self._meeting.setdefault(number, {})
        meeting[die.number] = index
        if len(meeting) < len(self.dies):
            return
        commands = [self.dies[d].commands[i] for d, i in sorted(meeting.items())]
        if any(type(c.op) is not type(commands[0].op) for c in commands):
            raise TyirError(f"the dies do not meet: {', '.join(c.describe() for c in commands)}")
        self._collective_left[number] = 1
        for other, command in zip(self.dies, commands):
            other.start[command.index] = other.data[command.index] = self.now
            op = command.op
            assert isinstance(op, (edge10.AllReduce, edge10.AllGather))
            transfer = collective_transfer(op)
            if transfer.nbytes:
                self._collective_left[number] += 1
                other.dram_bytes[command.index] = transfer.nbytes
                other.dram.add(self.now, command.index, transfer.cost_bytes(self.machine), self.port)
                self._watch_dram(other)
        self._push(self.now + self._collective_ns(commands[0]), _LINKS, 0, number)

    def _collective_ns(self, command: Command) -> float:
        op = command.op
        if isinstance(op, edge10.AllReduce):
            return self.machine.sync.command_ns + all_reduce_ns(op.nbytes, op.element, len(self.kind), self.machine)
        assert isinstance(op, edge10.AllGather)
        return self.machine.sync.command_ns + all_gather_ns(op.rows, op.sizes, self.machine)

    def _part_done(self, number: int) -> None:
        """The links, or one die's DRAM side, have finished; the last one ends the collective everywhere."""
        self._collective_left[number] -= 1
        if not self._collective_left[number]:
            for other in self.dies:
                self._finish(other, self._meeting[number][other.number])

    # -- the result -----------------------------------------------------------------------------------------------
    def _check_finished(self) -> None:
        stuck = [d.commands[i].describe() for d in self.dies for i, end in enumerate(d.end) if end < 0]
        if stuck:
            raise TyirError(
                f"{len(stuck)} commands can never run; the first: {stuck[0]}",
                help="the dies' programs do not hold the same collectives, or tokens form a circle",
            )

    def _timing(self) -> Timing:
        launch = self.machine.sync.launch_us * 1000
        timings = [_die_timing(die, launch) for die in self.dies]
        return Timing(self.now + launch, tuple(timings[k] for k in self.kind), self.pos, self.seqlen)


def _die_timing(die: _Die, launch: float) -> DieTiming:
    busy = {unit: _covered(die, queue) for unit, queue in die.queues.items()}
    busy["dram"] = die.dram.busy_ns
    start, data, end = ([t + launch for t in times] for times in (die.start, die.data, die.end))
    return DieTiming(die.commands, start, data, end, die.dram_bytes, busy)


def _covered(die: _Die, queue: _Queue) -> float:
    """Time in which at least one of a unit's commands is under way."""
    total = last = 0.0
    for index in queue.commands:
        total += max(0.0, die.end[index] - max(die.start[index], last))
        last = max(last, die.end[index])
    return total
