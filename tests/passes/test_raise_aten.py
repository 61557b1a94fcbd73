"""raise-aten rule by rule: each pattern becomes its ty op, keeps its numbers and its location; near misses
stay and are reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.interpreter import run_function
from tyir.location import module_path
from tyir.parser import parse_module
from tyir.passes.raise_aten import RaiseAten, raise_aten
from tyir.pipeline import run_pipeline
from tyir.printer import print_op

Array = npt.NDArray[Any]

RMS_NORM = """
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<1x?x4xf16>, tensor<4xf16>) -> tensor<1x?x4xf16>, sym_name = "main"}> ({
  ^bb0(%x: tensor<1x?x4xf16>, %w: tensor<4xf16>):
    %1 = "aten.to"(%x) <{element = f32}> : (tensor<1x?x4xf16>) -> tensor<1x?x4xf32>
    %2 = "aten.pow"(%1) <{exponent = 2.0 : f64}> : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %3 = "aten.mean"(%2) <{dim = array<i64: -1>, keepdim = true}> : (tensor<1x?x4xf32>) -> tensor<1x?x1xf32>
    %4 = "aten.add"(%3) <{scalar = 0.5 : f64}> : (tensor<1x?x1xf32>) -> tensor<1x?x1xf32>
    %5 = "aten.rsqrt"(%4) : (tensor<1x?x1xf32>) -> tensor<1x?x1xf32>
    %6 = "aten.mul"(%1, %5) : (tensor<1x?x4xf32>, tensor<1x?x1xf32>) -> tensor<1x?x4xf32>
    %7 = "aten.to"(%6) <{element = f16}> : (tensor<1x?x4xf32>) -> tensor<1x?x4xf16> loc("norm"("m.py":3:1))
    %8 = "aten.mul"(%w, %7) : (tensor<4xf16>, tensor<1x?x4xf16>) -> tensor<1x?x4xf16> loc("norm"("m.py":4:1))
    "func.return"(%8) : (tensor<1x?x4xf16>) -> ()
  }) : () -> ()
}) {tyir.stage = "aten"} : () -> ()
"""  # noqa: E501

ROPE = """
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<1x?x2x4xf32>, tensor<1x?xi64>) -> tensor<1x?x2x4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<1x?x2x4xf32>, %p: tensor<1x?xi64>):
    %f = "ty.constant"() <{value = dense<[1.0, 0.25]> : tensor<2xf32>}> : () -> tensor<2xf32>
    %1 = "aten.unsqueeze"(%p) <{dim = 2 : i64}> : (tensor<1x?xi64>) -> tensor<1x?x1xi64>
    %2 = "aten.to"(%1) <{element = f32}> : (tensor<1x?x1xi64>) -> tensor<1x?x1xf32>
    %3 = "aten.mul"(%2, %f) : (tensor<1x?x1xf32>, tensor<2xf32>) -> tensor<1x?x2xf32>
    %4 = "aten.cat"(%3, %3) <{dim = -1 : i64}> : (tensor<1x?x2xf32>, tensor<1x?x2xf32>) -> tensor<1x?x4xf32>
    %5 = "aten.cos"(%4) : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %6 = "aten.mul"(%5) <{scalar = 1.5 : f64}> : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %7 = "aten.sin"(%4) : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %8 = "aten.mul"(%7) <{scalar = 1.5 : f64}> : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>
    %9 = "aten.transpose"(%x) <{dim0 = 1 : i64, dim1 = 2 : i64}> : (tensor<1x?x2x4xf32>) -> tensor<1x2x?x4xf32>
    %10 = "aten.unsqueeze"(%6) <{dim = 1 : i64}> : (tensor<1x?x4xf32>) -> tensor<1x1x?x4xf32>
    %11 = "aten.unsqueeze"(%8) <{dim = 1 : i64}> : (tensor<1x?x4xf32>) -> tensor<1x1x?x4xf32>
    %12 = "aten.mul"(%9, %10) : (tensor<1x2x?x4xf32>, tensor<1x1x?x4xf32>) -> tensor<1x2x?x4xf32>
    %13 = "aten.slice"(%9) <{dim = 3 : i64, end = 2 : i64, start = 0 : i64}> : (tensor<1x2x?x4xf32>) -> tensor<1x2x?x2xf32>
    %14 = "aten.slice"(%9) <{dim = 3 : i64, end = 9223372036854775807 : i64, start = 2 : i64}> : (tensor<1x2x?x4xf32>) -> tensor<1x2x?x2xf32>
    %15 = "aten.neg"(%14) : (tensor<1x2x?x2xf32>) -> tensor<1x2x?x2xf32>
    %16 = "aten.cat"(%15, %13) <{dim = -1 : i64}> : (tensor<1x2x?x2xf32>, tensor<1x2x?x2xf32>) -> tensor<1x2x?x4xf32>
    %17 = "aten.mul"(%16, %11) : (tensor<1x2x?x4xf32>, tensor<1x1x?x4xf32>) -> tensor<1x2x?x4xf32>
    %18 = "aten.add"(%12, %17) : (tensor<1x2x?x4xf32>, tensor<1x2x?x4xf32>) -> tensor<1x2x?x4xf32>
    %19 = "aten.transpose"(%18) <{dim0 = 1 : i64, dim1 = 2 : i64}> : (tensor<1x2x?x4xf32>) -> tensor<1x?x2x4xf32>
    "func.return"(%19) : (tensor<1x?x2x4xf32>) -> ()
  }) : () -> ()
}) {tyir.stage = "aten"} : () -> ()
"""  # noqa: E501

GATE = """
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<1x?x6xf32>) -> tensor<1x?x3xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<1x?x6xf32>):
    %1 = "aten.slice"(%x) <{dim = -1 : i64, end = 3 : i64, start = 0 : i64}> : (tensor<1x?x6xf32>) -> tensor<1x?x3xf32>
    %2 = "aten.slice"(%x) <{dim = -1 : i64, end = 9 : i64, start = -3 : i64}> : (tensor<1x?x6xf32>) -> tensor<1x?x3xf32>
    %3 = "aten.silu"(%1) : (tensor<1x?x3xf32>) -> tensor<1x?x3xf32>
    %4 = "aten.mul"(%2, %3) : (tensor<1x?x3xf32>, tensor<1x?x3xf32>) -> tensor<1x?x3xf32>
    %5 = "aten.reshape"(%4) <{shape = array<i64: -1, 3>}> : (tensor<1x?x3xf32>) -> tensor<?x3xf32>
    %6 = "aten.view"(%5) <{shape = array<i64: 1, -1, 3>}> : (tensor<?x3xf32>) -> tensor<1x?x3xf32>
    "func.return"(%6) : (tensor<1x?x3xf32>) -> ()
  }) : () -> ()
}) {tyir.stage = "aten"} : () -> ()
"""  # noqa: E501


def raised(text: str, *args: Array) -> tuple[Module, list[str]]:
    """The raised module and its ops' names, after checking that the result on `args` is the same up to
    rounding.
    """
    module = parse_module(text)
    (before,) = run_function(module, "main", args)
    run_pipeline(module, "raise-aten")
    (after,) = run_function(module, "main", args)
    np.testing.assert_allclose(
        after.astype(np.float32),
        before.astype(np.float32),
        rtol=2e-3 if before.dtype == np.float16 else 1e-6,
        atol=1e-6,
    )
    main = module.lookup("main")
    assert main is not None
    return module, [op.name for op in main.body]


def random(*shape: int, dtype: str = "f4") -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_rms_norm() -> None:
    module, names = raised(RMS_NORM, random(1, 3, 4, dtype="f2"), random(4, dtype="f2"))
    assert names == ["ty.rms_norm", "func.return"]
    (norm,) = module.walk_type(ty.RmsNorm)
    assert norm.eps == 0.5 and module_path(norm.loc) == "norm" and '"m.py":4:1' in str(norm.loc)
    assert 'tyir.stage = "ty"' in print_op(module)


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        ("dim = array<i64: -1>", "dim = array<i64: 1>", ["mean", "pow", "rsqrt"]),  # over the tokens
        ("exponent = 2.0", "exponent = 3.0", ["mean", "pow", "rsqrt"]),  # not a square
        ("%1, %5", "%w32, %5", ["mean", "pow", "rsqrt"]),  # not the squared value is scaled
        (
            '    %8 = "aten.mul"(%w, %7) : (tensor<4xf16>,',
            '    %8 = "aten.mul"(%x, %7) : (tensor<1x?x4xf16>,',
            ["mean", "pow", "rsqrt"],
        ),
    ],
)
def test_what_is_no_rms_norm_is_reported(old: str, new: str, left: list[str]) -> None:
    text = RMS_NORM.replace(old, new)
    assert text != RMS_NORM
    if "%w32" in new:  # another operand of the same type
        text = text.replace(
            "    %2 =", '    %w32 = "aten.neg"(%1) : (tensor<1x?x4xf32>) -> tensor<1x?x4xf32>\n    %2 ='
        )
    with pytest.raises(TyirError) as caught:
        raise_aten(parse_module(text))
    for name in left:
        assert f"aten.{name}: once" in str(caught.value)


def test_rope_between_cancelled_transposes() -> None:
    module, names = raised(ROPE, random(1, 5, 2, 4), np.arange(5)[None])
    assert names == ["ty.rope_angles", "ty.rope", "func.return"]
    (angles,) = module.walk_type(ty.RopeAngles)
    assert angles.scale == 1.5 and angles.inv_freq.to_numpy().tolist() == [1.0, 0.25]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"aten.cat"(%15, %13)', '"aten.cat"(%13, %15)'),  # the other rotation
        ('"aten.mul"(%9, %10)', '"aten.mul"(%9, %11)'),  # sin in place of cos
        (
            '"aten.slice"(%9) <{dim = 3 : i64, end = 2 : i64, start = 0',
            '"aten.slice"(%9) <{dim = 3 : i64, end = 3 : i64, start = 1',
        ),
    ],
)
def test_what_is_no_rope_is_reported(old: str, new: str) -> None:
    assert old in ROPE
    with pytest.raises(TyirError, match=r"aten\.cat: "):
        raise_aten(parse_module(ROPE.replace(old, new)))


def test_gate_slices_and_shapes() -> None:
    _, names = raised(GATE, random(1, 5, 6))
    assert names == ["ty.slice", "ty.slice", "ty.silu_mul", "func.return"]


def test_report_names_place_and_help() -> None:
    text = GATE.replace(
        '"aten.silu"(%1) : (tensor<1x?x3xf32>) -> tensor<1x?x3xf32>',
        '"aten.cos"(%1) : (tensor<1x?x3xf32>) -> tensor<1x?x3xf32> loc("model.layers.7.mlp.act"("m.py":9:1))',
    )
    with pytest.raises(TyirError) as caught:
        raise_aten(parse_module(text))
    assert "1 kind of operation (1 op)" in str(
        caught.value
    ) and "aten.cos: once, first in layer 7, model.layers.7.mlp.act (m.py:9)" in str(caught.value)
    assert "passes/_raise_rules.py" in caught.value.diagnostics[0].help


def test_pass_name_and_unused_weights() -> None:
    assert RaiseAten.name() == "raise-aten"
    unused = (
        '"ty.global"() <{file = "f", key = "k", nbytes = 8 : i64, offset = 0 : i64, sym_name = "w", type ='
        ' tensor<4xf16>}> : () -> ()\n  "func.func"'
    )
    module, _ = raised(
        RMS_NORM.replace('"func.func"', unused, 1), random(1, 3, 4, dtype="f2"), random(4, dtype="f2")
    )
    assert module.lookup("w") is None
