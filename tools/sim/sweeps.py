"""Simulations of a sweep as pieces that workers make (`tyir.backends.workers`): one value of a constant each,
or one setting of a stream of requests.  Workers read the artifacts themselves, from the same path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tyir.backends.workers import Workers, check_tools, make_each
from tyir.runtime_sim.timing.summary import SweepRow, sweep
from tyir.tools.sim.requests import Asked, served
from tyir.tools.sim.sources import Choice, open_source

__all__ = ["served_each", "swept"]


def swept(
    workers: Workers,
    paths: Sequence[Path],
    choice: Choice,
    constant: str,
    values: Sequence[float],
    prompt: int,
    pos: int,
) -> list[SweepRow]:
    """`tyir.runtime_sim.timing.summary.sweep` of what these paths hold, a value a piece."""
    asked = [path.resolve() for path in paths], replace(choice, name=_everywhere(choice.name)), constant
    return make_each(workers, _swept, [(*asked, value, prompt, pos) for value in values])


def _swept(
    identity: str, paths: Sequence[Path], choice: Choice, constant: str, value: float, prompt: int, pos: int
) -> SweepRow:
    check_tools(identity)
    predictor = open_source(paths, choice, check=False).predictor  # who asks has verified the files
    (row,) = sweep(predictor, constant, [value], prompt, pos)
    return row


def served_each(workers: Workers | None, settings: Sequence[Asked]) -> list[Mapping[str, Any]]:
    """`served` of each setting, in their order."""
    everywhere = [
        replace(
            one,
            artifacts=one.artifacts.resolve(),
            trace=None if one.trace is None else one.trace.resolve(),
            machine=_everywhere(one.machine),
        )
        for one in settings
    ]
    return make_each(workers, _served, [(one,) for one in everywhere])


def _served(identity: str, asked: Asked) -> Mapping[str, Any]:
    check_tools(identity)
    return served(asked)


def _everywhere(machine: str | None) -> str | None:
    """A machine's name, or its file by a path that does not depend on where a process was started."""
    return str(Path(machine).resolve()) if machine is not None and Path(machine).is_file() else machine
