"""What a process of a group does in a step, without the others: how long it computes until it asks them for
something, and what for.  With the links of a cluster file that says how long a token takes in a group that
nobody has started.

    rehearsals = [Rehearsal(artifacts, dies, None) for dies in places]
    for each in rehearsals: each.steps(40)
    seconds = played([each.part for each in rehearsals], cluster, None)

The others are answered for with zeros: what is computed is wrong, how long it takes is not.  A process's dies
count as doing the same at the same time, as those of one pipeline stage do.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from tyir.artifacts.consistency import cache_inputs
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Layout, Meet, Recv
from tyir.process.cores import on_cores
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_engine import HostEngine
from tyir.targets.cluster import Cluster

__all__ = ["Event", "Part", "Rehearsal", "played"]

Array = npt.NDArray[Any]
_WARM: Final = 4  # steps that are not counted


@dataclass(frozen=True)
class Event:
    """After `seconds` of computing a process meets all others, sends to or receives from dies of another one,
    or its step ends; `tag` says which send a receive waits for, `nbytes` what it gives.
    """

    kind: Literal["meet", "send", "recv", "end"]
    seconds: float
    nbytes: int = 0
    tag: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Part:
    """A process's step: what it does, and how many cores it keeps busy when it computes."""

    cores: float
    events: tuple[Event, ...]


@dataclass
class _Alone:
    """`Links` to processes that are not there."""

    count: int
    dies: Sequence[int]
    events: list[Event] = field(default_factory=list)
    last: float = 0.0

    def did(self, kind: Literal["meet", "send", "recv", "end"], *what: Any) -> None:
        now = time.perf_counter()
        self.events.append(Event(kind, now - self.last, *what))
        self.last = time.perf_counter()

    def meet(self, request: Meet, own: Sequence[Array | None]) -> Sequence[Array | None]:
        members = request.dies or tuple(range(self.count))
        here = [number for number, die in enumerate(members) if die in self.dies]
        parts: list[Array | None] = [_zeros(request.given(number)) for number in range(len(members))]
        for number, part in zip(here, own):
            parts[number] = part
        self.did("meet", sum(request.given(number).nbytes for number in here))
        return parts

    def send(self, source: int, target: int, tag: int, data: Array) -> None:
        self.did("send", data.nbytes, (source, target, tag))

    def recv(self, target: int, request: Recv) -> Array:
        if target == self.dies[0]:  # the others of the process's stage receive the same at the same time
            self.did("recv", 0, (request.source, target, request.tag))
        return _zeros(request.given())

    def abort(self) -> None:
        pass


def _zeros(layout: Layout) -> Array:
    return np.zeros(layout.shape, layout.dtype)


class Rehearsal:
    """The decode steps of the process with these dies, which the others do not take part in."""

    def __init__(
        self,
        artifacts: Artifacts,
        dies: Sequence[int],
        threads: int | None,
        cores: Sequence[int] | None = None,
    ) -> None:
        """`threads` and `cores` (None: all): as the group's process has them."""
        self._cores = cores
        self._links = _Alone(artifacts.manifest.options.dies, dies)
        with on_cores(cores):
            self._engine = HostEngine(artifacts, threads=threads, links=self._links)
        self._length = min(artifacts.manifest.options.seqlens)
        program = artifacts.manifest.program(dies[0], self._length)
        caches = cache_inputs(program)
        self._inputs = {
            t.name: _zeros(Layout(t.shape, t.storage_dtype))
            for i, t in enumerate(program.inputs)
            if i not in caches
        }
        self._made: list[list[Event]] = []
        self._used: list[float] = []

    def steps(self, count: int) -> None:
        """So many more, of a sequence from its beginning; a few before them are not counted."""
        made: list[list[Event]] = []
        used: list[float] = []
        with on_cores(self._cores):
            for position in range(count + _WARM):
                self._inputs["pos"][...] = position * self._length
                self._links.events, self._links.last = [], time.perf_counter()
                cpu = time.process_time()
                self._engine.step(self._inputs, Chunk(position * self._length, self._length, self._length))
                self._links.did("end")
                took = math.fsum(event.seconds for event in self._links.events)
                used.append((time.process_time() - cpu) / took)
                made.append(self._links.events)
        self._made += made[_WARM:]
        self._used += used[_WARM:]

    @property
    def part(self) -> Part:
        """What a step does: the medians of all."""
        return Part(
            float(np.median(self._used)),
            tuple(
                Event(of[0].kind, float(np.median([e.seconds for e in of])), of[0].nbytes, of[0].tag)
                for of in zip(*self._made, strict=True)
            ),
        )


def played(parts: Sequence[Part], cluster: Cluster, cores: Sequence[Sequence[int]] | None) -> float:
    """Seconds until the first process has its token, when each does its part and the links take what the
    cluster file says.

    `cores`: those that each process runs on, when they are on one machine; who computes at the same time on
    the same core is slowed down by it.
    """
    play = _Play(cluster, cores, [_Actor(part) for part in parts])
    tell = cluster.message_ns(0) * 1e-9  # the first tells each to begin, and then begins itself
    for number, actor in enumerate(play.actors):
        actor.until = number * tell if number else (len(parts) - 1) * tell
    first = play.actors[0]
    while True:
        while any(actor.ready(play.now) and play.does(actor) for actor in play.actors):
            if first.over:
                return play.now
        play.advance()


@dataclass
class _Actor:
    """A process: the event that it comes to next, the seconds of computing that are left until then, and the
    time before which it cannot go on.
    """

    part: Part
    next: int = 0
    left: float = 0.0
    until: float = 0.0
    arrived: list[float] = field(default_factory=list)  # when it came to its collectives

    def __post_init__(self) -> None:
        self.left = self.part.events[0].seconds

    @property
    def over(self) -> bool:
        return self.next == len(self.part.events)

    def ready(self, now: float) -> bool:
        return not self.over and self.until <= now and not self.left

    def go_on(self, after: float) -> None:
        """To the next event: what lies between is begun at a time."""
        self.next += 1
        self.until = after
        self.left = 0.0 if self.over else self.part.events[self.next].seconds


@dataclass
class _Play:
    cluster: Cluster
    cores: Sequence[Sequence[int]] | None
    actors: Sequence[_Actor]
    now: float = 0.0
    sent: dict[tuple[int, int, int], float] = field(default_factory=dict)  # when it is there

    def advance(self) -> None:
        """To the next moment when somebody has computed or hears what was on its way."""
        busy = [n for n, a in enumerate(self.actors) if a.until <= self.now and a.left]
        speeds = self._speeds(busy)
        ends = [self.actors[n].left / speeds[n] for n in busy]
        step = min(ends + [a.until - self.now for a in self.actors if a.until > self.now])
        for number, end in zip(busy, ends):
            actor = self.actors[number]
            actor.left = actor.left - step * speeds[number] if end > step else 0.0
        self.now += step

    def _speeds(self, busy: Sequence[int]) -> dict[int, float]:
        """How fast those that compute are, of 1 when they do so alone."""
        if self.cores is None:
            return dict.fromkeys(busy, 1.0)
        asked: Counter[int] = Counter()
        for number in busy:
            own = self.cores[number]
            asked.update(dict.fromkeys(own, self.actors[number].part.cores / len(own)))
        return {n: min(1.0, 1.0 / max(asked[core] for core in self.cores[n])) for n in busy}

    def does(self, actor: _Actor) -> bool:
        """What a process has come to, if that can be done now; whether it could."""
        event = actor.part.events[actor.next]
        if event.kind == "meet":
            number = sum(e.kind == "meet" for e in actor.part.events[: actor.next])
            if len(actor.arrived) == number:
                actor.arrived.append(self.now)
            if any(len(other.arrived) <= number for other in self.actors):
                return False
            others = len(self.actors) - 1
            there = max(o.arrived[number] for o in self.actors if o is not actor) + self._message(
                others * event.nbytes
            )
            actor.go_on(max(self.now, there) + others * self._exchange)
        elif event.kind == "recv":
            if event.tag not in self.sent:
                return False
            actor.go_on(max(self.now, self.sent[event.tag]) + self._exchange / 2)
        elif event.kind == "send":  # half of an exchange: nothing comes back
            self.sent[event.tag] = self.now + self._exchange / 2 + self._message(event.nbytes)
            actor.go_on(self.now + self._exchange / 2)
        else:
            actor.go_on(self.now)
        return True

    @property
    def _exchange(self) -> float:
        return self.cluster.link.exchange_us * 1e-6

    def _message(self, nbytes: int) -> float:
        return self.cluster.message_ns(nbytes) * 1e-9
