"""What each argument of a layer function is, and where what it names lies.

    func.func @layer_s1(%x, %w0, %w1, %k, %v, %pos)  called as  @layer_s1(%h, @l3.w0, @l3.w1, %k3, %v3, %pos)
    -->
    %x       an activation, handed over at the boundary          %k, %v   caches, temperature: by an address
    %w0 %w1  packed: at fixed distances from one base address    %pos     a position

Layers are lowered once for all calls, so what differs from call to call must come by addresses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tyir.backends.edge10.lowering.order import keys_first
from tyir.backends.edge10.memory.allocate import align
from tyir.backends.edge10.memory.places import Boundary, BoundaryPlaces, boundary_of, root
from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.execution.entry_points import alias_of, arguments
from tyir.ir import Value

__all__ = ["LayerLayout", "cache_arguments", "find_layers", "reached", "symbol_of"]


@dataclass(frozen=True)
class LayerLayout:
    """A layer function, its calls, and its arguments by what they are."""

    function: Func
    calls: Sequence[Call]
    packed: Sequence[int]  # weights, found by the layer's base address
    shared: Mapping[int, str]  # weights that are the same for every call
    addressed: Sequence[int]  # caches, and weights without a pattern: an address argument each
    activations: Sequence[int]
    aliased: Mapping[int, int]  # result -> argument, for caches
    boundary: Boundary  # where the activations lie

    @property
    def offsets(self) -> dict[int, int]:
        """Byte distance of each packed weight from the first."""
        offsets, end = {}, 0
        for index in self.packed:
            offsets[index] = align(end)
            end = offsets[index] + ty.tensor_type(self.function.args[index]).nbytes
        return offsets


def reached(source: Module, main: Func) -> list[Func]:
    """The entry function and the layers it calls, each once."""
    names = dict.fromkeys(op.callee.leaf for op in main.body if isinstance(op, Call))
    return [main, *(f for n in names if isinstance(f := source.lookup(n), Func))]


def find_layers(
    source: Module, main: Func, caches: Collection[Value], places: BoundaryPlaces
) -> dict[str, LayerLayout]:
    """The layer functions that `main` calls, by name; `places` are the ones in which all of them hand
    activations on.
    """
    functions = {f.sym_name: f for f in source.body if isinstance(f, Func)}
    calls: dict[str, list[Call]] = {}
    for op in main.body:
        if isinstance(op, Call):
            if op.callee.leaf not in functions:
                raise TyirError(f"@{main.sym_name} calls @{op.callee.leaf}, which the module does not define")
            calls.setdefault(op.callee.leaf, []).append(op)
    uses, positions = _weight_uses(main), arguments(main, "position")
    by_address = {*caches, *arguments(main, "temperature")}
    return {
        name: _layout(keys_first(functions[name]), own, uses, by_address, positions, places)
        for name, own in calls.items()
    }


def _layout(
    function: Func,
    calls: Sequence[Call],
    uses: Mapping[str, int],
    by_address: Collection[Value],
    positions: Collection[Value],
    places: BoundaryPlaces,
) -> LayerLayout:
    packed: list[int] = []
    shared: dict[int, str] = {}
    addressed: list[int] = []
    activations: list[int] = []
    for index in range(len(function.args)):
        values = [call.operands[index] for call in calls]
        symbols = [v.op.symbol.leaf for v in values if isinstance(v.op, ty.GetGlobal)]
        if len(symbols) == len(values):
            if len(set(symbols)) == 1 and len(symbols) > 1:
                shared[index] = symbols[0]
            elif all(uses[s] == 1 for s in symbols):
                packed.append(index)
            else:
                addressed.append(index)
        elif all(root(v) in by_address for v in values):
            addressed.append(index)
        elif values[0] not in positions:
            activations.append(index)
    aliased = _aliased(function, addressed)
    boundary = boundary_of(function, activations, aliased, places)
    return LayerLayout(function, calls, packed, shared, addressed, activations, aliased, boundary)


def _aliased(function: Func, addressed: Sequence[int]) -> dict[int, int]:
    """The results that are caches, and the arguments that these are."""
    found: dict[int, int] = {}
    for index in range(len(function.function_type.results)):
        alias = alias_of(function, index)
        returned = root(function.body.terminator.operands[index])
        if alias is not None:
            found[index] = alias
        elif returned in function.args and function.args.index(returned) in addressed:
            found[index] = function.args.index(returned)
    return found


def _weight_uses(main: Func) -> dict[str, int]:
    """How many operands of main refer to each parameter."""
    uses: dict[str, int] = {}
    for op in main.body:
        if isinstance(op, ty.GetGlobal):
            uses[op.symbol.leaf] = uses.get(op.symbol.leaf, 0) + len(op.result.uses)
    return uses


def cache_arguments(main: Func) -> set[Value]:
    """Main's arguments that a result aliases."""
    caches: set[Value] = set()
    for index in range(len(main.body.terminator.operands)):
        if (alias := alias_of(main, index)) is not None:
            caches.add(main.args[alias])
    return caches


def symbol_of(value: Value) -> str:
    """The parameter that a value of main is."""
    assert isinstance(value.op, ty.GetGlobal), "only parameters are packed, see `find_layers`"
    return value.op.symbol.leaf
