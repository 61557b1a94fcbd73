"""Cutting a range of ops out of a function, with the values that really flow into it.

The ops from one to another (by their results' names) become the function `@cut` of a small module.  What they
take from outside becomes its arguments, except weights, which are still read from the checkpoint.  The
interpreter runs the original function, so that arguments and results can be saved as `.npy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr
from tyir.diagnostics import TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import Constant, GetGlobal
from tyir.execution.weights import CheckpointReader, WeightSource, checkpoint_of
from tyir.interpreter import lookup_symbol, run_function
from tyir.ir import Op, Value
from tyir.process.files import open_regular
from tyir.traits import ConstantLike, Terminator
from tyir.types import FloatType, IntegerType, TensorType, from_dtype, storage_dtype

__all__ = ["Cut", "check_array", "cut_ops", "read_array", "sample_arguments"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Cut:
    """A module with `@cut`, and the arrays that flow into and out of it.

    The arrays of its arguments and of its results, in order, and the argument names.
    """

    module: Module
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def function(self) -> Func:
        return next(op for op in self.module.body if isinstance(op, Func))

    def save_arrays(self, folder: Path) -> list[Path]:
        """Write `in0_<name>.npy`, ..., `out0.npy`, ... into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"in{i}_{arg.name or 'arg'}" for i, arg in enumerate(self.function.args)] + [
            f"out{i}" for i in range(len(self.outputs))
        ]
        paths = [folder / f"{name}.npy" for name in names]
        for path, array in zip(paths, (*self.inputs, *self.outputs)):
            np.save(path, array)
        return paths

    def with_constants(self) -> Module:
        """The module with its arguments as dense constants.

        `TyirError` for arguments whose shapes are not static.
        """
        module = self.module.clone()
        function = next(op for op in module.body if isinstance(op, Func))
        for argument, array in reversed(list(zip(function.args, self.inputs))):
            if not isinstance(argument.type, TensorType) or not argument.type.is_static:
                raise TyirError(
                    f"%{argument.name} has type {argument.type}; a constant needs a static shape",
                    help="save the inputs as .npy",
                )
            constant = Constant(value=DenseElementsAttr(np.ascontiguousarray(array).tobytes(), argument.type))
            constant.out.name = argument.name
            function.body.insert(constant, before=function.body.first_op)
            argument.replace_all_uses_with(constant.out)
            function.body.erase_arg(argument.index)
        function.arg_attrs = None
        function.refresh_type()
        return module


def cut_ops(
    module: Module, first: str, last: str, arguments: Sequence[Array], function_name: str = "main"
) -> Cut:
    """Ops `first` to `last` of a function, with what flows in and out for these arguments.

    Ops are named by their results, with or without %.

    Raises `TyirError` for unknown names, an empty range, and where the interpreter does.
    """
    functions = {f.sym_name: f for f in module.body if isinstance(f, Func)}
    if function_name not in functions:
        raise TyirError(
            f"there is no function @{function_name}",
            help=f"functions here: {', '.join(f'@{n}' for n in functions)}",
        )
    function = functions[function_name]
    ops = _range(function, first, last)
    members = set(ops)
    weights = _pulled_in(ops, members)
    inside = [*weights, *ops]
    made = {v for op in inside for v in op.results}
    inputs = list(dict.fromkeys(v for op in ops for v in op.operands if v not in made))
    outputs = [
        v for op in ops for v in op.results if not v.uses or any(user not in members for user in v.uses)
    ]
    values = _run(module, function, arguments, [*inputs, *outputs])
    return Cut(
        _module_of(module, inside, inputs, outputs),
        tuple(values[v] for v in inputs),
        tuple(values[v] for v in outputs),
    )


def _range(function: Func, first: str, last: str) -> list[Op]:
    ops = [op for op in function.body if not op.has_trait(Terminator)]
    names = {v.name: i for i, op in enumerate(ops) for v in op.results if v.name is not None}
    names |= {str(i): i for i in range(len(ops))}
    places = []
    for name in (first, last):
        key = name.removeprefix("%")
        if key not in names:
            raise TyirError(
                f"@{function.sym_name} has no op {name}",
                help=did_you_mean(key, names) or "name an op by its result, or by its number",
            )
        places.append(names[key])
    if places[0] > places[1]:
        raise TyirError(f"{last} stands before {first}")
    return ops[places[0] : places[1] + 1]


def _pulled_in(ops: Sequence[Op], members: set[Op]) -> list[Op]:
    """Weights and constants that the ops use, which come along instead of becoming arguments."""
    found: dict[Op, None] = {}
    for op in ops:
        for value in op.operands:
            if value.op is not None and value.op not in members and value.op.has_trait(ConstantLike):
                found[value.op] = None
    return list(found)


def _run(
    module: Module, function: Func, arguments: Sequence[Array], wanted: Sequence[Value]
) -> dict[Value, Array]:
    needed = set(wanted)
    values = {value: array for value, array in zip(function.args, arguments) if value in needed}

    def probe(stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
        values.update((value, array) for value, array in zip(op.results, results) if value in needed)

    run_function(module, str(function.sym_name), arguments, _weights(module), probe)
    return values


def _weights(module: Module) -> WeightSource | None:
    return CheckpointReader(checkpoint_of(module)) if "tyir.checkpoint" in module.attributes else None


def _module_of(
    source: Module, ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]
) -> Module:
    module = Module.empty()
    module.attributes = source.attributes
    function = Func.make("cut", [v.type for v in inputs], [v.name for v in inputs])
    mapping = dict(zip(inputs, function.args))
    for op in ops:
        function.body.append(op.clone(mapping))
    function.body.append(Return(values=[mapping[v] for v in outputs]))
    function.refresh_type()
    for target in _referred(ops):
        module.body.append(target.clone())
    module.body.append(function)
    return module


def _referred(ops: Sequence[Op]) -> list[Op]:
    """The functions and weights that ops refer to, and those that these refer to in turn."""
    found: dict[Op, None] = {}
    waiting = list(ops)
    while waiting:
        for inner in waiting.pop().walk():
            if isinstance(inner, (GetGlobal, Call)):
                reference = inner.symbol if isinstance(inner, GetGlobal) else inner.callee
                target = lookup_symbol(inner, reference.leaf)
                if target is not None and target not in found:
                    found[target] = None
                    waiting.append(target)
    return list(found)


def sample_arguments(function: Func, tokens: int, seed: int = 0) -> list[Array]:
    """Arguments to run a function with, the same every time.

    Whole numbers count up from 0, other tensors are normal numbers; `?` is `tokens`.
    """
    rng = np.random.default_rng(seed)
    arrays: list[Array] = []
    for value in function.args:
        kind = value.type
        if not isinstance(kind, TensorType) or kind.shape is None:
            raise TyirError(f"%{value.name} has type {kind}; give its array with --arg")
        shape = tuple(tokens if d is None else d for d in kind.shape)
        if isinstance(kind.element, IntegerType):
            arrays.append(np.arange(int(np.prod(shape))).reshape(shape).astype(storage_dtype(kind.element)))
        elif isinstance(kind.element, FloatType):
            arrays.append(rng.standard_normal(shape).astype(storage_dtype(kind.element)))
        else:
            raise TyirError(f"%{value.name} has type {kind}; give its array with --arg")
    return arrays


def read_array(path: str) -> Array:
    """The array of a .npy file, mapped; `OSError` or `ValueError` when it is not one, or is cut off."""
    open_regular(path).close()
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # a huge shape without its bytes is refused
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive of arrays (.npz), one array (.npy) is needed")
    return array


def check_array(value: Value, array: Array) -> Array:
    """The array, if it fits the value's type; `TyirError` otherwise."""
    kind = value.type
    assert isinstance(kind, TensorType)
    fits = kind.shape is None or (
        len(kind.shape) == array.ndim and all(d in (None, n) for d, n in zip(kind.shape, array.shape))
    )
    if not fits or array.dtype != storage_dtype(kind.element):
        raise TyirError(
            f"%{value.name} is {kind}, the array is {TensorType(array.shape, from_dtype(array.dtype))}"
        )
    return array
