"""The pass `lower-edge10`: every die's program of one sequence length becomes its edge10 command program.

    builtin.module @die0 { ty.param ..., @layer_s8 ..., @main_s8 ..., @main_s1 ... }
    -->
    builtin.module @die0 { edge10.buffer ..., @layer_s8 (commands), @main_s8 (commands) }

Runs on a module at stage `program`; what is written to `llm_die{i}.edge10` is one of the die modules.  A
memory plan on the program is followed (plan-memory).  The work is `lower.lower_die`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.plan_memory import dies_of
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Global, Param
from tyir.execution.entry_points import entry_points
from tyir.ir import Op
from tyir.pipeline import Pass, PassContext
from tyir.targets.machine import load_machine

__all__ = ["LowerEdge10"]


@dataclass(frozen=True)
class LowerEdge10(Pass):
    """`seqlen` chooses the program (0: the only one there is); `machine` names the machine file."""

    stage: ClassVar[tuple[str, ...]] = ("program",)
    to_stage: ClassVar[str | None] = "edge10"

    seqlen: int = 0
    machine: str = "edge10"

    def run(self, op: Op, context: PassContext) -> None:
        machine, search = load_machine(self.machine), Search()
        for die in dies_of(op):
            lowered = lower_die(die, self.seqlen or _only_length(die), machine, search=search)
            context.statistics["commands"] = context.statistics.get("commands", 0) + sum(
                1 for _ in lowered.walk()
            )
            lowered.insert_before(die)
            die.erase()
        for leftover in [o for o in op.body if isinstance(o, (Global, Param))]:
            leftover.erase()


def _only_length(die: Module) -> int:
    """The sequence length of a die that has one program."""
    lengths = list(entry_points(die))
    if len(lengths) != 1:
        raise TyirError(
            f"the module has programs for {len(lengths)} sequence lengths: {', '.join(map(str, lengths))}",
            help="choose one: lower-edge10{seqlen=1}",
        )
    return lengths[0]
