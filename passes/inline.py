"""Puts the bodies of functions where they are called.

    %y = func.call @layer(%x, %w) loc("b")      -->      %y = ty.linear(%x, %w) loc(callsite("a" at "b"))
    func.func private @layer(..) { %r = ty.linear(..) loc("a"); func.return %r }      (deleted, when every call of it was inlined)

A function is inlined when it has one block and does not call itself, directly or through others; what it calls is inlined into it first, so that one pass
finds everything.  `functions=a,b` inlines only those.  Calls that stay are counted in the statistic `inline.left`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tyir.dialects.func import Call, Func, Return
from tyir.ir import Op, Value
from tyir.location import UNKNOWN, CallSiteLoc, Location
from tyir.passes.symbol_dce import dead_symbols
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import erase_all
from tyir.verify_rules import SymbolTables

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
    """Inline calls of functions with one block."""

    functions: tuple[str, ...] = ()

    def run(self, op: Op, context: PassContext) -> None:
        graph = context.analyses.get(call_graph, op)
        fits: set[Func] = set()
        inlined: set[Func] = set()
        left = done = 0
        for function, is_recursive in graph.bottom_up():
            wanted = not self.functions or function.sym_name in self.functions
            if wanted and not is_recursive and len(function.regions[0].blocks) == 1 and isinstance(function.body.last_op, Return):
                fits.add(function)
            for call in list(function.walk_type(Call)):
                callee = graph.callees.get(call)  # None for what was copied from an inlined body: it did not fit there either
                if callee in fits and callee is not function:
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
    """Replace a call by a copy of the callee's one block; the ops' locations say both places."""
    mapping: dict[Value, Value] = dict(zip(callee.args, call.operands))
    results: list[Value] = []
    for op in callee.body:
        if isinstance(op, Return):
            results = [mapping.get(v, v) for v in op.operands]
            break
        copy = op.clone(mapping).insert_before(call)
        for inner in copy.walk():
            inner.loc = _called(inner.loc, call.loc)
    call.replace_with(results)


def _called(callee: Location, caller: Location) -> Location:
    if caller is UNKNOWN or callee is UNKNOWN:
        return caller if callee is UNKNOWN else callee
    return CallSiteLoc(callee, caller)
