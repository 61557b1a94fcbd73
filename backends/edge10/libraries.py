"""The host libraries of a compile's programs: made once for programs that are equal, by threads, by workers
elsewhere, or all of them in a process beside this one.

    with libraries_beside(parts, context) as beside:       # a copy of this process, before there are threads
        ...                                                # command programs, IR, weights
        host = beside.finish()

TVM compiles under Python's lock, so that threads of one process take turns with the lowering; a process does
not, and loads TVM meanwhile too, which takes a second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tyir.backends.host.names import LINKED_IN, assign_kernels
from tyir.backends.host.step import Program
from tyir.backends.pieces import compiler_identity, compiler_version, tool_identity
from tyir.backends.workers import check_tools
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, Global, Param
from tyir.execution.entry_points import entry_point
from tyir.ir import Op
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.process.beside import Beside, Lost, possible
from tyir.process.cache import cache_key
from tyir.process.stopwatch import StageTime, Stopwatch

if TYPE_CHECKING:
    from tyir.backends.edge10.compile import CompileContext
    from tyir.backends.host.tvm_host import HostTarget

__all__ = [
    "HostFacts",
    "LibraryWriter",
    "Part",
    "built_library",
    "functions_of",
    "libraries_beside",
    "params_of",
]


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
class Part:
    """A die's program of one length: its library goes to `path`, reports call it `name`."""

    die: Module
    seqlen: int
    path: Path
    name: str


@dataclass(frozen=True)
class HostFacts:
    """What artifacts say of the processor that their libraries are for."""

    mcpu: str
    features: list[str]
    activations: str

    @classmethod
    def of(cls, target: HostTarget) -> HostFacts:
        """Those of a target."""
        return cls(target.mcpu, target.features(), target.activations)


@dataclass(frozen=True)
class _Library:
    """A library that is to be made; `texts`: all that its step is made from, `ir`: the same as a module."""

    kernels: Mapping[str, Op]
    program: Program
    texts: tuple[str, ...]
    path: Path
    ir: str


def built_library(identity: str, compiler: str, ir: str, target: HostTarget) -> bytes:
    """The library of a die's program, from the IR that lies beside it: what a worker does.

    `TyirError` unless it has the tools and the compiler of who asks.
    """
    from tyir.backends.host.tvm_host import build_library, linker

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
class LibraryWriter:
    """Writes libraries.

    A context manager: they are built by as many threads as the compile has jobs, and are all there when it
    is left.
    """

    context: CompileContext
    built: dict[tuple[str, ...], Path] = field(default_factory=dict)
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

    def add(self, part: Part, ir: str) -> None:
        """One more library; `ir`: the program's IR, as workers elsewhere need it."""
        functions = functions_of(part.die, part.seqlen)
        kernels = assign_kernels(functions)
        weights = tuple((str(p.sym_name), p.type) for p in params_of(part.die, functions))
        program = Program(tuple(functions), weights)
        texts = (str(program.identity), *(print_op(f, locations=False) for f in functions))
        same = self.built.setdefault(texts, part.path)
        work = (_Library(kernels, program, texts, part.path, ir), f"host code {part.name}")
        if same is not part.path:  # dies with equal programs share a library's bytes
            self._copies.append((same, part.path))
        elif self.context.jobs == 1 and self.context.workers is None:
            self._write(*work)
        else:
            self._building.append(self._pool.submit(self._write, *work))

    def _write(self, wanted: _Library, stage: str) -> None:
        with self.context.watch.stage(stage):
            self._make(wanted)

    def _make(self, wanted: _Library) -> None:
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


# ------------------------------------------------------------------------------------------- beside


@dataclass(frozen=True)
class _Built:
    """What a process that has made libraries says."""

    stages: list[StageTime]
    host: HostFacts


class LibrariesBeside:
    """All libraries of a compile, being made in another process."""

    def __init__(self, process: Beside[_Built], parts: Sequence[Part], context: CompileContext) -> None:
        self._process, self._parts, self._context = process, parts, context

    def finish(self) -> HostFacts:
        """Wait until they are all there; what the process took the time for is added to the compile's stages.

        Raises as `LibraryWriter`.  A process that was lost costs its work: it is done here.
        """
        try:
            built = self._process.result()
        except Lost:
            built = _build(self._parts, self._context)
            for folder in {part.path.parent for part in self._parts}:
                for left in folder.glob(f"{LINKED_IN}*"):  # what it was linking
                    shutil.rmtree(left, ignore_errors=True)
        else:
            self._context.watch.stages += built.stages
        return built.host


@contextmanager
def libraries_beside(parts: Sequence[Part], context: CompileContext) -> Iterator[LibrariesBeside | None]:
    """Begin to make all libraries in a process beside this one; None where that is not possible, or not
    asked for (nothing to make, one job, workers elsewhere).  It is gone when the block is left.
    """
    if not parts or context.jobs == 1 or context.workers is not None or not possible():
        yield None
        return
    for part in parts:
        part.path.parent.mkdir(parents=True, exist_ok=True)
    tool_identity()  # once, for both
    own = replace(context, watch=Stopwatch(told=context.watch.told))
    try:
        process = Beside.start(lambda: _build(parts, own))
    except OSError:  # no memory for another process, or too many of them
        yield None
        return
    with process:
        yield LibrariesBeside(process, parts, context)


def _build(parts: Sequence[Part], context: CompileContext) -> _Built:
    with LibraryWriter(context) as writer:
        for part in parts:
            writer.add(part, "")
    return _Built(context.watch.stages, HostFacts.of(context.host_target()))
