"""Dies that run side by side and meet: each is a generator that stops at every collective, and is resumed
with what the collective gives it.

All dies of a collective must have arrived before it happens; a send does not wait, a receive waits for the
send of its source and tag.  The interpreter's runs and the functional engine's differ in what they stop at,
so both say through `Meet`, `Send` or `Recv` what they ask for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError

__all__ = ["Meet", "Meeting", "Recv", "Request", "Send", "drive"]

Array = npt.NDArray[Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Meet:
    """A collective of `dies` (none: all): `combine` makes of their operands, in die order, what each of them
    gets.  Requests that meet have equal kinds.
    """

    kind: str
    dies: tuple[int, ...]
    operand: Array | None
    combine: Callable[[Sequence[Array | None]], Array]
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
    """What `source` sends with this tag."""

    source: int
    tag: int
    name: str


Request = Meet | Send | Recv
NOTHING = np.empty(0, np.uint8)  # what a send gives its own die


def drive(runs: Sequence[Generator[Request, Array | None, Result]]) -> list[Result]:
    """Run all dies to their ends; returns each die's result.

    `TyirError` when they wait for each other in vain.
    """
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


class Meeting:
    """The same for dies that run in threads of their own: each asks, and waits until it is answered."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.problem: BaseException | None = None
        self._changed = threading.Condition()
        self._waiting: dict[int, Request] = {}
        self._answers: dict[int, Array | None] = {}
        self._mail: dict[tuple[int, int, int], Array] = {}
        self._finished = 0

    def ask(self, die: int, request: Request) -> Array | None:
        """What a collective gives a die.  Raises what another die has failed of, and `TyirError` when dies
        wait for each other in vain.
        """
        with self._changed:
            self._waiting[die] = request
            self._serve()
            while die not in self._answers:
                if self.problem is not None:
                    raise self.problem
                self._changed.wait()
            return self._answers.pop(die)

    def leave(self, problem: BaseException | None = None) -> None:
        """A die has finished, or failed."""
        with self._changed:
            self._finished += 1
            self.problem = self.problem or problem
            self._serve()

    def _serve(self) -> None:
        served = _served(self._waiting, self._mail, self.count)
        for die in served:
            del self._waiting[die]
        self._answers.update(served)
        if self._waiting and not served and len(self._waiting) + self._finished == self.count:
            self.problem = self.problem or _stuck(self._waiting, self._finished, self.count)
        self._changed.notify_all()


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
            meeting = [
                o for o in others if isinstance(o, Meet) and (o.kind, o.dies) == (request.kind, request.dies)
            ]
            if len(meeting) == len(members):
                combined = request.combine([o.operand for o in meeting])
                served.update(dict.fromkeys(members, combined))
    return served
