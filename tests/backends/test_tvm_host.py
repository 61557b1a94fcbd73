"""Names, sharing, determinism and errors of the host code generator."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tvm

from tyir.backends.host import tvm_host
from tyir.backends.host.tvm_host import GENERIC_CPU, HostTarget, assign_kernels, build_library, kernel_name
from tyir.diagnostics import TyirError
from tyir.dialects import func, ty
from tyir.runtime_sim.session.host_runtime import HostLibrary
from tyir.types import TensorType, f16, f64, ui4


def two_layers(s: int = 4) -> func.Func:
    """The same norm and product twice, and one product of another shape."""
    t = TensorType((1, s, 64), f16)
    function = func.Func.make(
        f"main_s{s}", (t, TensorType((64,), f16), TensorType((64, 64), f16), TensorType((32, 64), f16))
    )
    x, norm, square, narrow = function.args
    for _ in range(2):
        n = ty.RmsNorm(x, norm, eps=1e-6)
        p = ty.Linear(n.out, square)
        x = p.out
        function.body.append(n)
        function.body.append(p)
    last = ty.Linear(x, narrow)
    view = ty.Reshape(last.out, shape=(s, 32))
    for op in (last, view, func.Return((view.out,))):
        function.body.append(op)
    return function


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_ops_share_a_kernel() -> None:
    function = two_layers()
    kernels = assign_kernels([function])
    ops = function.body.ops
    assert sorted(k.rpartition("_f16")[0] for k in kernels) == [
        "linear_1x4x64_32x64",
        "linear_1x4x64_64x64",
        "rms_norm_1x4x64_64",
    ]
    assert ops[0].attributes["tyir.kernel"] is ops[2].attributes["tyir.kernel"]
    assert ops[1].attributes["tyir.kernel"] is not ops[4].attributes["tyir.kernel"]
    assert "tyir.kernel" not in ops[5].attributes, "a reshape is a view"


def test_properties_are_part_of_the_name() -> None:
    x, w = func.Func.make("f", (TensorType((1, 2, 8), f16), TensorType((8,), f16))).args
    near, far = ty.RmsNorm(x, w, eps=1e-6), ty.RmsNorm(x, w, eps=1e-5)
    assert kernel_name(near) != kernel_name(far)
    assert kernel_name(near) == kernel_name(ty.RmsNorm(x, w, eps=1e-6))


def test_lengths_share_nothing_but_names_stay_apart() -> None:
    assert len(assign_kernels([two_layers(4), two_layers(8), two_layers(4)])) == 6


BUILD = """
import sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("case", sys.argv[1])
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
case.build_library(case.assign_kernels([case.two_layers()]), case.HostTarget(mcpu=case.GENERIC_CPU, num_cores=2), Path(sys.argv[2]))
"""  # noqa: E501


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "llm_die0.so", tmp_path / "elsewhere" / "other.so"
    for path in (first, second):
        path.parent.mkdir()
    kernels = assign_kernels([two_layers()])
    target = HostTarget(mcpu=GENERIC_CPU, num_cores=2)
    build_library(kernels, target, first)
    build_library(dict(reversed(kernels.items())), target, second)
    assert sha256(first) == sha256(second)
    subprocess.run([sys.executable, "-P", "-c", BUILD, __file__, str(second)], check=True, cwd=tmp_path)
    assert sha256(first) == sha256(second)
    assert [p.name for p in sorted(first.parent.iterdir())] == ["llm_die0.so"], (
        "nothing else is left beside the library"
    )


def test_compiles_beside_each_other_have_no_options_to_take_from_each_other() -> None:
    """LLVM's options are the process's; TVM sets those of a target back when its compile ends, also below one
    that runs in another thread.  One kernel of some hundred builds came out with other bytes.
    """
    assert "cl-opt" not in HostTarget(mcpu=GENERIC_CPU).tvm_target().attrs


@pytest.mark.parametrize("name", ["sapphirerapids", "icelake-server", "znver4"])
@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_are_compiled_for_who_may_use_them(
    name: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual machines and filters of system calls hide what LLVM knows a processor to have."""
    monkeypatch.setattr(tvm_host.codegen, "llvm_get_system_cpu", lambda: name)
    monkeypatch.setattr(tvm_host, "may_use_tiles", lambda: allowed)
    target = HostTarget(activations="int8")
    has = name == "sapphirerapids" and allowed
    assert target.mcpu == ("icelake-server" if name == "sapphirerapids" and not allowed else name)
    assert target.cpu().tiles == has and ("amx_tile" in target.features()) == has


@pytest.mark.parametrize(
    "name", ["a,b", "a b", "$(x)", "a'\"b", "-o", "@x", "a\nb", "ä", os.fsdecode(b"\xff")]
)
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    """A linker takes a comma for the end of an option, `@` for a file of them."""
    folder = tmp_path / name
    folder.mkdir()
    build_library(assign_kernels([two_layers()]), HostTarget(), folder / name)
    assert [path.name for path in folder.iterdir()] == [name]
    assert HostLibrary(folder / name).function(next(iter(assign_kernels([two_layers()]))))


def test_a_linker_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linker = tmp_path / "cc"
    linker.write_text("#!/bin/sh\necho 'ld: cannot write: no more luck' >&2\nexit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    with pytest.raises(
        TyirError, match=r"cc could not link the host library: ld: cannot write: no more luck(\n|$)"
    ):
        build_library(assign_kernels([two_layers()]), HostTarget(), tmp_path / "x.so")
    linker.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(TyirError, match=r"could not link the host library: it does not say why(\n|$)"):
        build_library(assign_kernels([two_layers()]), HostTarget(), tmp_path / "x.so")
    assert [path.name for path in tmp_path.iterdir()] == ["cc"], "nothing is left"


def test_generic_code_has_no_wider_vectors(tmp_path: Path) -> None:
    build_library(assign_kernels([two_layers()]), HostTarget(mcpu=GENERIC_CPU), tmp_path / "x.so")
    listing = subprocess.run(
        ["objdump", "-d", str(tmp_path / "x.so")], check=True, capture_output=True, text=True
    ).stdout
    assert "ymm" in listing
    assert "zmm" not in listing


@pytest.mark.parametrize("tokens", [1, 8, 96])
def test_partial_sums_never_leave_the_registers(tokens: int) -> None:
    """Inside a loop over cores, a buffer that is too large for the stack is taken from the heap, and every
    step of the sum is stored.
    """
    function = func.Func.make("main", (TensorType((1, tokens, 512), f16), TensorType((1024, 512), f16)))
    function.body.append(ty.Linear(*function.args))
    ((name, op),) = assign_kernels([function]).items()
    target = HostTarget(num_cores=2)
    module = tvm_host._kernel_functions(name, op, target.cpu())
    compiled = tvm.compile(module, target=target.tvm_target(), tir_pipeline=tvm_host._PIPELINE)
    source = compiled.mod.inspect_source("ll")
    bodies = [text for text in source.split("\ndefine ") if "parallel_lambda" in text.partition("{")[0]]
    assert bodies, "the loop runs on several cores"
    assert not any("AllocWorkspace" in body for body in bodies)


def test_dynamic_shapes_are_refused_together() -> None:
    t = TensorType((1, None, 8), f16)
    function = func.Func.make("main", (t,))
    function.body.append(ty.Silu(function.args[0]))
    function.body.append(ty.Add(function.args[0], function.args[0]))
    with pytest.raises(TyirError, match="run specialize-seqlen first") as error:
        assign_kernels([function])
    assert [d.message for d in error.value.diagnostics] == [
        f"'ty.{name}' in @main has the dynamic type tensor<1x?x8xf16>" for name in ("silu", "add")
    ]


@pytest.mark.parametrize("element", [f64, ui4])
def test_unsupported_elements_are_refused(element: object, tmp_path: Path) -> None:
    t = TensorType((1, 8), element)  # type: ignore[arg-type]
    function = func.Func.make("main", (t,))
    function.body.append(ty.Repeat(function.args[0], axis=0, times=2))
    with pytest.raises(TyirError, match=r"no host kernel of 'ty.repeat' takes"):
        build_library(assign_kernels([function]), HostTarget.generic(), tmp_path / "x.so")
    assert not list(tmp_path.iterdir())


def test_unknown_processor_is_refused() -> None:
    with pytest.raises(TyirError, match="LLVM knows no processor 'z80'"):
        HostTarget(mcpu="z80")


@pytest.mark.parametrize("mcpu", ["i386", "i486", "pentium4", "prescott", "yonah", "lakemont"])
def test_a_processor_of_32_bits_is_refused(mcpu: str) -> None:
    """LLVM would print a line of its own and end the process."""
    with pytest.raises(TyirError, match=f"a {mcpu} processor has 32 bits, x86_64.* needs 64"):
        HostTarget(mcpu=mcpu)


def test_odd_group_is_refused(tmp_path: Path) -> None:
    types = [
        TensorType((1, 9), f16),
        TensorType((4, 9), ui4),
        TensorType((4, 3), f16),
        TensorType((4, 3), ui4),
    ]
    function = func.Func.make("main", types)
    function.body.append(ty.QuantizedLinear(*function.args, group_size=3))
    with pytest.raises(TyirError, match="group_size 3 is odd"):
        build_library(assign_kernels([function]), HostTarget.generic(), tmp_path / "x.so")
