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


NAMES = ("values", "ids", "logsumexp")


def program(
    x: TensorType, k: int, sizes: tuple[int, ...], machine: Machine, cap: float | None = None
) -> Module:
    """x + x, its top k at once, and by halves."""
    function = Func.make("main_s1", [x], ["x"])
    mark_entry(function, 1)

    def add(op: Any) -> tuple[Value, ...]:
        return tuple(function.body.append(op).results)

    (y,) = add(ty.Add(function.args[0], function.args[0]))
    whole = add(ty.TopK(y, k=k, softcap=cap))
    halves = ty.TopKCandidates(y, k=k, sizes=sizes, softcap=cap)
    (candidates,) = add(halves)
    merged = add(ty.MergeTopK(candidates, k=k, counts=halves.counts(), softcap=cap))
    function.body.append(Return(values=[*whole, candidates, *merged]))
    function.refresh_type()
    names = (*NAMES, "candidates", *(f"merged_{n}" for n in NAMES))
    function.set_res_attrs([result(n) for n in names])
    module = Module.empty("die0")
    module.attributes = DictAttr({"tyir.die": IntegerAttr(0, i64), "tyir.stage": StringAttr("program")})
    module.body.append(function)
    lowered = lower_die(module, 1, machine)
    verify(lowered)
    return lowered


def logsumexp(x: Array) -> Array:
    """Over the last axis, in f64."""
    wide = x.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    return np.asarray(largest[..., 0] + np.log(np.exp(wide - largest).sum(axis=-1)))


def run(module: Module, x: Array, machine: Machine) -> dict[str, Array]:
    return run_step([FunctionalDie(EdgeProgram(module), {}, machine)], {"x": x}, 0)


@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["in SRAM", "through DRAM"])
@pytest.mark.parametrize("element", [f16, f32])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 3000, 8), (3, 700, 1), (37, 2100, 5), (1, 40, 40)])
def test_equals_the_reference(
    machine: Machine, element: Type, rows: int, width: int, k: int, cap: float | None
) -> None:
    """Small whole numbers, so that equal values lie in different tiles."""
    x = (
        np.random.default_rng(rows)
        .integers(-60, 60, (1, rows, width))
        .astype(np.float16 if element is f16 else np.float32)
    )
    sizes = (width // 3, width - width // 3 - 2, 2)
    got = run(program(TensorType(x.shape, element), k, sizes, machine, cap), x, machine)
    y = (x + x).astype(np.float32)
    values, ids = ty.select_best(y, np.broadcast_to(np.arange(width), x.shape), k)
    if cap is not None:
        values, y = (np.asarray(np.tanh(a / np.float32(cap)) * np.float32(cap)) for a in (values, y))
    for name, wanted in (("values", values), ("ids", ids), ("merged_values", values), ("merged_ids", ids)):
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)
    for name in ("logsumexp", "merged_logsumexp"):
        np.testing.assert_allclose(got[name], logsumexp(y), rtol=0, atol=1e-5, err_msg=name)
    words = sum(2 * min(k, size) + 1 for size in sizes)
    assert got["candidates"].shape == (1, rows, words)


EXTREME = {
    "all equal": np.zeros(700, np.float32),
    "all large": np.full(700, 3e4, np.float32),
    "one huge": np.where(np.arange(700) == 400, np.float32(3e38), np.float32(0)) / 2,
    "all but one low": np.where(np.arange(700) == 1, np.float32(0), np.float32(-3e38)) / 2,
    "growing": np.arange(700, dtype=np.float32) / 4,
    "falling": -np.arange(700, dtype=np.float32) / 4,
}


@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["in SRAM", "through DRAM"])
def test_sums_of_extreme_rows(machine: Machine) -> None:
    """Relative to the larger of 1 and the result, since f32 has no more digits."""
    x = np.stack(list(EXTREME.values()))[None]
    got = run(program(TensorType(x.shape, f32), 3, (300, 0, 399, 1), machine), x, machine)
    wanted = logsumexp(x + x)
    for name in ("logsumexp", "merged_logsumexp"):
        off = np.abs(got[name] - wanted) / np.maximum(1, np.abs(wanted))
        assert off.max() < 2e-6, dict(zip(EXTREME, off[0]))


def test_values_without_order_are_the_lowest() -> None:
    x = np.full((1, 1, 64), np.nan, np.float32)
    x[0, 0, [5, 50]] = -np.inf, 1.0
    got = run(program(TensorType(x.shape, f32), 3, (64,), MACHINE), x, MACHINE)
    assert got["ids"].tolist() == [[[50, 0, 1]]]
    assert np.isfinite(got["values"]).all()
    np.testing.assert_allclose(got["logsumexp"], 2.0)


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        TyirError, match=r"lists of 4000 tokens do not fit \d+ bytes(.|\n)*use topk=\d+ or less"
    ):
        program(TensorType((1, 1, 5000), f32), 4000, (5000,), SMALL)


def test_time() -> None:
    """One row of a fourth of Qwen2.5's vocabulary: compared once, about 8 (1 + ln 4752) = 76 candidates enter
    the list; a softmax's passes, or those of a capped one.
    """
    tiles = math.ceil(38016 / 256)
    assert top_k_ns(1, 38016, 8, 38016, MACHINE) == 2 * (32 + tiles + 76 + 8 * tiles)
    assert top_k_ns(1, 38016, 8, 1, MACHINE) == 2 * (32 + tiles + 76 + 8)
    whole = math.ceil(8 * 38016 / 256)
    capped = top_k_ns(8, 38016, 8, 8 * 38016, MACHINE, function="softmax_capped")
    assert capped == 2 * (32 + whole + 2 * 76 + 12 * whole)
    assert top_k_ns(0, 38016, 8, 0, MACHINE) == 0.0
    for cap, function in ((None, "softmax"), (30.0, "softmax_capped")):
        commands = [
            op
            for op in program(TensorType((1, 1, 640), f32), 8, (640,), MACHINE, cap).walk()
            if isinstance(op, edge10.TopK)
        ]
        assert commands[0].cost(()).ns(MACHINE) == top_k_ns(1, 640, 8, 640, MACHINE, function=function)
        assert commands[-1].cost(()).ns(MACHINE) == top_k_ns(1, 8, 8, 1, MACHINE, function=function)


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("machine", [MACHINE, SMALL], ids=["large", "small"])
def test_logits_of_many_tokens_are_ranked_as_they_are_made(
    machine: Machine, halves: bool, cap: float | None
) -> None:
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
        first = function.body.append(ty.TopKCandidates(logits, k=5, sizes=(200, 3, 497), softcap=cap))
        merge = ty.MergeTopK(first.result, k=5, counts=(5, 3, 5), softcap=cap)
        results = function.body.append(merge).results
    else:
        results = function.body.append(ty.TopK(logits, k=5, softcap=cap)).results
    function.body.append(Return(values=list(results)))
    function.refresh_type()
    function.set_res_attrs([result(n) for n in NAMES])
    module = Module.empty("die0")
    module.attributes = DictAttr({"tyir.die": IntegerAttr(0, i64), "tyir.stage": StringAttr("program")})
    module.body.append(function)
    lowered = lower_die(module, 40, machine)
    verify(lowered)
    got = run_step([FunctionalDie(EdgeProgram(lowered), {"w": w}, machine)], {"x": x}, 0)
    expected = x.astype(np.float32) @ w.astype(np.float32).T
    values, ids = ty.select_best(expected, np.broadcast_to(np.arange(700), expected.shape), 5)
    if cap is not None:
        values, expected = (
            np.asarray(np.tanh(a / np.float32(cap)) * np.float32(cap)) for a in (values, expected)
        )
    np.testing.assert_array_equal(got["values"], values)
    np.testing.assert_array_equal(got["ids"], ids)
    np.testing.assert_allclose(got["logsumexp"], logsumexp(expected), rtol=0, atol=1e-5)
    stores = [op for op in lowered.walk_type(edge10.Store) if op.shape[1] * op.shape[2] > 40 * 5 * 4]
    assert machine is SMALL or not stores
