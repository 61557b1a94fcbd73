"""A step that returns one row of each sequence returns that of the step which returns all, however cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from tests.llm import ArrayWeights, Shape, build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.dialects.ty import Add, Param, Softcap, tensor_type
from tyir.execution.storage import pack
from tyir.interpreter import Interpreter, evaluate_param, run_lockstep
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.types import storage_dtype

Array = npt.NDArray[np.generic]
SHAPE = Shape(layers=2, heads=6, kv_heads=2, vocabulary=101)
IDS = [3, 14, 15, 9, 26, 5, 35, 8]
KV = "kv-materialize{max-kv=16}"
MACHINE = load_machine("edge10")
BOARDS = {
    "": "partition-dies{dies=1}",
    "die": "partition-dies{dies=2 strategy=split}",
    "stages": "partition-dies{dies=4 pp=2 strategy=split}",
    "uneven": "select-output{kind=topk k=3},partition-dies{dies=3 strategy=split}",
}


def program(pipeline: str, change: Callable[[Module], None] = lambda m: None) -> tuple[Module, ArrayWeights]:
    module, weights = build(SHAPE)
    change(module)
    run_pipeline(module, pipeline)
    return module, weights


def stepped(
    module: Module, weights: ArrayWeights, name: str, ids: Array, pos: Array, row: Array | None
) -> tuple[Array, ...]:
    """The results of all dies' steps with empty caches, those of the first."""
    runs = []
    for die in dies_of(module):
        function = die.lookup(name)
        assert isinstance(function, Func)
        given = {"ids": ids, "pos": pos, "row": row}
        arguments = [
            given[a.name] if a.name in given else np.zeros(*layout(tensor_type(a))) for a in function.args
        ]
        runs.append(Interpreter(die, weights).run(name, arguments))
    return run_lockstep(runs)[0]


def layout(type: object) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    return type.static_shape, storage_dtype(type.element)  # type: ignore[attr-defined]


def cap(module: Module) -> None:
    """Logits capped as Gemma 2's, and scaled twice before."""
    (function,) = [op for op in module.body if isinstance(op, Func)]
    terminator = function.body.terminator
    twice = Add(terminator.operands[0], terminator.operands[0]).insert_before(terminator)
    terminator.operands = [Softcap(twice.out, cap=3.0).insert_before(terminator).out]


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("change", [lambda m: None, cap], ids=["plain", "capped"])
def test_each_row_is_that_of_all(board: str, change: Callable[[Module], None]) -> None:
    rest = f"{BOARDS[board]},specialize-seqlen{{seqlens=1,8}}"
    every, weights = program(f"{KV},{rest}", change)
    one, _ = program(f"{KV},select-rows,{rest}", change)
    ids, pos = np.array([IDS], np.int32), np.array([0], np.int32)
    wanted = stepped(every, weights, "main_s8", ids, pos, None)
    for row in range(8):
        got = stepped(one, weights, "main_s8", ids, pos, np.array([row], np.int32))
        results = 3 if "topk" in BOARDS[board] else 1
        for mine, theirs in zip(got[:results], wanted[:results]):
            assert mine.shape[1] == 1
            np.testing.assert_allclose(mine[:, 0], theirs[:, row], atol=1e-4)  # BLAS sums one row otherwise
        for mine, theirs in zip(got[results:], wanted[results:], strict=True):
            np.testing.assert_array_equal(mine, theirs)  # the caches hold all rows


def test_a_step_of_one_token_is_the_same_program() -> None:
    every, one = (
        program(f"{KV},{rows}{BOARDS['die']},specialize-seqlen")[0] for rows in ("", "select-rows,")
    )
    for theirs, mine in zip(dies_of(every), dies_of(one), strict=True):
        texts = [str(m.lookup("main_s1")) for m in (theirs, mine)]
        assert texts[0] == texts[1]


def test_each_sequence_has_its_row() -> None:
    batch = f"{KV},specialize-batch{{batch=3}}"
    every, weights = program(f"{batch},{BOARDS['die']},specialize-seqlen{{seqlens=4}}")
    one, _ = program(f"{batch},select-rows,{BOARDS['die']},specialize-seqlen{{seqlens=4}}")
    ids = np.array([[3, 14, 15, 9], [26, 5, 35, 8], [9, 7, 9, 32]], np.int32)
    pos, rows = np.array([0, 0, 0], np.int32), np.array([3, 0, 2], np.int32)
    wanted = stepped(every, weights, "main_s4", ids, pos, None)[0]
    got = stepped(one, weights, "main_s4", ids, pos, rows)[0]
    np.testing.assert_allclose(got[:, 0], wanted[np.arange(3), rows], atol=1e-4)


@pytest.mark.parametrize("machine", [MACHINE, MACHINE.with_overrides({"sram.capacity_bytes": 64 << 10})])
@pytest.mark.parametrize("batch", [1, 3])
def test_command_programs_select_in_sram_and_in_dram(machine: Machine, batch: int) -> None:
    """Whether the layers leave their result in SRAM or in DRAM: one gather a sequence, and all checks."""
    several = f"specialize-batch{{batch={batch}}}," if batch > 1 else ""
    rest = f"select-rows,{BOARDS['die']},specialize-seqlen{{seqlens=8}},to-program"
    module, weights = program(f"{KV},{several}{rest}")
    ids = np.array([IDS[i:] + IDS[:i] for i in range(batch)], np.int32)
    rows = np.array([5, 0, 7][:batch], np.int32)
    wanted = stepped(module, weights, "main_s8", ids, np.zeros(batch, np.int32), rows)[0]
    found = []
    for die in dies_of(module):
        lowered = lower_die(die, 8, machine)
        gathers = [g for g in lowered.walk_type(edge10.Gather) if g.table_rows == 8 and g.index == "ids"]
        assert [g.rows for g in gathers] == [1] * batch
        params = {str(p.sym_name): pack(evaluate_param(p, weights), p.type) for p in die.walk_type(Param)}
        found.append(FunctionalDie(EdgeProgram(lowered), params, machine))
    got = run_step(found, {"ids": ids, "row": rows}, (0,) * batch)["logits"]
    assert got.shape == (batch, 1, SHAPE.vocabulary)
    np.testing.assert_allclose(got, wanted, atol=0.02)


def test_fewer_products_and_less_to_write() -> None:
    """Of 8 rows the head's products and the logits of 7 are gone."""
    taken = []
    for rows in ("", "select-rows,"):
        module, _ = program(f"{KV},{rows}{BOARDS['']},specialize-seqlen{{seqlens=8}},to-program")
        timing = simulate([EdgeProgram(lower_die(die, 8, MACHINE)) for die in dies_of(module)], MACHINE, 0)
        (die,) = timing.dies
        taken.append(sum(c.op.macs(c.scalars) for c in die.commands))
    assert taken[0] - taken[1] == 7 * SHAPE.vocabulary * SHAPE.hidden


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("select-rows", "select-rows"),
        (f"{KV},partition-dies{{dies=1}},select-rows", "select-rows"),
        (f"{KV},select-rows{{rows=first}}", "first"),
    ],
)
def test_where_it_cannot_run(pipeline: str, words: str) -> None:
    with pytest.raises(TyirError, match=words):
        program(pipeline)


def test_the_last_stage_hands_on_one_row() -> None:
    module, _ = program(f"{KV},select-rows,{BOARDS['stages']},specialize-seqlen{{seqlens=8}}")
    sent = {
        tensor_type(op.operands[0]).static_shape
        for die in dies_of(module)[2:]
        for op in die.walk()
        if op.name == "dist.send"
    }
    assert sent == {(1, 1, SHAPE.hidden)}
    assert all(any(True for _ in die.walk_type(Append)) for die in dies_of(module))
