"""The engine `host` of artifacts whose pipeline stages work on several steps at a time: an engine for the
dies of each stage, with a thread that takes one step after the other.

A stage takes a step up as soon as it is done with its part of the one before, and is given what it needs of
other stages through a `_Crossing`, one for each step: what is sent lies there until it is asked for.  Results
are the bits of steps one after the other, since no stage sees steps in another order.

    stage 0   | step 0 | step 1 | step 2 |
    stage 1            | step 0 | step 1 | step 2 |
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Meet, Recv
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_engine import HostEngine, _threads
from tyir.runtime_sim.session.host_runtime import check_threads
from tyir.runtime_sim.session.program_engine import CacheName
from tyir.sharding import even_ranges

__all__ = ["StagedEngine"]

Array = npt.NDArray[Any]


class _OtherStage(TyirError):
    """What is waited for will not come."""


@dataclass
class _Crossing:
    """What the stages give each other in one step."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    mail: dict[tuple[int, int, int], deque[Array]] = field(default_factory=lambda: defaultdict(deque))
    operands: dict[tuple[Any, ...], dict[int, Array | None]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    broken: bool = False

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Wait, `changed` being held, until something is there; `TyirError` when a stage has failed."""
        self.changed.wait_for(lambda: self.broken or there())
        if not there():
            raise _OtherStage("another stage of dies has failed in this step")


class _StageLinks:
    """`Links` of the dies of one stage, in the step that it is at."""

    def __init__(self, count: int, dies: range) -> None:
        self.count, self.dies = count, dies
        self.begin(_Crossing())

    def begin(self, crossing: _Crossing) -> None:
        self._crossing = crossing
        self._met: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def meet(self, request: Meet, own: Sequence[Array | None]) -> Sequence[Array | None]:
        members = request.dies or tuple(range(self.count))
        here = [die for die in members if die in self.dies]
        with self._crossing.changed:
            kind = (request.kind, request.dies)
            given = self._crossing.operands[*kind, self._met[kind]]  # of the n-th of a kind
            self._met[kind] += 1
            given.update((die, None if a is None else a.copy()) for die, a in zip(here, own, strict=True))
            self._crossing.changed.notify_all()
            self._crossing.wait_for(lambda: len(given) == len(members))
            return [given[die] for die in members]

    def send(self, source: int, target: int, tag: int, data: Array) -> None:
        with self._crossing.changed:
            self._crossing.mail[source, target, tag].append(data.copy())
            self._crossing.changed.notify_all()

    def recv(self, target: int, request: Recv) -> Array:
        with self._crossing.changed:
            sent = self._crossing.mail[request.source, target, request.tag]
            self._crossing.wait_for(lambda: bool(sent))
            return sent.popleft()

    def abort(self) -> None:
        with self._crossing.changed:
            self._crossing.broken = True
            self._crossing.changed.notify_all()


class StagedEngine:
    """An `Engine` of all dies."""

    def __init__(self, artifacts: Artifacts, threads: int | None = None) -> None:
        """`threads`: as `HostEngine` takes them, of all stages together; each has at least one.
        `RuntimeError` where the system lets no thread be started.
        """
        if threads is not None:
            check_threads(threads)
        self.artifacts = artifacts
        options = artifacts.manifest.options
        ranges = [range(first, first + count) for first, count in even_ranges(options.dies, options.pp)]
        self._links = [_StageLinks(options.dies, dies) for dies in ranges]
        own = max(1, (_threads() if threads is None else threads) // len(ranges))
        self._stages = [HostEngine(artifacts, threads=own, links=links) for links in self._links]
        self._workers = [ThreadPoolExecutor(1, f"stage{number}") for number in range(len(ranges))]
        for worker in self._workers:
            worker.submit(int).result()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name."""
        return self.begin(inputs, chunk)()

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """Begin a step behind those that were begun before; what is returned waits for its end."""
        crossing = _Crossing()
        parts = [
            worker.submit(_part, stage, links, crossing, inputs, chunk)
            for worker, stage, links in zip(self._workers, self._stages, self._links)
        ]
        return _Begun(parts)

    def reset(self) -> None:
        """Forget the caches."""
        for stage in self._stages:
            stage.reset()

    def caches(self) -> dict[CacheName, Array]:
        """All caches by die and name."""
        return {name: array for stage in self._stages for name, array in stage.caches().items()}

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches that `caches` gave."""
        for stage in self._stages:
            stage.load_caches(caches)

    def copy_sequence(self, source: int, target: int) -> None:
        """Make the caches of one sequence of the batch those of another."""
        for stage in self._stages:
            stage.copy_sequence(source, target)


def _part(
    stage: HostEngine, links: _StageLinks, crossing: _Crossing, inputs: dict[str, Array], chunk: Chunk
) -> dict[str, Array]:
    """A stage's part of a step."""
    links.begin(crossing)
    with np.errstate(all="ignore"):  # what is not finite is told by who reads the results
        try:
            return stage.step(inputs, chunk)
        except BaseException:
            links.abort()
            raise


@dataclass(frozen=True)
class _Begun:
    """A step under way: the stages' parts of it."""

    parts: Sequence[Future[dict[str, Array]]]

    def __call__(self) -> dict[str, Array]:
        """Wait for all; the first stage's outputs.  Raises what a stage has failed of, rather than that
        another has.
        """
        problems = [problem for part in self.parts if (problem := part.exception()) is not None]
        if problems:
            raise next((p for p in problems if not isinstance(p, _OtherStage)), problems[0])
        return self.parts[0].result()
