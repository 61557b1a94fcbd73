"""How the compiled steps of dies run: one alone, all of a process in compiled code, or each in a thread of its own.

A die alone is a call.  Dies that all run in this process run and meet in compiled code (`Together`): as many
threads as share them evenly take them through their steps, a die going on where another waits, and what a
thread has left of the cores is for its kernels.  Dies some of whose peers run elsewhere have threads of their own
and meet through `tyir.execution.lockstep` (`Apart`).
"""  # noqa: E501

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Global, Reshape, tensor_type
from tyir.execution.lockstep import Links, Meet, Meeting, Request
from tyir.execution.meetings import can_meet, collectives_of, request_of, workers_of
from tyir.execution.step_identity import step_identity
from tyir.execution.storage import packed_shape
from tyir.interpreter import Interpreter
from tyir.ir import Op, Value
from tyir.manifest import DieProgram, TensorInfo
from tyir.runtime_sim.session.host_runtime import CompiledStep, Exchange, HostLibrary, use_threads
from tyir.traits import Collective
from tyir.types import storage_dtype

__all__ = ["DieCode", "HostSteps", "NoThread", "Workers", "layout_of", "steps_of"]

Array = npt.NDArray[Any]
_CACHE_LINE: Final = 64
_LOOKS: Final = (
    1000  # of a worker that has nothing to do, some 50 us: what another's part of a layer may take longer
)


class NoThread(RuntimeError):
    """The system lets no thread be started for dies."""


def layout_of(info: TensorInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype as it is stored."""
    return info.shape, info.storage_dtype


@dataclass(frozen=True)
class DieCode:
    """A die's program of one length, its library, and what of both a step is made from."""

    program: DieProgram
    library: HostLibrary
    functions: tuple[Func, ...]
    weights: tuple[Array, ...]

    @classmethod
    def of(cls, program: DieProgram, library: HostLibrary, interpreter: Interpreter) -> DieCode:
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

    def step(self, workers: Workers, exchange: Any = None, context: int | None = None) -> CompiledStep:
        """The step, in the workspace of its die."""
        outputs = [o for o in self.program.outputs if o.alias is None]
        layouts = [layout_of(t) for t in (*self.program.inputs, *outputs)]
        space = workers.workspace(self.program.die, int(self.library.function("step_workspace_bytes")()))
        return CompiledStep(self.library.function("step"), layouts, self.weights, space, exchange, context)


class Workers:
    """The threads of an engine and the workspaces of its dies, which the steps of all lengths share.

    A thread has one thing to do at a time, in the order in which it was asked to.
    """

    def __init__(self, threads: int, dies: int, stages: int = 1) -> None:
        """`threads`: all that run at once; `stages`: of a pipeline, that the dies are of."""
        self.threads, self.dies = threads, dies
        self.together = workers_of(threads, dies, stages)
        self._pools: list[ThreadPoolExecutor] = []
        self._running: list[Future[None]] = []
        self._spaces: dict[int, Array] = {}
        self._calling = threading.local()  # what has been said of the calling thread's kernels

    def workspace(self, die: int, size: int) -> Array:
        """So many bytes for what lives between a die's kernels."""
        if die not in self._spaces or self._spaces[die].size < size:
            self._spaces[die] = _aligned(size)
        return self._spaces[die][:size]

    def count_kernels_threads(self, sharing: int) -> None:
        """Gives kernels called from this thread their part of all threads, which so many threads share."""
        if getattr(self._calling, "counted", 0) != sharing:
            use_threads(max(1, self.threads // sharing))
            self._calling.counted = sharing

    def idle(self) -> None:
        """Waits for steps that an interrupt has left running."""
        wait(self._running)

    def side_by_side(
        self, parts: Sequence[Callable[[], None]], failed: Callable[[BaseException], None]
    ) -> list[Future[None]]:
        """Has each part run in a thread of its own, behind what that was given before; what is to be waited
        for.

        `failed` is told of what keeps one from running, so that the others need not wait for it.
        """
        while len(self._pools) < len(parts):
            self._pools.append(ThreadPoolExecutor(1, f"dies{len(self._pools)}"))
        started: list[Future[None]] = []
        self._running = [other for other in self._running if not other.done()]
        try:
            for pool, part in zip(self._pools, parts):
                started.append(pool.submit(part))
                self._running.append(started[-1])
        except RuntimeError as error:
            failed(NoThread(str(error)))
        except BaseException as error:
            failed(error)
            raise
        return started


class HostSteps(Protocol):
    """The steps of one length, of all dies that run here."""

    calls: list[CompiledStep]
    common: frozenset[str]  # outputs for which all dies may be given the same memory

    def begin(self, given: Sequence[Sequence[Array]]) -> Callable[[], None]:
        """One step of each die, with its inputs and outputs, behind those begun before; what is returned
        waits for its end and raises what one of them has failed of, unless this has.
        """


def steps_of(codes: Sequence[DieCode], workers: Workers, links: Links) -> HostSteps:
    """How these dies are best run."""
    if len(codes) == 1 and links.count == 1:
        return _Alone(codes[0], workers)
    sites = [collectives_of(code.functions) for code in codes]
    here = len(links.dies) == links.count and all(sites)
    if (
        here
        and all(code.library.has("meeting") for code in codes)
        and can_meet([code.functions for code in codes])
    ):
        return _Together(codes, workers)
    return _Apart(codes, sites, workers, links)


class _Alone:
    """One die that meets nobody."""

    def __init__(self, code: DieCode, workers: Workers) -> None:
        self._workers = workers
        self.common: frozenset[str] = frozenset()
        self.calls = [code.step(workers)]

    def begin(self, given: Sequence[Sequence[Array]]) -> Callable[[], None]:
        self._workers.count_kernels_threads(1)
        self.calls[0](given[0])
        return _ended


class _Together:
    """All dies, in compiled code (`tyir.backends.host.meeting`)."""

    def __init__(self, codes: Sequence[DieCode], workers: Workers) -> None:
        self._workers = workers
        self._library = codes[0].library
        sites = [code.library.function("meeting_sites")() for code in codes]
        self._meeting = self._ask("meeting", workers.together, _LOOKS, *sites, of=())
        weakref.finalize(self, self._library.function("meeting_end"), self._meeting)
        self.common = frozenset.intersection(*(frozenset(_made_together(code)) for code in codes))
        exchange = self._ask("meeting_exchange", of=())
        self.calls = [
            code.step(workers, exchange, self._ask("meeting_context", die).value)
            for die, code in enumerate(codes)
        ]
        self._arguments = [call.packed_arguments() for call in self.calls]
        for die, (call, arguments) in enumerate(zip(self.calls, self._arguments, strict=True)):
            place = ctypes.c_void_p(arguments.__array_interface__["data"][0])
            self._ask("meeting_step", die, call.function, place, len(arguments) // 2)

    def _ask(self, function: str, *arguments: Any, of: Sequence[Any] | None = None) -> Any:
        return self._library.function(function)(*((self._meeting,) if of is None else of), *arguments)

    def begin(self, given: Sequence[Sequence[Array]]) -> Callable[[], None]:
        """The whole step: while one stage of a pipeline works, the others' threads are its kernels'."""
        self._workers.idle()
        for call, arrays in zip(self.calls, given, strict=True):
            call.take(arrays)
        count = self._workers.together
        problems: dict[int, BaseException] = {}

        def failed(problem: BaseException, worker: int = -1) -> None:
            problems[worker] = problem
            self._ask("meeting_give_up")

        def part(worker: int) -> None:
            try:
                self._workers.count_kernels_threads(count)
                self._ask("meeting_run", worker)
            except BaseException as error:
                failed(error, worker)

        if count == 1:
            part(0)
        else:
            wait(self._workers.side_by_side([functools.partial(part, w) for w in range(count)], failed))
        if problems:
            die = int(self._ask("meeting_failed"))
            cause = problems.get(die * count // len(self.calls)) if die >= 0 else None
            if isinstance(cause, Exception):
                raise TyirError(f"the step of die {die} failed: {cause}") from cause
            raise next(iter(problems.values()))
        return _ended


def _ended() -> None:
    """What there is to wait for of a step that is over when it has begun."""


def _made_together(code: DieCode) -> Iterator[str]:
    """Outputs that are what a collective of all dies gives: each of them writes the same there, at once."""
    returned = code.functions[-1].body.terminator.operands
    for info, value in zip(code.program.outputs, returned, strict=True):
        op = value.op
        while isinstance(op, Reshape):
            op = op.operands[0].op
        request = request_of(op) if op is not None and op.has_trait(Collective) else None
        if info.alias is None and isinstance(request, Meet) and not request.dies:
            yield info.name


class _Apart:
    """Each die in a thread of its own: those that run elsewhere are met by way of `links`."""

    def __init__(
        self, codes: Sequence[DieCode], sites: Sequence[Sequence[Op]], workers: Workers, links: Links
    ) -> None:
        self._workers, self._links = workers, links
        self._meetings: dict[int, Meeting] = {}  # of the step that each die is in
        self.common: frozenset[str] = frozenset()
        self.calls = [
            code.step(workers, Exchange(self._exchange(die, ops)))
            for die, code, ops in zip(links.dies, codes, sites, strict=True)
        ]

    def begin(self, given: Sequence[Sequence[Array]]) -> Callable[[], None]:
        meeting = Meeting(self._links)

        def part(die: int, call: CompiledStep, arrays: Sequence[Array]) -> None:
            problem: BaseException | None = None
            try:
                self._meetings[die] = meeting
                self._workers.count_kernels_threads(len(self.calls))
                call(arrays)
            except BaseException as error:
                problem = error
                raise
            finally:
                meeting.leave(problem)

        started: list[Future[None]] = []

        def end() -> None:
            wait(started)
            if meeting.problem is not None:
                raise meeting.problem

        parts = list(zip(self._links.dies, self.calls, given, strict=True))
        if len(parts) == 1:
            part(*parts[0])
        else:
            works = [functools.partial(part, *one) for one in parts]
            started += self._workers.side_by_side(works, meeting.leave)
            if isinstance(meeting.problem, NoThread):
                end()
        return end

    def _exchange(self, die: int, sites: Sequence[Op]) -> Callable[..., int]:
        """What a step calls where dies meet."""

        def exchange(context: int, site: int, operand: int | None, result: int | None) -> int:
            meeting = self._meetings[die]
            try:
                op: Any = sites[site]
                given = _array(op.operands[0], operand) if op.operands else None
                if given is not None and not op.results:
                    given = given.copy()  # a die that sends goes on, and uses its workspace again
                request: Request = op.request(given)
                received = meeting.ask(die, request)
                if op.results:
                    _array(op.results[0], result)[...] = received
            except BaseException as error:  # compiled code lies between here and whoever can report it
                meeting.problem = meeting.problem or error
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
