"""The entry function: what stands before and after the layers, and their calls.

%h = embedding(...);  %h1 = call @layer_s1(%h, @l0.w.., %k0, %v0);  ..;  logits = linear(norm(%h32))
-->
commands of the embedding, its result at the layers' boundary;  call @layer_s1(addresses of layer 0, tokens);  ..;  commands of the head
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection, Mapping

from tyir.attributes import SymbolRefAttr
from tyir.backends.edge10.lowering.body_lowering import BodyLowering
from tyir.backends.edge10.lowering.context import Lowering, Place
from tyir.backends.edge10.lowering.dependences import Tracker
from tyir.backends.edge10.lowering.layers import LayerLayout, symbol_of
from tyir.backends.edge10.memory.places import root
from tyir.diagnostics import TyirError
from tyir.dialects import edge10, ty
from tyir.dialects.func import Call, Func, Return
from tyir.execution.optional_tail import optional_tail
from tyir.ir import Op, Value

__all__ = ["MainLowering"]


class MainLowering:
    """Lowers the entry function `main`, whose arguments lie in the buffers `arguments`."""

    def __init__(
        self,
        main: Func,
        layers: Mapping[str, LayerLayout],
        arguments: Mapping[Value, str],
        caches: Collection[Value],
        bodies: BodyLowering,
    ) -> None:
        self._main, self._layers, self._arguments = main, layers, arguments
        self._caches, self._bodies = caches, bodies
        self._kept: dict[Value, Place] = {}  # results of layers that are copied away, and where they are made

    def lower(self, first: int) -> Func:
        """The command program; its own activations lie in SRAM from offset `first` on."""
        function = Func.make(self._main.sym_name, [])
        start = function.body.append(edge10.Join(tokens=())).result
        slots = self._bodies.plan.slots
        lowering = self._bodies.begin(function, Tracker(slots, [start] * len(slots), start))
        fixed = {
            v: Place("dram", 0, name, constant=v not in self._caches) for v, name in self._arguments.items()
        }
        for op in self._main.body:
            if isinstance(op, ty.GetGlobal):
                fixed[op.result] = Place("dram", 0, op.symbol.leaf, constant=True)
        self._fix_boundaries(fixed)
        late = self._fix_results(fixed)
        for op in self._main.body:
            if isinstance(op, Call):
                self._coalesce(op, fixed)
        self._bodies.lower(self._main, lowering, fixed, first, self._call, optional_tail(self._main))
        for value, place in late:
            lowering.move(lowering.place(value), place, ty.tensor_type(value).nbytes)
        function.body.append(Return(values=[]))
        function.refresh_type()
        return function

    # -- places
    # ---------------------------------------------------------------------------------------------------
    def _fix_boundaries(self, fixed: dict[Value, Place]) -> None:
        """What layers give lies at their boundary, the caches where they were.  What is wanted after another
        layer has written there, as the states of several layers that a projector takes are, is copied away.
        """
        order = {op: n for n, op in enumerate(self._main.body)}
        for op in order:
            if isinstance(op, Call):
                layer = self._layers[op.callee.leaf]
                for index, argument in layer.aliased.items():
                    fixed[op.results[index]] = fixed[root(op.operands[argument])]
                for index, place in layer.boundary.results.items():
                    value = op.results[index]
                    fixed[value] = place
                    if self._is_overwritten(value, place, order):
                        name = f"kept{len(self._kept)}.{self._main.sym_name}"
                        self._bodies.buffers.add_activations(name, ty.tensor_type(value))
                        fixed[value], self._kept[value] = Place("dram", 0, name), place

    def _is_overwritten(self, value: Value, place: Place, order: Mapping[Op, int]) -> bool:
        """Whether a call writes where a value lies and another op wants it after that."""
        last = max((order[user] for alias in _aliases(value, self._main) for user in alias.uses), default=0)
        assert value.op is not None, "a result of a call"
        between = (op for op, n in order.items() if order[value.op] < n < last and isinstance(op, Call))
        return any(self._writes(call, value, place) for call in between)

    def _writes(self, call: Call, value: Value, place: Place) -> bool:
        """Whether a call leaves another value where this one lies."""
        boundary = self._layers[call.callee.leaf].boundary
        return place in boundary.results.values() or any(
            taken == place and (index in boundary.overwritten or root(call.operands[index]) is not value)
            for index, taken in boundary.arguments.items()
        )

    def _fix_results(self, fixed: dict[Value, Place]) -> list[tuple[Value, Place]]:
        """Main's results are output buffers.

        Returns the results that lie elsewhere (a layer's result, an input) and must be copied to their buffer
        at the end.
        """
        caches = {self._arguments[v] for v in self._caches}
        late: list[tuple[Value, Place]] = []
        for index, value in enumerate(self._main.body.terminator.operands):
            known = fixed.get(root(value))
            if known is not None and known.base in caches:
                continue
            output = Place("dram", 0, self._bodies.buffers.add_result(self._main, index))
            if known is None:
                fixed[root(value)] = output
            else:
                late.append((value, output))
        return late

    def _coalesce(self, call: Call, fixed: dict[Value, Place]) -> None:
        """A value made only to be a layer's argument is made at the layer's boundary, if nobody wants it
        after the layer has overwritten it.
        """
        layer = self._layers[call.callee.leaf]
        order = {op: n for n, op in enumerate(self._main.body)}
        for index, place in layer.boundary.arguments.items():
            value = root(call.operands[index])
            if value in fixed or value.op is None:
                continue
            aliases = _aliases(value, self._main)
            users = [u for alias in aliases for u in alias.uses if not isinstance(u, ty.Reshape)]
            overwritten = index in layer.boundary.overwritten
            lives = range(order[value.op] + 1, max((order[u] for u in users), default=0) + 1)
            if any(order[other] in lives and self._takes_another(other, value, place) for other in order):
                continue  # layers that take different values there in turn: it is brought for each call
            if all(_takes_at(u, value, layer, index) for u in users) and (
                not overwritten or all(order[u] <= order[call] for u in users)
            ):
                fixed[value] = place

    def _takes_another(self, op: Op, value: Value, place: Place) -> bool:
        """Whether an op is a call that wants another value than this one at a place."""
        wanted = self._layers[op.callee.leaf].boundary.arguments if isinstance(op, Call) else {}
        return any(p == place and root(op.operands[i]) is not value for i, p in wanted.items())

    # -- calls
    # ----------------------------------------------------------------------------------------------------
    def _call(self, op: Call, lowering: Lowering) -> None:
        layer = self._layers[op.callee.leaf]
        for index, target in layer.boundary.arguments.items():
            value = op.operands[index]
            if lowering.place(value) != target:
                _check_free(op, root(value), target, lowering)
            lowering.move(lowering.place(value), target, ty.tensor_type(value).nbytes)
        emitter = lowering.emitter
        base = (
            symbol_of(op.operands[layer.packed[0]]) if layer.packed else next(iter(self._arguments.values()))
        )
        addresses = [emitter.address_of(base)]
        for index in layer.addressed:
            addresses.append(lowering.address(lowering.place(op.operands[index])))
        slot_tokens, rest = emitter.tracker.finish()
        tokens = [emitter.join(t) for t in (*slot_tokens, rest)]
        call = Call(
            args=(*addresses, *tokens),
            callee=SymbolRefAttr(layer.function.sym_name),
            result_types=[edge10.TOKEN] * len(tokens),
            loc=op.loc,
            attributes=op.attributes,
        )
        emitter.block.append(call)
        emitter.tracker.reset(call.results[:-1], call.results[-1])
        for value in op.results:
            if (made := self._kept.get(value)) is not None:
                lowering.move(made, lowering.place(value), ty.tensor_type(value).nbytes)


def _aliases(value: Value, function: Func) -> list[Value]:
    """A value and all reshapes of it."""
    return [
        value,
        *(r for op in function.body if isinstance(op, ty.Reshape) for r in op.results if root(r) is value),
    ]


def _check_free(call: Call, value: Value, target: Place, lowering: Lowering) -> None:
    """`TyirError` when moving an argument to its place would destroy another value that is still wanted."""
    following: Op | None = call
    while following is not None:
        for other in following.operands:
            if (
                root(other) is not value
                and other.op is not None
                and other in lowering.places
                and lowering.places[other] == target
                and _made_before(other, call)
            ):
                raise TyirError(
                    f"@{call.callee.leaf} takes an activation where %{other.name or '?'} still lies; the"
                    " layers of this model take theirs in different orders",
                    help="give all layer functions their activations in the same order",
                )
        following = following.next_op


def _made_before(value: Value, call: Call) -> bool:
    """Whether the value's op precedes the call in their block."""
    op: Op | None = call
    while op is not None and op is not value.op:
        op = op.prev_op
    return op is not None and op is not call


def _takes_at(user: Op, value: Value, layer: LayerLayout, index: int) -> bool:
    """Whether a user is a call of this layer that takes the value as this argument, or an op that leaves it
    alone.
    """
    if not isinstance(user, Call):
        return True
    return user in layer.calls and all(i == index for i, v in enumerate(user.operands) if root(v) is value)
