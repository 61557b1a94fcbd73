"""Where the programs of dies meet, and whether they do from beginning to end: compiled code that takes
dies of one process through their steps (`tyir.backends.host.meeting`) does not look.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func
from tyir.execution.lockstep import Layout, Meet, Recv, Request, Send, drive
from tyir.execution.storage import packed_shape
from tyir.ir import Op
from tyir.traits import Collective
from tyir.types import TensorType, storage_dtype

__all__ = ["can_meet", "collectives_of", "request_of", "workers_of"]

_NOTHING: Final = np.empty(0, np.uint8)


def collectives_of(functions: Sequence[Func]) -> list[Op]:
    """The ops where dies meet, in the order of their sites' numbers: that of the text."""
    return [op for f in functions for op in f.walk() if op.has_trait(Collective)]


def workers_of(threads: int, dies: int, stages: int) -> int:
    """How many threads take dies of one process through their steps, the others being for kernels: as many as
    share the dies evenly; one where these are of several pipeline stages, of which one has work at a time.
    """
    return math.gcd(threads, dies) if stages == 1 else 1


def request_of(op: Any) -> Request:
    """What an op asks of other dies, without its data."""
    request: Request = op.request(_NOTHING if op.operands else None)
    return request


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
