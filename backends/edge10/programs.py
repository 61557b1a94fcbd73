"""The files of one die's program: host code, command program, IR and constants, under one name each."""

from __future__ import annotations

import json
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tyir.artifacts.agreement import interface_of
from tyir.attributes import IntegerAttr, StringAttr
from tyir.backends.edge10.libraries import LibraryWriter, Part, functions_of, params_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.die_numbers import DieNumbers, renumber, without_numbers
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.backends.edge10.weight_files import Places
from tyir.backends.host.names import assign_kernels
from tyir.backends.pieces import tool_identity
from tyir.dialects.builtin import Module
from tyir.edge10.binary import encode
from tyir.manifest import DieProgram
from tyir.printer import print_op
from tyir.process.cache import cache_key
from tyir.targets.machine import Machine, load_machine
from tyir.text.attribute_printer import AttributeText
from tyir.types import i64

if TYPE_CHECKING:
    from tyir.backends.edge10.compile import CompileContext

__all__ = ["Memory", "ProgramFiles", "ProgramWriter"]

# (die, length) -> bytes by kind, `memory_summary`
Memory = dict[tuple[int, int], dict[str, int]]


@dataclass(frozen=True)
class ProgramFiles:
    """How a length's files are called, and the file of weights that lengths share: patterns with `{die}`
    where each die has one of its own.
    """

    pattern: str
    common: str

    def name(self, die: int, suffix: str) -> str:
        """`batch_1/seqlen_8/llm_die0.so`"""
        return f"{self.pattern.format(die=die)}.{suffix}"

    def shared(self, die: int) -> str:
        """`batch_1/common_die0.params`"""
        return self.common.format(die=die)

    @property
    def what(self) -> str:
        """`llm`: what the programs are, for reports."""
        return self.pattern.rpartition("/")[2].partition("_die")[0]

    def part(self, folder: Path, die: Module, index: int, seqlen: int) -> Part:
        """A die's program as who makes its library in `folder` knows it."""
        path = folder / self.name(index, "so")
        return Part(die, seqlen, path, f"{self.what} s{seqlen} die{index}")


@dataclass(frozen=True)
class _Lowered:
    """A command program of the die with these numbers, and what it needs of memory."""

    program: Module
    numbers: DieNumbers
    memory: dict[str, int]


@dataclass
class ProgramWriter:
    """Writes programs into `folder`, whose weights are at `places`; `memory`: what they need of it; `texts`:
    those of attributes, which dies and lengths share.

    A context manager: libraries (`LibraryWriter`) are built beside the lowering of other dies and are all
    there when it is left, unless somebody else makes them (`libraries` is false).
    """

    folder: Path
    places: Places
    context: CompileContext
    libraries: bool = True
    memory: Memory = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    texts: AttributeText = field(default_factory=AttributeText)
    _programs: dict[Hashable, _Lowered] = field(default_factory=dict)
    _seqlen: int | None = None
    _writer: LibraryWriter | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        if self.libraries:
            self._writer = self._open.enter_context(LibraryWriter(self.context))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, die: Module, index: int, seqlen: int, files: ProgramFiles) -> DieProgram:
        """The files of one die and length; returns the manifest's entry."""
        part = files.part(self.folder, die, index, seqlen)
        commands = files.name(index, "bin" if self.context.binary else "edge10")
        for path in (self.folder / commands, part.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        functions = functions_of(die, seqlen)
        assign_kernels(functions)
        text = print_op(self._artifact_ir(die, index, seqlen), locations=False, texts=self.texts)
        (self.folder / files.name(index, "ir")).write_text(text)
        with self.context.watch.stage(f"edge10 {part.name}"):
            data, self.memory[index, seqlen] = self._commands(die, seqlen)
            (self.folder / commands).write_bytes(data)
        if self._writer is not None:
            self._writer.add(part, text)
        main = functions[-1]
        inputs, outputs = interface_of(main)
        return DieProgram(
            die=index,
            seqlen=seqlen,
            function=str(main.sym_name),
            library=files.name(index, "so"),
            program=commands,
            ir=files.name(index, "ir"),
            constants=files.name(index, "params"),
            params=files.shared(index),
            inputs=inputs,
            outputs=outputs,
        )

    def _commands(self, die: Module, seqlen: int) -> tuple[bytes, dict[str, int]]:
        """A command program as it is written, and what it needs of memory."""
        machine, cache = load_machine(self.context.chosen_machine), self.context.cache
        form = "bytes" if self.context.binary else "text"
        shape, numbers = without_numbers(die, seqlen), DieNumbers.of(die, seqlen)
        key = cache_key("edge10", tool_identity(), repr(machine), form, repr((shape, numbers)))
        if cache is not None and (known := cache.read(key)) is not None:
            summary, _, data = known.partition(b"\n")
            return data, json.loads(summary)
        lowered, memory = self._lowered(die, seqlen, machine, shape, numbers)
        data = encode(lowered) if self.context.binary else print_op(lowered, texts=self.texts).encode()
        if cache is not None:
            cache.write(key, json.dumps(memory).encode() + b"\n" + data)
        return data, memory

    def _lowered(
        self, die: Module, seqlen: int, machine: Machine, shape: Hashable, numbers: DieNumbers
    ) -> tuple[Module, dict[str, int]]:
        """A die's command program, and what it needs of memory; dies that differ by numbers alone are lowered
        once.
        """
        if self._seqlen != seqlen:  # those of one length are in memory at a time
            self._programs.clear()
            self._seqlen = seqlen
        known = self._programs.get(shape)
        if known is None or not renumber(known.program, known.numbers, numbers):
            program = lower_die(die, seqlen, machine, search=self.search)
            known = _Lowered(program, numbers, memory_summary(program))
        self._programs[shape] = replace(known, numbers=numbers)
        return known.program, known.memory

    def _artifact_ir(self, die: Module, index: int, seqlen: int) -> Module:
        """The die's program as the runtime walks it: functions with their kernels named, weights by reference
        to the `.params`.
        """
        module = Module.empty(f"die{index}")
        functions = functions_of(die, seqlen)
        for param in params_of(die, functions):
            file, name = self.places.of(index, param, seqlen)
            module.body.append(file.global_for(param, name))
        for function in functions:
            module.body.append(function.clone())
        module.set_attribute("tyir.die", IntegerAttr(index, i64))
        module.set_attribute("tyir.stage", StringAttr("program"))
        return module
