"""One die's `program`-stage module to its edge10 command program.

    func.func @main_s1(%ids, %pos, %k0, %v0, ...)                  edge10.buffer @ids, @model.layers.0..., @k0, ... (DRAM addresses)
      ... embedding, calls of @layer_s1, norm, lm_head ...   -->   func.func @layer_s1(%weights, %k, %v : addresses, tokens) -> tokens
    func.func @layer_s1(%x, %w..., %k, %v, ...)                    func.func @main_s1()

Layers are lowered once: their weights lie in DRAM in the same order with the same distances, so one base
address per call says where they are. The tokens of a function say when each slot of the weight stream is
free and when everything else is done; the next layer's weights begin to load while this layer is still at
work.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tyir.attributes import DictAttr, IntegerAttr, StringAttr, SymbolRefAttr
from tyir.backends.edge10.lowering.body import find_groups, is_known
from tyir.backends.edge10.lowering.columns import MOST_ROWS, collective_block, summings
from tyir.backends.edge10.lowering.context import Lowering, Place, ResidualCopy
from tyir.backends.edge10.lowering.dependences import Tracker
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.order import keys_first
from tyir.backends.edge10.lowering.residual import waiting_sums
from tyir.backends.edge10.lowering.rows import row_blocks, rows_part
from tyir.backends.edge10.lowering.search import PricedEmitter, Prices, Search, products_ns
from tyir.backends.edge10.memory.allocate import ALIGNMENT, DramLayout, SramPlan, SramShares, align, sram_plan
from tyir.backends.edge10.memory.edited_plan import (
    activation_address,
    address_in,
    planned_places,
    read_shares,
    write_plan,
)
from tyir.backends.edge10.memory.live_check import live_problems
from tyir.backends.edge10.memory.places import (
    Boundary,
    BoundaryPlaces,
    Places,
    Scratch,
    assign_places,
    boundary_of,
    in_place,
    root,
)
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import edge10, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.kv import Append
from tyir.edge10.memory import program_problems
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import TensorType, f16, i64, ui8

__all__ = ["estimated_ns", "lower_die", "plan_die"]


def lower_die(
    die_module: Module,
    seqlen: int,
    machine: Machine,
    shares: SramShares | None = None,
    search: Search | None = None,
) -> Module:
    """The command program of one die for `seqlen` tokens a step: a module at stage `edge10` with its buffers,
    `@layer_s{n}`s and `@main_s{n}`.

    `shares` says how SRAM is divided; without it (and without a plan's word on it, `planned`) the best known
    division is searched for, and kept in `search` for programs of the same shapes.  `die_module` is at stage
    `program` (passes/README.md).  `TyirError` lists every op that has no lowering, or says what does not fit.
    """
    return _lowering_of(die_module, seqlen, machine, shares, search).lower()


def plan_die(
    die_module: Module, seqlen: int, machine: Machine, search: Search | None = None
) -> dict[str, int]:
    """Write the memory plan of a program on it, as attributes (`planned`): what `lower_die` decides, to be
    seen and changed before it is lowered.

    Returns what `memory_summary` says of the lowered program.  Raises as `lower_die`.
    """
    lowering = _lowering_of(die_module, seqlen, machine, None, search)
    summary = memory_summary(lowering.lower())
    lowering.write_plan()
    return summary


def _lowering_of(
    die_module: Module, seqlen: int, machine: Machine, shares: SramShares | None, search: Search | None
) -> _DieLowering:
    main = die_module.lookup(f"main_s{seqlen}")
    if not isinstance(main, Func):
        known = [
            f.sym_name.removeprefix("main_s")
            for f in die_module.body
            if isinstance(f, Func) and f.sym_name.startswith("main_s")
        ]
        raise TyirError(
            f"the module has no @main_s{seqlen}", help=f"sequence lengths here: {', '.join(known)}"
        )
    shares = (
        shares or read_shares(main) or _chosen_shares(die_module, main, seqlen, machine, search or Search())
    )
    return _DieLowering(die_module, main, seqlen, machine, shares)


def _chosen_shares(
    die_module: Module, main: Func, seqlen: int, machine: Machine, search: Search
) -> SramShares:
    """The division of SRAM for a program: the default for few tokens, the result of the search for many."""
    if seqlen * _sequences(main) <= machine.cube.rows:
        return SramShares()
    shapes = tuple(
        (op.name, op.properties, *(v.type for v in (*op.operands, *op.results)))
        for f in _reached(die_module, main)
        for op in f.body
    )
    key = (seqlen, tuple((n, c.value) for n, c in machine.constants.items()), shapes)
    return search.best_shares(lambda shares: _estimated_ns(die_module, main, seqlen, machine, shares), key)


def estimated_ns(die_module: Module, seqlen: int, machine: Machine, shares: SramShares) -> float:
    """About how long a step of `seqlen` tokens takes with this division of SRAM: what divisions are compared
    by (`search`).
    """
    main = die_module.lookup(f"main_s{seqlen}")
    assert isinstance(main, Func)
    return _estimated_ns(die_module, main, seqlen, machine, shares)


def _estimated_ns(die_module: Module, main: Func, seqlen: int, machine: Machine, shares: SramShares) -> float:
    layers = _DieLowering(die_module, main, seqlen, machine, shares).layers_ns()
    calls = [op.callee.leaf for op in main.body if isinstance(op, Call)]
    return sum(ns * calls.count(name) for name, ns in layers.items()) + products_ns(
        main, machine, sram_plan(machine, shares)
    )


def _reached(die_module: Module, main: Func) -> list[Func]:
    """The entry function and the layers it calls, each once."""
    names = dict.fromkeys(op.callee.leaf for op in main.body if isinstance(op, Call))
    return [main, *(f for n in names if isinstance(f := die_module.lookup(n), Func))]


@dataclass
class _Layer:
    """A layer function: what each of its arguments is, and where the activations lie."""

    function: Func
    calls: list[Call]
    packed: list[int] = field(default_factory=list)  # weights, found by the layer's base address
    offsets: dict[int, int] = field(default_factory=dict)
    shared: dict[int, str] = field(default_factory=dict)  # weights that are the same for every call
    addressed: list[int] = field(
        default_factory=list
    )  # caches, and weights without a pattern: an address argument each
    activations: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    aliased: dict[int, int] = field(default_factory=dict)  # result -> argument, for caches
    boundary: Boundary | None = None


class _DieLowering:
    def __init__(self, source: Module, main: Func, seqlen: int, machine: Machine, shares: SramShares) -> None:
        self.source, self.main, self.machine, self.seqlen = source, main, machine, seqlen
        self.shares = shares
        self.plan: SramPlan = sram_plan(machine, shares)
        die = source.attributes.get("tyir.die")
        self.die = die.value if isinstance(die, IntegerAttr) else 0
        self.module = Module.empty(source.sym_name)
        self.module.attributes = DictAttr(
            {
                "tyir.stage": StringAttr("edge10"),
                "tyir.die": IntegerAttr(self.die, i64),
                "tyir.seqlen": IntegerAttr(seqlen, i64),
                "tyir.machine": StringAttr(machine.name),
            }
        )
        self.dram = DramLayout(int(machine.dram.capacity_bytes))
        self.suffix = main.sym_name.removeprefix("main")
        self.caches = _cache_arguments(main)
        appends = (a for f in _reached(source, main) for a in f.walk_type(Append))
        self.capacity = next((a.capacity for a in appends), 0)  # positions of the caches
        self.layers = self._find_layers()
        # Activations of very many tokens lie in DRAM between layers: SRAM is for the rows that are worked on.
        self.boundary = BoundaryPlaces(
            self.plan.boundary if seqlen <= MOST_ROWS else 0, f"boundary{self.suffix}"
        )
        self.placed: dict[Func, tuple[Places, Mapping[Op, Scratch]]] = {}
        self.prices: Prices | None = (
            None  # when divisions of SRAM are compared, commands are priced and not written
        )

    def lower(self) -> Module:
        """The program."""
        self._lay_out()
        for layer in self.layers.values():
            self._lower_layer(layer)
        self._lower_main()
        self.dram.check()
        if problems := list(program_problems(self.module, self.machine)):
            raise TyirError(problems)
        return self.module

    def write_plan(self) -> None:
        """After `lower`: say on the source where everything lies."""
        functions = {name: layer.function for name, layer in self.layers.items()}
        write_plan(self.source, self.main, self.module, self.shares, functions, self.placed)

    def layers_ns(self) -> dict[str, float]:
        """About how long each layer function takes, from the prices of its commands."""
        self._lay_out()
        found: dict[str, float] = {}
        for name, layer in self.layers.items():
            self.prices = Prices(self.machine)
            self._lower_layer(layer)
            found[name] = self.prices.total_ns()
        return found

    def _lay_out(self) -> None:
        self._check_ops()
        self._lay_out_weights()
        self._lay_out_arguments()
        for layer in self.layers.values():
            layer.boundary = boundary_of(layer.function, layer.activations, layer.aliased, self.boundary)
        if self.boundary.dram_bytes:
            self._activations(self.boundary.symbol, TensorType((self.boundary.dram_bytes,), ui8))

    # -- what there is
    # --------------------------------------------------------------------------------------------
    def _functions(self) -> list[Func]:
        return [*(layer.function for layer in self.layers.values()), self.main]

    def _check_ops(self) -> None:
        unknown: dict[str, Op] = {}
        for function in self._functions():
            for op in function.body:
                if not is_known(op):
                    unknown.setdefault(op.name, op)
        if unknown:
            raise TyirError(
                Diagnostic(
                    f"'{name}' has no edge10 command",
                    where=str(op.loc),
                    help=(
                        "the passes before lower-edge10 should have removed it; see passes/README.md for the"
                        " stages"
                    ),
                )
                for name, op in unknown.items()
            )

    def _find_layers(self) -> dict[str, _Layer]:
        functions = {f.sym_name: f for f in self.source.body if isinstance(f, Func)}
        layers: dict[str, _Layer] = {}
        for op in self.main.body:
            if isinstance(op, Call):
                name = op.callee.leaf
                if name not in functions:
                    raise TyirError(f"@{self.main.sym_name} calls @{name}, which the module does not define")
                if name not in layers:
                    layers[name] = _Layer(keys_first(functions[name]), [])
                layers[name].calls.append(op)
        uses = _weight_uses(self.main)
        for layer in layers.values():
            self._classify(layer, uses)
        return layers

    def _classify(self, layer: _Layer, uses: Mapping[str, int]) -> None:
        for index in range(len(layer.function.args)):
            values = [call.operands[index] for call in layer.calls]
            symbols = [v.op.symbol.leaf for v in values if isinstance(v.op, ty.GetGlobal)]
            if len(symbols) == len(values):
                if len(set(symbols)) == 1 and len(symbols) > 1:
                    layer.shared[index] = symbols[0]
                elif all(uses[s] == 1 for s in symbols):
                    layer.packed.append(index)
                else:
                    layer.addressed.append(index)
            elif all(root(_through_calls(v, layer.calls)) in self.caches for v in values):
                layer.addressed.append(index)
            elif _is_position(values[0].type):
                layer.positions.append(index)
            else:
                layer.activations.append(index)
        for index in range(len(layer.function.function_type.results)):
            alias = layer.function.res_attr(index).get("tyir.alias")
            returned = root(layer.function.body.terminator.operands[index])
            if isinstance(alias, IntegerAttr):
                layer.aliased[index] = alias.value
            elif returned in layer.function.args and layer.function.args.index(returned) in layer.addressed:
                layer.aliased[index] = layer.function.args.index(returned)

    # -- DRAM
    # -----------------------------------------------------------------------------------------------------
    def _buffer(
        self,
        name: str,
        kind: str,
        type: TensorType,
        planned: int | None,
        alignment: int = 4096,
        **attributes: int,
    ) -> None:
        """Declare a buffer, at the address that a plan gives it or at the next one."""
        address = self.dram.take(kind, type.nbytes, alignment, planned)
        notes = DictAttr({f"tyir.{k}": IntegerAttr(v, i64) for k, v in attributes.items()})
        self.module.body.append(
            edge10.Buffer(
                sym_name=name, address=address, nbytes=type.nbytes, kind=kind, type=type, attributes=notes
            )
        )

    def _activations(self, name: str, type: TensorType) -> None:
        self._buffer(name, "activation", type, activation_address(self.source, name))

    def _lay_out_weights(self) -> None:
        """Parameters in the order of the module, except that a layer's lie together, each argument's at the
        same distance from the first.

        What another sequence length alone uses has its place too: weights and caches are shared, so all
        lengths' programs must find them at the same addresses.
        """
        params = {p.sym_name: p for p in self.source.body if isinstance(p, ty.Param)}
        planned = {name: address_in(p.attributes) for name, p in params.items()}
        types = {name: p.type for name, p in params.items()}
        for name, value in _weight_types(self.main).items():
            types.setdefault(name, value)
        in_layers: dict[str, tuple[_Layer, Call]] = {}
        for layer in self.layers.values():
            for call in layer.calls:
                for index in layer.packed:
                    in_layers[_symbol(call.operands[index])] = (layer, call)
            layer.offsets = _relative_offsets(layer)
        used = _weight_types(self.main)
        done: set[Call] = set()
        for name in types:
            if name not in used:
                self.dram.take("weight", types[name].nbytes, planned=planned.get(name))
                continue
            if name not in in_layers:
                self._buffer(name, "weight", types[name], planned.get(name))
                continue
            layer, call = in_layers[name]
            if call not in done:
                done.add(call)
                for number, index in enumerate(layer.packed):
                    symbol = _symbol(call.operands[index])
                    self._buffer(
                        symbol,
                        "weight",
                        types[symbol],
                        planned.get(symbol),
                        4096 if number == 0 else ALIGNMENT,
                    )

    def _lay_out_arguments(self) -> None:
        """The caches first, after the weights: what follows them differs from length to length."""
        self.argument_names: dict[Value, str] = {}
        arguments = [(i, v) for i, v in enumerate(self.main.args) if not _is_position(v.type)]
        for index, value in sorted(arguments, key=lambda pair: pair[1] not in self.caches):
            given = self.main.arg_attr(index).get("tyir.name")
            name = given.value if isinstance(given, StringAttr) else value.name or f"arg{index}"
            self.argument_names[value] = name
            kind = "kv" if value in self.caches else "input"
            notes = {"argument": index, **({"capacity": self.capacity} if kind == "kv" else {})}
            self._buffer(name, kind, ty.tensor_type(value), address_in(self.main.arg_attr(index)), **notes)

    # -- functions
    # ------------------------------------------------------------------------------------------------
    def _lower_layer(self, layer: _Layer) -> None:
        assert layer.boundary is not None
        source = layer.function
        addresses = [
            f"weights{source.sym_name.removeprefix('layer')}",
            *(source.args[i].name or f"a{i}" for i in layer.addressed),
        ]
        slots = self.plan.slots
        function = Func.make(
            source.sym_name,
            [*[edge10.ADDRESS] * len(addresses), *[edge10.TOKEN] * (len(slots) + 1)],
            [*addresses, *[f"slot{i}" for i in range(len(slots))], "ready"],
        )
        function.sym_visibility = "private"
        arguments = function.args
        tokens = arguments[len(addresses) :]
        low = self._lowering(function, Tracker(slots, tokens[:-1], tokens[-1]))
        given = self._given(layer, arguments)
        if self._takes_rows(layer):
            for first, count in self._row_blocks():
                self._lower_rows(layer, low, given, first, count)
        else:
            self._lower_layer_body(source, layer.boundary, low, given, self.boundary.sram_bytes)
        slot_tokens, rest = low.emitter.tracker.finish()
        function.body.append(Return(values=[low.emitter.join(t) for t in (*slot_tokens, rest)]))
        function.refresh_type()
        self.module.body.append(function)

    @staticmethod
    def _given(layer: _Layer, arguments: Sequence[Value]) -> dict[int, Place]:
        """Where a layer's weights and caches lie, by argument: its own arguments are addresses."""
        given = {i: Place("dram", layer.offsets[i], arguments[0], constant=True) for i in layer.packed}
        given.update({i: Place("dram", 0, symbol, constant=True) for i, symbol in layer.shared.items()})
        for number, index in enumerate(layer.addressed):
            is_weight = isinstance(layer.calls[0].operands[index].op, ty.GetGlobal)
            given[index] = Place("dram", 0, arguments[1 + number], constant=is_weight)
        return given

    def _lower_layer_body(
        self, source: Func, boundary: Boundary, low: Lowering, given: Mapping[int, Place], first: int
    ) -> None:
        """A layer's ops; its own activations lie in SRAM from offset `first` on."""
        fixed: dict[Value, Place] = {source.args[i]: p for i, p in boundary.arguments.items()}
        fixed.update(in_place(source, boundary))
        fixed.update({root(source.body.terminator.operands[i]): p for i, p in boundary.results.items()})
        if self.shares.waiting_sums:
            self._keep_sums_in_dram(source, low, fixed)
        fixed.update({source.args[i]: place for i, place in given.items()})
        self._lower_body(source, low, fixed, first)

    def _takes_rows(self, layer: _Layer) -> bool:
        """Whether a layer has more tokens than are worked on at once, in all that it takes and gives."""
        types = [ty.tensor_type(layer.function.args[i]) for i in layer.activations]
        return self.seqlen > MOST_ROWS and all(
            t.rank >= 3 and t.static_shape[:2] == (1, self.seqlen) for t in types
        )

    def _row_blocks(self) -> list[tuple[int, int]]:
        """The blocks of rows; when they are only priced, one of each size."""
        blocks = list(row_blocks(self.seqlen, self.machine))
        if self.prices is None:
            return blocks
        return list({count: (first, count) for first, count in blocks}.values())

    def _lower_rows(
        self, layer: _Layer, low: Lowering, given: Mapping[int, Place], first: int, count: int
    ) -> None:
        """A layer for `count` tokens: their rows are brought to where the layer works, and its results
        back.
        """
        assert layer.boundary is not None
        part = rows_part(layer.function, self.seqlen, first, count)
        start = self.boundary.sram_bytes
        places = BoundaryPlaces(max(self.plan.boundary - start, 0), f"rows.{part.sym_name}", start)
        boundary = boundary_of(part, layer.activations, layer.aliased, places)
        if places.dram_bytes:
            self._activations(places.symbol, TensorType((places.dram_bytes,), ui8))
        low.first_token = first
        low.emitter.begin(next(iter(part.body)))
        for index, place in boundary.arguments.items():
            nbytes = ty.tensor_type(part.args[index]).nbytes
            low.move(layer.boundary.arguments[index].at(nbytes // count * first), place, nbytes)
        self._lower_layer_body(part, boundary, low, given, start + places.sram_bytes)
        for index, place in boundary.results.items():
            nbytes = ty.tensor_type(part.body.terminator.operands[index]).nbytes
            low.move(place, layer.boundary.results[index].at(nbytes // count * first), nbytes)

    def _keep_sums_in_dram(self, source: Func, low: Lowering, fixed: dict[Value, Place]) -> None:
        """Give the norms of waiting sums the sums' places, and the sums copies in DRAM (`residual`)."""
        sums = summings(source, self.machine)
        for number, (value, normed) in enumerate(waiting_sums(sums).items()):
            place = fixed.get(value)
            if place is not None and place.in_sram:
                fixed[normed] = place
                *outer, columns = ty.tensor_type(value).static_shape
                rows, name = math.prod(outer), f"waiting{number}.{source.sym_name}"
                self._activations(name, TensorType((rows, columns), f16))
                low.waits[value] = normed
                low.copies[value] = ResidualCopy(
                    Place("dram", 0, name), rows, columns, collective_block(rows, 2, self.machine)
                )

    def _lower_main(self) -> None:
        function = Func.make(self.main.sym_name, [])
        start = function.body.append(edge10.Join(tokens=())).result
        slots = self.plan.slots
        low = self._lowering(function, Tracker(slots, [start] * len(slots), start))
        fixed: dict[Value, Place] = {
            v: Place("dram", 0, name, constant=v not in self.caches)
            for v, name in self.argument_names.items()
        }
        for op in self.main.body:
            if isinstance(op, ty.GetGlobal):
                fixed[op.result] = Place("dram", 0, op.symbol.leaf, constant=True)
        late = self._fix_results(fixed)
        self._lower_body(self.main, low, fixed, self.boundary.sram_bytes)
        for value, place in late:
            low.move(low.place(value), place, ty.tensor_type(value).nbytes)
        function.body.append(Return(values=[]))
        function.refresh_type()
        self.module.body.append(function)

    def _fix_results(self, fixed: dict[Value, Place]) -> list[tuple[Value, Place]]:
        """Main's results are output buffers; what layers take and give lies at their boundary.

        Returns the results that lie elsewhere (a layer's result, an input) and must be copied to their buffer
        at the end.
        """
        for op in self.main.body:
            if not isinstance(op, Call):
                continue
            layer = self.layers[op.callee.leaf]
            assert layer.boundary is not None
            for index, argument in layer.aliased.items():
                fixed[op.results[index]] = fixed[root(op.operands[argument])]
            for index, place in layer.boundary.results.items():
                fixed[op.results[index]] = place
        caches = {self.argument_names[v] for v in self.caches}
        late: list[tuple[Value, Place]] = []
        for index, value in enumerate(self.main.body.terminator.operands):
            known = fixed.get(root(value))
            if known is not None and known.base in caches:
                continue
            given = self.main.res_attr(index).get("tyir.name")
            name = given.value if isinstance(given, StringAttr) else f"output{index}" if index else "logits"
            self._buffer(
                name, "output", ty.tensor_type(value), address_in(self.main.res_attr(index)), result=index
            )
            if known is None:
                fixed[root(value)] = Place("dram", 0, name)
            else:
                late.append((value, Place("dram", 0, name)))
        for op in self.main.body:
            if isinstance(op, Call):
                self._coalesce(op, fixed)
        return late

    def _coalesce(self, call: Call, fixed: dict[Value, Place]) -> None:
        """A value made only to be a layer's argument is made at the layer's boundary, if nobody wants it
        after the layer has overwritten it.
        """
        layer = self.layers[call.callee.leaf]
        assert layer.boundary is not None
        order = {op: n for n, op in enumerate(self.main.body)}
        for index, place in layer.boundary.arguments.items():
            value = root(call.operands[index])
            if value in fixed or value.op is None:
                continue
            users = [
                u for alias in _aliases(value, self.main) for u in alias.uses if not isinstance(u, ty.Reshape)
            ]
            overwritten = index in layer.boundary.overwritten
            if all(_takes_at(u, value, layer, index) for u in users) and (
                not overwritten or all(order[u] <= order[call] for u in users)
            ):
                fixed[value] = place

    def _lowering(self, function: Func, tracker: Tracker) -> Lowering:
        emitter = (
            Emitter(function.body, tracker)
            if self.prices is None
            else PricedEmitter(function.body, tracker, self.prices)
        )
        return Lowering(emitter, self.machine, self.plan, self.die)

    def _lower_body(self, source: Func, low: Lowering, fixed: dict[Value, Place], first: int) -> None:
        spill = f"spill.{source.sym_name}"
        held = [v for v, place in fixed.items() if place.in_sram]
        groups = find_groups(source, self.plan.arena - first, self.machine, self.plan, held)
        decided = assign_places(source, fixed, first, self.plan.arena, spill, groups.anchors, groups.scratch)
        given = planned_places(source, decided, fixed, groups.scratch)
        if problems := list(live_problems(source, given, fixed, groups.scratch, groups.anchors, low.waits)):
            raise TyirError(problems)
        self.placed[source] = given, groups.scratch
        if given.spill_bytes:
            self._activations(spill, TensorType((given.spill_bytes,), ui8))
        for value in (
            *source.args,
            *(v for op in source.body if op not in groups.anchors for v in op.results),
        ):
            if root(value) in given.values:
                low.places[value] = given.values[root(value)]
        for op in source.body:
            if isinstance(op, Call):
                low.emitter.begin(op)
                self._call(op, low)
            else:
                groups.lower(op, low, given.scratch)

    def _call(self, op: Call, low: Lowering) -> None:
        layer = self.layers[op.callee.leaf]
        assert layer.boundary is not None
        for index, target in layer.boundary.arguments.items():
            value = op.operands[index]
            if low.place(value) != target:
                _check_free(op, root(value), target, low)
            low.move(low.place(value), target, ty.tensor_type(value).nbytes)
        emitter = low.emitter
        base = (
            _symbol(op.operands[layer.packed[0]])
            if layer.packed
            else next(iter(self.argument_names.values()))
        )
        addresses = [emitter.address_of(base)]
        for index in layer.addressed:
            addresses.append(low.address(low.place(op.operands[index])))
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


def _relative_offsets(layer: _Layer) -> dict[int, int]:
    """Byte distance of each packed weight from the first."""
    offsets, end = {}, 0
    for index in layer.packed:
        offsets[index] = align(end)
        end = offsets[index] + ty.tensor_type(layer.function.args[index]).nbytes
    return offsets


def _symbol(value: Value) -> str:
    assert isinstance(value.op, ty.GetGlobal)
    return value.op.symbol.leaf


def _weight_uses(main: Func) -> dict[str, int]:
    """How many operands of main refer to each parameter."""
    uses: dict[str, int] = {}
    for op in main.body:
        if isinstance(op, ty.GetGlobal):
            uses[op.symbol.leaf] = uses.get(op.symbol.leaf, 0) + len(op.result.uses)
    return uses


def _weight_types(main: Func) -> dict[str, TensorType]:
    return {op.symbol.leaf: ty.tensor_type(op.result) for op in main.body if isinstance(op, ty.GetGlobal)}


def _sequences(main: Func) -> int:
    """How many sequences a step runs: as many as it has positions."""
    return next((ty.tensor_type(a).static_shape[0] for a in main.args if _is_position(a.type)), 1)


def _is_position(type: object) -> bool:
    """`pos` [b] i32: the only rank-1 integer input."""
    return isinstance(type, TensorType) and type.rank == 1 and str(type.element) == "i32"


def _cache_arguments(main: Func) -> set[Value]:
    """Main's arguments that a result aliases."""
    caches: set[Value] = set()
    for index in range(len(main.body.terminator.operands)):
        alias = main.res_attr(index).get("tyir.alias")
        if isinstance(alias, IntegerAttr):
            caches.add(main.args[alias.value])
    return caches


def _through_calls(value: Value, calls: Sequence[Call]) -> Value:
    """The argument a value is, when layers hand it on (no layer does today, each cache is used by one
    layer).
    """
    return value


def _aliases(value: Value, function: Func) -> list[Value]:
    """A value and all reshapes of it."""
    return [
        value,
        *(r for op in function.body if isinstance(op, ty.Reshape) for r in op.results if root(r) is value),
    ]


def _check_free(call: Call, value: Value, target: Place, low: Lowering) -> None:
    """`TyirError` when moving an argument to its place would destroy another value that is still wanted."""
    following: Op | None = call
    while following is not None:
        for other in following.operands:
            if (
                root(other) is not value
                and other.op is not None
                and other in low.places
                and low.places[other] == target
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


def _takes_at(user: Op, value: Value, layer: _Layer, index: int) -> bool:
    """Whether a user is a call of this layer that takes the value as this argument, or an op that leaves it
    alone.
    """
    if not isinstance(user, Call):
        return True
    return user in layer.calls and all(i == index for i, v in enumerate(user.operands) if root(v) is value)
