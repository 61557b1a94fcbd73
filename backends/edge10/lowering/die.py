"""One die's `program`-stage module to its edge10 command program.

    func.func @main_s1(%ids, %pos, %k0, %v0, ...)                  edge10.buffer @ids, @model.layers.0..., @k0, ... (DRAM addresses)
      ... embedding, calls of @layer_s1, norm, lm_head ...   -->   func.func @layer_s1(%weights, %k, %v : addresses, tokens) -> tokens
    func.func @layer_s1(%x, %w..., %k, %v, ...)                    func.func @main_s1()

Layers are lowered once (`layers`, `layer_lowering`): their weights lie in DRAM in the same order with the
same distances (`dram_buffers`), so one base address per call (`main_lowering`) says where they are. The tokens of
a function say when each slot of the weight stream is free and when everything else is done; the next layer's
weights begin to load while this layer is still at work.
"""  # noqa: E501

from __future__ import annotations

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.backends.edge10.lowering.body_lowering import BodyLowering
from tyir.backends.edge10.lowering.columns import MOST_ROWS
from tyir.backends.edge10.lowering.dram_buffers import DramBuffers
from tyir.backends.edge10.lowering.groups import is_known
from tyir.backends.edge10.lowering.layer_lowering import LayerLowering
from tyir.backends.edge10.lowering.layers import cache_arguments, find_layers, reached
from tyir.backends.edge10.lowering.main_lowering import MainLowering
from tyir.backends.edge10.lowering.search import CANDIDATES, TALL, Prices, Search, products_ns
from tyir.backends.edge10.memory.allocate import SramShares, sram_plan
from tyir.backends.edge10.memory.edited_plan import read_shares, write_plan
from tyir.backends.edge10.memory.places import BoundaryPlaces
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.kv import Append
from tyir.edge10.memory import program_problems
from tyir.execution.entry_points import arguments, entry_point, mark_entry
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import i64

__all__ = ["lower_die", "plan_die"]


def lower_die(
    die_module: Module,
    seqlen: int,
    machine: Machine,
    shares: SramShares | None = None,
    search: Search | None = None,
) -> Module:
    """The command program of one die for `seqlen` tokens a step: a module at stage `edge10` with its buffers,
    layer functions and entry point.

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
    main = entry_point(die_module, seqlen)
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
        for f in reached(die_module, main)
        for op in f.body
    )
    key = (seqlen, tuple((n, c.value) for n, c in machine.constants.items()), shapes)
    dense = not any(isinstance(op, ty.QuantizedLinear) for f in reached(die_module, main) for op in f.body)
    candidates = TALL if dense and seqlen > MOST_ROWS else CANDIDATES
    return search.best_shares(
        lambda shares: _estimated_ns(die_module, main, seqlen, machine, shares), key, candidates
    )


def _estimated_ns(die_module: Module, main: Func, seqlen: int, machine: Machine, shares: SramShares) -> float:
    layers = _DieLowering(die_module, main, seqlen, machine, shares).layers_ns()
    calls = [op.callee.leaf for op in main.body if isinstance(op, Call)]
    return sum(ns * calls.count(name) for name, ns in layers.items()) + products_ns(
        main, machine, sram_plan(machine, shares)
    )


class _DieLowering:
    """One program: what there is (layers, buffers), then the layers, then the entry function."""

    def __init__(self, source: Module, main: Func, seqlen: int, machine: Machine, shares: SramShares) -> None:
        self.source, self.main, self.seqlen, self.machine = source, main, seqlen, machine
        self.shares = shares
        plan = sram_plan(machine, shares)
        die = source.attributes.get("tyir.die")
        number = die.value if isinstance(die, IntegerAttr) else 0
        self.program = Module.empty(source.sym_name)
        self.program.attributes = DictAttr(
            {
                "tyir.stage": StringAttr("edge10"),
                "tyir.die": IntegerAttr(number, i64),
                "tyir.machine": StringAttr(machine.name),
            }
        )
        self.buffers = DramBuffers(source, self.program, int(machine.dram.capacity_bytes))
        self.bodies = BodyLowering(machine, plan, number, self.buffers)
        # Activations of very many tokens lie in DRAM between layers: SRAM is for the rows that are worked on.
        self.boundary = BoundaryPlaces(plan.boundary if seqlen <= MOST_ROWS else 0, f"boundary_s{seqlen}")
        self.caches = cache_arguments(main)
        self.layers = find_layers(source, main, self.caches, self.boundary)
        self.layer_lowering = LayerLowering(
            self.bodies, self.boundary, seqlen, sums_may_wait=shares.waiting_sums
        )

    def lower(self) -> Module:
        """The program."""
        places = self._lay_out()
        for layer in self.layers.values():
            self.program.body.append(self.layer_lowering.lower(layer))
        main = MainLowering(self.main, self.layers, places, self.caches, self.bodies)
        entry = main.lower(self.boundary.sram_bytes)
        mark_entry(entry, self.seqlen)
        self.program.body.append(entry)
        self.buffers.check()
        if problems := list(program_problems(self.program, self.machine)):
            raise TyirError(problems)
        return self.program

    def write_plan(self) -> None:
        """After `lower`: say on the source where everything lies."""
        functions = {name: layer.function for name, layer in self.layers.items()}
        write_plan(self.source, self.main, self.program, self.shares, functions, self.bodies.placed)

    def layers_ns(self) -> dict[str, float]:
        """About how long each layer function takes, from the prices of its commands."""
        self._check_ops()  # where weights and caches lie has no price
        found: dict[str, float] = {}
        for name, layer in self.layers.items():
            prices = Prices(self.machine)
            self.layer_lowering.lower(layer, prices)
            found[name] = prices.total_ns()
        return found

    def _lay_out(self) -> dict[Value, str]:
        """Declare the buffers that all functions share; returns the names of main's arguments."""
        self._check_ops()
        self.buffers.add_weights(self.main, self.layers.values())
        appends = (a for f in reached(self.source, self.main) for a in f.walk_type(Append))
        capacity = next((a.capacity for a in appends), 0)
        places = self.buffers.add_arguments(self.main, self.caches, capacity)
        self.buffers.add_bytes(self.boundary.symbol, self.boundary.dram_bytes)
        return places

    def _check_ops(self) -> None:
        unknown: dict[str, Op] = {}
        for function in (*(layer.function for layer in self.layers.values()), self.main):
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


def _sequences(main: Func) -> int:
    """How many sequences a step runs: as many as it has positions."""
    return next((ty.tensor_type(a).static_shape[0] for a in arguments(main, "position")), 1)
