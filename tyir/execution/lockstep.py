"""Dies that run side by side and meet: each is a generator that stops at every collective, and is resumed
with what the collective gives it.

All dies of a collective must have arrived before it happens; a send does not wait, a receive waits for the
send of its source and tag.  The interpreter's runs and the functional engine's differ in what they stop at,
so both say through `Meet`, `Send` or `Recv` what they ask for.

Dies may run in several processes: `Links` says which of them this one has and carries to the others what
they are asked for.  What a collective makes of its operands is computed by each process, from all operands
in die order, so results are the same bits wherever the dies run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError

__all__ = ["Layout", "Links", "Meet", "Meeting", "OneProcess", "Recv", "Request", "Send", "drive"]

Array = npt.NDArray[Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """Shape and type of an array that is on its way: known before it comes, as programs are static."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Meet:
    """A collective of `dies` (none: all): `combine` makes of their operands, in die order, what each of them
    gets.  Requests that meet have equal kinds.

    `given(i)`: the layout of what the i-th of them gives, if it gives something.
    """

    kind: str
    dies: tuple[int, ...]
    operand: Array | None
    combine: Callable[[Sequence[Array | None]], Array]
    given: Callable[[int], Layout]
    name: str


@dataclass(frozen=True)
class Send:
    """Data for each of the `targets`."""

    targets: tuple[int, ...]
    tag: int
    data: Array
    name: str


@dataclass(frozen=True)
class Recv:
    """What `source` sends with this tag, laid out as `given()`."""

    source: int
    tag: int
    given: Callable[[], Layout]
    name: str


Request = Meet | Send | Recv
NOTHING = np.empty(0, np.uint8)  # what a send gives its own die


class Links(Protocol):
    """Which dies run in this process, and the way to those that run in others.

    Called by the threads of dies, several at a time, when a request cannot be served in this process alone.
    """

    @property
    def count(self) -> int:
        """Dies of all processes."""

    @property
    def dies(self) -> Sequence[int]:
        """Those of this process, in order."""

    def meet(self, request: Meet, own: Sequence[Array | None]) -> Sequence[Array | None]:
        """The operands of all dies that meet, in die order, from those of this process's (`own`)."""

    def send(self, source: int, target: int, tag: int, data: Array) -> None:
        """Data of a die of this process for one of another.  Does not wait for it."""

    def recv(self, target: int, request: Recv) -> Array:
        """What a die of another process sends to one of this."""

    def abort(self) -> None:
        """A die of this process has failed: whoever waits for it must hear of it."""


@dataclass(frozen=True)
class OneProcess:
    """`Links` of dies that all run in this process."""

    count: int

    @property
    def dies(self) -> range:
        return range(self.count)

    def meet(self, request: Meet, own: Sequence[Array | None]) -> Sequence[Array | None]:
        return own

    def send(self, source: int, target: int, tag: int, data: Array) -> None:
        raise self._stranger(target)

    def recv(self, target: int, request: Recv) -> Array:
        raise self._stranger(request.source)

    def abort(self) -> None:
        pass

    def _stranger(self, die: int) -> TyirError:
        return TyirError(f"there is no die {die} among {self.count}")


def drive(
    runs: Sequence[Generator[Request, Array | None, Result]], links: Links | None = None
) -> list[Result]:
    """Run dies to their ends, those that `links` has here (None: all); returns each die's result.

    They take turns in one thread; in threads of their own where others run elsewhere.  `TyirError` when
    they wait for each other in vain.
    """
    if links is not None and len(links.dies) < links.count:
        return _drive_threads(runs, links)
    results: dict[int, Result] = {}
    waiting: dict[int, Request] = {}
    mail: dict[tuple[int, int, int], Array] = {}
    ready: dict[int, Array | None] = dict.fromkeys(range(len(runs)))
    while ready:
        for die, message in ready.items():
            try:
                waiting[die] = runs[die].send(message)
            except StopIteration as stop:
                results[die] = stop.value
        ready = _served(waiting, mail, len(runs))
        for die in ready:
            del waiting[die]
    if waiting:
        raise _stuck(waiting, len(results), len(runs))
    return [results[die] for die in range(len(runs))]


def _drive_threads(runs: Sequence[Generator[Request, Array | None, Result]], links: Links) -> list[Result]:
    meeting = Meeting(links)

    def one(die: int, run: Generator[Request, Array | None, Result]) -> Result:
        problem: BaseException | None = None
        message: Array | None = None
        try:
            while True:
                try:
                    request = run.send(message)
                except StopIteration as stop:
                    result: Result = stop.value
                    return result
                message = meeting.ask(die, request)
        except BaseException as error:
            problem = error
            raise
        finally:
            meeting.leave(problem)

    with ThreadPoolExecutor(len(runs)) as pool:
        made = [pool.submit(one, die, run) for die, run in zip(links.dies, runs)]
    if meeting.problem is not None:
        raise meeting.problem
    return [future.result() for future in made]


class Meeting:
    """The same for dies that run in threads of their own: each asks, and waits until it is answered."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.problem: BaseException | None = None
        lock = threading.Lock()
        # One for each die, so that a collective wakes who took part in it and not who waits for another.
        self._answered = {die: threading.Condition(lock) for die in links.dies}
        self._lock = lock
        self._waiting: dict[int, Request] = {}
        self._answers: dict[int, Array | None] = {}
        self._mail: dict[tuple[int, int, int], Array] = {}
        self._finished = 0

    def ask(self, die: int, request: Request) -> Array | None:
        """What a collective gives a die.  Raises what another die has failed of, and `TyirError` when dies
        wait for each other in vain.
        """
        if isinstance(request, Send):
            for target in request.targets:
                if target not in self.links.dies:
                    self.links.send(die, target, request.tag, request.data)
        with self._lock:
            self._waiting[die] = request
            elsewhere = self._for_others(die, request)
            if not elsewhere:
                self._serve()
                while die not in self._answers:
                    if self.problem is not None:
                        raise self.problem
                    self._answered[die].wait()
                return self._answers.pop(die)
            for member in elsewhere:
                del self._waiting[member]
        answer = self._of_others(elsewhere)
        with self._lock:
            self._give(dict.fromkeys(elsewhere, answer))
            return self._answers.pop(die)

    def _for_others(self, die: int, request: Request) -> dict[int, Request]:
        """The requests, by die in order, that only other processes can answer now that this one is made."""
        here = self.links.dies
        if isinstance(request, Recv):
            return {} if request.source in here else {die: request}
        if isinstance(request, Send):
            return {}
        members = request.dies or range(self.links.count)
        own = {m: self._waiting.get(m) for m in members if m in here}
        met = {m: other for m, other in own.items() if other is not None and _meet(other, request)}
        return met if len(met) == len(own) < len(members) else {}

    def _of_others(self, requests: Mapping[int, Request]) -> Array:
        """The answer to a receive, or to the same collective of all dies that are here."""
        (die, request), *_ = requests.items()
        if isinstance(request, Recv):
            return self.links.recv(die, request)
        assert isinstance(request, Meet)
        own = [other.operand for other in requests.values() if isinstance(other, Meet)]
        return request.combine(self.links.meet(request, own))

    def leave(self, problem: BaseException | None = None) -> None:
        """A die has finished, or failed."""
        with self._lock:
            self._finished += 1
            self.problem = self.problem or problem
            self._serve()
        if problem is not None:
            self.links.abort()

    def _serve(self) -> None:
        here = len(self.links.dies)
        served = _served(self._waiting, self._mail, self.links.count)
        for die in served:
            del self._waiting[die]
        self._give(served)
        if self._waiting and not served and len(self._waiting) + self._finished == here:
            self.problem = self.problem or _stuck(self._waiting, self._finished, here)
        if self.problem is not None:
            for answered in self._answered.values():
                answered.notify()

    def _give(self, answers: Mapping[int, Array | None]) -> None:
        self._answers.update(answers)
        for die in answers:
            self._answered[die].notify()


def _meet(request: Request, other: Request) -> bool:
    """Whether two requests are of the same collective."""
    return (
        isinstance(request, Meet)
        and isinstance(other, Meet)
        and (request.kind, request.dies) == (other.kind, other.dies)
    )


def _stuck(waiting: dict[int, Request], finished: int, count: int) -> TyirError:
    stuck = ", ".join(f"die {die} at {request.name}" for die, request in sorted(waiting.items()))
    return TyirError(f"the dies do not meet: {stuck}; {finished} of {count} dies have finished")


def _served(
    waiting: dict[int, Request], mail: dict[tuple[int, int, int], Array], count: int
) -> dict[int, Array | None]:
    """The waiting dies that can go on, with what they are resumed with."""
    served: dict[int, Array | None] = {}
    for die, request in sorted(waiting.items()):
        if isinstance(request, Send):
            mail.update({(die, target, request.tag): request.data for target in request.targets})
            served[die] = NOTHING
    for die, request in sorted(waiting.items()):
        if isinstance(request, Recv) and (request.source, die, request.tag) in mail:
            served[die] = mail.pop((request.source, die, request.tag))
        elif isinstance(request, Meet) and die not in served:
            members = request.dies or tuple(range(count))
            others = [waiting.get(other) for other in members]
            meeting = [o for o in others if isinstance(o, Meet) and _meet(o, request)]
            if len(meeting) == len(members):
                combined = request.combine([o.operand for o in meeting])
                served.update(dict.fromkeys(members, combined))
    return served
