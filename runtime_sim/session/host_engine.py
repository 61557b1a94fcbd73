"""The engine `host`: a step is one call of compiled code for each die, and dies run in threads of their own.

With a probe, which wants to see every op, the programs are walked op by op instead, through the same kernels.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from tyir.execution.meetings import MeetingMemory, can_meet, collectives_of
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
from tyir.runtime_sim.session.program_engine import CacheName, ProgramEngine, StepProbe, check_inputs
from tyir.types import storage_dtype

__all__ = ["HostEngine"]

Array = npt.NDArray[Any]
_CACHE_LINE: Final = 64
_LOOKS: Final = 2000  # of a die that waits, some 50 us: what another's part of a layer may take longer


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
        self.workspace = np.empty(0, np.uint8)  # shared by the lengths: one runs at a time
        self._calling = threading.local()  # whether the calling thread's workers have been counted

    def room(self, size: int) -> Array:
        """So much of the workspace."""
        if self.workspace.size < size:
            self.workspace = _aligned(size)
        return self.workspace[:size]

    def run(self, step: CompiledStep, arrays: Sequence[Array], meeting: Meeting) -> None:
        """One step, in the thread that this is called from: its workers are that thread's own."""
        self.meeting = meeting
        problem: BaseException | None = None
        try:
            if not getattr(self._calling, "counted", False):
                use_threads(self.threads)
                self._calling.counted = True
            step(arrays)
        except BaseException as error:
            problem = error
            raise
        finally:
            meeting.leave(problem)


@dataclass(frozen=True)
class _Code:
    """A die's program, its library, and what of both a step is made from."""

    program: DieProgram
    library: HostLibrary
    functions: tuple[Func, ...]
    weights: tuple[Array, ...]

    @classmethod
    def of(cls, program: DieProgram, library: HostLibrary, interpreter: Interpreter) -> _Code:
        """`TyirError` when the library is of another program."""
        module = interpreter.module
        functions = tuple(op for op in module.body if isinstance(op, Func))
        weights = [(str(g.sym_name), g.type) for g in module.body if isinstance(g, Global)]
        if int(library.function("step_program")()) != step_identity(functions, weights):
            raise TyirError(
                f"{library.path} is not compiled from the program beside it",
                help="they are of different builds, or one was changed; compile the model again",
            )
        return cls(program, library, functions, tuple(interpreter.constants.values()))

    @property
    def layouts(self) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        outputs = [o for o in self.program.outputs if o.alias is None]
        return [_layout(t) for t in (*self.program.inputs, *outputs)]

    def step(self, die: _Die, exchange: Any, context: int | None) -> CompiledStep:
        size = int(self.library.function("step_workspace_bytes")())
        function = self.library.function("step")
        return CompiledStep(function, self.layouts, self.weights, die.room(size), exchange, context)


class _Steps:
    """The steps of one length, of all dies that run here."""

    def __init__(self, dies: Sequence[_Die], codes: Sequence[_Code], links: Links) -> None:
        self.codes = codes
        self._sites = [collectives_of(code.functions) for code in codes]
        self.memory = self._memory(dies, links)
        self.calls = [self._call(number, die) for number, die in enumerate(dies)]

    def _memory(self, dies: Sequence[_Die], links: Links) -> MeetingMemory | None:
        """Where dies meet without leaving compiled code: those that meet no other process."""
        if not all(self._sites) or len(links.dies) < links.count:
            return None
        if not all(code.library.has("step_meeting") for code in self.codes):
            return None
        if not can_meet([code.functions for code in self.codes]):
            return None
        return MeetingMemory(self._sites, _LOOKS if len(dies) <= usable_cores() else 0)

    def _call(self, number: int, die: _Die) -> CompiledStep:
        code, sites = self.codes[number], self._sites[number]
        if self.memory is not None:
            address = ctypes.c_void_p(int(code.library.function("step_meeting")()))
            return code.step(die, address, self.memory.contexts[number])
        return code.step(die, Exchange(_exchange(die, sites)) if sites else None, None)

    def give_up(self) -> None:
        """No die waits for another any more."""
        if self.memory is not None:
            self.memory.give_up()


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
        self._steps: dict[int, _Steps] = {}  # by length
        self._walks = False
        self._workers = [ThreadPoolExecutor(1, f"die{die}") for die in self.links.dies] if count > 1 else []

    def reset(self) -> None:
        """Forget the caches."""
        super().reset()
        self._forget()

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches as `caches` gave them, those of this process's dies."""
        super().load_caches(caches)
        self._forget()

    def _forget(self) -> None:
        for steps in self._steps.values():
            for call in steps.calls:
                call.forget()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name, each [1, seqlen, ...]."""
        if self.probe is not None or self._walks:
            return super().step(inputs, chunk)
        if chunk.seqlen not in self._steps:
            self._steps[chunk.seqlen] = _Steps(self._dies, self._codes(chunk.seqlen), self.links)
        steps = self._steps[chunk.seqlen]
        given: list[list[Array]] = []
        made: list[dict[str, Array]] = []
        for die, code in zip(self._dies, steps.codes):
            program = code.program
            check_inputs(program, inputs)
            caches = cache_inputs(program)
            own = {t.name: np.empty(*_layout(t)) for t in program.outputs if t.alias is None}
            taken = [
                self._cache(die.number, t) if i in caches else _taken(inputs[t.name], t)
                for i, t in enumerate(program.inputs)
            ]
            given.append([*taken, *own.values()])
            made.append(own)
        try:
            self._run(steps, given)
        except BaseException as error:
            self._steps.pop(chunk.seqlen, None)  # places where dies meet are as they were left
            if not isinstance(error, _NoThread):
                raise
            self._walks = True  # the dies can still be walked side by side in this thread
            return super().step(inputs, chunk)
        return made[0]

    def _codes(self, seqlen: int) -> list[_Code]:
        programs = [self.manifest.program(die.number, seqlen) for die in self._dies]
        return [_Code.of(p, self._programs.library(p), self._programs.interpreter(p)) for p in programs]

    def _run(self, steps: _Steps, given: Sequence[Sequence[Array]]) -> None:
        meeting = Meeting(self.links)
        if not self._workers:
            self._dies[0].run(steps.calls[0], given[0], meeting)
            return
        waiting = []
        try:
            for worker, die, call, arrays in zip(self._workers, self._dies, steps.calls, given, strict=True):
                waiting.append(worker.submit(self._part, steps, die, call, arrays, meeting))
        except BaseException as error:  # those that have begun would wait for the others
            problem = _NoThread(str(error)) if isinstance(error, RuntimeError) else error
            meeting.leave(problem)
            steps.give_up()
            if problem is error:
                raise
        for future in waiting:
            future.exception()
        if meeting.problem is not None:
            raise meeting.problem

    @staticmethod
    def _part(
        steps: _Steps, die: _Die, call: CompiledStep, arrays: Sequence[Array], meeting: Meeting
    ) -> None:
        try:
            die.run(call, arrays, meeting)
        except BaseException:
            steps.give_up()
            raise


def _taken(array: Array, info: TensorInfo) -> Array:
    """An input as a step takes it; `TyirError` for one of another shape."""
    if array.shape != info.shape:
        raise TyirError(f"{info.name} {list(array.shape)} is given, the program takes {list(info.shape)}")
    return np.ascontiguousarray(array, info.storage_dtype)
