"""A die's step: code that is the same for every program, and tables of this one that it walks."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.backends.host.step import Program, step_code, tables_of
from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.dialects.func import Func
from tyir.parser import parse_module
from tyir.runtime_sim.session.host_runtime import CompiledStep, Exchange, HostLibrary
from tyir.types import TensorType, f32

Array = npt.NDArray[Any]
T = "tensor<4xf32>"


def layers(count: int) -> Program:
    """x + w0, twice by a function within a function; then the same with w1 and so on.  Every second layer
    writes into its cache, an argument, and meets other dies.
    """
    lines = [
        '"builtin.module"() ({',
        f'"func.func"() <{{sym_name = "inner", function_type = ({T}, {T}) -> {T}}}> ({{',
        f"^bb0(%x: {T}, %w: {T}):",
        f'  %y = "ty.add"(%x, %w) : ({T}, {T}) -> {T}',
        f'  "func.return"(%y) : ({T}) -> ()',
        "}) : () -> ()",
        f'"func.func"() <{{sym_name = "layer", function_type = ({T}, {T}) -> {T}}}> ({{',
        f"^bb0(%x: {T}, %w: {T}):",
        f'  %y = "func.call"(%x, %w) <{{callee = @inner}}> : ({T}, {T}) -> {T}',
        f'  %m = "dist.all_reduce"(%y) : ({T}) -> {T}',
        f'  %z = "func.call"(%m, %w) <{{callee = @inner}}> : ({T}, {T}) -> {T}',
        f'  "func.return"(%z) : ({T}) -> ()',
        "}) : () -> ()",
        f'"func.func"() <{{sym_name = "main", function_type = ({T}) -> {T}, '
        'arg_attrs = [{tyir.name = "x"}]}> ({',
        f"^bb0(%x0: {T}):",
    ]
    for i in range(count):
        lines += [
            f'  %w{i} = "ty.get_global"() <{{symbol = @w{i}}}> : () -> {T}',
            f'  %x{i + 1} = "func.call"(%x{i}, %w{i}) <{{callee = @layer}}> : ({T}, {T}) -> {T}',
        ]
    lines += [f'  "func.return"(%x{count}) : ({T}) -> ()', "}) : () -> ()", "}) : () -> ()"]
    module = parse_module("\n".join(lines))
    functions = tuple(op for op in module.body if isinstance(op, Func))
    return Program(functions, tuple((f"w{i}", TensorType((4,), f32)) for i in range(count)))


def built(program: Program, path: Path) -> HostLibrary:
    build_library(assign_kernels(program.functions), HostTarget.generic(), path, program)
    return HostLibrary(path)


def twice(operand: int, result: int) -> None:
    """What a die gives, and as much of another."""
    there = (ctypes.c_float * 4).from_address(operand)
    (ctypes.c_float * 4).from_address(result)[:] = [2 * value for value in there]


def step_of(program: Program, library: HostLibrary, weights: list[Array], sites: list[int]) -> CompiledStep:
    def exchange(context: int, site: int, operand: int, result: int) -> int:
        sites.append(site)
        twice(operand, result)
        return 0

    space = np.full(program.workspace_bytes + 64, 255, np.uint8)
    first = -int(space.__array_interface__["data"][0]) % 64
    workspace = space[first : first + program.workspace_bytes]
    layout = ((4,), np.dtype(np.float32))
    return CompiledStep(library.function("step"), [layout, layout], weights, workspace, Exchange(exchange))


@pytest.mark.parametrize("count", [1, 5])
def test_functions_are_called_with_their_weights_in_frames_of_their_own(count: int, tmp_path: Path) -> None:
    program = layers(count)
    library = built(program, tmp_path / "x.so")
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(4).astype(np.float32) for _ in range(count)]
    x, found = rng.standard_normal(4).astype(np.float32), np.zeros(4, np.float32)
    sites: list[int] = []
    step_of(program, library, weights, sites)([x, found])
    wanted = x
    for w in weights:
        wanted = (wanted + w) * np.float32(2) + w
    np.testing.assert_array_equal(found, wanted)
    assert sites == [0] * count
    assert library.function("step_workspace_bytes")() == program.workspace_bytes
    assert library.function("step_program")() == program.identity


def test_code_does_not_grow_with_depth_and_tables_do_by_rows() -> None:
    few, more, many = layers(3), layers(4), layers(40)
    assert step_code(few) == step_code(many)

    def words(program: Program) -> int:
        assign_kernels(program.functions)
        return sum(line.count(",") + 1 for line in tables_of(program).splitlines() if ".quad" in line)

    assert words(many) - words(few) == 37 * (words(more) - words(few)) > 0


def test_a_kernel_may_take_many_tensors(tmp_path: Path) -> None:
    count = 21
    types, names = ", ".join([T] * count), ", ".join(f"%x{i}" for i in range(count))
    arguments = ", ".join(f"%x{i}: {T}" for i in range(count))
    module = parse_module(f"""
      "func.func"() <{{sym_name = "main", function_type = ({types}) -> tensor<{4 * count}xf32>}}> ({{
      ^bb0({arguments}):
        %y = "ty.concat"({names}) <{{axis = 0 : i64}}> : ({types}) -> tensor<{4 * count}xf32>
        "func.return"(%y) : (tensor<{4 * count}xf32>) -> ()
      }}) : () -> ()
    """)
    program = Program(tuple(op for op in module.body if isinstance(op, Func)), ())
    library = built(program, tmp_path / "x.so")
    parts = [np.arange(4 * i, 4 * i + 4, dtype=np.float32) for i in range(count)]
    found = np.zeros(4 * count, np.float32)
    layouts = [(a.shape, a.dtype) for a in (*parts, found)]
    CompiledStep(library.function("step"), layouts, [], np.zeros(program.workspace_bytes, np.uint8))(
        [*parts, found]
    )
    np.testing.assert_array_equal(found, np.arange(4 * count, dtype=np.float32))


def test_arguments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    program = layers(1)
    library = built(program, tmp_path / "x.so")
    weights, said = [np.zeros(4, np.float32)], "contiguous and in memory of the CPU"
    cases = [
        ("shape", lambda t: t.shape.__setitem__(0, 5)),
        ("rank", lambda t: setattr(t, "ndim", 0)),
        ("type", lambda t: setattr(t, "bits", 16)),
        ("device", lambda t: setattr(t, "device_type", 2)),
        ("strides", lambda t: setattr(t, "strides", (ctypes.c_int64 * 1)(2))),
        ("data", lambda t: setattr(t, "data", None)),
    ]
    for what, spoil in cases:
        step = step_of(program, library, weights, [])
        x = np.zeros(4, np.float32)
        step([x, x.copy()])
        spoil(step._tensors[0])
        with pytest.raises(ValueError, match=rf"argument #0 of step is not x, float32 \[4\], {said}"):
            step.function(*step._arguments)
            pytest.fail(what)
    step = step_of(program, library, weights, [])
    step([x, x.copy()])
    with pytest.raises(TypeError, match="step takes 6 arguments, 5 are given"):
        step.function(*step._arguments[:-1])
    with pytest.raises(TypeError, match="the last two arguments of step, exchange and context, are pointers"):
        step.function(*step._arguments[:-1], 5)
    with pytest.raises(ValueError, match=r"argument #3 of step is not the workspace, uint8 \[\d+\]"):
        step.function(*step._arguments[:2], step._arguments[2], step._arguments[2], *step._arguments[4:])
    with pytest.raises(ValueError, match="meets those of other dies: exchange cannot be null"):
        step.function(*step._arguments[:-2], ctypes.c_void_p(None), step._arguments[-1])
