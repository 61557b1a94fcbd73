"""One row per vector function: what is derived from it holds together."""

from __future__ import annotations

import numpy as np
import pytest

from tyir.edge10.command_times import vector_ns
from tyir.edge10.vector_functions import VECTOR_FUNCTIONS, VECTOR_PASSES, Call, passes_of, whole
from tyir.targets.machine import load_machine

CALL = Call(rows=6, cols=12, group=2, constant=0.5)


@pytest.mark.parametrize("name", sorted(VECTOR_FUNCTIONS))
def test_outputs_have_the_shapes_that_the_row_says(name: str) -> None:
    row = VECTOR_FUNCTIONS[name]
    inputs = [np.full(shape(CALL), 2.0, np.float32) for shape in row.inputs]
    made = row.compute(CALL, *inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    assert [o.shape for o in outputs] == [shape(CALL) for shape in row.outputs]
    if row.elementwise:
        assert set(row.inputs) | set(row.outputs) == {whole}


@pytest.mark.parametrize("machine", ["edge10", "hopper_sm"])
def test_every_function_has_its_cycles_and_a_machine_has_no_others(machine: str) -> None:
    found = load_machine(machine)
    assert set(found.vector.cycles) == set(VECTOR_PASSES)
    elements = found.vector.units * found.vector.lanes
    for name, row in VECTOR_FUNCTIONS.items():
        constant = found.constants[f"vector.{row.priced_as}_cycles"].value
        per_pass = vector_ns(name, 2 * elements, found) - vector_ns(name, elements, found)
        assert per_pass == pytest.approx(constant * found.cycle_ns)


def test_a_gpu_that_plays_a_die_goes_over_the_elements_as_often_as_edge10_takes_cycles() -> None:
    for name, cycles in load_machine("edge10").vector.cycles.items():
        assert VECTOR_PASSES[name] == cycles
    assert (passes_of("quantize_rows"), passes_of("softmax"), passes_of("top_k")) == (4, 8, 1)
