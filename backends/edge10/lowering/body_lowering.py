"""The body of any function: first the groups of its ops, then the places of its values, then the commands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tyir.backends.edge10.lowering.columns import MOST_ROWS
from tyir.backends.edge10.lowering.context import Lowering, Place
from tyir.backends.edge10.lowering.dependences import Tracker
from tyir.backends.edge10.lowering.dram_buffers import DramBuffers
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.groups import find_groups
from tyir.backends.edge10.lowering.search import PricedEmitter, Prices
from tyir.backends.edge10.memory.allocate import SramPlan
from tyir.backends.edge10.memory.edited_plan import planned_places
from tyir.backends.edge10.memory.live_check import live_problems
from tyir.backends.edge10.memory.places import Places, Scratch, assign_places, root, used_until
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import TensorType

__all__ = ["BodyLowering"]


def _no_calls(call: Call, lowering: Lowering) -> None:
    raise TyirError(f"@{call.callee.leaf} is called by a layer; only the entry function may call layers")


def _many_rows(op: Op) -> bool:
    """Whether temporaries bound how many columns of an op's results are handed on together: of few rows the
    accumulators do.
    """
    shapes = [v.type.static_shape for v in op.results if isinstance(v.type, TensorType)]
    return any(math.prod(shape[:-1]) > MOST_ROWS for shape in shapes)


class BodyLowering:
    """Lowers bodies of one die's functions, and remembers where it has `placed` their values and scratch."""

    def __init__(self, machine: Machine, plan: SramPlan, die: int, buffers: DramBuffers) -> None:
        self.machine, self.plan, self.die, self.buffers = machine, plan, die, buffers
        self.placed: dict[Func, tuple[Places, Mapping[Op, Scratch]]] = {}

    def begin(self, function: Func, tracker: Tracker, prices: Prices | None = None) -> Lowering:
        """What lowering a function needs at hand; with `prices`, commands are priced and not written."""
        emitter = (
            Emitter(function.body, tracker)
            if prices is None
            else PricedEmitter(function.body, tracker, prices)
        )
        return Lowering(emitter, self.machine, self.plan, self.die)

    def lower(
        self,
        source: Func,
        lowering: Lowering,
        fixed: Mapping[Value, Place],
        first: int,
        lower_call: Callable[[Call, Lowering], None] = _no_calls,
        tail: Sequence[Op] = (),
    ) -> None:
        """The commands of the ops of `source`; `fixed` values have their places, others may have SRAM from
        offset `first` on.  `tail`: its last ops, which run where a row is wanted.
        """
        spill = f"spill.{source.sym_name}"
        held = [v for v, place in fixed.items() if place.in_sram]
        groups = find_groups(source, self.plan.arena - first, self.machine, self.plan, held)
        decided = assign_places(source, fixed, first, self.plan.arena, spill, groups.anchors, groups.scratch)
        places = planned_places(source, decided, fixed, groups.scratch)
        problems = live_problems(source, places, fixed, groups.scratch, groups.anchors, lowering.waits)
        if found := list(problems):
            raise TyirError(found)
        self.placed[source] = places, groups.scratch
        self.buffers.add_bytes(spill, places.spill_bytes)
        made = [v for op in source.body if op not in groups.anchors for v in op.results]
        for value in (*source.args, *made):
            if root(value) in places.values:
                lowering.places[value] = places.values[root(value)]
        lowering.halved = groups.halved
        used = used_until(source, places, groups.scratch, groups.anchors)
        around = lowering.emitter
        for op in source.body:
            if tail and op is tail[0]:
                lowering.emitter = self._optional(around)
            lowering.spare = max(self.plan.arena - max(used[op], first), 0) if _many_rows(op) else 0
            if isinstance(op, Call):
                lowering.emitter.begin(op)
                lower_call(op, lowering)
            else:
                groups.lower(op, lowering, places.scratch)
        if tail:
            lowering.emitter.end_optional()
            around.optional(lowering.emitter.block, lowering.emitter.tracker)
            lowering.emitter = around

    def _optional(self, around: Emitter) -> Emitter:
        """For a body that may be left out."""
        slots = self.plan.slots
        block = Emitter.body(len(slots) + 1)
        _, *tokens, rest = block.args
        return around.nested(block, Tracker(slots, tokens, rest))
