"""Pieces of a compile, or of a sweep of simulations, that other processes make, here or on other machines.

A piece is made by a function of a module, from arguments that can be sent: IR as text, names, numbers.  The
compile that asks for it checks it, writes it and keeps it in the cache, as if it had been made here; so the
artifacts are the same, and a worker that is lost costs what it was making.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from tyir.backends.pieces import tool_identity
from tyir.diagnostics import TyirError

__all__ = ["Workers", "check_tools", "make_each"]

Piece = TypeVar("Piece")


class Workers(Protocol):
    """Processes that make pieces.  Threads ask, as many at once as there are workers."""

    @property
    def count(self) -> int:
        """How many pieces are made at once."""

    def run(self, make: Callable[..., Piece], *arguments: Any) -> Piece:
        """What a function gives in another process; waits for it.  `TyirError` as the function raises it, and
        when no process can be had any more.
        """


def make_each(
    workers: Workers | None, make: Callable[..., Piece], arguments: Sequence[Sequence[Any]]
) -> list[Piece]:
    """What a function gives for each of the arguments, in their order: by workers, all of them at once, or
    one after the other in this process.  `make` takes the identity of these tools first (`check_tools`).
    """
    identity = tool_identity()
    if workers is None:
        return [make(identity, *each) for each in arguments]
    with ThreadPoolExecutor(workers.count) as pool:
        return list(pool.map(lambda each: workers.run(make, identity, *each), arguments))


def check_tools(identity: str) -> None:
    """`TyirError` unless this process has the tyir and the libraries of the one that asks."""
    if identity != tool_identity():
        raise TyirError(
            "a worker has another tyir, or other versions of its libraries, than the compile that asks it",
            help="install the same on every machine of the cluster",
        )
