"""`edge10.top_k` against `ty.top_k`, its halves and their merge: in SRAM, tile by tile through DRAM, and what
it costs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import DictAttr, IntegerAttr, StringAttr, SymbolRefAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.diagnostics import TyirError
from tyir.dialects import edge10, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.edge10.command_times import top_k_ns
from tyir.execution.entry_points import mark_entry, result
from tyir.ir import Value
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.types import TensorType, Type, f16, f32, i64
from tyir.verifier import verify

MACHINE = load_machine("edge10")
SMALL = MACHINE.with_overrides({"sram.capacity_bytes": 64 << 10})
Array = npt.NDArray[Any]


def program(x: TensorType, k: int, sizes: tuple[int, ...], machine: Machine) -> Module:
    """x + x, its top k at once, and by halves."""
    function = Func.make("main_s1", [x], ["x"])
    mark_entry(function, 1)

    def add(op: Any) -> tuple[Value, ...]:
        return tuple(function.body.append(op).results)

    (y,) = add(ty.Add(function.args[0], function.args[0]))
    whole = add(ty.TopK(y, k=k))
    (candidates,) = add(ty.TopKCandidates(y, k=k, sizes=sizes))
    merged = add(ty.MergeTopK(candidates, k=k))
    function.body.append(Return(values=[*whole, candidates, *merged]))
    function.refresh_type()
    names = ("values", "ids", "candidates", "merged_values", "merged_ids")
    function.set_res_attrs([result(n) for n in names])
    module = Module.empty("die0")
    module.attributes = DictAttr({"tyir.die": IntegerAttr(0, i64), "tyir.stage": StringAttr("program")})
    module.body.append(function)
    lowered = lower_die(module, 1, machine)
    verify(lowered)
    return lowered


def run(module: Module, x: Array, machine: Machine) -> dict[str, Array]:
    return run_step([FunctionalDie(EdgeProgram(module), {}, machine)], {"x": x}, 0)


@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["in SRAM", "through DRAM"])
@pytest.mark.parametrize("element", [f16, f32])
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 3000, 8), (3, 700, 1), (37, 2100, 5), (1, 40, 40)])
def test_equals_the_reference(machine: Machine, element: Type, rows: int, width: int, k: int) -> None:
    """Small whole numbers, so that equal values lie in different tiles."""
    x = (
        np.random.default_rng(rows)
        .integers(-60, 60, (1, rows, width))
        .astype(np.float16 if element is f16 else np.float32)
    )
    sizes = (width // 3, width - width // 3 - 2, 2)
    got = run(program(TensorType(x.shape, element), k, sizes, machine), x, machine)
    values, ids = ty.select_best((x + x).astype(np.float32), np.broadcast_to(np.arange(width), x.shape), k)
    for name, wanted in (("values", values), ("ids", ids), ("merged_values", values), ("merged_ids", ids)):
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)
    assert got["candidates"].shape == (1, rows, 2, sum(min(k, size) for size in sizes))


def test_values_without_order_are_the_lowest() -> None:
    x = np.full((1, 1, 64), np.nan, np.float32)
    x[0, 0, [5, 50]] = -np.inf, 1.0
    got = run(program(TensorType(x.shape, f32), 3, (64,), MACHINE), x, MACHINE)
    assert got["ids"].tolist() == [[[50, 0, 1]]]
    assert np.isfinite(got["values"]).all()


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        TyirError, match=r"lists of 4000 tokens do not fit \d+ bytes(.|\n)*use topk=\d+ or less"
    ):
        program(TensorType((1, 1, 5000), f32), 4000, (5000,), SMALL)


def test_time() -> None:
    """One row of a fourth of Qwen2.5's vocabulary: compared once, about 8 (1 + ln 4752) = 76 candidates enter
    the list.
    """
    assert top_k_ns(1, 38016, 8, MACHINE) == 2 * (32 + math.ceil(38016 / 256) + 76)
    assert top_k_ns(8, 38016, 8, MACHINE) == 2 * (32 + math.ceil(8 * 38016 / 256) + 2 * 76)
    assert top_k_ns(0, 38016, 8, MACHINE) == 0.0
    commands = [
        op
        for op in program(TensorType((1, 1, 640), f32), 8, (640,), MACHINE).walk()
        if isinstance(op, edge10.TopK)
    ]
    assert commands[0].cost(()).ns(MACHINE) == top_k_ns(1, 640, 8, MACHINE)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["large", "small"])
def test_logits_of_many_tokens_are_ranked_as_they_are_made(machine: Machine, halves: bool) -> None:
    """Whole numbers, exact in f16 products; the logits themselves are never stored."""
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-3, 4, shape).astype(np.float16) for shape in ((1, 40, 64), (700, 64)))
    function = Func.make("main_s40", [TensorType(x.shape, f16)], ["x"])
    mark_entry(function, 40)
    weight = function.body.append(
        ty.GetGlobal(symbol=SymbolRefAttr("w"), result_types=[TensorType(w.shape, f16)])
    ).result
    logits = function.body.append(ty.Linear(function.args[0], weight, element=f32)).result
    if halves:
        candidates = function.body.append(ty.TopKCandidates(logits, k=5, sizes=(200, 3, 497))).result
        results = function.body.append(ty.MergeTopK(candidates, k=5)).results
    else:
        results = function.body.append(ty.TopK(logits, k=5)).results
    function.body.append(Return(values=list(results)))
    function.refresh_type()
    function.set_res_attrs([result(n) for n in ("values", "ids")])
    module = Module.empty("die0")
    module.attributes = DictAttr({"tyir.die": IntegerAttr(0, i64), "tyir.stage": StringAttr("program")})
    module.body.append(function)
    lowered = lower_die(module, 40, machine)
    verify(lowered)
    got = run_step([FunctionalDie(EdgeProgram(lowered), {"w": w}, machine)], {"x": x}, 0)
    expected = x.astype(np.float32) @ w.astype(np.float32).T
    values, ids = ty.select_best(expected, np.broadcast_to(np.arange(700), expected.shape), 5)
    np.testing.assert_array_equal(got["values"], values)
    np.testing.assert_array_equal(got["ids"], ids)
    stores = [op for op in lowered.walk_type(edge10.Store) if op.shape[1] * op.shape[2] > 40 * 5 * 4]
    assert machine is SMALL or not stores
