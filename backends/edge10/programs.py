"""The files of one die's program: host code, command program, IR and constants, under one name each."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.artifacts.agreement import interface_of
from tyir.attributes import IntegerAttr, StringAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.backends.edge10.params import ParamsFile
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, Param
from tyir.edge10.binary import encode
from tyir.execution.entry_points import entry_point
from tyir.manifest import DieProgram
from tyir.printer import print_op
from tyir.targets.machine import load_machine
from tyir.types import i64

if TYPE_CHECKING:
    from tyir.backends.edge10.compile import CompileContext

__all__ = ["Memory", "Places", "ProgramFiles", "ProgramWriter", "functions_of"]

# Where each die's parameter went: the file, and its name in the folder.
Places = dict[tuple[int, Param], tuple[ParamsFile, str]]
# (die, length) -> bytes by kind, `memory_summary`
Memory = dict[tuple[int, int], dict[str, int]]


@dataclass(frozen=True)
class ProgramFiles:
    """How a length's files are called: in `folder`, beginning with `stem`; `common` names the weights that
    lengths share, with `{die}` in it.
    """

    folder: str
    stem: str
    common: str

    def name(self, die: int, suffix: str) -> str:
        """`batch_1/seqlen_8/llm_die0.so`"""
        return f"{self.folder}/{self.stem}_die{die}.{suffix}"

    def shared(self, die: int) -> str:
        """`batch_1/common_die0.params`"""
        return self.common.format(die=die)


def functions_of(die: Module, seqlen: int) -> list[Func]:
    """A die's entry function for a sequence length and what it calls."""
    by_name = {str(f.sym_name): f for f in die.body if isinstance(f, Func)}
    main = entry_point(die, seqlen)
    called = dict.fromkeys(c.callee.leaf for c in main.walk_type(Call))
    return [*(by_name[name] for name in called), main]


def params_of(die: Module, functions: Sequence[Func]) -> list[Param]:
    """The parameters that functions name, in the order in which a program lists them."""
    used = {g.symbol.leaf for f in functions for g in f.walk_type(GetGlobal)}
    return [p for p in die.body if isinstance(p, Param) and p.sym_name in used]


@dataclass
class ProgramWriter:
    """Writes programs into `folder`, whose weights are at `places`; `memory`: what they need of it."""

    folder: Path
    places: Places
    context: CompileContext
    memory: Memory = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    built: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def write(self, die: Module, index: int, seqlen: int, files: ProgramFiles) -> DieProgram:
        """The files of one die and length; returns the manifest's entry."""
        commands = files.name(index, "bin" if self.context.binary else "edge10")
        for name in (commands, files.name(index, "so")):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        where = f"{files.stem} s{seqlen} die{index}"
        with self.context.watch.stage(f"edge10 {where}"):
            lowered = lower_die(die, seqlen, load_machine(self.context.chosen_machine), search=self.search)
            self.memory[index, seqlen] = memory_summary(lowered)
            _write_command_program(lowered, self.folder / commands)
        with self.context.watch.stage(f"host code {where}"):
            self._write_library(die, seqlen, self.folder / files.name(index, "so"))
        text = print_op(self._artifact_ir(die, index, seqlen), locations=False)
        (self.folder / files.name(index, "ir")).write_text(text)
        main = functions_of(die, seqlen)[-1]
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

    def _write_library(self, die: Module, seqlen: int, library: Path) -> None:
        from tyir.backends.host.step import Program
        from tyir.backends.host.tvm_host import assign_kernels, build_library

        functions = functions_of(die, seqlen)
        kernels = assign_kernels(functions)
        program = Program(
            tuple(functions), tuple((str(p.sym_name), p.type) for p in params_of(die, functions))
        )
        key = (*(print_op(f, locations=False) for f in functions), str(program.identity()))
        same = self.built.setdefault(key, library)
        if same is library:
            build_library(kernels, self.context.host_target(), library, program)
        else:  # dies with equal programs share a library's bytes
            shutil.copyfile(same, library)

    def _artifact_ir(self, die: Module, index: int, seqlen: int) -> Module:
        """The die's program as the runtime walks it: functions with their kernels named, weights by reference
        to the `.params`.
        """
        module = Module.empty(f"die{index}")
        functions = functions_of(die, seqlen)
        for param in params_of(die, functions):
            file, name = self.places[index, param]
            module.body.append(file.global_for(param, name))
        for function in functions:
            module.body.append(function.clone())
        module.set_attribute("tyir.die", IntegerAttr(index, i64))
        module.set_attribute("tyir.stage", StringAttr("program"))
        return module


def _write_command_program(lowered: Module, path: Path) -> None:
    if path.suffix == ".bin":
        path.write_bytes(encode(lowered))
    else:
        path.write_text(print_op(lowered))
