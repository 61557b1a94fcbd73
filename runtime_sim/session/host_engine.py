"""The engine `host`: a step is one call of compiled code for each die, and dies run in threads of their own.

With a probe, which wants to see every op, the programs are walked op by op instead, through the same kernels.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.consistency import cache_inputs
from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Global, tensor_type
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Links, Meeting, Request
from tyir.execution.step_identity import step_identity
from tyir.execution.storage import packed_shape
from tyir.interpreter import Interpreter
from tyir.ir import Op, Value
from tyir.manifest import DieProgram, TensorInfo
from tyir.process.cores import usable_cores
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_runtime import (
    CompiledStep,
    Exchange,
    HostLibrary,
    check_threads,
    use_threads,
)
from tyir.runtime_sim.session.program_engine import ProgramEngine, StepProbe, check_inputs
from tyir.traits import Collective
from tyir.types import storage_dtype

__all__ = ["HostEngine"]

Array = npt.NDArray[Any]
_CACHE_LINE: Final = 64


class _NoThread(RuntimeError):
    """The system lets no thread be started for a die."""


def _threads() -> int:
    """The cores that this process may use, or fewer where the environment says so."""
    asked = os.environ.get("TVM_NUM_THREADS", "")
    cores = usable_cores()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


class _Die:
    """One die's programs, and the thread that runs them."""

    def __init__(self, number: int, threads: int) -> None:
        self.number = number
        self.threads = threads
        self.meeting: Meeting | None = None
        self.steps: dict[int, CompiledStep] = {}  # by length
        self.workspace = np.empty(0, np.uint8)  # shared by the lengths: one runs at a time
        self._calling = threading.local()  # whether the calling thread's workers have been counted

    def load(self, seqlen: int, program: DieProgram, interpreter: Interpreter, library: HostLibrary) -> None:
        """Makes the step of one length ready to be called."""
        if seqlen in self.steps:
            return
        module = interpreter.module
        functions = [op for op in module.body if isinstance(op, Func)]
        sites = [op for f in functions for op in f.walk() if op.has_trait(Collective)]
        weights = [(str(g.sym_name), g.type) for g in module.body if isinstance(g, Global)]
        if int(library.function("step_program")()) != step_identity(functions, weights):
            raise TyirError(
                f"{library.path} is not compiled from the program beside it",
                help="they are of different builds, or one was changed; compile the model again",
            )
        size = int(library.function("step_workspace_bytes")())
        if self.workspace.size < size:
            self.workspace = _aligned(size)
        layouts = [_layout(t) for t in (*program.inputs, *(o for o in program.outputs if o.alias is None))]
        self.steps[seqlen] = CompiledStep(
            library.function("step"),
            layouts,
            list(interpreter.constants.values()),
            self.workspace[:size],
            Exchange(_exchange(self, sites)) if sites else None,
        )

    def run(self, seqlen: int, arrays: Sequence[Array], meeting: Meeting) -> None:
        """One step, in the thread that this is called from: its workers are that thread's own."""
        self.meeting = meeting
        problem: BaseException | None = None
        try:
            if not getattr(self._calling, "counted", False):
                use_threads(self.threads)
                self._calling.counted = True
            self.steps[seqlen](arrays)
        except BaseException as error:
            problem = error
            raise
        finally:
            meeting.leave(problem)


def _exchange(die: _Die, sites: Sequence[Op]) -> Callable[..., int]:
    """What a step calls where dies meet."""

    def exchange(context: int, site: int, operand: int | None, result: int | None) -> int:
        assert die.meeting is not None
        try:
            op: Any = sites[site]
            given = _array(op.operands[0], operand) if op.operands else None
            if given is not None and not op.results:
                given = given.copy()  # a die that sends goes on, and uses its workspace again
            request: Request = op.request(given)
            received = die.meeting.ask(die.number, request)
            if op.results:
                _array(op.results[0], result)[...] = received
        except BaseException as error:  # compiled code lies between here and whoever can report it
            die.meeting.problem = die.meeting.problem or error
            return 1
        return 0

    return exchange


def _array(value: Value, address: int | None) -> Array:
    """The tensor of a value, where it lies."""
    t = tensor_type(value)
    shape, dtype = packed_shape(t), storage_dtype(t.element)
    count = int(np.prod(shape)) * dtype.itemsize
    stored: Array = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address or 0))
    return stored.view(dtype).reshape(shape)


def _aligned(size: int) -> Array:
    """Memory that begins with a cache line, as a step's workspace must."""
    space = np.empty(size + _CACHE_LINE, np.uint8)
    first = -int(space.__array_interface__["data"][0]) % _CACHE_LINE
    return space[first : first + size]


def _layout(info: TensorInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return info.shape, info.storage_dtype


class HostEngine(ProgramEngine):
    """Compiled dies, side by side."""

    def __init__(
        self,
        artifacts: Artifacts,
        *,
        probe: StepProbe | None = None,
        threads: int | None = None,
        links: Links | None = None,
    ) -> None:
        """`threads`: all that run at once, None for the cores that this process may use.  `links`: which dies
        run here, None for all.

        Dies of several share them; each has at least one.  `TyirError` for more than there are cores.
        """
        if threads is not None:
            check_threads(threads)
        super().__init__(artifacts, compiled=True, probe=probe, links=links)
        count = len(self.links.dies)
        threads = _threads() if threads is None else threads
        self._dies = [_Die(die, max(1, threads // count)) for die in self.links.dies]
        self._walks = False
        self._begun: list[_Begun] = []
        self._workers = [ThreadPoolExecutor(1, f"die{die}") for die in self.links.dies] if count > 1 else []

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name, each [1, seqlen, ...]."""
        return self.begin(inputs, chunk)()

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """Begin a step behind those that were begun before; what is returned waits for its end.

        A die takes it up as soon as it is done with its part of those before, and meets the others in each
        step by itself: stages of a pipeline work on several steps at a time, with the same bits.
        """
        if self.probe is not None or self._walks:
            return self._walked(inputs, chunk)
        meeting = Meeting(self.links)
        calls: list[tuple[_Die, list[Array]]] = []
        made: list[dict[str, Array]] = []
        for die in self._dies:
            program = self.manifest.program(die.number, chunk.seqlen)
            interpreter = self._programs.interpreter(program)
            check_inputs(program, inputs)
            die.load(chunk.seqlen, program, interpreter, self._programs.library(program))
            caches = cache_inputs(program)
            own = {t.name: np.empty(*_layout(t)) for t in program.outputs if t.alias is None}
            given = [
                self._cache(die.number, t) if i in caches else _taken(inputs[t.name], t)
                for i, t in enumerate(program.inputs)
            ]
            calls.append((die, [*given, *own.values()]))
            made.append(own)
        begun = _Begun(self._run(calls, chunk.seqlen, meeting), meeting, made[0])
        if isinstance(meeting.problem, _NoThread):  # the dies can still be walked side by side in this one
            begun.wait()
            self._walks = True
            return self._walked(inputs, chunk)
        self._begun = [other for other in self._begun if not other.ended] + [begun]
        return begun

    def _walked(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """A step op by op, when those before it have ended."""
        for begun in self._begun:
            begun.wait()
        return super().begin(inputs, chunk)

    def _run(
        self, calls: Sequence[tuple[_Die, list[Array]]], seqlen: int, meeting: Meeting
    ) -> list[Future[None]]:
        """Have each die run its part, one alone in this thread; what is to be waited for."""
        if not self._workers:
            die, arrays = calls[0]
            die.run(seqlen, arrays, meeting)
            return []
        waiting = []
        for worker, (die, arrays) in zip(self._workers, calls):
            try:
                waiting.append(worker.submit(die.run, seqlen, arrays, meeting))
            except RuntimeError as error:
                meeting.leave(_NoThread(str(error)))
        return waiting


@dataclass(frozen=True, eq=False)
class _Begun:
    """A step under way: the dies' parts, where they meet, and the first die's outputs by name."""

    parts: Sequence[Future[None]]
    meeting: Meeting
    outputs: dict[str, Array]

    def __call__(self) -> dict[str, Array]:
        """Wait for its end; raises what a die has failed of."""
        self.wait()
        if self.meeting.problem is not None:
            raise self.meeting.problem
        return self.outputs

    @property
    def ended(self) -> bool:
        return all(part.done() for part in self.parts)

    def wait(self) -> None:
        for part in self.parts:
            part.exception()


def _taken(array: Array, info: TensorInfo) -> Array:
    """An input as a step takes it; `TyirError` for one of another shape."""
    if array.shape != info.shape:
        raise TyirError(f"{info.name} {list(array.shape)} is given, the program takes {list(info.shape)}")
    return np.ascontiguousarray(array, info.storage_dtype)
