"""The first process of a group: it runs dies of its own, has the others run theirs, and watches them.

    with DieGroup.start(Artifacts.open(folder), processes=2) as group:
        session = Session(group.artifacts, group=group)

Before anything is computed each process has found the artifacts by their manifest's hash, verified the files
of its dies, looked at its processor and memory, and reached every other; whatever is missing anywhere is
reported together.  Afterwards each gives a sign of life every two seconds.  One that is gone is named with
its dies within ten, whether a step runs or none does; the group has then failed, what waits is woken, and
the others end by themselves.
"""

from __future__ import annotations

import math
import multiprocessing.connection
import os
import queue
import signal
import subprocess
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Links
from tyir.process.cores import on_cores, usable_cores
from tyir.runtime_sim.processes.checks import memory_of, problems_here
from tyir.runtime_sim.processes.gloo import Address, Gloo, GlooLinks, LinksBroken, listen_for_store
from tyir.runtime_sim.processes.hosts import address_of, connect, start_here
from tyir.runtime_sim.processes.measure import exchanges, round_trips
from tyir.runtime_sim.processes.messages import Channel, Message
from tyir.runtime_sim.processes.placement import Cores, place_language, place_tower, share_cores
from tyir.runtime_sim.processes.rank import BEAT, SILENCE, named, unreachable
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.program_engine import CacheName
from tyir.runtime_sim.session.session import Engine, EngineName, make_engine
from tyir.runtime_sim.vision.tower import Tower

__all__ = ["DieGroup", "GroupFailed"]

Array = npt.NDArray[Any]
_LOOPBACK: Final = "127.0.0.1"
_END: Final = 3.0  # seconds for a process to end when it is told to
_START: Final = 60.0  # seconds of silence that are allowed while libraries are loaded


class GroupFailed(TyirError):
    """A process of the group is gone or has failed: nothing more can be computed with it."""


@dataclass
class _Other:
    """Another process, as the first sees it."""

    rank: int
    name: str
    host: str
    channel: Channel
    process: subprocess.Popen[bytes] | None  # None where it is not this process's child
    heard: float = 0.0
    gone: bool = False
    answers: queue.Queue[Message] = field(default_factory=queue.Queue)


class DieGroup:
    """Made by `start`; closed by `close`, by `with`, and at the end of the process."""

    def __init__(
        self, artifacts: Artifacts, engine_name: EngineName, count: int, host: str, *, pinned: bool = False
    ) -> None:
        """`pinned`: the processes are all on this machine, and each runs on cores of its own."""
        self.artifacts = artifacts
        self.engine_name: EngineName = engine_name
        self.places = place_language(artifacts.manifest, count)
        self.problem: TyirError | None = None
        self.on_failure: Callable[[TyirError], None] = lambda problem: None
        self._names = [named(rank, dies) for rank, dies in enumerate(self.places)]
        self._host = host
        self._others: list[_Other] = []
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._over = threading.Event()
        cores = sorted(os.sched_getaffinity(0))
        self.cores: Cores | None = None
        if pinned and len(cores) == usable_cores():  # with a share of them nobody knows whose a core is
            self.cores = share_cores(self.places, artifacts.manifest.options.pp, cores)
        with on_cores(self._cores_of(0)):
            self._gloo = Gloo(host)
        self._ended = weakref.finalize(self, _end, self._others, self._closing, self._gloo, self._over)
        self.links = GlooLinks(self.places, 0, self._gloo)
        self.tower_links: Links = GlooLinks(place_tower(artifacts.manifest, count), 0, self._gloo)
        self.threads: tuple[int | None, ...] = ()  # of each process
        self.engine: Engine

    @classmethod
    def start(
        cls,
        artifacts: Artifacts,
        *,
        processes: int = 0,
        hosts: Sequence[tuple[str, int]] = (),
        engine: EngineName = "host",
        threads: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """A group of so many `processes` on this machine, or of one on each of the `hosts`, the first of
        which is this machine by an address that the others can reach (its port is not used).

        `threads`: of each process.  `say` hears where each process runs and which address it has bound.
        `TyirError` lists what is missing, and where.
        """
        count = len(hosts) or processes
        host = address_of(hosts[0][0]) if hosts else _LOOPBACK
        pinned = engine == "host" and threads is None and not hosts
        group = cls(artifacts, engine, count, host, pinned=pinned)
        try:
            group._begin(hosts, threads, say)
        except BaseException:
            group.close()
            raise
        return group

    # --------------------------------------------------------------------------------------------- beginning

    def _begin(
        self, hosts: Sequence[tuple[str, int]], threads: int | None, say: Callable[[str], None]
    ) -> None:
        count = len(self.places)
        if self.cores is not None:
            self.threads = tuple(map(len, self.cores))
        elif threads is None and self.engine_name == "host" and not hosts:  # they share the cores
            self.threads = (max(1, usable_cores() // count),) * count
        else:
            self.threads = (threads,) * count
        self._bring_up(hosts)
        watch = threading.Thread(target=_watch, args=(weakref.ref(self), self._closing), daemon=True)
        watch.start()
        problems = list(self._check_here(not hosts))
        everywhere = sum(self._memory(rank) for rank in range(count))
        for other in self._others:
            other.channel.send(
                "open",
                rank=other.rank,
                processes=count,
                manifest=self.artifacts.sha256,
                check=self.artifacts.checked,
                engine=self.engine_name,
                threads=self.threads[other.rank],
                cores=self._cores_of(other.rank),
                memory=self._memory(other.rank) if hosts else everywhere,
            )
        opened: list[Message] = []
        for other in self._others:
            try:
                opened.append(self._answer(other))
            except GroupFailed as failed:
                problems += failed.diagnostics
        if problems:
            raise TyirError(problems)
        addresses: list[Address] = [self._gloo.address, *(tuple(m["address"]) for m in opened)]
        say(f"{self._names[0]} binds {_shown(self._gloo.address)}")
        for other, message in zip(self._others, opened):
            where = f"process {message['pid']} on {other.host}"
            say(f"{other.name}, {where}, binds {_shown(message['address'])}, has {message['folder']}")
        self._reach(addresses)
        self._join(addresses)
        self.engine = _GroupEngine(self, self.threads[0])

    def _bring_up(self, hosts: Sequence[tuple[str, int]]) -> None:
        """Start the processes, or reach those that wait on other machines, all at once."""
        ranks = range(1, len(self.places))
        problems: list[Diagnostic] = []

        def reached(rank: int) -> Any:
            try:
                return connect(*hosts[rank])
            except TyirError as error:
                return error

        with ThreadPoolExecutor(max(len(ranks), 1)) as pool:
            for rank, found in zip(ranks, pool.map(reached, ranks) if hosts else [None] * len(ranks)):
                host, process = hosts[rank][0] if hosts else "this machine", None
                if isinstance(found, TyirError):
                    (diagnostic,) = found.diagnostics
                    what = f"{self._names[0]} and {self._names[rank]} cannot meet: {diagnostic.message}"
                    problems.append(Diagnostic(what, help=diagnostic.help))
                    continue
                if found is None:
                    found, process = start_here(self._host, self.artifacts.path)
                other = _Other(rank, self._names[rank], host, Channel(found), process, time.monotonic())
                self._others.append(other)
        if problems:
            raise TyirError(problems)

    def _cores_of(self, rank: int) -> tuple[int, ...] | None:
        """Those that a process runs its dies on; None for all."""
        return None if self.cores is None else self.cores[rank]

    def _memory(self, rank: int) -> int:
        return memory_of(self.artifacts.manifest, len(self.places), rank)

    def _check_here(self, alone: bool) -> Iterator[Diagnostic]:
        ranks = range(len(self.places)) if alone else range(1)
        needed = sum(map(self._memory, ranks))
        compiled = self.engine_name == "host"
        for d in problems_here(self.artifacts, compiled=compiled, needed=needed):
            where = "this machine" if alone else self._host
            yield Diagnostic(f"{self._names[0]} on {where}: {d.message}", help=d.help)

    def _reach(self, addresses: Sequence[Address]) -> None:
        """`TyirError` names each pair of processes that cannot connect."""
        for other in self._others:
            peers = [(r, *address) for r, address in enumerate(addresses) if r != other.rank]
            other.channel.send("reach", peers=peers)
        found = [(0, rank, why) for rank, why in unreachable(list(enumerate(addresses))[1:])]
        for other in self._others:
            found += [(other.rank, rank, why) for rank, why in self._answer(other)["unreachable"]]
        if not found:
            return
        raise TyirError(
            Diagnostic(
                f"{self._names[a]} cannot reach {self._names[b]} at {_shown(addresses[b])}: {why}",
                help="give an address that the other machine can reach first in --hosts, and as --host of"
                " tyir-rank; let its ports through (ip -brief address shows the addresses)",
            )
            for a, b, why in found
        )

    def _join(self, addresses: Sequence[Address]) -> None:
        store, listener = listen_for_store(self._host)
        for other in self._others:
            other.channel.send("join", rank=other.rank, addresses=addresses, store=store)
        try:
            self._gloo.join(0, addresses, store, listener)
        except LinksBroken as error:
            raise self._cause(error) from None
        for other in self._others:
            self._answer(other)

    # ----------------------------------------------------------------------------------------------- working

    def tell(self, kind: str, arrays: Mapping[str, Array] | None = None, **fields: Any) -> None:
        """Have the other processes do something, which they begin at once and in this order."""
        if self.problem is not None:
            raise self.problem
        for other in self._others:
            try:
                other.channel.send(kind, arrays, **fields)
            except OSError as error:
                raise self._cause(error) from None

    def ask(self, kind: str) -> Iterator[Message]:
        """Tell the same to all, and hear each answer."""
        self.tell(kind)
        for other in self._others:
            yield self._answer(other)

    def tell_each(self, kind: str, arrays: Callable[[Sequence[int]], Mapping[str, Array]]) -> None:
        """Give each process what is for its dies."""
        if self.problem is not None:
            raise self.problem
        for other in self._others:
            other.channel.send(kind, arrays(self.places[other.rank]))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, what fails because of another process fails with what happened there; what fails in this
        process ends the group.
        """
        try:
            yield
        except LinksBroken as error:
            traceback.clear_frames(error.__traceback__)  # they hold what gloo was asked, and so its ports
            raise self._cause(error) from None
        except GroupFailed:
            raise
        except TyirError as error:
            self._fail(0, error.diagnostics)
            raise

    @property
    def traffic(self) -> tuple[int, int, int]:
        """So far, of this process: collectives that other processes had a part in, messages, bytes sent."""
        return self.links.met, self._gloo.messages, self._gloo.sent

    def round_trips(self, nbytes: int, count: int) -> list[float]:
        """Seconds of messages to the second process and back."""
        with self.working():
            self.tell("round_trips", nbytes=nbytes, count=count)
            with on_cores(self._cores_of(0)):
                return round_trips(self._gloo, 0, nbytes, count)

    def exchanges(self, nbytes: int, count: int) -> list[float]:
        """Seconds of collectives of all dies, as `tyir.runtime_sim.processes.measure` has them."""
        with self.working():
            self.tell("exchanges", nbytes=nbytes, count=count)
            rounds = math.ceil((1 + len(self.pids)) / usable_cores())
            with on_cores(self._cores_of(0)):
                return exchanges(self.links, nbytes, count, rounds)

    def compute_tower(self, tower: Tower, patches: Array) -> dict[str, Array]:
        """`Tower.compute` in this process, while the others run their dies of the same tower."""
        size = tower.vision.sizes.index(tower.size)
        with self.working():
            self.tell("tower", {"patches": patches}, size=size)
            return tower.compute(patches)

    @property
    def pids(self) -> dict[int, int]:
        """The processes of this machine that were started for it, by rank."""
        return {o.rank: o.process.pid for o in self._others if o.process is not None}

    def close(self) -> None:
        """End the other processes; nothing of them is left when this returns."""
        self._ended()
        self._over.wait()  # it may be under way in the thread that watches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- watching

    def _answer(self, other: _Other) -> Message:
        """What a process answers; `GroupFailed` when it cannot."""
        while True:
            with suppress(queue.Empty):
                message = other.answers.get(timeout=0.2)
                if message.kind == "failed":
                    raise GroupFailed(_problems_of(other, message))
                return message
            if self.problem is not None and other.answers.empty():
                raise self.problem

    def _cause(self, error: Exception) -> TyirError:
        """What is behind a connection that broke: it is known within the time that silence takes."""
        self._failed.wait(SILENCE + BEAT)
        if self.problem is None:
            self._fail(0, [Diagnostic(f"a connection of the group broke: {error}")])
        assert self.problem is not None
        return self.problem

    def _fail(self, rank: int, problems: Sequence[Diagnostic]) -> None:
        if self.problem is not None or self._closing.is_set():
            return
        self.problem = GroupFailed(problems)
        self._failed.set()
        self._gloo.abort()
        if rank:
            self.on_failure(self.problem)

    def look(self) -> None:
        """Hear what the processes say, for a second at most, and notice who is gone."""
        present = {o.channel.connection: o for o in self._others if not o.gone}
        if not present:
            self._closing.wait(BEAT / 2)
        for ready in multiprocessing.connection.wait(list(present), timeout=BEAT / 2):
            other = present[ready]  # type: ignore[index]  # connections are what was given
            try:
                message = other.channel.receive(0)
            except (EOFError, OSError, TimeoutError):
                self._gone(other, _end_of(other))
                continue
            other.heard = time.monotonic()
            self._hear(other, message)
        now, patience = time.monotonic(), SILENCE if hasattr(self, "engine") else _START
        for other in self._others:
            if not other.gone and now - other.heard > patience:
                self._gone(other, f"has said nothing for {patience:.0f} s")
            with suppress(OSError):
                other.channel.send("beat")

    def _hear(self, other: _Other, message: Message) -> None:
        if message.kind == "failed" and not hasattr(self, "engine"):
            other.answers.put(message)  # at the beginning all problems are reported together
        elif message.kind == "failed" and not message["consequence"]:
            self._fail(other.rank, _problems_of(other, message))
        elif message.kind != "beat":
            other.answers.put(message)

    def _gone(self, other: _Other, how: str) -> None:
        other.gone = True
        help = "start again; what was computed is lost"
        self._fail(other.rank, [Diagnostic(f"{other.name} on {other.host} {how}", help=help)])


def _watch(group: weakref.ref[DieGroup], closing: threading.Event) -> None:
    """Look after a group for as long as somebody has it; one that has failed is ended."""
    while not closing.is_set() and (watched := group()) is not None:
        watched.look()
        if watched.problem is not None:
            watched.close()
        del watched


def _end_of(other: _Other) -> str:
    """How a process has ended."""
    if other.process is None:
        return "has ended"
    with suppress(subprocess.TimeoutExpired):
        code = other.process.wait(1)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"(process {other.process.pid}) has ended: {how}"
    return f"(process {other.process.pid}) has closed its connection"


def _problems_of(other: _Other, message: Message) -> list[Diagnostic]:
    return [
        Diagnostic(f"{other.name} on {other.host}: {what}", help=help) for what, help in message["problems"]
    ]


def _shown(address: Sequence[Any]) -> str:
    return f"{address[0]}:{address[1]}"


def _end(others: Sequence[_Other], closing: threading.Event, gloo: Gloo, ended: threading.Event) -> None:
    """Tell all to end, and see to it that those of this machine have and no port is held."""
    closing.set()
    for other in others:
        with suppress(OSError):
            other.channel.send("end")
    for other in others:
        if other.process is not None:
            try:
                other.process.wait(_END)
            except subprocess.TimeoutExpired:  # it is stopped, or hangs
                other.process.kill()
                other.process.wait()
        with suppress(OSError):
            other.channel.close()
    gloo.close()
    ended.set()


class _GroupEngine:
    """An `Engine` whose dies run in the processes of a group."""

    def __init__(self, group: DieGroup, threads: int | None) -> None:
        self.artifacts = group.artifacts
        self._group = weakref.proxy(group)
        self._cores = None if group.cores is None else group.cores[0]
        self._own = make_engine(group.engine_name, group.artifacts, threads=threads, links=group.links)

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """Run one chunk; the main die's outputs by name."""
        with self._group.working(), on_cores(self._cores):
            self._group.tell("step", inputs, chunk=[chunk.start, chunk.count, chunk.seqlen])
            return self._own.step(inputs, chunk)

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """`step`: done here when this returns, while other processes may still be at work on it."""
        outputs = self.step(inputs, chunk)
        return lambda: outputs

    def reset(self) -> None:
        """Forget the caches."""
        self._group.tell("reset")
        self._own.reset()

    def caches(self) -> dict[CacheName, Array]:
        """All caches by die and name."""
        found = dict(self._own.caches())
        for message in self._group.ask("caches"):
            for key, array in message.arrays.items():
                die, _, name = key.partition("/")
                found[int(die), name] = array
        return found

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches that `caches` gave."""

        def of(dies: Sequence[int]) -> dict[str, Array]:
            return {f"{die}/{name}": array for (die, name), array in caches.items() if die in dies}

        self._group.tell_each("load_caches", of)
        self._own.load_caches(caches)

    def copy_sequence(self, source: int, target: int) -> None:
        """Make the caches of one sequence of the batch those of another."""
        self._group.tell("copy_sequence", source=source, target=target)
        self._own.copy_sequence(source, target)
