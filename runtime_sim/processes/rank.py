"""A process that runs some of the dies, as the first process of its group tells it.

    python -m tyir.runtime_sim.processes.rank DESCRIPTOR HOST FOLDER..

`DESCRIPTOR` is a connected socket, inherited; `HOST` the address that dies' data comes in at; the artifacts
are looked for in the folders.  It ends when it is told to, or when the first process is gone: nothing is left
behind, whatever happens to the others.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.process.cache import checked_files
from tyir.process.cores import on_cores
from tyir.runtime_sim.processes.checks import files_of_rank, find_artifacts, problems_here
from tyir.runtime_sim.processes.gloo import Address, Gloo, GlooLinks, LinksBroken
from tyir.runtime_sim.processes.measure import exchanges, round_trips
from tyir.runtime_sim.processes.messages import Channel, Message
from tyir.runtime_sim.processes.placement import place_language, place_tower
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.session import Engine, make_engine
from tyir.runtime_sim.vision.tower import Tower

__all__ = ["BEAT", "SILENCE", "Rank", "main", "named", "unreachable"]

Array = npt.NDArray[Any]
BEAT: Final = 2.0  # seconds between signs of life
SILENCE: Final = 8.0  # seconds without one after which a process counts as gone
_REACH: Final = 5.0  # seconds for a connection to another process
_GONE: Final = 1  # exit code of a process whose group is gone


def named(rank: int, dies: Sequence[int]) -> str:
    """`rank 1 (dies 2, 3)`: what a process is called in messages."""
    if not dies:
        return f"rank {rank} (no die)"
    return f"rank {rank} ({'die' if len(dies) == 1 else 'dies'} {', '.join(map(str, dies))})"


def unreachable(peers: Sequence[tuple[int, Address]]) -> list[tuple[int, str]]:
    """Of other processes, by rank, those that cannot be reached from here, and why."""
    found = []
    for rank, address in peers:
        try:
            socket.create_connection(address, _REACH).close()
        except OSError as error:
            found.append((rank, "timed out" if isinstance(error, TimeoutError) else str(error.strerror)))
    return found


class Rank:
    """The process's dies and what it is told to do with them."""

    def __init__(self, channel: Channel, host: str, folders: Sequence[Path]) -> None:
        self.channel, self.host, self.folders = channel, host, folders
        self.name = "a rank"
        self._gloo: Gloo | None = None
        self._engine: Engine
        self._artifacts: Artifacts
        self._links: GlooLinks
        self._tower_links: GlooLinks
        self._engine_name: Any = "host"
        self._cores: Sequence[int] | None = None
        self._towers: dict[int, Tower] = {}
        self._told: queue.Queue[Message] = queue.Queue()
        self._ending = False

    def run(self) -> int:
        """Do as told until told to end; the exit code."""
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()
        while (message := self._told.get()).kind != "end":
            try:
                self._do(message)
            except Exception as error:
                self._report(error)
        return 0

    def _do(self, message: Message) -> None:
        actions: dict[str, Callable[[Message], object]] = {
            "open": self._open,
            "reach": self._reach,
            "join": self._join,
            "step": self._step,
            "tower": self._tower,
            "round_trips": self._round_trips,
            "exchanges": self._exchanges,
            "reset": lambda m: self._engine.reset(),
            "caches": lambda m: self.channel.send("answer", _named(self._engine.caches())),
            "load_caches": lambda m: self._engine.load_caches(_by_die(m.arrays)),
            "copy_sequence": lambda m: self._engine.copy_sequence(m["source"], m["target"]),
        }
        actions[message.kind](message)

    def _listen(self) -> None:
        """Takes what is told, and ends the process when nothing is any more."""
        try:
            while True:
                message = self.channel.receive(SILENCE)
                if message.kind != "beat":
                    self._told.put(message)
                if message.kind == "end":
                    self._ending = True
        except TimeoutError:
            self._leave(f"the first process has said nothing for {SILENCE:.0f} s")
        except (EOFError, OSError):
            self._leave("the first process is gone")

    def _leave(self, why: str) -> None:
        if self._gloo is not None:
            self._gloo.abort()
        if not self._ending:
            with suppress(OSError):
                os.write(2, f"{self.name}: {why}; ends\n".encode())
        os._exit(0 if self._ending else _GONE)

    def _beat(self) -> None:
        pause = threading.Event()
        with suppress(OSError):
            while not pause.wait(BEAT):
                self.channel.send("beat")

    def _report(self, error: Exception) -> None:
        if isinstance(error, TyirError):
            problems = [[d.message, d.help or ""] for d in error.diagnostics]
        else:
            problems = [[f"{type(error).__name__}: {error}", ""]]
        if self._gloo is not None:
            self._gloo.abort()
        with suppress(OSError):
            self.channel.send("failed", problems=problems, consequence=isinstance(error, LinksBroken))

    def _open(self, message: Message) -> None:
        """Find, verify and check everything; nothing has started yet when it fails."""
        rank, count = message["rank"], message["processes"]
        folder = find_artifacts(message["manifest"], self.folders)
        used = files_of_rank(count, rank)
        self._artifacts = Artifacts.open(folder, check=message["check"], seen=checked_files(), used=used)
        manifest = self._artifacts.manifest
        places = place_language(manifest, count)
        self.name = named(rank, places[rank])
        self._engine_name = message["engine"]
        compiled = self._engine_name == "host"
        if problems := problems_here(self._artifacts, compiled=compiled, needed=message["memory"]):
            raise TyirError(problems)
        self._cores = message["cores"]
        with on_cores(self._cores):
            self._gloo = Gloo(self.host)
        self._links = GlooLinks(places, rank, self._gloo)
        self._rank = rank
        self._tower_links = GlooLinks(place_tower(manifest, count), rank, self._gloo)
        self._engine = make_engine(
            self._engine_name, self._artifacts, threads=message["threads"], links=self._links
        )
        self.channel.send("answer", address=self._gloo.address, pid=os.getpid(), folder=str(folder))

    def _reach(self, message: Message) -> None:
        peers = [(rank, (host, port)) for rank, host, port in message["peers"]]
        self.channel.send("answer", unreachable=unreachable(peers))

    def _join(self, message: Message) -> None:
        addresses = [(host, port) for host, port in message["addresses"]]
        host, port = message["store"]
        self._joined.join(message["rank"], addresses, (host, port), None)
        self.channel.send("answer")

    @property
    def _joined(self) -> Gloo:
        assert self._gloo is not None
        return self._gloo

    def _step(self, message: Message) -> None:
        # what is not finite is told by the first process
        with on_cores(self._cores), np.errstate(all="ignore"):
            self._engine.step(dict(message.arrays), Chunk(*message["chunk"]))

    def _round_trips(self, message: Message) -> None:
        with on_cores(self._cores):
            round_trips(self._joined, self._rank, message["nbytes"], message["count"])

    def _exchanges(self, message: Message) -> None:
        with on_cores(self._cores):
            exchanges(self._links, message["nbytes"], message["count"])

    def _tower(self, message: Message) -> None:
        if not self._tower_links.dies:
            return
        size = message["size"]
        if size not in self._towers:
            self._towers[size] = Tower(self._artifacts, size, self._engine_name, links=self._tower_links)
        self._towers[size].compute(message.arrays["patches"])


def _named(caches: dict[tuple[int, str], Array]) -> dict[str, Array]:
    return {f"{die}/{name}": array for (die, name), array in caches.items()}


def _by_die(arrays: Any) -> dict[tuple[int, str], Array]:
    return {(int(key.partition("/")[0]), key.partition("/")[2]): array for key, array in arrays.items()}


def main(argv: Sequence[str]) -> int:
    """Entry point of the process."""
    from tyir.process.threads import limit_threads

    limit_threads()
    descriptor, host, *folders = argv
    channel = Channel(Connection(int(descriptor)))
    return Rank(channel, host, [Path(folder) for folder in folders]).run()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads that wait for others are not waited for
