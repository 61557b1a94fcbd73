"""How many threads this process may use at once: its affinity, and its control group's share of time; and
which cores a thread runs on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["control_groups", "on_cores", "usable_cores"]

_GROUPS: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


def usable_cores(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """At least 1.  A control group (version 2) with a quota of 1.5 processors counts as 2.

    `groups` and `own`: where the system says so.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _quotas(groups, own))]))


@contextmanager
def on_cores(cores: Collection[int] | None) -> Iterator[None]:
    """Inside, this thread and those that it starts run on these cores only; with None, or where the system
    does not give them, where they may.
    """
    before = None if cores is None else os.sched_getaffinity(0)
    if before is not None:
        with suppress(OSError):
            os.sched_setaffinity(0, cores or ())
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, before)


def _quotas(groups: Path, own: Path) -> list[float]:
    """The quotas of the process's control group and of those around it, in processors."""
    found = []
    for folder in control_groups(groups, own):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # a system without such groups
    return found


def control_groups(groups: Path = _GROUPS, own: Path = _OWN) -> list[Path]:
    """The folders of the process's control group (version 2) and of those around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    parts = name.split("/") if name else []
    return [groups.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1) if ".." not in parts]
