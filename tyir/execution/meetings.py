"""Memory with which dies of one process run and meet in compiled code, and whether their programs can.

A library whose program meets others has two C functions (`tyir.backends.host.meeting`): `RUN` takes a worker, a
thread's dies, through their steps; `EXCHANGE` is what these steps call where dies meet.  Their memory are words
of i64, smaller numbers first in them:

    group              i32 given up (not 0: nobody waits any more), i32 workers that sleep; i32 events
    worker             addresses of group, of the die that runs, of its own place to return to; how often it looks
                       before it sleeps; how many dies it has, and their addresses
    die                address of its context of ucontext.h; address and bytes of its stack; address of the step,
                       of its arguments, their number; i32 0 before it begins, 1, 2 when it has ended; i32 what it
                       returned; address of the word that it waits for; i32 which value that must lose
    context of a die   address of its worker, then for each site in the order of its number (`site_words`):
                           a collective   address of its place, the die's number there, how many meet
                           a send         addresses of the places of its targets
                           a receive      address of the place
    place of dies      i32 turn, i32 arrived; nothing; addresses of operands; addresses of results
    place of a send    i32 full; address of the bytes

The last die that comes to a place makes all results there and counts the turn up.  It leaves the place as it was, so
that nothing is to be set up between steps; memory of a step that was given up is of no use any more.
"""  # noqa: E501

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func
from tyir.execution.lockstep import Layout, Meet, Recv, Request, Send, drive
from tyir.execution.storage import packed_shape
from tyir.ir import Op
from tyir.traits import Collective
from tyir.types import TensorType, storage_dtype

__all__ = [
    "EXCHANGE",
    "FIRST_SITE",
    "PLACE_HEAD",
    "RUN",
    "WORDS",
    "MeetingMemory",
    "can_meet",
    "collectives_of",
    "request_of",
    "site_words",
]

Array = npt.NDArray[Any]
EXCHANGE: Final = "__tvm_tyir_exchange"
RUN: Final = "__tvm_tyir_run"
WORDS: Final = {
    # of a worker
    "current": 1,
    "main": 2,
    "looks": 3,
    "dies": 4,
    "list": 5,
    # of a die
    "stack": 1,
    "stack_bytes": 2,
    "function": 3,
    "arguments": 4,
    "count": 5,
    "state": 6,
    "code": 7,
    "word": 8,
    "old": 9,
}
FIRST_SITE: Final = 1  # word of a context
PLACE_HEAD: Final = 2  # words of a place of dies before the addresses
_STACK: Final = 1 << 20  # bytes: kernels keep less than 1 KiB of numbers each there, and call few others
_UCONTEXT: Final = (
    1 << 13
)  # bytes that a context of ucontext.h takes at most, of the systems that glibc runs on
_LINE: Final = 64  # bytes of a cache line: two places share none
_NOTHING: Final = np.empty(0, np.uint8)


def collectives_of(functions: Sequence[Func]) -> list[Op]:
    """The ops where dies meet, in the order of their sites' numbers: that of the text."""
    return [op for f in functions for op in f.walk() if op.has_trait(Collective)]


def request_of(op: Any) -> Request:
    """What an op asks of other dies, without its data."""
    request: Request = op.request(_NOTHING if op.operands else None)
    return request


def site_words(request: Request) -> int:
    """How many words of a context a site takes."""
    return len(request.targets) if isinstance(request, Send) else 1 if isinstance(request, Recv) else 3


# ------------------------------------------------------------------------------------------ do programs meet


@dataclass(frozen=True)
class _Way:
    """What passes from die to die, once in a step."""

    source: int
    target: int
    tag: int
    layout: Layout


def can_meet(programs: Sequence[Sequence[Func]]) -> bool:
    """Whether the dies' programs, the entry of each last, meet from beginning to end, all with the operands
    that the others expect.

    Compiled code looks at none of that: dies that do not meet would wait for ever, and a sum of tensors of
    two lengths would read beyond the shorter one.
    """
    dies = range(len(programs))
    executed = [list(_executed(functions)) for functions in programs]
    if not all(_gives_what_is_expected(op, die, len(dies)) for die in dies for op in executed[die]):
        return False
    sent = [way for die in dies for op in executed[die] for way in _ways(op, die, Send)]
    received = [way for die in dies for op in executed[die] for way in _ways(op, die, Recv)]
    if len(set(sent)) != len(sent) or len(set(received)) != len(received) or set(sent) != set(received):
        return False
    try:
        drive([_requests(ops) for ops in executed])
    except TyirError:
        return False
    return True


def _executed(functions: Sequence[Func]) -> Iterator[Op]:
    """The ops where a die meets others, as often and in the order as its step comes to them."""
    by_name = {str(f.sym_name): f for f in functions}

    def inside(function: Func) -> Iterator[Op]:
        for op in function.body:
            if op.has_trait(Collective):
                yield op
            elif isinstance(op, Call):
                yield from inside(by_name[op.callee.leaf])

    return inside(functions[-1])


def _requests(ops: Sequence[Op]) -> Generator[Request, Any, None]:
    """Requests whose kinds hold all that those who meet must have in common, and that compute nothing."""
    for op in ops:
        request = request_of(op)
        if isinstance(request, Meet):
            kind = f"{op.name} {[str(v.type) for v in op.results]} {op.properties}"
            request = replace(request, kind=kind, combine=lambda parts: _NOTHING)
        yield request


def _gives_what_is_expected(op: Op, die: int, count: int) -> bool:
    request = request_of(op)
    if not isinstance(request, Meet):
        return True
    members = request.dies or tuple(range(count))
    if die not in members:
        return False
    expected = request.given(members.index(die))
    if op.operands:
        return _layout(op.operands[0].type) == expected
    # a die without heads adds nothing to a sum; of what is joined it has a part of no bytes
    return not expected.nbytes or expected == _layout(op.results[0].type)


def _ways(op: Op, die: int, kind: type[Send] | type[Recv]) -> Iterator[_Way]:
    request = request_of(op)
    if isinstance(request, Send) and kind is Send:
        layout = _layout(op.operands[0].type)
        yield from (_Way(die, target, request.tag, layout) for target in request.targets)
    elif isinstance(request, Recv) and kind is Recv:
        yield _Way(request.source, die, request.tag, request.given())


def _layout(type: Any) -> Layout:
    assert isinstance(type, TensorType)
    return Layout(packed_shape(type), storage_dtype(type.element))


# ---------------------------------------------------------------------------------------------------- memory


class MeetingMemory:
    """Memory for the steps of all dies, as this module's text says, shared among `workers`.

    `of_dies`: each die's words; `contexts` and `workers`: addresses, in the order of dies and of workers,
    which have as many neighbouring dies each.
    """

    def __init__(self, sites: Sequence[Sequence[Op]], workers: int, looks: int) -> None:
        """`sites`: each die's, in the order of their numbers; `looks`: how often a worker none of whose dies
        can go on looks before it sleeps.
        """
        self._kept: list[Array] = []
        self._group = self._words(2)
        self._places: dict[tuple[object, ...], int] = {}
        self.of_dies = [self._die() for _ in sites]
        each = len(sites) // workers
        shares = [self.of_dies[first : first + each] for first in range(0, len(sites), each)]
        self.workers = [self._worker(dies, looks) for dies in shares]
        self.contexts = [
            self._context(self.workers[die // each], die, ops, len(sites)) for die, ops in enumerate(sites)
        ]

    def give_up(self) -> None:
        """Lets every die that waits, or comes to wait, go on without the others."""
        self._group.view(np.int32)[0] = 1

    def begin(self) -> None:
        """All steps are to run from their beginning."""
        for die in self.of_dies:
            die[WORDS["state"]] = die[WORDS["code"]] = 0

    def _die(self) -> npt.NDArray[np.int64]:
        die = self._words(len(WORDS))
        die[0] = _address(self._words(_UCONTEXT // 8))
        stack = np.empty(_STACK, np.uint8)
        self._kept.append(stack)
        die[WORDS["stack"]], die[WORDS["stack_bytes"]] = _address(stack), _STACK
        return die

    def _worker(self, dies: Sequence[Array], looks: int) -> int:
        worker = self._words(WORDS["list"] + len(dies))
        worker[0] = _address(self._group)
        worker[WORDS["main"]] = _address(self._words(_UCONTEXT // 8))
        worker[WORDS["looks"]], worker[WORDS["dies"]] = looks, len(dies)
        worker[WORDS["list"] :] = [_address(die) for die in dies]
        return _address(worker)

    def _context(self, worker: int, die: int, ops: Sequence[Op], count: int) -> int:
        words = [worker, *itertools.chain(*(self._site(die, op, count) for op in ops))]
        context = self._words(len(words))
        context[:] = words
        return _address(context)

    def _site(self, die: int, op: Op, count: int) -> list[int]:
        request = request_of(op)
        if isinstance(request, Send):
            size = _layout(op.operands[0].type).nbytes
            return [self._mail(die, target, request.tag, size) for target in request.targets]
        if isinstance(request, Recv):
            return [self._mail(request.source, die, request.tag, request.given().nbytes)]
        members = request.dies or tuple(range(count))
        if members not in self._places:
            self._places[members] = _address(self._words(PLACE_HEAD + 2 * len(members)))
        return [self._places[members], members.index(die), len(members)]

    def _mail(self, *key: int) -> int:
        if key not in self._places:
            data = self._words(-(-key[-1] // 8))
            place = self._words(2)
            place[1] = _address(data)
            self._places[key] = _address(place)
        return self._places[key]

    def _words(self, count: int) -> npt.NDArray[np.int64]:
        """Zeros that begin with a cache line and end with one."""
        line = _LINE // 8
        space = np.zeros(-(-count // line) * line + line, np.int64)
        first = -_address(space) % _LINE // 8
        self._kept.append(space)
        return space[first : first + count]


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
