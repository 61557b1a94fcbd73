"""`tyir-reduce`: small files that still fail; cuts that compute what the whole did."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Attention, Linear
from tyir.interpreter import run_function
from tyir.ir import Value
from tyir.parser import parse_file, parse_module
from tyir.printer import print_op
from tyir.tools.bench.ir import decoder_text
from tyir.tools.reduce.reduce_ir import reduce_module
from tyir.tools.tyir_reduce import main
from tyir.verifier import verify

FUNCTION = """
func.func @main(%x: tensor<1x?x4xf32>, %unused: tensor<2xf32>) -> tensor<1x?x4xf32> {
  %w = ty.constant {value = dense<[[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]> : tensor<4x4xf32>} : tensor<4x4xf32>
  %a = ty.silu %x : tensor<1x?x4xf32>
  %b = ty.linear %a, %w : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32>
  %c = ty.add %b, %a : tensor<1x?x4xf32>
  %d = ty.mul %c, %x : tensor<1x?x4xf32>
  return %d : tensor<1x?x4xf32>
}
"""  # noqa: E501


def test_a_model_is_reduced_to_the_op_that_matters() -> None:
    module = parse_module(decoder_text(300))
    result = reduce_module(module, lambda m: any(True for _ in m.walk_type(Attention)))
    verify(result.module)
    assert [op.name for op in result.module.walk()] == [
        "builtin.module",
        "func.func",
        "ty.attention",
        "func.return",
    ]
    assert result.tried < 150
    assert sum(1 for _ in module.walk()) > 250, "the input was changed"


def test_two_ops_that_belong_together() -> None:
    def interesting(module: Module) -> bool:
        """A linear whose input was made by an activation that reads a linear."""
        return any(isinstance(v.op, Linear) for op in module.walk_type(Linear) for v in _inputs_of_maker(op))

    result = reduce_module(parse_module(decoder_text(120)), interesting)
    assert interesting(result.module)
    assert sum(1 for _ in result.module.walk()) <= 8, print_op(result.module)


def _inputs_of_maker(op: Linear) -> tuple[Value, ...]:
    return op.x.op.operands if op.x.op is not None else ()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, script = tmp_path / "in.ir", tmp_path / "out.ir", tmp_path / "fails.py"
    path.write_text(FUNCTION)
    script.write_text(
        'import sys\ntext = open(sys.argv[1]).read()\nif "ty.mul" in text:\n    sys.exit("bad'
        ' multiplication")\n'
    )
    command = f"{sys.executable} {script} {{}}"
    assert main([str(path), "--command", command, "--match", "bad mul", "-o", str(out)]) == 0
    assert "ops -> 4 ops, the command ran" in capsys.readouterr().err
    assert [op.name for op in parse_file(out).walk()][-2:] == ["ty.mul", "func.return"]
    assert main([str(path), "--command", command, "--match", "other"]) == 1
    assert "does not match 'other'" in capsys.readouterr().err
    path.write_text(FUNCTION.replace("ty.mul", "ty.add"))
    assert main([str(path), "--command", command]) == 1
    assert "the command succeeds on the file as it is" in capsys.readouterr().err


def test_cut_computes_what_the_whole_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, given = tmp_path / "in.ir", tmp_path / "out.ir", tmp_path / "x.npy"
    path.write_text(FUNCTION)
    np.save(given, np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4))
    assert (
        main(
            [
                str(path),
                "--cut=%b..%c",
                f"--arg=x={given}",
                "--arrays",
                str(tmp_path / "arrays"),
                "-o",
                str(out),
            ]
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "arrays").iterdir()) == ["in0_a.npy", "out0.npy"]
    module = parse_file(out)
    verify(module)
    function = module.lookup("cut")
    assert isinstance(function, Func)
    assert [op.name for op in function.body] == ["ty.constant", "ty.linear", "ty.add", "func.return"]
    x = np.load(tmp_path / "arrays/in0_a.npy")
    assert x.shape == (1, 3, 4)
    (result,) = run_function(module, "cut", [x])
    np.testing.assert_array_equal(result, np.load(tmp_path / "arrays/out0.npy"))


def test_cut_with_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.ir", tmp_path / "out.ir"
    path.write_text(FUNCTION.replace("1x?x4", "1x2x4"))
    assert main([str(path), "--cut=%c", "--constants", "--arrays", str(tmp_path), "-o", str(out)]) == 0
    module = parse_file(out)
    verify(module)
    (result,) = run_function(module, "cut", [])
    np.testing.assert_array_equal(result, np.load(tmp_path / "out0.npy"))
    path.write_text(FUNCTION)
    assert main([str(path), "--cut=%c", "--constants"]) == 1
    assert "a constant needs a static shape" in capsys.readouterr().err
    assert main([str(path), "--cut=%e..%f"]) == 1
    assert "@main has no op %e" in capsys.readouterr().err


CALLS = """
func.func private @inner(%x: tensor<2xf32>) -> tensor<2xf32> {
  %y = ty.silu %x : tensor<2xf32>
  return %y : tensor<2xf32>
}
func.func private @outer(%x: tensor<2xf32>) -> tensor<2xf32> {
  %a = call @inner(%x) : tensor<2xf32>
  %b = call @inner(%a) : tensor<2xf32>
  return %b : tensor<2xf32>
}
func.func private @unused() { return }
func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
  %c = call @outer(%x) : tensor<2xf32>
  %d = ty.mul %c, %x : tensor<2xf32>
  return %d : tensor<2xf32>
}
"""


def test_a_cut_takes_along_what_its_callees_call(tmp_path: Path) -> None:
    path, out = tmp_path / "in.ir", tmp_path / "out.ir"
    path.write_text(CALLS)
    assert main([str(path), "--cut=%c", "--arrays", str(tmp_path), "-o", str(out)]) == 0
    module = parse_file(out)
    verify(module)
    assert sorted(str(op.sym_name) for op in module.body) == ["cut", "inner", "outer"]
    (result,) = run_function(module, "cut", [np.load(tmp_path / "in0_x.npy")])
    np.testing.assert_array_equal(result, np.load(tmp_path / "out0.npy"))


def test_a_function_that_calls_itself_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.ir"
    path.write_text(CALLS.replace("ty.silu %x", "call @outer(%x)"))
    assert main([str(path), "--cut=%c"]) == 1
    assert "@outer calls itself, which never ends" in capsys.readouterr().err
