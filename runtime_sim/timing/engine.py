"""Time: when each command of each die starts and ends.  Events only, no ticking; the commands are the ones
`functional` executes.

Rules
- A unit takes its commands in program order; a command starts when its tokens are done and its unit can take it: `sync.fetch_ns` after the one before, which passes while it waits for tokens.
- dequant, cube, drain, vector: one command at a time, dispatch (`sync.command_ns`) and then the time of `tyir.edge10.command_times`.
- Units that share a control (unit i has control i mod `sync.controls`) slow each other: work on a unit and issuing take `1 + sync.waiting_overhead` for each other unit of its control that the program uses, for a
  unit that waits looks at its tokens again and again.
- DMA queues: commands are issued one after the other (`sync.command_ns + dma.issue_ns`, and `dma.run_ns` for each run of addresses), up to `dma.outstanding` are in flight, so that the DRAM's latency
  is hidden behind the data of the transfers before; data moves in order, all queues of a die (and its collectives) sharing the DRAM bandwidth fairly, none
  faster than its port of the on-chip memory.
- A collective starts when all its dies have reached it, and ends at the same time on all of them; a send meets its receives.

`die_engine` follows one die; here the dies meet.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.edge10.command_times import Transfer, Work
from tyir.process.collector import collector_paused
from tyir.runtime_sim.timing.die_engine import DieEngine, Durations
from tyir.runtime_sim.timing.program import EdgeProgram, alike_programs
from tyir.runtime_sim.timing.unroll import Command, Kind, Step, chained
from tyir.targets.collectives import all_gather_ns, all_reduce_ns, send_ns
from tyir.targets.machine import Machine

__all__ = ["DieTiming", "Record", "Timing", "simulate", "simulate_chunks"]

Times = npt.NDArray[np.float64]


class Record(NamedTuple):
    """When a command ran.

    A transfer starts when it is issued; `data` is when its bytes begin to move (equal to `start` for other
    units).
    """

    command: Command
    start: float
    data: float
    end: float
    dram_bytes: int


@dataclass(frozen=True, eq=False)
class DieTiming:
    """One die's step: its commands with their times in ns and the DRAM bytes they move, and how long each
    unit is busy (`dram`: any transfer moves data).
    """

    commands: Step
    start: Times
    data: Times
    end: Times
    command_bytes: npt.NDArray[np.int64]
    busy: Mapping[str, float]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """Every command with its times, as objects."""
        return tuple(
            map(
                Record,
                self.commands,
                self.start.tolist(),
                self.data.tolist(),
                self.end.tolist(),
                self.command_bytes.tolist(),
            )
        )

    @property
    def dram_bytes(self) -> int:
        return int(self.command_bytes.sum())


@dataclass(frozen=True)
class Timing:
    """One step on all dies, in nanoseconds from the launch of the program.

    Dies whose programs are alike share one `DieTiming`.
    """

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


def simulate(
    programs: Sequence[EdgeProgram],
    machine: Machine,
    pos: int,
    layers: frozenset[int] | None = None,
    wanted: bool = True,
) -> Timing:
    """Time one step of all dies at position `pos`, of the decoder `layers` alone where some are named;
    `wanted`: whether a row of its results is.  Deterministic; `TyirError` when the dies' programs do not
    meet, a program cannot proceed, or needs more SRAM than there is.

    Dies with the same program run alike to the nanosecond: one of each kind is simulated.
    """
    groups = alike_programs(programs)
    if (
        needed := max((programs[group[0]].sram_bytes for group in groups), default=0)
    ) > machine.sram.capacity_bytes:
        raise TyirError(
            f"the programs use {needed:,} bytes of SRAM, {machine.name} has {machine.sram.capacity_bytes:,}",
            help="compile for that machine: tyir-compile --machine",
        )
    launch, kind_of_die = machine.sync.launch_us * 1000, _kinds_of_dies(groups)
    with collector_paused():
        dies = [_Die(programs[group[0]].expand(pos, layers, wanted), machine) for group in groups]
        _run(dies, kind_of_die, machine)
        timings = [die.timing(launch) for die in dies]
    total = max((float(t.end.max(initial=launch)) for t in timings), default=launch)
    return Timing(total, tuple(timings[kind] for kind in kind_of_die), pos, programs[0].seqlen)


def simulate_chunks(
    programs: Sequence[EdgeProgram],
    machine: Machine,
    positions: Sequence[int],
    layers: frozenset[int] | None = None,
    wanted: bool = True,
) -> float:
    """The ns of a prompt's chunks, one at each position, when no die waits for the others between them: it
    begins a chunk as soon as it is done with the one before, so that pipeline stages work on several.

    Launches are not counted.  `wanted`: whether a row of their results is.  `TyirError` as of `simulate`.
    """
    groups = alike_programs(programs)
    with collector_paused():
        steps = [[programs[group[0]].expand(pos, layers, wanted) for pos in positions] for group in groups]
        dies = [_Die(chained(of_die), machine) for of_die in steps]
        _run(dies, _kinds_of_dies(groups), machine)
        return max(max(die.engine.end, default=0.0) for die in dies)


def _kinds_of_dies(groups: Sequence[Sequence[int]]) -> list[int]:
    """Of each die the number of the group of equal programs that its program is in."""
    kinds = {die: kind for kind, group in enumerate(groups) for die in group}
    return [kinds[die] for die in range(len(kinds))]


class _Die:
    """A die's step, what it costs on a machine, and the engine that follows it."""

    def __init__(self, step: Step, machine: Machine) -> None:
        self.step = step
        self.machine = machine
        slowed = _slowed_by_waiting({kind.unit for kind in step.kinds}, machine)
        durations = Durations(
            work=[_work(kind, slowed[kind.unit], machine) for kind in step.kinds],
            fetch_ns=machine.sync.fetch_ns,
            issue=[slowed[kind.unit] * _issue_ns(kind.cost, machine) for kind in step.kinds],
            latency_ns=machine.dram.latency_ns,
            outstanding=max(1, int(machine.dma.outstanding)),
            dram_rate=machine.dram_bytes_per_ns,
            port_rate=machine.sram.port_bytes_per_cycle / machine.cycle_ns,
        )
        self.engine = DieEngine(step, durations)

    @property
    def waits_with(self) -> Kind | None:
        """The collective that the die has reached."""
        return self.step.kinds[self.step.kind[self.engine.arrival[0]]] if self.engine.arrival else None

    def timing(self, launch: float) -> DieTiming:
        """The finished step, all times later by `launch`."""
        engine = self.engine
        start, data, end = (np.array(times) for times in (engine.start, engine.data, engine.end))
        moved = np.array(
            [kind.cost.nbytes if isinstance(kind.cost, Transfer) else 0 for kind in self.step.kinds], np.int64
        )
        busy = {unit: _covered(start[queue], end[queue]) for unit, queue in zip(edge10.UNITS, engine.queues)}
        busy["dram"] = engine.dram.busy_ns
        return DieTiming(self.step, start + launch, data + launch, end + launch, moved[self.step.kind], busy)


def _slowed_by_waiting(units: Collection[str], machine: Machine) -> dict[str, float]:
    """How many times longer a unit takes for its own work, since others of its control look for their tokens;
    `units` are those that the program has commands for.
    """
    control = {unit: number % machine.sync.controls for number, unit in enumerate(edge10.UNITS)}
    return {
        unit: 1 + machine.sync.waiting_overhead * sum(control[u] == control[unit] for u in units if u != unit)
        for unit in units
    }


def _work(kind: Kind, slowed: float, machine: Machine) -> float:
    """ns on its unit, dispatch included; for a transfer its bytes' worth of DRAM time."""
    if isinstance(kind.cost, Transfer):
        return kind.cost.cost_bytes(machine)
    return slowed * (machine.sync.command_ns + kind.cost.ns(machine))


def _issue_ns(cost: Transfer | Work, machine: Machine) -> float:
    """ns of issuing a transfer, dispatch included.  Example (40 each, 2 a run): 48 runs 176."""
    runs = cost.runs if isinstance(cost, Transfer) else 0
    return machine.sync.command_ns + machine.dma.issue_ns + runs * machine.dma.run_ns


def _covered(start: Times, end: Times) -> float:
    """Time in which at least one of a unit's commands is under way; they end in order."""
    before = np.concatenate([[0.0], end[:-1]])
    return float(np.maximum(0.0, end - np.maximum(start, before)).sum())


def _run(dies: Sequence[_Die], kind_of_die: Sequence[int], machine: Machine) -> None:
    """Follow all dies from collective to collective; dies that do not take part in the same ones go on
    independently.
    """
    while True:
        for die in dies:
            die.engine.run()
        meetings = list(_meetings(dies, kind_of_die))
        if not meetings:
            return _check_finished(dies)
        for members, links_ns in meetings:
            _meet([dies[kind] for kind in members], links_ns(machine) + machine.sync.command_ns)


def _meetings(
    dies: Sequence[_Die], kind_of_die: Sequence[int]
) -> Iterator[tuple[list[int], Callable[[Machine], float]]]:
    """The collectives that all their dies have reached: which kinds of dies, and how long the links are
    busy.
    """
    waiting = [die.waits_with for die in dies]
    seen: set[int] = set()
    for kind, reached in enumerate(waiting):
        if reached is None or kind in seen:
            continue
        op = reached.op
        if isinstance(op, edge10.Send):
            die = kind_of_die.index(kind)
            peers = sorted({kind_of_die[target] for target in op.targets})
            if all(_receives(waiting[peer], die, op.tag) for peer in peers):
                yield [kind, *peers], partial(_send_ns, op, die)
        elif not isinstance(op, edge10.Recv):
            assert isinstance(op, (edge10.AllReduce, edge10.AllGather))
            numbers = op.dies or range(len(kind_of_die))
            members = sorted({kind_of_die[number] for number in numbers})
            others = [waiting[member] for member in members]
            if all(o is not None and type(o.op) is type(op) and o.op.dies == op.dies for o in others):
                seen.update(members)
                yield members, partial(_links_ns, op, len(numbers))


def _receives(waiting: Kind | None, peer: int, tag: int) -> bool:
    return (
        waiting is not None
        and isinstance(waiting.op, edge10.Recv)
        and (waiting.op.peer, waiting.op.tag) == (peer, tag)
    )


def _meet(dies: Sequence[_Die], links_ns: float) -> None:
    """The collective begins with the last die's arrival, and ends when the links and every die's DRAM side
    have.
    """
    begin = max(die.engine.arrival[1] for die in dies if die.engine.arrival is not None)
    for die in dies:
        kind = die.waits_with
        assert kind is not None
        transfer = kind.cost
        die.engine.join(
            begin,
            links_ns,
            transfer.cost_bytes(die.machine) if isinstance(transfer, Transfer) and transfer.nbytes else 0.0,
        )
    for die in dies:
        die.engine.run()
    end = max(die.engine.part_end for die in dies)
    for die in dies:
        die.engine.leave(end)


def _links_ns(op: edge10.AllReduce | edge10.AllGather, dies: int, machine: Machine) -> float:
    if isinstance(op, edge10.AllReduce):
        return all_reduce_ns(op.nbytes, op.element, dies, machine, op.group)
    return all_gather_ns(op.rows, op.sizes, machine)


def _send_ns(op: edge10.Send, source: int, machine: Machine) -> float:
    return send_ns(op.nbytes, source, op.targets, machine)


def _check_finished(dies: Sequence[_Die]) -> None:
    stuck = [die.step[i] for die in dies for i, end in enumerate(die.engine.end) if end < 0]
    if stuck:
        raise TyirError(
            f"{len(stuck)} commands can never run; the first: {stuck[0].describe()}",
            help="the dies' programs do not hold the same collectives, or tokens form a circle",
        )
