"""specialize-seqlen, outline-params and outline-layers keep the numbers and make layers one function."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.llm import Shape, Step, build, dies_of, run_ty
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, Param, Slice
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.printer import print_op

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
TO_PROGRAM = (
    "kv-materialize{max-kv=16},partition-dies{dies=3"
    " strategy=split},specialize-seqlen{seqlens=1,4},outline-params,outline-layers"
)


@pytest.mark.parametrize("quantize", ["", "quantize-weights{group-size=32},"])
def test_chunks_over_buckets_equal_one_shot(quantize: str) -> None:
    """11 tokens as 4 + 4 + 3 (padded) over the compiled lengths; then the printed program, read again, gives
    the same bits.
    """
    module, weights = build(Shape(hidden=64, heads=6, kv_heads=2))
    wanted = run_ty(module, weights, IDS)
    run_pipeline(module, quantize + TO_PROGRAM)
    step = Step(module, weights)
    got = np.concatenate(
        [
            step.feed(IDS[:4], "main_s4"),
            step.feed(IDS[4:8], "main_s4"),
            step.feed(IDS[8:], "main_s4", padded=4),
        ]
    )
    if not quantize:
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted.astype(np.float32)).max())
    again = Step(parse_module(print_op(module)), weights)
    np.testing.assert_array_equal(again.feed(IDS[:4], "main_s4"), got[:4])


@pytest.mark.parametrize("quantize", ["", "quantize-weights{group-size=32},"])
def test_parameters_are_the_same_before_lengths_and_behind_them(quantize: str) -> None:
    """The order of `tyir-compile`, which meets each weight expression once, and that of `to-program`."""
    before = re.sub("(specialize-seqlen{.*?}),(outline-params),", r"\2,\1,", TO_PROGRAM)
    assert before.index("outline-params") < before.index("specialize-seqlen")
    made = []
    for pipeline in (TO_PROGRAM, before):
        module, _ = build(Shape(hidden=64, heads=6, kv_heads=2, layers=3, tied=True))
        run_pipeline(module, quantize + pipeline)
        made.append(print_op(module))
    assert made[0] == made[1]


def test_layers_become_one_function_called_per_layer() -> None:
    module, _ = build(Shape(layers=5))
    run_pipeline(module, TO_PROGRAM)
    for die in dies_of(module):
        functions = [f.sym_name for f in die.body if isinstance(f, Func)]
        assert sorted(map(str, functions)) == ["layer_s1", "layer_s4", "main_s1", "main_s4"]
        main = die.lookup("main_s4")
        assert isinstance(main, Func)
        assert [c.attributes["tyir.layer"].value for c in main.walk_type(Call)] == [0, 1, 2, 3, 4]


def test_weights_are_shared_by_all_lengths_and_expressions_leave_the_functions() -> None:
    module, _ = build(Shape(layers=2, tied=True))
    run_pipeline(module, TO_PROGRAM)
    die = dies_of(module)[0]
    params = [p for p in die.body if isinstance(p, Param)]
    names = [str(p.sym_name) for p in params]
    assert (
        len(names) == len(set(names)) == 2 * 12 + 2 + 2
    )  # 12 a layer, embedding = head, final norm, two rotary tables
    for function in (f for f in die.body if isinstance(f, Func)):
        assert not list(function.walk_type(Slice))
        assert {g.symbol.leaf for g in function.walk_type(GetGlobal)} <= set(names)


def test_caches_stay_aliased_through_the_outlined_layer() -> None:
    module, _ = build(Shape(layers=2))
    run_pipeline(module, TO_PROGRAM)  # the verifier, which runs after each pass, checks the aliasing
    layer = dies_of(module)[0].lookup("layer_s4")
    assert isinstance(layer, Func)
    assert sum("tyir.alias" in layer.res_attr(i) for i in range(len(layer.function_type.results))) == 2


@pytest.mark.parametrize(
    ("seqlens", "message", "help"),
    [
        ("8,1", "must ascend", "seqlens=1,8"),
        ("0,4", "0 is below 1", "seqlens=1,4"),
        ("1,64", "64 is larger than the cache of 16", "seqlens=1,16"),
    ],
)
def test_bad_lengths_name_the_nearest_good_list(seqlens: str, message: str, help: str) -> None:
    module, _ = build(Shape())
    with pytest.raises(TyirError, match=f"{message}(.|\n)*{help}"):
        run_pipeline(
            module,
            "kv-materialize{max-kv=16},partition-dies{dies=2"
            f" strategy=split}},specialize-seqlen{{seqlens={seqlens}}}",
        )


def test_group_sizes_that_do_not_divide_are_all_reported() -> None:
    module, _ = build(Shape(width=96))
    with pytest.raises(TyirError) as caught:
        run_pipeline(module, "quantize-weights{group-size=64}")
    assert sum(d.severity == "error" for d in caught.value.diagnostics) == 1
    assert "does not divide the 96 input channels of model.layers.0.mlp.down_proj and 1 more linear\n" in str(
        caught.value
    )
    assert "group-size=32 divides" in str(caught.value)
