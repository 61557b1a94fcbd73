"""The 8-bit cache in command programs: equal to the interpreter over random layers, through DRAM and across
blocks of a long cache.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.llm import Shape, Step, build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.dialects import edge10
from tyir.dialects.ty import Global, Param
from tyir.edge10.command_times import dequant_ns, vector_ns
from tyir.execution.storage import pack
from tyir.interpreter import evaluate_param
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine

MACHINE = load_machine("edge10")
SMALL = MACHINE.with_overrides({"sram.capacity_bytes": 48 << 10})


def program(
    shape: Shape, machine: Machine, dies: int, tokens: int, capacity: int
) -> tuple[Step, list[FunctionalDie]]:
    """The step run by the interpreter, and as command programs."""
    module, weights = build(shape)
    kv = f"kv-materialize{{max-kv={capacity} dtype=int8}},partition-dies{{dies={dies} strategy=split}}"
    run_pipeline(module, f"{kv},specialize-seqlen{{seqlens={tokens}}},to-program")
    engines = []
    for die in dies_of(module):
        params = {
            p.sym_name: pack(evaluate_param(p, weights), p.type) for p in die.body if isinstance(p, Param)
        }
        engines.append(FunctionalDie(EdgeProgram(lower_die(die, tokens, machine)), params, machine))
    assert not any(isinstance(op, Global) for op in dies_of(module)[0].body)
    return Step(module, weights), engines


@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["in SRAM", "through DRAM"])
@pytest.mark.parametrize(("dies", "tokens"), [(1, 1), (1, 8), (3, 8)])
def test_program_equals_interpreter(machine: Machine, dies: int, tokens: int) -> None:
    check(Shape(heads=6, kv_heads=2), machine, dies, tokens, capacity=40, steps=3)


def test_blocks_of_a_long_cache() -> None:
    """More keys than a block holds: 300 tokens in steps of 60."""
    check(Shape(layers=1), MACHINE, 1, 60, capacity=310, steps=5)


def check(shape: Shape, machine: Machine, dies: int, tokens: int, capacity: int, steps: int) -> None:
    step, engines = program(shape, machine, dies, tokens, capacity)
    for number in range(steps):
        ids = [(7 * i + number) % shape.vocabulary for i in range(tokens)]
        expected = step.feed(ids, f"main_s{tokens}")
        got = run_step(engines, {"ids": np.array([ids], np.int32)}, number * tokens)["logits"][0]
        # A value that f16 rounding moves across the border between two of the 255 steps moves by a whole
        # step.
        np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max(), rtol=0)
    assert step.caches is not None
    stored = engines[0].memory.dram.buffer("k0").view(np.int8).reshape(step.caches[0][0].shape)
    used = slice(0, steps * tokens)
    assert np.abs(stored[:, :, used].astype(int) - step.caches[0][0][:, :, used]).max() <= 1


def test_the_caches_take_half_the_bytes() -> None:
    _, engines = program(Shape(layers=1), MACHINE, 1, 1, capacity=64)
    sizes = {b.sym_name: b.nbytes for b in engines[0].program.buffers.values() if b.kind == "kv"}
    assert sizes == {"k0": 2 * 64 * 16, "k_scales0": 2 * 64 * 2, "v0": 2 * 64 * 16, "v_scales0": 2 * 64 * 2}


def test_time() -> None:
    """De-quantising goes through the pipe of the 4-bit weights; quantising is a pass over the row like a
    norm.
    """
    _, engines = program(Shape(layers=1), MACHINE, 1, 1, capacity=64)
    commands = engines[0].program.expand(40)
    blocks = [c for c in commands if isinstance(c.op, edge10.DequantRows)]
    assert sum(count for block in blocks for count in block.scalars) == 2 * 41  # keys and values
    rows = blocks[0]
    (count,) = rows.scalars
    assert count and rows.op.cost((count,)).ns(MACHINE) == dequant_ns(2 * count, 16, MACHINE)
    assert rows.op.cost((0,)).ns(MACHINE) == 0.0
    (new, *_) = [
        c for c in commands if isinstance(c.op, edge10.VectorOp) and c.op.function == "quantize_rows"
    ]
    assert new.op.cost(()).ns(MACHINE) == vector_ns("rms_norm", 2 * 16, MACHINE)
