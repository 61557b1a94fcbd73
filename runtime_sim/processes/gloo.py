"""Dies of several processes meet through torch.distributed's gloo.

Every process sends its dies' operands to the others that take part, and makes of all of them, in die order,
what a single process would: the sum of an all-reduce is never left to gloo, whose order of adding is its own.
Sizes are known before anything comes, from the programs; a message is one frame for all dies of a process.

gloo sends nothing before the other side has asked for it.  Small messages are therefore asked for ahead: who
comes last to a collective finds there what the others gave, and they hear of it by one message, not three.

This is the only file that imports torch.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.execution.lockstep import Layout, Meet, Recv
from tyir.process.extras import require
from tyir.runtime_sim.processes.placement import Places

__all__ = ["Address", "Gloo", "GlooLinks", "LinksBroken", "family_of", "listen_for_store"]

Array = npt.NDArray[Any]
Address = tuple[str, int]

_CONNECT: Final = timedelta(seconds=10)
# How long a die may be waited for: as long as it computes.  Processes that are gone are noticed by their
# silence (`group.py`), not by this.
_FOREVER: Final = timedelta(days=30)
_ALIGNMENT: Final = 64
_ABSENT, _GIVEN, _EMPTY = range(3)  # a die's operand in a frame: none, one, one of no elements
_SEND: Final = 1 << 16  # tags of collectives are sets of dies as bits, 16 of them; tags of sends lie above
_AHEAD: Final = 1 << 16  # bytes of the messages that are asked for ahead
_LARGE: Final = 1 << 29  # tags of the others, which must not meet what waits for a small one


class LinksBroken(TyirError):
    """Another process is gone, or has let go because a die of it failed: the consequence, not the cause."""


class Gloo:
    """Connections of this process to all others; made in two steps, as its address must be told to them."""

    def __init__(self, host: str) -> None:
        """Listens at `host`, an address of this machine; `address` is where.  `TyirError` when it cannot, or
        torch has no gloo.
        """
        require("running dies in several processes", "torch")
        import torch.distributed as distributed

        backend = getattr(distributed, "ProcessGroupGloo", None)
        if backend is None:
            raise TyirError(
                "this torch was built without gloo, which dies in several processes meet through",
                help="install the torch of pypi.org or pytorch.org, or run all dies in one process",
            )
        self._distributed = distributed
        before = set(_sockets())
        try:
            with _as_batch():
                self._device = backend.create_device(hostname=host)
        except RuntimeError as error:
            raise TyirError(
                f"cannot listen at {host}: {str(error).splitlines()[0]}",
                help="give an address that this machine has: ip -brief address",
            ) from None
        made = (s for s in _sockets() if s not in before)
        self.address: Address = (host, next((port for _, (_, port), peer in made if peer is None), 0))
        self._peers: frozenset[Address] = frozenset()
        self._group: Any = None
        self._store: Any = None
        self._broken = threading.Event()
        self._asked: dict[tuple[int, int], tuple[Any, npt.NDArray[np.uint8]]] = {}  # ahead, by rank and tag
        self.sent = 0  # bytes
        self.messages = 0

    def join(self, rank: int, peers: Sequence[Address], store: Address, listener: int | None) -> None:
        """Connect with all others, whose addresses are `peers`, by rank.  `store`: where the first has
        opened a store, from the listening socket `listener`, which is None for the others.

        `TyirError` when that takes longer than 10 seconds.
        """
        distributed = self._distributed
        self._peers = frozenset(peers)
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [self._device]
        options._timeout = _CONNECT
        options._threads = 1
        try:
            self._store = distributed.TCPStore(
                *store,
                len(peers),
                listener is not None,
                _CONNECT,
                wait_for_workers=False,
                master_listen_fd=listener,
            )
            self._group = distributed.ProcessGroupGloo(self._store, rank, len(peers), options)
        except (RuntimeError, distributed.DistError) as error:
            raise LinksBroken(f"rank {rank} could not join: {str(error).splitlines()[0]}") from None

    def send(self, rank: int, tag: int, data: npt.NDArray[np.uint8]) -> Any:
        """Begins to send; what is returned is `finish`ed."""
        import torch

        self.sent += data.size
        self.messages += 1
        try:
            return self._group.send([torch.from_numpy(data)], rank, _sized(tag, data.size)), data
        except (RuntimeError, AttributeError) as error:
            raise self._let_go(error) from None

    def finish(self, work: Any) -> None:
        """Waits until a send needs its data no longer."""
        try:
            work[0].wait(_FOREVER)
        except RuntimeError as error:
            raise self._let_go(error) from None

    def recv(self, rank: int, tag: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes that another rank sends with this tag.  One thread at a time asks for those of a tag."""
        try:
            if size > _AHEAD:
                work, data = self._ask(rank, _sized(tag, size), size)
                work.wait(_FOREVER)
                return data
            asked = self._asked.pop((rank, tag)) if (rank, tag) in self._asked else None
            work, data = asked or self._ask(rank, tag, _AHEAD)
            work.wait(_FOREVER)
            self._asked[rank, tag] = self._ask(rank, tag, _AHEAD)
            return data[:size]
        except (RuntimeError, AttributeError) as error:
            raise self._let_go(error) from None

    def _ask(self, rank: int, tag: int, size: int) -> tuple[Any, npt.NDArray[np.uint8]]:
        import torch

        data = np.empty(size, np.uint8)
        return self._group.recv([torch.from_numpy(data)], rank, tag), data

    def _let_go(self, error: Exception) -> LinksBroken:
        return LinksBroken(f"a process of the group has gone: {str(error).splitlines()[0]}")

    def close(self) -> None:
        """Ends what waits, and lets go of connections and ports."""
        self.abort()
        self._asked.clear()
        self._group = self._store = self._device = None

    def abort(self) -> None:
        """Ends whatever waits here and in the other processes.

        gloo has no call that wakes who waits in it: its connections are shut down, as if the peers had gone.
        """
        if self._broken.is_set():
            return
        self._broken.set()
        for descriptor, own, peer in _sockets():
            if peer is not None and (own == self.address or peer in self._peers):
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as ours:
                    ours.shutdown(socket.SHUT_RDWR)


@contextmanager
def _as_batch() -> Iterator[None]:
    """Inside, threads that are started interrupt no other when they wake, but wait until it sleeps.

    gloo's own thread tries again and again for what the thread that sends has locked.  Where both run on one
    core and it has just taken that core, the sender cannot go on, and a turn of 4 ms is over before it does.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    changed = policy == os.SCHED_OTHER  # otherwise somebody has decided so
    if changed:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:  # a sandbox allows it not: slower, and right all the same
            changed = False
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, policy, parameters)


def _sized(tag: int, size: int) -> int:
    """The tag that a message of so many bytes goes by."""
    return tag if size <= _AHEAD else tag | _LARGE


def listen_for_store(host: str) -> tuple[Address, int]:
    """A listening socket for the store of the first rank: its address and its descriptor."""
    server = socket.create_server((host, 0), family=family_of(host), backlog=64)
    return server.getsockname()[:2], server.detach()


def family_of(host: str) -> socket.AddressFamily:
    """Of an address as digits."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _sockets() -> list[tuple[int, Address, Address | None]]:
    """The TCP sockets of this process: descriptor, own address, the peer's (None: it listens)."""
    found: list[tuple[int, Address, Address | None]] = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.append((int(name), one.getsockname()[:2], None))
                else:
                    found.append((int(name), one.getsockname()[:2], one.getpeername()[:2]))
    return found


class GlooLinks:
    """`Links` of dies that are dealt out to processes."""

    def __init__(self, places: Places, rank: int, gloo: Gloo) -> None:
        self.places = places
        self.count = sum(map(len, places))
        self.dies = places[rank]
        self.met = 0  # collectives that went through other processes
        self._rank = rank
        self._gloo = gloo
        self._rank_of = {die: number for number, dies in enumerate(places) for die in dies}
        self._members: dict[tuple[int, ...], dict[int, list[int]]] = {}
        self._sending: list[Any] = []
        self._lock = threading.Lock()

    def meet(self, request: Meet, own: Sequence[Array | None]) -> Sequence[Array | None]:
        """The operands of all dies that meet, in die order, from those of this process's (`own`)."""
        members = request.dies or tuple(range(self.count))
        shares = self._shares(members)
        tag = sum(1 << die for die in members)
        frame = _Frame([request.given(i) for i in shares[self._rank]])
        data = frame.pack(own)
        sends = [self._gloo.send(rank, tag, data) for rank in shares if rank != self._rank]
        parts: list[Array | None] = [None] * len(members)
        for i, part in zip(shares[self._rank], own):
            parts[i] = part
        for rank, numbers in shares.items():
            if rank != self._rank:
                theirs = _Frame([request.given(i) for i in numbers])
                for i, part in zip(numbers, theirs.unpack(self._gloo.recv(rank, tag, theirs.size))):
                    parts[i] = part
        for work in sends:
            self._gloo.finish(work)
        self.met += 1
        return parts

    def _shares(self, members: tuple[int, ...]) -> dict[int, list[int]]:
        """Which of the members, by number, each process has."""
        if members not in self._members:
            shares: dict[int, list[int]] = {}
            for number, die in enumerate(members):
                shares.setdefault(self._rank_of[die], []).append(number)
            self._members[members] = shares
        return self._members[members]

    def send(self, source: int, target: int, tag: int, data: Array) -> None:
        """Data of a die of this process for one of another.

        Does not wait: gloo sends when the other asks.
        """
        plain = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        work = self._gloo.send(self._rank_of[target], _tag(source, target, tag), plain)
        with self._lock:
            self._sending = [w for w in self._sending if not w[0].is_completed()] + [work]

    def recv(self, target: int, request: Recv) -> Array:
        """What a die of another process sends to one of this."""
        layout = request.given()
        data = self._gloo.recv(
            self._rank_of[request.source], _tag(request.source, target, request.tag), layout.nbytes
        )
        return data.view(layout.dtype).reshape(layout.shape)

    def abort(self) -> None:
        """A die of this process has failed: whoever waits for it must hear of it."""
        self._gloo.abort()


def _tag(source: int, target: int, tag: int) -> int:
    return _SEND + (tag << 8 | source << 4 | target)


class _Frame:
    """The operands of some dies in one message: a byte for each, whether it gives one, then those."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self.layouts = layouts
        self.first = []
        self.size = _aligned(len(layouts))
        for layout in layouts:
            self.first.append(self.size)
            self.size += _aligned(layout.nbytes)

    def pack(self, parts: Sequence[Array | None]) -> npt.NDArray[np.uint8]:
        data = np.zeros(self.size, np.uint8)
        for number, (part, layout) in enumerate(zip(parts, self.layouts, strict=True)):
            data[number] = _ABSENT if part is None else _GIVEN if part.size else _EMPTY
            if part is not None and part.size:
                if (part.dtype, part.size * part.itemsize) != (layout.dtype, layout.nbytes):
                    raise TyirError(
                        f"a die gives {part.dtype}{list(part.shape)} where {layout.dtype}{list(layout.shape)}"
                        " meets"
                    )
                first = self.first[number]
                data[first : first + layout.nbytes] = np.ascontiguousarray(part).view(np.uint8).reshape(-1)
        return data

    def unpack(self, data: npt.NDArray[np.uint8]) -> list[Array | None]:
        parts: list[Array | None] = []
        for number, (first, layout) in enumerate(zip(self.first, self.layouts)):
            if data[number] == _ABSENT:
                parts.append(None)
            elif data[number] == _EMPTY:
                parts.append(np.empty(0, layout.dtype))
            else:
                parts.append(data[first : first + layout.nbytes].view(layout.dtype).reshape(layout.shape))
        return parts


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
