"""Steps of long contexts from few layers and positions: what all layers and every position take, or a
refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.timing.engine import simulate, simulate_chunks
from tyir.runtime_sim.timing.long_steps import TOLERANCE, LongSteps


def test_equal_to_all_layers_at_every_position(make_model: Callable[..., Any]) -> None:
    wide = {"heads": 4, "kv_heads": 1, "dim": 128, "hidden": 128, "tokens": 96}
    model = make_model(layers=4, capacity=24_000, data=False, **wide)
    steps = LongSteps(model.programs, model.machine, 24_000)
    for pos in (0, 4_096, 9_000, 23_000):
        whole = simulate(model.programs, model.machine, pos).total_ns
        assert steps.ns(pos) == pytest.approx(whole, rel=0.02)


def test_far_positions_are_on_the_line(make_model: Callable[..., Any]) -> None:
    model = make_model(layers=1, tokens=16, capacity=400_000, dim=64, data=False)
    steps = LongSteps(model.programs, model.machine, 400_000)
    assert steps.ns(390_000) == pytest.approx(
        simulate(model.programs, model.machine, 390_000).total_ns, rel=TOLERANCE
    )


def test_what_is_no_line_is_refused(make_model: Callable[..., Any]) -> None:
    """A window of 20,000 tokens: from there on a step takes no longer."""
    model = make_model(layers=1, tokens=16, capacity=200_000, window=20_000, dim=64, data=False)
    with pytest.raises(TyirError, match=r"at position 32768 takes(.|\n)*--max-kv 32768"):
        LongSteps(model.programs, model.machine, 200_000).ns(100_000)


def test_chunks_of_one_die_follow_each_other(make_model: Callable[..., Any]) -> None:
    model = make_model(layers=2, tokens=8, capacity=300, data=False)
    launch = model.machine.sync.launch_us * 1000
    alone = [simulate(model.programs, model.machine, pos).total_ns - launch for pos in (0, 8, 16)]
    assert simulate_chunks(model.programs, model.machine, [0, 8, 16]) == pytest.approx(sum(alone), rel=1e-6)
