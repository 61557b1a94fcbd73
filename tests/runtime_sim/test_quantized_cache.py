"""Caches of 8 and of 4 bits in command programs: equal to the interpreter over random layers, through DRAM
and across blocks of a long cache.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.llm import Shape, Step, build, dies_of
from tyir.attributes import StringAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.dialects import edge10
from tyir.dialects.kv import rows_of
from tyir.dialects.ty import Attention, Global, Param
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
    shape: Shape, machine: Machine, dies: int, tokens: int, capacity: int, dtype: str
) -> tuple[Step, list[FunctionalDie]]:
    """The step run by the interpreter, and as command programs."""
    module, weights = build(shape)
    if dtype == "mixed":  # as `scale-keys` asks for, where 4 bits would not hold a layer's keys
        dtype = "int4"
        for attention in list(module.walk_type(Attention))[:1]:
            attention.set_attribute("tyir.keys", StringAttr("int8"))
    kv = f"kv-materialize{{max-kv={capacity} dtype={dtype}}},partition-dies{{dies={dies} strategy=split}}"
    run_pipeline(module, f"{kv},specialize-seqlen{{seqlens={tokens}}},to-program")
    engines = []
    for die in dies_of(module):
        params = {
            p.sym_name: pack(evaluate_param(p, weights), p.type) for p in die.body if isinstance(p, Param)
        }
        engines.append(FunctionalDie(EdgeProgram(lower_die(die, tokens, machine)), params, machine))
    assert not any(isinstance(op, Global) for op in dies_of(module)[0].body)
    return Step(module, weights), engines


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["in SRAM", "through DRAM"])
@pytest.mark.parametrize(("dies", "tokens"), [(1, 1), (1, 8), (3, 8)])
def test_program_equals_interpreter(machine: Machine, dies: int, tokens: int, dtype: str) -> None:
    check(Shape(heads=6, kv_heads=2), machine, dies, tokens, 40, 3, dtype)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_of_a_long_cache(dtype: str) -> None:
    """More keys than a block holds: 300 tokens in steps of 60."""
    check(Shape(layers=1), MACHINE, 1, 60, 310, 5, dtype)


@pytest.mark.parametrize("tokens", [1, 60])
def test_keys_of_8_bits_beside_values_of_4(tokens: int) -> None:
    step, engines = program(Shape(), MACHINE, 2, tokens, 310, "mixed")
    for number in range(5):
        ids = [(7 * i + number) % 80 for i in range(tokens)]
        expected = step.feed(ids, f"main_s{tokens}")
        got = run_step(engines, {"ids": np.array([ids], np.int32)}, number * tokens)["logits"][0]
        np.testing.assert_allclose(got, expected, atol=0.1 * np.abs(expected).max(), rtol=0)
    assert step.caches is not None
    kinds = [cache.dtype.name for cache in step.caches[0]]
    assert kinds == ["int8", "float16", "uint8", "uint16", "uint8", "uint16", "uint8", "uint16"]


def check(
    shape: Shape, machine: Machine, dies: int, tokens: int, capacity: int, steps: int, dtype: str
) -> None:
    step, engines = program(shape, machine, dies, tokens, capacity, dtype)
    for number in range(steps):
        ids = [(7 * i + number) % shape.vocabulary for i in range(tokens)]
        expected = step.feed(ids, f"main_s{tokens}")
        got = run_step(engines, {"ids": np.array([ids], np.int32)}, number * tokens)["logits"][0]
        # A value that f16 rounding moves across the border between two of the 255 or 16 steps moves by a
        # whole step.
        near = 0.02 if dtype == "int8" else 0.1
        np.testing.assert_allclose(got, expected, atol=near * np.abs(expected).max(), rtol=0)
    assert step.caches is not None
    wanted, of_wanted = (cache[:, :, : steps * tokens] for cache in step.caches[0][:2])
    stored, scales = (
        engines[0].memory.dram.buffer(name).view(cache.dtype).reshape(cache.shape)[:, :, : steps * tokens]
        for name, cache in zip(("k0", "k_scales0"), step.caches[0])
    )
    if dtype == "int8":
        assert np.abs(stored.astype(int) - wanted).max() <= 1
    else:
        steps_of = np.abs(rows_of(wanted, of_wanted)).max(axis=-1, keepdims=True).astype(np.float32) / 7
        moved = np.abs(rows_of(stored, scales).astype(np.float32) - rows_of(wanted, of_wanted))
        assert (moved <= 1.05 * steps_of).all() and (moved == 0).mean() > 0.97


@pytest.mark.parametrize(("dtype", "row"), [("int8", 32), ("int4", 16)])
def test_the_caches_take_half_and_a_quarter_of_the_bytes(dtype: str, row: int) -> None:
    _, engines = program(Shape(layers=1, head_dim=32), MACHINE, 1, 1, 64, dtype)
    sizes = {b.sym_name: b.nbytes for b in engines[0].program.buffers.values() if b.kind == "kv"}
    assert sizes == {"k0": 2 * 64 * row, "k_scales0": 2 * 64 * 2, "v0": 2 * 64 * row, "v_scales0": 2 * 64 * 2}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_time(dtype: str) -> None:
    """De-quantising goes through the pipe of the 4-bit weights; quantising is a pass over the row like a
    norm.
    """
    _, engines = program(Shape(layers=1), MACHINE, 1, 1, 64, dtype)
    commands = engines[0].program.expand(40)
    blocks = [c for c in commands if isinstance(c.op, edge10.DequantRows)]
    assert sum(count for block in blocks for count in block.scalars) == 2 * 41  # keys and values
    rows = blocks[0]
    (count,) = rows.scalars
    assert count and rows.op.cost((count,)).ns(MACHINE) == dequant_ns(2 * count, 16, MACHINE)
    assert rows.op.cost((0,)).ns(MACHINE) == 0.0
    (new, *_) = [
        c
        for c in commands
        if isinstance(c.op, edge10.VectorOp) and c.op.function in ("quantize_rows", "quantize_groups")
    ]
    assert new.op.cost(()).ns(MACHINE) == vector_ns("rms_norm", 2 * 16, MACHINE)
