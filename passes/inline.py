"""Puts the bodies of functions where they are called.

    %y = func.call @layer(%x, %w) loc("b")      -->      %y = ty.linear(%x, %w) loc(callsite("a" at "b"))
    func.func private @layer(..) { %r = ty.linear(..) loc("a"); func.return %r }      (deleted, when every call of it was inlined)

A function is inlined when it returns in one place and does not call itself, directly or through others;
what it calls is inlined into it first, so that one pass finds everything.  Several blocks are spliced
between the two halves of the calling block.  `functions=a,b` inlines only those.  Calls that stay are
counted in the statistic `inline.left`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tyir.checking.symbols import SymbolTables
from tyir.dialects.func import Call, Func, Return
from tyir.ir import Op
from tyir.layers import layer_of, place_in_layer
from tyir.location import UNKNOWN, CallSiteLoc, Location
from tyir.passes.symbol_dce import dead_symbols
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import erase_all

__all__ = ["CallGraph", "Inline", "call_graph"]


@dataclass(frozen=True)
class CallGraph:
    """Which function each call below an op reaches, and the calls in each function, in order."""

    callees: dict[Call, Func]
    calls: dict[Func, tuple[Call, ...]]

    def bottom_up(self) -> Iterator[tuple[Func, bool]]:
        """Every function after those it calls, with whether it is recursive (reaches itself)."""
        state: dict[Func, int] = {}  # 1: being visited, 2: done
        recursive: set[Func] = set()
        for root in self.calls:
            stack = [(root, iter(self.calls[root]))] if root not in state else []
            state.setdefault(root, 1)
            while stack:
                function, calls = stack[-1]
                callee = next((self.callees[c] for c in calls if c in self.callees), None)
                if callee is None:
                    stack.pop()
                    state[function] = 2
                    yield function, function in recursive
                elif callee not in state:
                    state[callee] = 1
                    stack.append((callee, iter(self.calls[callee])))
                elif state[callee] == 1:
                    cycle = [f for f, _ in stack]
                    recursive.update(cycle[cycle.index(callee) :])


def call_graph(root: Op) -> CallGraph:
    """The call graph of everything below `root` (an analysis)."""
    tables = SymbolTables()
    callees: dict[Call, Func] = {}
    calls: dict[Func, tuple[Call, ...]] = {}
    for function in root.walk_type(Func):
        calls[function] = tuple(function.walk_type(Call))
        for call in calls[function]:
            target = tables.resolve(call.callee, tables.nearest(call), outward=True, only=Func)
            if isinstance(target, Func):
                callees[call] = target
    return CallGraph(callees, calls)


@dataclass(frozen=True)
class Inline(Pass):
    """Inline calls of functions that return in one place."""

    functions: tuple[str, ...] = ()

    def run(self, op: Op, context: PassContext) -> None:
        graph = context.analyses.get(call_graph, op)
        fits: set[Func] = set()
        inlined: set[Func] = set()
        left = done = 0
        for function, is_recursive in graph.bottom_up():
            wanted = not self.functions or function.sym_name in self.functions
            if wanted and not is_recursive and _fits(function):
                fits.add(function)
            for call in list(function.walk_type(Call)):
                callee = graph.callees.get(
                    call
                )  # None for what was copied from an inlined body: it did not fit there either
                if callee in fits and callee is not function and _takes(call, callee):
                    inline_call(call, callee)
                    inlined.add(callee)
                    done += 1
                else:
                    left += 1
        erase_all([f for f in dead_symbols(op) if f in inlined])
        context.count("inline.inlined", done)
        context.count("inline.left", left)
        if not done:
            context.nothing_changed()


def inline_call(call: Call, callee: Func) -> None:
    """Put a copy of the callee's blocks in the place of a call; the ops' locations say both places.

    The entry block's ops come before the call in its block, what follows the call goes behind the ops of the
    block that returned: nothing branches anew.
    """
    copy = callee.clone()
    layer = layer_of(call)
    for op in copy.walk():
        op.loc = _called(op.loc, call.loc)
        if layer is not None:
            place_in_layer(op, layer)
    entry, *others = copy.regions[0].blocks
    for argument, operand in zip(entry.args, call.operands):
        argument.replace_all_uses_with(operand)
    last = _returning(copy)[0]
    assert last.block is not None and call.block is not None and call.block.region is not None
    end, here = last.block, call.block
    results = last.operands
    last.erase()
    for op in entry:
        op.detach().insert_before(call)
    if others:
        while call.next_op is not None:
            end.append(call.next_op.detach())
        blocks = call.block.region.blocks
        for block in others:
            block.region = call.block.region
        blocks[blocks.index(here) + 1 : blocks.index(here) + 1] = others
    call.replace_with(results)


def _returning(function: Func) -> list[Return]:
    """The returns of a function."""
    return [op for block in function.regions[0].blocks for op in (block.last_op,) if isinstance(op, Return)]


def _fits(function: Func) -> bool:
    """Whether calls of a function can be replaced: with one return no branch is needed that was not there."""
    return not function.is_external and len(_returning(function)) == 1


def _takes(call: Call, callee: Func) -> bool:
    """Whether the callee's blocks may stand where the call does; several only directly in a function."""
    return len(callee.regions[0].blocks) == 1 or isinstance(call.parent_op, Func)


def _called(callee: Location, caller: Location) -> Location:
    if caller is UNKNOWN or callee is UNKNOWN:
        return caller if callee is UNKNOWN else callee
    return CallSiteLoc(callee, caller)
