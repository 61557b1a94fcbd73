"""What must hold of every program's time: bytes and products conserved, no unit busy twice, deterministic, a
better machine not slower.

Programs are small models as compiled, for 1 to 3 dies, and random ones; machines are random values of the
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime_sim.test_hand_worked import MACHINE, Die
from tyir.dialects import edge10
from tyir.ir import Value
from tyir.runtime_sim.timing.costs import layer_costs, op_costs
from tyir.runtime_sim.timing.engine import Timing, simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine

SHIPPED = load_machine("edge10")
BETTER_HIGH = (
    "dram.bandwidth_gbps",
    "dram.efficiency",
    "clock.frequency_mhz",
    "d2d.bandwidth_gbps",
    "dequant.weights_per_cycle",
    "sram.port_bytes_per_cycle",
    "cube.drain_bytes_per_cycle",
)
BETTER_HIGH_COUNTS = ("cube.count", "vector.lanes", "vector.units", "dma.outstanding")
BETTER_LOW = (
    "dram.latency_ns",
    "dma.issue_ns",
    "dma.run_ns",
    "sync.fetch_ns",
    "sync.command_ns",
    "sync.launch_us",
    "d2d.hop_us",
    "d2d.collective_us",
    "cube.fill_cycles",
    "vector.startup_cycles",
    "dram.run_overhead_bytes",
)


def _random_command(die: Die, unit: str, size: int, deps: list[Value]) -> Value:
    if unit == "eodma":
        return die.store(size * 50, *deps)
    if unit == "dequant":
        return die.dequant(size, 64, *deps)
    if unit == "cube":
        return die.matmul(size, 48, 64, *deps)
    if unit == "drain":
        return die.drain(size, 48, *deps)
    return (
        die.vector("silu", size, 64, *deps) if unit == "vector" else die.load(size * 100, *deps, queue=unit)
    )


@st.composite
def random_programs(draw: st.DrawFn) -> list[EdgeProgram]:
    """One or two dies with the same collectives between different commands."""
    dies = draw(st.integers(1, 2))
    meetings = draw(st.integers(0, 2)) if dies > 1 else 0
    programs = []
    for number in range(dies):
        die = Die(number, dies)
        tokens = [die.add(edge10.Join(tokens=()))]
        for part in range(meetings + 1):
            for _ in range(draw(st.integers(1, 8))):
                deps = [tokens[i] for i in draw(st.lists(st.integers(0, len(tokens) - 1), max_size=2))]
                size = draw(st.sampled_from((1, 17, 400)))
                tokens.append(_random_command(die, draw(st.sampled_from(edge10.UNITS[:-1])), size, deps))
            if part < meetings:
                memory = "dram" if part else "sram"
                tokens.append(die.all_gather(1000, tokens[-1], memory=memory))
        programs.append(die.program())
    return programs


def check_consistent(timing: Timing) -> None:
    """No unit does two things at once, commands wait for what they depend on, and busy times are those of the
    commands.
    """
    for die in timing.dies:
        assert (die.start <= die.data + 1e-9).all() and (die.data <= die.end + 1e-9).all()
        units = np.array([k.unit for k in die.commands.kinds])[die.commands.kind]
        for unit in set(units.tolist()):
            mine = np.flatnonzero(units == unit)
            begin = die.data[
                mine
            ]  # a queue's transfers wait at the same time, but move data one after the other
            assert (begin[1:] >= die.end[mine][:-1] - 1e-6).all()
            if unit not in edge10.DMA_UNITS:
                assert die.busy[unit] == pytest.approx(float((die.end[mine] - die.start[mine]).sum()))
        for command in die.commands:
            assert all(die.end[d] <= die.start[command.index] + 1e-6 for d in command.deps)
        assert all(-1e-6 <= busy <= timing.total_ns + 1e-6 for busy in die.busy.values())


def check_dram(timing: Timing, machine: Machine) -> None:
    """The DRAM moves no more than it can while it is busy, and at least what one port or its own rate
    allows.
    """
    for die in timing.dies:
        moved = sum(
            die.commands.kinds[k].cost.cost_bytes(machine)
            for k in die.commands.kind
            if hasattr(die.commands.kinds[k].cost, "runs")
        )
        least = min(machine.dram_bytes_per_ns, machine.sram.port_bytes_per_cycle / machine.cycle_ns)
        assert die.busy["dram"] * least <= moved * (1 + 1e-9) + 1e-3
        assert moved <= die.busy["dram"] * machine.dram_bytes_per_ns * (1 + 1e-9) + 1e-3


@settings(max_examples=100, deadline=None)
@given(random_programs(), st.integers(1, 8), st.just(0.0) | st.floats(1e-9, 500))
def test_random_programs_are_consistent(
    programs: list[EdgeProgram], outstanding: int, latency: float
) -> None:
    machine = MACHINE.with_overrides({"dma.outstanding": outstanding, "dram.latency_ns": latency})
    timing = simulate(programs, machine, 0)
    check_consistent(timing)
    check_dram(timing, machine)
    again = simulate(programs, machine, 0)
    assert again.total_ns == timing.total_ns and all(
        (a.end == b.end).all() for a, b in zip(timing.dies, again.dies)
    )


@pytest.mark.parametrize(
    "sizes",
    [{"dies": 1, "tokens": 8, "group": 16}, {"dies": 3, "tokens": 1, "group": 16}, {"dies": 2, "tokens": 8}],
)
def test_compiled_programs_are_consistent(make_model: Callable[..., Any], sizes: dict[str, int]) -> None:
    model = make_model(**sizes)
    timing = simulate(model.programs, model.machine, 13)
    check_consistent(timing)
    check_dram(timing, model.machine)
    for number, die in enumerate(timing.dies):
        costs = op_costs(timing, number)
        assert (
            sum(c.macs for c in costs)
            == sum(c.op.macs(c.scalars) for c in die.commands if isinstance(c.op, edge10.Matmul))
            > 0
        )
        assert (
            sum(c.dram_bytes for c in costs)
            == sum(c.dram_bytes for c in layer_costs(timing, number))
            == die.dram_bytes
        )
        assert sum(c.time_ns for c in costs) == pytest.approx(
            sum(c.time_ns for c in layer_costs(timing, number))
        )
        assert sum(c.commands for c in costs) == len(die.commands)


def test_a_better_machine_is_not_slower(make_model: Callable[..., Any]) -> None:
    """Any constant between a tenth and ten times its value, on a compiled program.

    More bandwidth is never slower.  What lets a transfer begin earlier (latency, queue depth, any faster unit
    before it) may take a part of the bandwidth, which is shared fairly, from one that more depends on: seen
    in one of some hundred draws, by 0.02 %; 0.1 % is let through.
    """
    models = {dies: make_model(dies=dies, tokens=8, group=16, data=False) for dies in (1, 2)}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        model = models[data.draw(st.sampled_from((1, 2)))]
        name = data.draw(st.sampled_from((*BETTER_HIGH, *BETTER_HIGH_COUNTS, *BETTER_LOW)))
        value = SHIPPED.constants[name].value
        if name in BETTER_HIGH_COUNTS:
            low, high = sorted(data.draw(st.lists(st.integers(1, int(value) * 10), min_size=2, max_size=2)))
        else:
            low, high = sorted(
                data.draw(
                    st.lists(
                        st.floats(value / 10, value * (1 if name == "dram.efficiency" else 10)),
                        min_size=2,
                        max_size=2,
                    )
                )
            )
        slow, fast = (high, low) if name in BETTER_LOW else (low, high)
        slower, faster = (
            simulate(model.programs, model.machine.with_overrides({name: v}), 13).total_ns
            for v in (slow, fast)
        )
        allowed = 1e-9 if name in ("dram.bandwidth_gbps", "dram.efficiency") else 1e-3
        assert faster <= slower * (1 + allowed), (name, slow, fast, slower, faster)

    compare()
