"""MLPs computed part by part, and the search over divisions of SRAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tyir.backends.edge10.lowering import die
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.fused.fusion import Room
from tyir.backends.edge10.lowering.fused.mlp import Mlp
from tyir.backends.edge10.lowering.search import CANDIDATES
from tyir.backends.edge10.memory.allocate import SramShares, sram_plan
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine


@pytest.mark.parametrize(("inter", "parts"), [(2048, 2), (1024, 1)])
@pytest.mark.parametrize("group", [0, 16])
def test_parts_add_up(make_model: Callable[..., Any], inter: int, parts: int, group: int) -> None:
    machine = load_machine("edge10").with_overrides({"sram.capacity_bytes": 256 << 10})
    model = make_model(machine=machine, tokens=32, inter=inter, group=group)
    shares = SramShares(boundary=0.0)
    plan = sram_plan(machine, shares)
    layer = model.modules[0].lookup("layer_s32")
    assert isinstance(layer, Func)
    room = Room(layer, machine, plan, plan.arena)
    assert [mlp.parts for op in layer.body if (mlp := Mlp.match(op, room)) is not None] == [parts]
    model.lowered = [lower_die(m, 32, machine, shares) for m in model.modules]
    model.programs = [EdgeProgram(m) for m in model.lowered]
    engines = model.functional()
    model.fill_caches(engines, 3)
    ids = np.arange(32, dtype=np.int32)[None] * 7 % 80
    expected, got = model.interpret(ids, 3), model.step(engines, ids, 3)
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("shares", CANDIDATES)
def test_every_division_computes_the_same(make_model: Callable[..., Any], shares: SramShares) -> None:
    machine = load_machine("edge10").with_overrides({"sram.capacity_bytes": 128 << 10})
    model = make_model(machine=machine, tokens=32, inter=256, group=64, dies=2)
    model.lowered = [lower_die(m, 32, machine, shares) for m in model.modules]
    model.programs = [EdgeProgram(m) for m in model.lowered]
    engines = model.functional()
    ids = np.arange(32, dtype=np.int32)[None] * 5 % 80
    expected, got = model.interpret(ids, 0), model.step(engines, ids, 0)
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max(), rtol=0)


def estimated_ns(module: Module, tokens: int, machine: Machine, shares: SramShares) -> float:
    """What the search compares divisions by."""
    main = module.lookup(f"main_s{tokens}")
    assert isinstance(main, Func)
    return die._estimated_ns(module, main, tokens, machine, shares)


def test_the_estimate_is_near_the_simulation(make_model: Callable[..., Any]) -> None:
    """What the search compares is what the timing engine then says, up to what does not overlap."""
    model = make_model(tokens=64, hidden=512, inter=2048, heads=8, dim=64, vocab=2048, group=64, layers=2)
    machine = model.machine.with_overrides({"sync.launch_us": 0})
    for shares in CANDIDATES:
        simulated = simulate(
            [EdgeProgram(lower_die(m, 64, machine, shares)) for m in model.modules], machine, 0
        ).total_ns
        assert 0.5 * simulated < estimated_ns(model.modules[0], 64, machine, shares) < 1.1 * simulated
