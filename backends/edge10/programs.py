"""The files of one die's program: host code, command program, IR and constants, under one name each."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tyir.artifacts.agreement import interface_of
from tyir.attributes import IntegerAttr, StringAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.die_numbers import DieNumbers, renumber, without_numbers
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.backends.edge10.weight_files import Places
from tyir.backends.pieces import compiler_identity, compiler_version, tool_identity
from tyir.backends.workers import check_tools
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, Global, Param
from tyir.edge10.binary import encode
from tyir.execution.entry_points import entry_point
from tyir.ir import Op
from tyir.manifest import DieProgram
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.process.cache import cache_key
from tyir.targets.machine import Machine, load_machine
from tyir.types import i64

if TYPE_CHECKING:
    from tyir.backends.edge10.compile import CompileContext
    from tyir.backends.host.step import Program
    from tyir.backends.host.tvm_host import HostTarget

__all__ = ["Memory", "ProgramFiles", "ProgramWriter", "functions_of"]

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


@dataclass(frozen=True)
class _Library:
    """A library that is to be made; `texts`: all that its step is made from, `ir`: the same as a module."""

    kernels: Mapping[str, Op]
    program: Program
    texts: tuple[str, ...]
    path: Path
    ir: str


@dataclass(frozen=True)
class _Lowered:
    """A command program of the die with these numbers, and what it needs of memory."""

    program: Module
    numbers: DieNumbers
    memory: dict[str, int]


def built_library(identity: str, compiler: str, ir: str, target: HostTarget) -> bytes:
    """The library of a die's program, from the IR that lies beside it: what a worker does.

    `TyirError` unless it has the tools and the compiler of who asks.
    """
    from tyir.backends.host.step import Program
    from tyir.backends.host.tvm_host import assign_kernels, build_library, linker

    check_tools(identity)
    if (own := compiler_version(linker() or "")) != compiler:
        raise TyirError(
            f"a worker's C++ compiler is another: {own}, not {compiler}",
            help="install the same on every machine of the cluster, or name one in CXX",
        )
    module = parse_module(ir)
    functions = tuple(op for op in module.body if isinstance(op, Func))
    weights = tuple((str(op.sym_name), op.type) for op in module.body if isinstance(op, Global))
    kernels = assign_kernels(functions)
    with tempfile.TemporaryDirectory(prefix="tyir-library-") as folder:
        path = Path(folder) / "library.so"
        build_library(kernels, target, path, Program(functions, weights))
        return path.read_bytes()


@dataclass
class ProgramWriter:
    """Writes programs into `folder`, whose weights are at `places`; `memory`: what they need of it.

    A context manager: libraries are built by as many threads as the compile has jobs, beside the lowering of
    other dies, and are all there when it is left.
    """

    folder: Path
    places: Places
    context: CompileContext
    memory: Memory = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    built: dict[tuple[str, ...], Path] = field(default_factory=dict)
    _programs: dict[Hashable, _Lowered] = field(default_factory=dict)
    _seqlen: int | None = None
    _copies: list[tuple[Path, Path]] = field(default_factory=list)
    _building: list[Future[None]] = field(default_factory=list)

    def __enter__(self) -> Self:
        workers = self.context.workers
        count = self.context.jobs if workers is None else workers.count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="host-code")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                for future in self._building:
                    future.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
        if kind is None:
            for same, library in self._copies:
                shutil.copyfile(same, library)

    def write(self, die: Module, index: int, seqlen: int, files: ProgramFiles) -> DieProgram:
        """The files of one die and length; returns the manifest's entry."""
        from tyir.backends.host.step import Program
        from tyir.backends.host.tvm_host import assign_kernels

        commands = files.name(index, "bin" if self.context.binary else "edge10")
        for name in (commands, files.name(index, "so")):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        where = f"{files.what} s{seqlen} die{index}"
        functions = functions_of(die, seqlen)
        kernels = assign_kernels(functions)
        text = print_op(self._artifact_ir(die, index, seqlen), locations=False)
        (self.folder / files.name(index, "ir")).write_text(text)
        with self.context.watch.stage(f"edge10 {where}"):
            data, self.memory[index, seqlen] = self._commands(die, seqlen)
            (self.folder / commands).write_bytes(data)
        weights = tuple((str(p.sym_name), p.type) for p in params_of(die, functions))
        program = Program(tuple(functions), weights)
        texts = (str(program.identity), *(print_op(f, locations=False) for f in functions))
        library = self.folder / files.name(index, "so")
        same = self.built.setdefault(texts, library)
        work = (_Library(kernels, program, texts, library, text), f"host code {where}")
        if same is not library:  # dies with equal programs share a library's bytes
            self._copies.append((same, library))
        elif self.context.jobs == 1 and self.context.workers is None:
            self._write_library(*work)
        else:
            self._building.append(self._pool.submit(self._write_library, *work))
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
        data = encode(lowered) if self.context.binary else print_op(lowered).encode()
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

    def _write_library(self, wanted: _Library, stage: str) -> None:
        with self.context.watch.stage(stage):
            self._make_library(wanted)

    def _make_library(self, wanted: _Library) -> None:
        from tyir.backends.host.tvm_host import build_library, linker

        cache, target = self.context.cache, self.context.host_target()
        tools = (tool_identity(), compiler_identity(linker() or ""), repr(target), repr(target.features()))
        key = cache_key("library", *tools, *wanted.texts)
        if cache is not None and cache.take(key, wanted.path) is not None:
            return
        if (workers := self.context.workers) is None:
            build_library(wanted.kernels, target, wanted.path, wanted.program, cache)
        else:
            compiler = compiler_version(linker() or "")
            wanted.path.write_bytes(workers.run(built_library, tool_identity(), compiler, wanted.ir, target))
        if cache is not None:
            cache.put(key, wanted.path)

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
