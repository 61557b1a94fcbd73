"""The memory plans of real models' shapes (two layers, the real vocabulary), replayed command by command on
every number of dies.

pytest tests/e2e/test_memory_plans.py --slow -s      # prints one line for each configuration
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.e2e.real_shapes import MODELS, partition
from tests.llm import build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.edge10.memory import shared_problems
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.timing.program import EdgeProgram, alike_programs
from tyir.targets.machine import load_machine

__all__ = ["CAPACITY", "Checked", "checked_plans", "table_head", "table_line"]

CAPACITY: Final = 1024
LENGTHS: Final = {
    1: CAPACITY - 1,
    8: 0,
}  # tokens a step, and where the step that is replayed begins: a full cache, an empty one


@dataclass(frozen=True)
class Checked:
    """A configuration whose plan was replayed: the largest die's bytes by kind, and how many commands of how
    many different dies were looked at.
    """

    model: str
    weights: str
    kv: str
    dies: int
    memory: dict[str, int]
    commands: int
    programs: int


def checked_plans(name: str, int4: bool, kv: str, dies: Sequence[int]) -> Iterator[Checked]:
    """Lower and replay; `TyirError` at the first bad access."""
    machine, model = load_machine("edge10"), MODELS[name]
    for count in dies:
        module, _ = build(model.shape(2, model.vocabulary), draw=False)
        lengths = ",".join(map(str, LENGTHS))
        partition(
            module,
            count,
            int4,
            f"specialize-seqlen{{seqlens={lengths}}},to-program",
            f"max-kv={CAPACITY} dtype={kv}",
        )
        memory: dict[str, int] = {}
        commands = kinds = 0
        buffers: list[list[list[edge10.Buffer]]] = []  # by length and die
        for length, position in LENGTHS.items():
            programs = []
            for die in dies_of(module):
                lowered = lower_die(die, length, machine)
                memory = {k: max(v, memory.get(k, 0)) for k, v in memory_summary(lowered).items()}
                programs.append(EdgeProgram(lowered))
            check_programs(programs, machine, (position,))
            buffers.append([list(p.buffers.values()) for p in programs])
            different = [programs[alike[0]] for alike in alike_programs(programs)]
            commands, kinds = (
                commands + sum(len(p.expand(position)) for p in different),
                kinds + len(different),
            )
        if problems := [p for first, second in zip(*buffers) for p in shared_problems(first, second)]:
            raise TyirError(problems)
        yield Checked(name, "int4" if int4 else "fp16", kv, count, memory, commands, kinds)


def table_head() -> str:
    """The columns of `table_line`."""
    return f"{'model':<30}{'':>6}{'KV':>6}{'dies':>5}{'weights':>12}{'cache':>10}{'activ.':>10}{'DRAM':>12}{'SRAM':>10}{'commands':>10}{'programs':>9}"  # noqa: E501


def table_line(row: Checked) -> str:
    """One configuration that passed; KiB of the largest die."""
    kib = [f"{row.memory[k] / 1024:,.0f}" for k in ("weights", "kv", "activations", "dram", "sram")]
    return (
        f"{row.model:<30}{row.weights:>6}{row.kv:>6}{row.dies:>5}{kib[0]:>12}{kib[1]:>10}{kib[2]:>10}{kib[3]:>12}{kib[4]:>10}"
        f"{row.commands:>10,}{row.programs:>9}"
    )
