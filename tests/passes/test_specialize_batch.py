"""A step for several sequences computes what a step for each computes, on its own position and its own
caches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.llm import ArrayWeights, Shape, Step, build, dies_of
from tyir.attributes import StringAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Param
from tyir.execution.storage import pack
from tyir.interpreter import Interpreter, evaluate_param, run_lockstep
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.session.host_runtime import HostLibrary
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine
from tyir.types import storage_dtype

SHAPE = Shape(heads=6, kv_heads=2)
IDS = np.array([[3, 14, 15, 9], [26, 5, 35, 8], [9, 7, 9, 32]], np.int32)
HISTORY = (0, 5, 2)  # tokens that each sequence's cache holds already


def caches(function: Func, rng: np.random.Generator) -> list[np.ndarray]:
    made = []
    for arg in function.args[2:]:
        dtype = storage_dtype(arg.type.element)  # type: ignore[attr-defined]
        shape = arg.type.static_shape  # type: ignore[attr-defined]
        made.append(
            (rng.integers(-99, 99, shape) if dtype == np.int8 else rng.uniform(0, 0.01, shape)).astype(dtype)
        )
    return made


def program(shape: Shape, pipeline: str) -> tuple[Module, ArrayWeights]:
    module, weights = build(shape)
    run_pipeline(module, pipeline)
    return module, weights


def step(
    module: Module,
    weights: ArrayWeights,
    name: str,
    ids: np.ndarray,
    pos: list[int],
    state: list[list[np.ndarray]],
) -> tuple[np.ndarray, ...]:
    runs = [
        Interpreter(die, weights).run(name, [ids, np.array(pos, np.int32), *own])
        for die, own in zip(dies_of(module), state)
    ]
    return run_lockstep(runs)[0]


@pytest.mark.parametrize("kv", ["kv-materialize{max-kv=16}", "kv-materialize{max-kv=16 dtype=int8}"])
@pytest.mark.parametrize("rest", ["", "select-output{kind=topk k=3},partition-dies{dies=3 strategy=split}"])
def test_each_sequence_is_computed_as_if_alone(kv: str, rest: str) -> None:
    tail = f",{rest}" if rest else ""
    one, weights = program(SHAPE, f"{kv}{tail}")
    three, _ = program(SHAPE, f"specialize-batch{{batch=3}},{kv}{tail}")
    later, _ = program(SHAPE, f"{kv},specialize-batch{{batch=3}}{tail}")
    functions = [f for d in dies_of(three) if isinstance(f := d.lookup("main"), Func)]
    state = [caches(f, np.random.default_rng(1)) for f in functions]
    for module in (three, later):
        got = step(module, weights, "main", IDS, list(HISTORY), [[c.copy() for c in own] for own in state])
        for i in range(3):
            alone = step(
                one,
                weights,
                "main",
                IDS[i : i + 1],
                [HISTORY[i]],
                [[c[i : i + 1].copy() for c in own] for own in state],
            )
            for mine, theirs in zip(got, alone):
                if mine.dtype == np.int8:
                    assert np.abs(mine[i].astype(int) - theirs[0]).max() <= 1
                else:
                    np.testing.assert_allclose(mine[i], theirs[0], atol=0.01)


def test_compiled_kernels_take_several_sequences(tmp_path: Path) -> None:
    module, weights = program(
        SHAPE,
        "specialize-batch{batch=3},kv-materialize{max-kv=16 dtype=int8},partition-dies{dies=1}," + TO_PROGRAM,
    )
    (die,) = dies_of(module)
    functions = [f for f in die.body if isinstance(f, Func)]
    build_library(assign_kernels(functions), HostTarget(num_cores=1), tmp_path / "batch.so")
    constants = {
        p.sym_name: pack(evaluate_param(p, weights), p.type) for p in die.body if isinstance(p, Param)
    }
    main = die.lookup("main_s4")
    assert isinstance(main, Func)
    state = caches(main, np.random.default_rng(2))
    compiled = Interpreter(die, constants=constants, evaluator=HostLibrary(tmp_path / "batch.so").evaluate)
    pos = np.array(HISTORY, np.int32)
    (got,) = run_lockstep([compiled.run("main_s4", [IDS, pos, *(c.copy() for c in state)])])
    wanted = step(module, weights, "main_s4", IDS, list(HISTORY), [[c.copy() for c in state]])
    np.testing.assert_allclose(got[0], wanted[0], atol=0.02 * np.abs(wanted[0]).max())


TO_PROGRAM = "specialize-seqlen{seqlens=4},to-program"


@pytest.mark.parametrize("kv", ["max-kv=16", "max-kv=16 dtype=int8"])
@pytest.mark.parametrize("dies", [1, 3])
def test_command_programs_take_several_sequences(kv: str, dies: int) -> None:
    """Each at its own position of its own cache, one of them beyond its end (padding is dropped)."""
    cut = f"partition-dies{{dies={dies} strategy=split}}"
    module, weights = program(SHAPE, f"specialize-batch{{batch=3}},kv-materialize{{{kv}}},{cut},{TO_PROGRAM}")
    pos = [0, 5, 14]
    state, programs = [], []
    for die in dies_of(module):
        main = die.lookup("main_s4")
        assert isinstance(main, Func)
        state.append(caches(main, np.random.default_rng(2)))
        packed = {
            str(p.sym_name): pack(evaluate_param(p, weights), p.type)
            for p in die.body
            if isinstance(p, Param)
        }
        functional = FunctionalDie(
            EdgeProgram(lower_die(die, 4, load_machine("edge10"))), packed, load_machine("edge10")
        )
        names = [
            name.value
            for i in range(2, len(main.args))
            if isinstance(name := main.arg_attr(i)["tyir.name"], StringAttr)
        ]
        for name, cache in zip(names, state[-1]):
            functional.memory.dram.write_buffer(name, cache)
        programs.append(functional)
    got = run_step(programs, {"ids": IDS}, tuple(pos))["logits"]
    wanted = step(module, weights, "main_s4", IDS, pos, [[c.copy() for c in own] for own in state])[0]
    for sequence, rows in enumerate((4, 4, 2)):
        np.testing.assert_allclose(
            got[sequence, :rows], wanted[sequence, :rows], atol=0.02 * np.abs(wanted).max()
        )


def test_bad_batches() -> None:
    with pytest.raises(TyirError, match=r"a batch of 0: 1 to 64(.|\n)*use 1"):
        program(SHAPE, "specialize-batch{batch=0}")
    with pytest.raises(TyirError, match=r"tensor<3x\?xi64>(.|\n)*once, at stage ty or kv"):
        program(SHAPE, "specialize-batch{batch=3},specialize-batch{batch=3}")


def test_one_sequence_changes_nothing() -> None:
    module, weights = program(SHAPE, "specialize-batch,kv-materialize{max-kv=16}")
    plain, _ = program(SHAPE, "kv-materialize{max-kv=16}")
    np.testing.assert_array_equal(Step(module, weights).feed([3, 4]), Step(plain, weights).feed([3, 4]))
