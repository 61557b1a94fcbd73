"""Which ops are lowered together: every kind of fusion is found where it should be, and computes what its ops
alone would.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.llm import Shape, build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.fused.gated import Gated, gated_function
from tyir.backends.edge10.lowering.fused.gathered import Gathered
from tyir.backends.edge10.lowering.fused.halved import Halved
from tyir.backends.edge10.lowering.fused.mlp import Mlp
from tyir.backends.edge10.lowering.fused.ranked import Ranked
from tyir.backends.edge10.lowering.fused.roped import Roped
from tyir.backends.edge10.lowering.fused.summed import Summed
from tyir.backends.edge10.lowering.fusions import FUSIONS
from tyir.backends.edge10.lowering.groups import Groups, find_groups
from tyir.backends.edge10.memory.allocate import sram_plan
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.interpreter import Interpreter, run_lockstep
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine

MACHINE = load_machine("edge10")
WIDE = Shape(hidden=256, heads=4, kv_heads=2, head_dim=64, width=8192, vocabulary=320)


def function(name: str, dies: int = 2, output: str = "") -> Func:
    """A function of the first die of a model with a wide MLP."""
    module, _ = build(WIDE, draw=False)
    tokens = name.partition("_s")[2]
    run_pipeline(
        module,
        f"kv-materialize{{max-kv=256}},{output}partition-dies{{dies={dies}}},"
        f"specialize-seqlen{{seqlens={tokens}}},to-program",
    )
    found = dies_of(module)[0].lookup(name)
    assert isinstance(found, Func)
    return found


def groups(function: Func) -> Groups:
    plan = sram_plan(MACHINE)
    return find_groups(function, plan.arena, MACHINE, plan, ())


def kinds(function: Func) -> dict[str, list[str]]:
    """For every kind that is found, the ops of each such fusion: the anchor first."""
    found: dict[str, list[str]] = {}
    for fusion in groups(function).fusions.values():
        ops = [op.name.partition(".")[2] for op in (fusion.anchor, *fusion.others)]
        found.setdefault(type(fusion).__name__, []).append(" ".join(ops))
    return found


def test_one_token_has_no_fusions_but_norms() -> None:
    assert kinds(function("layer_s1")) == {"Halved": ["rms_norm", "rms_norm"]}


def test_the_sums_of_many_tokens_take_products_and_mlps() -> None:
    assert kinds(function("layer_s64")) == {
        "Summed": ["add linear all_reduce", "add linear linear silu_mul linear all_reduce"],
        "Halved": ["rms_norm", "rms_norm"],
    }
    assert kinds(function("layer_s64", dies=1))["Summed"] == [
        "add linear",
        "add linear linear silu_mul linear",
    ]


def test_a_gated_activation_of_too_many_parts_is_fused_without_the_last_product() -> None:
    """With 4 KiB for activations the MLP would need too many parts, and with x in none at all."""
    layer, plan = function("layer_s64", dies=1), sram_plan(MACHINE)
    found = find_groups(layer, 96 << 10, MACHINE, plan, ()).fusions.values()
    assert [type(f) for f in found if not isinstance(f, (Halved, Summed))] == [Gated]
    assert sum(len(f.others) for f in found if isinstance(f, Summed)) == 2, "products alone"


def test_logits_are_gathered_or_ranked_by_blocks() -> None:
    head = kinds(function("main_s64"))
    assert head["Gathered"] == ["all_gather linear"] and "Ranked" not in head
    assert kinds(function("main_s64", 1, "select-output{kind=topk k=4},"))["Ranked"] == ["top_k linear"]


def test_the_first_product_after_a_norm_is_the_one_that_is_lowered_first() -> None:
    """Keys come before queries (in a layer's order), the gate before the up projection (in an MLP's)."""
    layer = function("layer_s64")
    found = groups(layer)
    norms = {norm: product for product, norm in found.halved.items()}
    mlp = next(f for f in found.fusions.values() if isinstance(f, Summed) and isinstance(f.source, Mlp))
    assert isinstance(mlp.source, Mlp)
    assert list(norms.values())[1] is mlp.source.gated.gate
    first = next(op for op in layer.body if isinstance(op, ty.Linear))
    assert next(iter(norms.values())) is first


def test_all_kinds_are_listed() -> None:
    assert (Mlp, Gated, Summed, Gathered, Ranked, Roped, Halved) == FUSIONS
    assert gated_function(None) is None


MLP = """"builtin.module"() <{sym_name = "die0"}> ({
  "func.func"() <{function_type = (tensor<5x32x256xf16>) -> tensor<5x32x256xf16>, sym_name = "main_s32"}> ({
  ^bb0(%x: tensor<5x32x256xf16>):
    %wg = "ty.get_global"() <{symbol = @wg}> : () -> tensor<INNERx256xf16>
    %wu = "ty.get_global"() <{symbol = @wu}> : () -> tensor<INNERx256xf16>
    %wd = "ty.get_global"() <{symbol = @wd}> : () -> tensor<256xINNERxf16>
    %h = "ty.add"(%x, %x) : (tensor<5x32x256xf16>, tensor<5x32x256xf16>) -> tensor<5x32x256xf16>
    %g = "ty.linear"(%h, %wg) : (tensor<5x32x256xf16>, tensor<INNERx256xf16>) -> tensor<5x32xINNERxf16>
    %u = "ty.linear"(%h, %wu) : (tensor<5x32x256xf16>, tensor<INNERx256xf16>) -> tensor<5x32xINNERxf16>
    %y = "ty.silu_mul"(%g, %u) : (tensor<5x32xINNERxf16>, tensor<5x32xINNERxf16>) -> tensor<5x32xINNERxf16>
    %d = "ty.linear"(%y, %wd) : (tensor<5x32xINNERxf16>, tensor<256xINNERxf16>) -> tensor<5x32x256xf16>
    %s = "ty.add"(%h, %d) : (tensor<5x32x256xf16>, tensor<5x32x256xf16>) -> tensor<5x32x256xf16>
    "func.return"(%s) : (tensor<5x32x256xf16>) -> ()
  }) {tyir.entry = 32 : i64} : () -> ()
}) {tyir.stage = "program"} : () -> ()
"""


@pytest.mark.parametrize("inner", [1024, 2048, 4096])
def test_an_mlp_of_more_rows_than_are_summed_by_blocks_has_its_own_scratch(inner: int) -> None:
    """Five sequences of 32 tokens: more rows than collectives take in blocks; the residual sum joins them."""
    machine = MACHINE.with_overrides({"sram.capacity_bytes": 3 << 19})
    module = parse_module(MLP.replace("INNER", str(inner)))
    main, plan = module.lookup("main_s32"), sram_plan(machine)
    assert isinstance(main, Func) and isinstance(module, Module)
    found = find_groups(main, plan.arena, machine, plan, ())
    (summed,) = set(found.fusions.values())
    assert isinstance(summed, Summed) and isinstance(summed.source, Mlp)
    assert found.scratch[summed.anchor] == summed.source.scratch
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 32, 256)).astype(np.float16)
    weights = {
        name: (rng.standard_normal(shape) * 0.03).astype(np.float16)
        for name, shape in (("wg", (inner, 256)), ("wu", (inner, 256)), ("wd", (256, inner)))
    }
    ((wanted,),) = run_lockstep([Interpreter(module, constants=weights).run("main_s32", [x])])
    program = EdgeProgram(lower_die(module, 32, machine))
    got = run_step([FunctionalDie(program, weights, machine)], {"x": x}, 0)["logits"]
    np.testing.assert_allclose(got, wanted, atol=4e-3 * np.abs(wanted).max(), rtol=0)
