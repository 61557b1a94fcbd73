"""Loading and calling compiled libraries: zero copies, several at once, errors that name the file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.diagnostics import TyirError
from tyir.dialects import func, kv, ty
from tyir.dialects.builtin import Module
from tyir.interpreter import Interpreter, run_lockstep
from tyir.runtime_sim.session.host_runtime import HostLibrary, use_threads
from tyir.types import TensorType, f16, f32, i32


def projection(rows: int) -> tuple[Module, func.Func]:
    """x [1, 2, 64] times a weight [rows, 64] read from the module's constants, as [2, rows]."""
    module = Module.empty()
    function = func.Func.make("main_s2", (TensorType((1, 2, 64), f16),))
    module.body.append(function)
    weight = ty.GetGlobal(symbol="w", result_types=(TensorType((rows, 64), f16),))
    product = ty.Linear(function.args[0], weight.out, element=f32)
    view = ty.Reshape(product.out, shape=(2, rows))
    for op in (weight, product, view, func.Return((view.out,))):
        function.body.append(op)
    function.refresh_type()
    return module, function


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[Module, Path]]]:
    """Two dies with weights of different heights."""
    directory = tmp_path_factory.mktemp("dies")
    built = {}
    for rows in (24, 17):
        module, function = projection(rows)
        path = directory / f"llm_die{rows}.so"
        build_library(assign_kernels([function]), HostTarget(), path)
        built[rows] = (module, path)
    yield built


def run(module: Module, library: HostLibrary, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    (out,) = run_lockstep(
        [Interpreter(module, constants={"w": w}, evaluator=library.evaluator()).run("main_s2", [x])]
    )[0]
    return out


def test_two_libraries_run_side_by_side(libraries: dict[int, tuple[Module, Path]]) -> None:
    loaded = {rows: HostLibrary(path) for rows, (_, path) in libraries.items()}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 64)).astype(np.float16)
    for rows, library in loaded.items():
        w = rng.standard_normal((rows, 64)).astype(np.float16)
        out = run(libraries[rows][0], library, x, w)
        np.testing.assert_allclose(
            out, x[0].astype(np.float32) @ w.astype(np.float32).T, rtol=1e-5, atol=1e-5
        )


def test_weights_may_be_read_only_and_unaligned(
    libraries: dict[int, tuple[Module, Path]], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    x, w = (
        rng.standard_normal((1, 2, 64)).astype(np.float16),
        rng.standard_normal((24, 64)).astype(np.float16),
    )
    (tmp_path / "weights").write_bytes(b"12" + w.tobytes())
    mapped = np.memmap(tmp_path / "weights", np.float16, "r", offset=2, shape=(24, 64))
    module, path = libraries[24]
    np.testing.assert_array_equal(
        run(module, HostLibrary(path), x, mapped), run(module, HostLibrary(path), x, w)
    )


def test_threads_do_not_change_results(libraries: dict[int, tuple[Module, Path]]) -> None:
    rng = np.random.default_rng(2)
    x, w = (
        rng.standard_normal((1, 2, 64)).astype(np.float16),
        rng.standard_normal((24, 64)).astype(np.float16),
    )
    module, path = libraries[24]
    library = HostLibrary(path)
    results = []
    for count in (1, 2):
        use_threads(count)
        results.append(run(module, library, x, w))
    np.testing.assert_array_equal(*results)


def test_append_writes_the_given_cache(tmp_path: Path) -> None:
    types = (TensorType((1, 2, 8, 16), f16), TensorType((1, 3, 2, 16), f16), TensorType((1,), i32))
    function = func.Func.make("main", types)
    op = kv.Append(*function.args)
    function.body.append(op)
    build_library(assign_kernels([function]), HostTarget(), tmp_path / "kv.so")
    library = HostLibrary(tmp_path / "kv.so")
    cache, rows, pos = (
        np.zeros((1, 2, 8, 16), np.float16),
        np.ones((1, 3, 2, 16), np.float16),
        np.array([6], np.int32),
    )
    assert library.evaluate(op, [cache, rows, pos]) is cache
    assert cache.sum() == 2 * 2 * 16, "two of three rows fit"
    with pytest.raises(TyirError, match="must be contiguous"):
        library.evaluate(op, [np.zeros((1, 2, 8, 32), np.float16)[..., ::2], rows, pos])


def test_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match=r"there is no library .*llm_die0\.so"):
        HostLibrary(tmp_path / "llm_die0.so")


def test_damaged_library_is_named(libraries: dict[int, tuple[Module, Path]], tmp_path: Path) -> None:
    broken = tmp_path / "llm_die0.so"
    broken.write_bytes(libraries[24][1].read_bytes()[:1000])
    with pytest.raises(TyirError, match=r"llm_die0\.so is not a compiled library"):
        HostLibrary(broken)


def test_missing_kernel_is_named(libraries: dict[int, tuple[Module, Path]]) -> None:
    other = projection(8)[1]
    assign_kernels([other])
    op = other.body.ops[1]
    with pytest.raises(TyirError, match="has no kernel 'linear_1x2x64_8x64"):
        HostLibrary(libraries[24][1]).evaluate(
            op, [np.zeros((1, 2, 64), np.float16), np.zeros((8, 64), np.float16)]
        )


def test_op_without_kernel_is_refused(libraries: dict[int, tuple[Module, Path]]) -> None:
    op = projection(8)[1].body.ops[1]
    with pytest.raises(TyirError, match=r"'ty.linear' has no kernel"):
        HostLibrary(libraries[24][1]).evaluate(op, [])


def test_wrong_shape_is_an_error(libraries: dict[int, tuple[Module, Path]]) -> None:
    module, path = libraries[24]
    with pytest.raises(
        TyirError, match=r"linear_1x2x64_24x64.*float16\[1, 2, 63\] where float16\[1, 2, 64\]"
    ):
        run(module, HostLibrary(path), np.zeros((1, 2, 63), np.float16), np.zeros((24, 64), np.float16))


def test_running_does_not_load_the_compiler(libraries: dict[int, tuple[Module, Path]]) -> None:
    code = (
        "import sys; from pathlib import Path; from tyir.runtime_sim.session.host_runtime import"
        " HostLibrary\nassert 'tvm_ffi' not in sys.modules\nHostLibrary(Path(sys.argv[1]))\nassert 'tvm' not"
        " in sys.modules and 'torch' not in sys.modules\nassert 'libtvm_compiler' not in"
        " Path('/proc/self/maps').read_text()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(libraries[24][1])], check=True)
