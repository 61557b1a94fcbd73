"""The pass `plan-memory`: where weights, caches and activations of every die and length lie, written on the
program for all to see.

    func.func @layer_s8(...)  { %h = ty.rms_norm(%x, %w) ... }
    -->
    edge10.buffer @spill.layer_s8 {address = ..., nbytes = ...}
    func.func @layer_s8(...)  { %h = ty.rms_norm(%x, %w) {tyir.place = "sram 16384..31744"} ... }

Runs on a module at stage `program`, which it remains at; lower-edge10 follows the plan, changed by hand or
not, and makes the same of a program without one. What attributes a plan consists of stands in
`backends/edge10/memory/edited_plan.py`.  Statistics are the largest die's bytes, over all lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.backends.edge10.lowering.die import plan_die
from tyir.backends.edge10.lowering.search import Search
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.execution.entry_points import entry_points
from tyir.ir import Op
from tyir.pipeline import Pass, PassContext
from tyir.targets.machine import load_machine

__all__ = ["PlanMemory", "dies_of"]


@dataclass(frozen=True)
class PlanMemory(Pass):
    """`machine` names the machine file."""

    stage: ClassVar[tuple[str, ...]] = ("program",)

    machine: str = "edge10"

    def run(self, op: Op, context: PassContext) -> None:
        machine, search = load_machine(self.machine), Search()
        for die in dies_of(op):
            for length in entry_points(die):
                for kind, nbytes in plan_die(die, length, machine, search).items():
                    context.statistics[kind] = max(context.statistics.get(kind, 0), nbytes)


def dies_of(op: Op) -> list[Module]:
    """The dies of a module at stage `program`; `TyirError` when it has none."""
    dies = [o for o in op.body if isinstance(o, Module)]
    if not dies:
        raise TyirError(
            "the module holds no dies",
            help="run partition-dies, specialize-seqlen, outline-params and outline-layers first",
        )
    return dies
