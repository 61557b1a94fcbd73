"""Running IR on numpy, op by op: the oracle of every pass, and the walk that the compiled runtime shares.

`Interpreter.run` is a generator: it yields at every collective and is resumed with what the other dies give,
which lets `run_lockstep` drive any number of dies in one thread.  What an op *does* is the `evaluator`'s
business: the reference evaluator calls the op's own `evaluate`; the runtime's calls a compiled kernel.  A
`probe` sees every op with its results (verification compares two runs through it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from tyir.attributes import SymbolRefAttr
from tyir.diagnostics import TyirError
from tyir.dialects import func
from tyir.dialects.builtin import Module
from tyir.execution import lockstep
from tyir.execution.weights import TensorReference, WeightSource
from tyir.ir import Block, Op, Value
from tyir.opdef import DeclaredOp
from tyir.traits import Collective, ComputedTensor, StoredTensor, Terminator, WeightReference
from tyir.types import TensorType, storage_dtype

__all__ = [
    "Evaluator",
    "Interpreter",
    "Probe",
    "SymbolIndex",
    "evaluate_op",
    "evaluate_param",
    "lookup_symbol",
    "run_function",
    "run_lockstep",
]

Array = npt.NDArray[Any]
Evaluator = Callable[[Op, Sequence[Array]], "Array | tuple[Array, ...]"]
Collectives = Generator[lockstep.Request, Array | None, tuple[Array, ...]]


class Probe(Protocol):
    """Called after every op (calls and collectives included) with the calls it is inside of (outermost
    first), the op and its results.
    """

    def __call__(self, stack: tuple[func.Call, ...], op: Op, results: tuple[Array, ...]) -> None: ...


def evaluate_op(op: Op, operands: Sequence[Array]) -> Array | tuple[Array, ...]:
    """The reference evaluator: the op's own `evaluate`."""
    if not isinstance(op, DeclaredOp):
        raise TyirError(f"'{op.name}' is not a registered op and cannot be interpreted")
    result: Array | tuple[Array, ...] = op.evaluate(*operands)
    return result


def lookup_symbol(start: Op, name: str) -> Op | None:
    """The symbol `name` in the modules around `start`, innermost first.

    From inside the region of a computed tensor only the checkpoint's tensors are seen, so that a parameter
    may bear the name of the tensor it is made of.
    """
    return _lookup(start, lambda module: (op for op in module.body if op.sym_name == name))


class SymbolIndex:
    """`lookup_symbol` for many symbols of modules that do not change meanwhile: each is read once."""

    def __init__(self) -> None:
        self._known: dict[Module, dict[str | None, list[Op]]] = {}

    def lookup(self, start: Op, name: str) -> Op | None:
        """The same as `lookup_symbol`."""
        return _lookup(start, lambda module: self._of(module).get(name, ()))

    def _of(self, module: Module) -> dict[str | None, list[Op]]:
        found = self._known.get(module)
        if found is None:
            found = {}
            for op in module.body:
                found.setdefault(op.sym_name, []).append(op)
            self._known[module] = found
        return found


def _lookup(start: Op, named: Callable[[Module], Iterable[Op]]) -> Op | None:
    """The innermost op that is seen from `start`; `named`: those of the name in a module."""
    current: Op | None = start
    in_initializer = False
    while current is not None:
        in_initializer = in_initializer or current.has_trait(ComputedTensor)
        if isinstance(current, Module):
            for op in named(current):
                if op.has_trait(StoredTensor) or not in_initializer:
                    return op
        current = current.parent_op
    return None


class Interpreter:
    """Runs functions of one module (one die).

    `constants` maps symbol names to arrays and is consulted before `weights`.  `skipped`: ops of functions
    that are left out of the next run, on all dies alike; their results are zeros.
    """

    def __init__(
        self,
        module: Module,
        weights: WeightSource | None = None,
        constants: Mapping[str, Array] | None = None,
        evaluator: Evaluator = evaluate_op,
        probe: Probe | None = None,
    ) -> None:
        self.module = module
        self.weights = weights
        self.constants = dict(constants or {})
        self.evaluator = evaluator
        self.probe = probe
        self.skipped: Collection[Op] = ()
        self._uses: dict[Block, dict[Op, list[Value]]] = {}
        self._functions: dict[str, func.Func] = {
            op.sym_name: op for op in module.body if isinstance(op, func.Func)
        }

    def run(self, name: str, args: Sequence[Array]) -> Collectives:
        """Run a function; yields what it asks of the other dies at each collective and is sent what that
        gives; returns the function's results.
        """
        if name not in self._functions:
            raise TyirError(
                f"there is no function @{name}",
                help=f"functions here: {', '.join('@' + f for f in self._functions)}",
            )
        return self._run_block(self._functions[name].body, args, ())

    def _run_block(self, block: Block, args: Sequence[Array], stack: tuple[func.Call, ...]) -> Collectives:
        name = block.parent_op.sym_name if block.parent_op is not None else None
        if len(args) != len(block.args):
            raise TyirError(f"@{name} takes {len(block.args)} arguments, {len(args)} given")
        env: dict[Value, Array] = dict(zip(block.args, args))
        last_use = self._uses.get(block)
        if last_use is None:
            last_use = self._uses[block] = _last_uses(block)
        for op in block:
            if op in self.skipped:
                env.update((value, _zeros(value)) for value in op.results)
                continue
            operands = [env[v] for v in op.operands]
            if op.has_trait(Terminator):
                return tuple(operands)
            for value in last_use.get(op, ()):  # big intermediates die with their last reader
                env.pop(value, None)
            results: Any
            if op.has_trait(Collective):
                received = yield _request(op, operands[0] if operands else None)
                results = received if op.results else ()
            elif isinstance(op, func.Call):
                results = yield from self._run_block(self._callee(op, stack), operands, (*stack, op))
            elif op.has_trait(WeightReference):
                results = self.read_symbol(op)
            else:
                results = self.evaluator(op, operands)
            if not isinstance(results, tuple):
                results = (results,)
            for value, array in zip(op.results, results):
                env[value] = array
            if self.probe is not None:
                self.probe(stack, op, results)
        raise TyirError(f"@{name} ends without a terminator")

    def _callee(self, call: func.Call, stack: tuple[func.Call, ...]) -> Block:
        """The body of a called function; `TyirError` when it is being run already: nothing would end it."""
        function = self._functions.get(call.callee.leaf)
        if function is None:
            raise TyirError(f"'{call.name}' refers to {call.callee}, which is not a function of this module")
        if any(outer.parent_op is function for outer in (*stack, call)):
            raise TyirError(f"@{function.sym_name} calls itself, which never ends", where=str(call.loc))
        return function.body

    def read_symbol(self, op: Op) -> Array:
        """The array a weight reference means: a given constant, a tensor of the checkpoint, or an evaluated
        initializer.
        """
        symbol = op.properties["symbol"]
        assert isinstance(symbol, SymbolRefAttr)
        name = symbol.leaf
        if name in self.constants:
            return self.constants[name]
        target = lookup_symbol(op, name)
        if target is not None and target.has_trait(ComputedTensor):
            return evaluate_param(target, self.weights)
        if target is None or not target.has_trait(StoredTensor):
            raise TyirError(f"'{op.name}' refers to @{name}, which is not a weight in scope")
        if self.weights is None:
            raise TyirError(f"weight @{name} is needed but no checkpoint was given")
        return self.weights.read(cast("TensorReference", target))


def _zeros(value: Value) -> Array:
    assert isinstance(value.type, TensorType)
    return np.zeros(value.type.static_shape, storage_dtype(value.type.element))


def _last_uses(block: Block) -> dict[Op, list[Value]]:
    """For each op, the values it is the last to read in its block."""
    seen: set[Value] = set()
    last: dict[Op, list[Value]] = {}
    for op in reversed(block):
        for value in op.operands:
            if value not in seen:
                seen.add(value)
                last.setdefault(op, []).append(value)
    return last


def evaluate_param(param: Op, weights: WeightSource | None) -> Array:
    """The tensor that a symbol's region computes."""
    interpreter = Interpreter(Module.empty(), weights)
    runner = interpreter._run_block(param.body, (), ())
    try:
        next(runner)
    except StopIteration as stop:
        (array,) = stop.value
        return np.asarray(array)
    raise TyirError(f"the initializer of @{param.sym_name} holds a collective")


def _request(op: Op, operand: Array | None) -> lockstep.Request:
    """What a collective asks of the other dies."""
    request: Callable[[Array | None], lockstep.Request] | None = getattr(op, "request", None)
    if request is None:
        raise TyirError(f"'{op.name}' cannot be executed", help="run localize-dies first")
    return request(operand)


def run_lockstep(runs: Sequence[Collectives], links: lockstep.Links | None = None) -> list[tuple[Array, ...]]:
    """Drive dies' runs together, all or those that `links` has here (`tyir.execution.lockstep`); returns each
    die's results.
    """
    return lockstep.drive(runs, links)


def _argument(function: str, number: int, given: Any, wanted: Value) -> Array:
    """An argument as its parameter's type has it."""
    declared = wanted.type
    if not isinstance(declared, TensorType):
        return cast("Array", given)
    array: Array = (
        given if isinstance(given, np.ndarray) else np.asarray(given, storage_dtype(declared.element))
    )
    shape = declared.shape
    if shape is not None and (
        len(shape) != array.ndim or any(d not in (None, n) for d, n in zip(shape, array.shape))
    ):
        raise TyirError(
            f"argument {number} of @{function} is {declared}, an array of shape {array.shape} was given",
            help="give an array of that shape; ? stands for any length",
        )
    return array


def run_function(
    module: Module,
    name: str,
    args: Sequence[Array],
    weights: WeightSource | None = None,
    probe: Probe | None = None,
) -> tuple[Array, ...]:
    """Run a function of a module without dies; the common case of tests.

    `args`: arrays of the shapes that the function declares, or lists of numbers, which become arrays of its
    element types; `TyirError` for other shapes.
    """
    function = next((f for f in module.body if isinstance(f, func.Func) and f.sym_name == name), None)
    if function is not None:
        args = [_argument(name, i, *pair) for i, pair in enumerate(zip(args, function.body.args))] + [
            *args[len(function.body.args) :]
        ]
    return run_lockstep([Interpreter(module, weights, probe=probe).run(name, args)])[0]
