"""A decode step of eight layers of Qwen2.5-7B (int4 g128, its own vocabulary) on boards, stages and batches:
the times are what the cuts promise.  --slow.

pytest tests/e2e/test_board_times.py --slow -s      # prints the figures
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.e2e.real_shapes import MODELS
from tests.llm import build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

POSITION = 500


@cache
def step_us(dies: int, stages: int = 1, batch: int = 1) -> float:
    """Device time of one token of each sequence, the best token as output."""
    model, machine = MODELS["Qwen2.5-7B"], load_machine("edge10")
    module, _ = build(model.shape(8, model.vocabulary), draw=False)
    several = f"specialize-batch{{batch={batch}}}," if batch > 1 else ""
    run_pipeline(
        module, f"quantize-weights{{group-size=128}},{several}kv-materialize{{max-kv=1024}},select-output"
    )
    run_pipeline(
        module,
        f"partition-dies{{dies={dies} pp={stages} strategy=split}},specialize-seqlen{{seqlens=1}},to-program",
    )
    programs = [EdgeProgram(lower_die(die, 1, machine)) for die in dies_of(module)]
    time = simulate(programs, machine, POSITION).total_ns / 1000
    print(
        f"\n{dies:>3} dies, {stages} stages, batch {batch:>2}: {time:>8.0f} us a step, {time / batch:>8.0f}"
        " us a token",
        flush=True,
    )
    return time


@pytest.mark.slow
@pytest.mark.parametrize("dies", [2, 4, 8, 16])
def test_more_dies_are_faster(dies: int) -> None:
    assert step_us(dies) < 1.15 * step_us(1) / dies


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "stages"), [(2, 2), (4, 2), (8, 2), (16, 4)])
def test_stages_read_one_after_the_other(dies: int, stages: int) -> None:
    """A token passes through the stages in turn: the layers take as long as on one stage's dies, only the
    head is read by all.
    """
    assert step_us(dies) < step_us(dies, stages) < 1.05 * step_us(dies // stages)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 4, 8, 16])
def test_a_batch_reads_the_weights_once(batch: int) -> None:
    assert step_us(4, 1, batch) < (1 + 0.01 * batch) * step_us(4)
