"""A die's command program: its functions and buffers, what it is equal to, and its steps (`unroll`)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import cached_property
from typing import Final, Self
from weakref import WeakKeyDictionary

from tyir.artifacts.agreement import check_commands
from tyir.attributes import IntegerAttr
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.edge10.binary import program_of
from tyir.edge10.memory import sram_bytes
from tyir.execution.artifacts import Artifacts
from tyir.execution.entry_points import ENTRY, entry_points
from tyir.ir import Block, Value
from tyir.manifest import MACHINE, DieProgram
from tyir.parser import parse_module
from tyir.runtime_sim.timing.unroll import Command, Kinds, Position, Step, unroll
from tyir.stages import stage_of
from tyir.targets.machine import Machine, load_machine, machine_from

__all__ = ["Command", "EdgeProgram", "alike_programs", "load_program", "load_programs", "machine_of"]

_KEPT_COMMANDS: Final = 300_000


class EdgeProgram:
    """One die's command program."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.functions = {f.sym_name: f for f in module.body if isinstance(f, Func)}
        self.buffers = {b.sym_name: b for b in module.body if isinstance(b, edge10.Buffer)}
        stage = stage_of(module)
        if stage is not None and stage != "edge10":
            raise TyirError(
                f"this is a module at stage {stage}, not a command program",
                help="compile it (tyir-compile FILE.ir -o out) and give the folder which that prints",
            )
        entries = entry_points(module)
        if len(entries) != 1:
            raise TyirError(
                f"a command program has one entry point ({ENTRY}), this one has {len(entries)}",
                help="give the llm_die<i>.edge10 file of one sequence length",
            )
        ((self.seqlen, entry),) = entries.items()
        self.entry = entry.sym_name
        self.die = _int_attribute(module, "tyir.die", 0)
        self._kinds = Kinds()
        self._alike: WeakKeyDictionary[EdgeProgram, bool] = WeakKeyDictionary()
        self._expanded: dict[tuple[Position, Collection[int] | None, bool], Step] = {}

    @cached_property
    def sram_bytes(self) -> int:
        """SRAM that the program needs."""
        return sram_bytes(self.module)

    @classmethod
    def parse(cls, text: str, name: str = "<string>") -> Self:
        """A program from its printed form."""
        return cls(parse_module(text, name))

    @cached_property
    def has_tail(self) -> bool:
        """Whether a step leaves something out where no row of its results is wanted."""
        entry = self.functions[self.entry]
        return any(op.register == "wanted" for op in entry.walk_type(edge10.Register))

    def expand(self, pos: Position, layers: frozenset[int] | None = None, wanted: bool = True) -> Step:
        """All commands of one step at position `pos` (of each sequence, where there are several), in program
        order; of the decoder `layers` alone where some are named; `wanted`: whether a row of its results is.
        The last few steps are kept: a report times them on several machines.
        """
        key = pos, layers, wanted
        if key not in self._expanded:
            while self._expanded and sum(map(len, self._expanded.values())) > _KEPT_COMMANDS:
                del self._expanded[next(iter(self._expanded))]
            self._expanded[key] = unroll(
                self.functions, self.buffers, self.entry, self._kinds, pos, layers=layers, wanted=wanted
            )
        return self._expanded[key]

    @cached_property
    def _signature(self) -> Hashable:
        return tuple(
            (name, self.functions[name].function_type, _block_signature(self.functions[name].body))
            for name in self.functions
        )

    def alike(self, other: EdgeProgram) -> bool:
        """Whether two programs differ at most in where and what their data is: same functions, ops,
        properties and operands.  Compared once.
        """
        if other is self:
            return True
        if other not in self._alike:
            self._alike[other] = other._alike[self] = self._signature == other._signature
        return self._alike[other]


def alike_programs(programs: Sequence[EdgeProgram]) -> list[list[int]]:
    """The programs' numbers in groups that are alike, in order of the first of each."""
    groups: list[list[int]] = []
    for number, program in enumerate(programs):
        group = next((g for g in groups if programs[g[0]].alike(program)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups


def load_programs(artifacts: Artifacts, seqlen: int) -> list[EdgeProgram]:
    """The command programs of all dies of an artifact folder, for one of its sequence lengths."""
    manifest = artifacts.manifest
    return [load_program(artifacts, manifest.program(die, seqlen)) for die in range(manifest.options.dies)]


def load_program(artifacts: Artifacts, program: DieProgram) -> EdgeProgram:
    """One die's command program; `TyirError` unless it is what the manifest says."""
    path = artifacts.path / program.program
    module = program_of(artifacts.read(program.program), str(path))
    check_commands(module, program, path)
    return EdgeProgram(module)


def machine_of(artifacts: Artifacts) -> Machine:
    """The machine that an artifact folder's programs were compiled for."""
    name = artifacts.manifest.build["machine"]
    if name != MACHINE:
        return load_machine(name)
    return machine_from(artifacts.read(name), artifacts.path / name)


def _int_attribute(module: Module, name: str, default: int) -> int:
    value = module.attributes.get(name)
    return value.value if isinstance(value, IntegerAttr) else default


def _block_signature(block: Block) -> Hashable:
    """The ops of a block, values by number."""
    numbers: dict[Value, int] = {}
    rows: list[Hashable] = []

    def visit(inner: Block) -> None:
        for value in inner.args:
            numbers[value] = len(numbers)
        for op in inner:
            properties = op.signature() if isinstance(op, edge10.Command) else op.properties
            rows.append((op.name, properties, tuple(numbers[v] for v in op.operands)))
            for value in op.results:
                numbers[value] = len(numbers)
            for region in op.regions:
                visit(region.entry)

    visit(block)
    return tuple(rows)
