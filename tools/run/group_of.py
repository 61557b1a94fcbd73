"""The processes that a command's `--processes` or `--hosts` asks for."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.process.cache import checked_files
from tyir.tools.cli import note

if TYPE_CHECKING:
    from tyir.runtime_sim.processes.group import DieGroup

__all__ = ["end_with", "open_with_group"]


def open_with_group(args: argparse.Namespace, *, check: bool) -> tuple[Artifacts, DieGroup | None]:
    """The artifacts, and the processes that their dies run in; None for this one alone.

    Each process verifies and maps the files of its own dies.  `TyirError` lists what is missing, and where.
    """
    hosts = _hosts(args.hosts)
    if hosts and args.processes is not None:
        raise TyirError("--hosts has one process on each machine", help="leave out --processes")
    count = len(hosts) or (1 if args.processes is None else args.processes)
    if count == 1:
        return Artifacts.open(args.artifacts, check=check, seen=checked_files()), None
    from tyir.runtime_sim.processes.checks import files_of_rank
    from tyir.runtime_sim.processes.group import DieGroup

    artifacts = Artifacts.open(
        args.artifacts, check=check, seen=checked_files(), used=files_of_rank(count, 0)
    )
    group = DieGroup.start(
        artifacts, processes=count, hosts=hosts, engine=args.engine, threads=args.threads, say=note
    )
    return artifacts, group


def _hosts(text: str | None) -> Sequence[tuple[str, int]]:
    from tyir.runtime_sim.processes.hosts import parse_host

    return [parse_host(part) for part in text.split(",")] if text else []


def end_with(group: DieGroup) -> None:
    """End this command with the message of a group that fails, also while it waits for input."""
    main = threading.main_thread()
    if threading.current_thread() is not main:
        return

    def failed(number: int, frame: FrameType | None) -> None:
        if group.problem is not None:
            raise group.problem

    signal.signal(signal.SIGUSR1, failed)
    group.on_failure = lambda problem: signal.pthread_kill(main.ident or 0, signal.SIGUSR1)
