"""Making IR smaller while it keeps a property, such as "this command fails".

What `tyir-reduce` does, as functions.

Delta debugging (Zeller and Hildebrandt 2002): ever smaller runs of ops are deleted, and a deletion stays if
the smaller module is still interesting. A deleted op's uses get an operand of the same type, a block argument
of that type, or a new argument of the function.  Functions then lose results and arguments, ops lose
attributes and locations.  Only IR that verifies is tried, unless the input does not verify itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tyir.attributes import DictAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.execution.entry_points import ALIAS
from tyir.ir import EMPTY_DICT, Op, Value
from tyir.location import UNKNOWN
from tyir.passes.dce import eliminate_dead_code
from tyir.passes.symbol_dce import dead_symbols
from tyir.printer import print_op
from tyir.rewrite import erase_all
from tyir.traits import Terminator
from tyir.verifier import verify

__all__ = ["Reduction", "reduce_module"]

Change = Callable[[Module], bool]


@dataclass
class Reduction:
    """The smallest module found so far; `tried` counts how often `interesting` was asked."""

    module: Module
    interesting: Callable[[Module], bool]
    tried: int = 0
    _must_verify: bool = True
    _seen: set[str] = field(default_factory=set)

    def attempt(self, change: Change) -> bool:
        """Apply a change to a copy; keep the copy if it is valid, new and interesting."""
        candidate = self.module.clone()
        if not change(candidate) or (self._must_verify and not _verifies(candidate)):
            return False
        text = print_op(candidate)
        if text in self._seen:
            return False
        self._seen.add(text)
        self.tried += 1
        if not self.interesting(candidate):
            return False
        self.module = candidate
        return True

    def size(self) -> int:
        return sum(1 for _ in self.module.walk())


def reduce_module(module: Module, interesting: Callable[[Module], bool]) -> Reduction:
    """The smallest module for which `interesting` holds, found greedily.

    The input is not changed and must be interesting.
    """
    reduction = Reduction(
        module.clone(), interesting, _must_verify=_verifies(module), _seen={print_op(module)}
    )
    reduction.attempt(_strip_locations)
    before = -1
    while before != (before := reduction.size()):
        reduction.attempt(_remove_dead)
        _remove_ops(reduction)
        _simplify_functions(reduction)
    _drop_attributes(reduction)
    return reduction


def _verifies(module: Module) -> bool:
    try:
        verify(module)
    except TyirError:
        return False
    return True


def _ops(module: Module) -> list[Op]:
    return [op for op in module.walk() if op is not module]


def _remove_ops(reduction: Reduction) -> None:
    """Runs of ops from the end, half of all at first, in the end one by one."""
    chunk = max(1, len(_ops(reduction.module)) // 2)
    while chunk:
        end = len(_ops(reduction.module))
        while end > 0:
            start = max(0, end - chunk)
            reduction.attempt(partial(_erase_range, start=start, end=end))
            end = min(start, len(_ops(reduction.module)))
        chunk //= 2


def _erase_range(module: Module, start: int, end: int) -> bool:
    called = _called(module)
    changed = False
    for op in reversed(_ops(module)[start:end]):
        changed = _erase(op, called) or changed
    return changed


def _called(module: Module) -> set[str]:
    return {call.callee.leaf for call in module.walk_type(Call)}


def _erase(op: Op, called: set[str]) -> bool:
    """Delete an op, giving its users something else; False when nothing fits."""
    if op.has_trait(Terminator) or op.successors:
        return False
    new = {value: _substitute(value, op) for value in op.results if value.uses}
    for old, value in new.items():
        if value is None:
            value = _new_argument(op, old, called)
        if value is None:
            return False
        old.replace_all_uses_with(value)
    op.erase()
    return True


def _substitute(value: Value, op: Op) -> Value | None:
    """An operand of `op`, or an argument of its block, of the same type."""
    assert op.block is not None
    return next((v for v in (*op.operands, *op.block.args) if v.type is value.type), None)


def _new_argument(op: Op, value: Value, called: set[str]) -> Value | None:
    parent, block = op.parent_op, op.block
    if block is None or parent is None or (parent.registered and not isinstance(parent, Func)):
        return None
    if isinstance(parent, Func):
        if parent.sym_name in called or block is not parent.body:
            return None
        argument = block.add_arg(value.type, value.name)
        if parent.arg_attrs is not None:
            parent.set_arg_attrs([parent.arg_attr(i) for i in range(len(block.args))])
        parent.function_type = type(parent.function_type)(
            tuple(a.type for a in block.args), parent.function_type.results
        )
        return argument
    return block.add_arg(value.type, value.name)


def _remove_dead(module: Module) -> bool:
    symbols = dead_symbols(module)
    erase_all(symbols)
    return eliminate_dead_code(module) > 0 or bool(symbols)


def _strip_locations(module: Module) -> bool:
    for op in module.walk():
        op.loc = UNKNOWN
    return True


def _functions(module: Module) -> list[Func]:
    """Functions with one block that nobody calls: their types may change."""
    called = _called(module)
    found = [f for f in module.walk_type(Func) if f.sym_name not in called and len(f.regions[0].blocks) == 1]
    return [f for f in found if isinstance(f.body.last_op, Return)]


def _simplify_functions(reduction: Reduction) -> None:
    """Drop results, then the arguments that nothing uses."""
    for index in range(len(_functions(reduction.module))):
        count = len(_functions(reduction.module)[index].body.terminator.operands)
        if not reduction.attempt(partial(_keep_results, index=index, kept=())):
            for position in reversed(range(count)):
                kept = tuple(
                    i
                    for i in range(len(_functions(reduction.module)[index].body.terminator.operands))
                    if i != position
                )
                reduction.attempt(partial(_keep_results, index=index, kept=kept))
        reduction.attempt(partial(_drop_arguments, index=index))


def _keep_results(module: Module, index: int, kept: tuple[int, ...]) -> bool:
    function = _functions(module)[index]
    terminator = function.body.terminator
    if len(kept) == len(terminator.operands):
        return False
    attributes = [function.res_attr(i) for i in kept]
    terminator.operands = [terminator.operands[i] for i in kept]
    function.set_res_attrs([a if ALIAS not in a else DictAttr() for a in attributes])
    function.refresh_type()
    eliminate_dead_code(function)
    return True


def _drop_arguments(module: Module, index: int) -> bool:
    function = _functions(module)[index]
    unused = [a.index for a in function.args if not a.uses]
    attributes = [function.arg_attr(i) for i in range(len(function.args)) if i not in unused]
    results = [
        a if ALIAS not in a else DictAttr()
        for a in (function.res_attr(i) for i in range(len(function.function_type.results)))
    ]
    for position in reversed(unused):
        function.body.erase_arg(position)
    function.set_arg_attrs(attributes)
    function.set_res_attrs(results)
    function.refresh_type()
    return bool(unused)


def _drop_attributes(reduction: Reduction) -> None:
    """All discardable attributes at once, or op by op."""
    if reduction.attempt(partial(_without_attributes, start=0, end=None)):
        return
    for position in range(reduction.size()):
        reduction.attempt(partial(_without_attributes, start=position, end=position + 1))


def _without_attributes(module: Module, start: int, end: int | None) -> bool:
    ops = [op for op in list(module.walk())[start:end] if len(op.attributes)]
    for op in ops:
        op.attributes = EMPTY_DICT
    return bool(ops)
