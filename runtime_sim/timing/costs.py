"""Where a step's time goes: by op of the model, by layer, by unit, and into collectives.

Commands overlap, so "the time of an op" needs a rule: in program order, an op is charged with what its
commands add to the latest end so far.  So the times of all ops, or of all layers, add up to the step's
without its launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.dialects import edge10
from tyir.runtime_sim.timing.engine import DieTiming, Timing
from tyir.runtime_sim.timing.unroll import Kind

__all__ = [
    "CollectiveCount",
    "LayerCost",
    "OpCost",
    "collective_counts",
    "layer_costs",
    "op_costs",
    "unit_shares",
]

UNITS: Final = ("dram", *edge10.UNITS)
_BOUNDS: Final = (
    "dram",
    *(u for u in edge10.UNITS if u not in edge10.DMA_UNITS),
)  # the DMA queues count as DRAM


@dataclass(frozen=True)
class OpCost:
    """What one op of the model costs in a step, over all layers, on one die; `bound_by` is the unit that is
    busiest with it, for `busy_ns`.

    What runs beside other ops is busy for longer than it adds to the step.
    """

    source: str
    path: str
    calls: int
    commands: int
    time_ns: float
    dram_bytes: int
    macs: int
    busy_ns: float
    bound_by: str


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of a step (layer -1: what stands outside the layers)."""

    layer: int
    time_ns: float
    dram_bytes: int
    bound_by: str


@dataclass(frozen=True)
class CollectiveCount:
    """Collectives of one op of the model in a step: how many, and the bytes that one leaves on a die."""

    what: str
    path: str
    in_layer: bool
    count: int
    nbytes: int


def op_costs(timing: Timing, die: int = 0) -> list[OpCost]:
    """The step's time divided among the model's ops, the most expensive first."""
    columns = _Columns.of(timing.dies[die])
    groups: dict[tuple[str, str], int] = {}
    of_kind = [groups.setdefault((kind.source, kind.path), len(groups)) for kind in columns.kinds]
    group = np.array(of_kind, np.int64)[columns.kind]
    macs_of_kind = np.array([kind.op.macs(kind.scalars) for kind in columns.kinds], np.int64)
    table = columns.by(group, len(groups))
    products = np.bincount(group, macs_of_kind[columns.kind], len(groups))
    calls = np.bincount(np.unique(np.stack([group, columns.layer]), axis=1)[0], minlength=len(groups))
    rows = [
        OpCost(
            source,
            path,
            int(calls[n]),
            int(table.commands[n]),
            float(table.delay[n]),
            int(table.nbytes[n]),
            int(products[n]),
            float(table.busy[n].max()),
            table.bound_by(n),
        )
        for (source, path), n in groups.items()
        if table.commands[n]
    ]
    return sorted(rows, key=lambda r: (-r.time_ns, r.path))


def layer_costs(timing: Timing, die: int = 0) -> list[LayerCost]:
    """The step's time divided among the layers, in their order."""
    columns = _Columns.of(timing.dies[die])
    layers, number = np.unique(columns.layer, return_inverse=True)
    table = columns.by(number, len(layers))
    return [
        LayerCost(int(layer), float(table.delay[n]), int(table.nbytes[n]), table.bound_by(n))
        for n, layer in enumerate(layers)
    ]


def unit_shares(timing: Timing) -> Mapping[str, float]:
    """Busy share of each unit on the die where it is busiest; `dram` is any transfer moving data."""
    return {unit: timing.share(unit) for unit in UNITS}


def collective_counts(timing: Timing, die: int = 0) -> list[CollectiveCount]:
    """The collectives of a step, by op of the model and size."""
    commands = timing.dies[die].commands
    found: dict[tuple[str, str, bool, int], int] = {}
    for number, layer in zip(commands.kind, commands.layer):
        kind = commands.kinds[number]
        if kind.unit == "d2d":
            key = (kind.op.name.removeprefix("edge10."), kind.path, layer >= 0, _collective_bytes(kind))
            found[key] = found.get(key, 0) + 1
    return [
        CollectiveCount(what, path, in_layer, count, nbytes)
        for (what, path, in_layer, nbytes), count in found.items()
    ]


def _collective_bytes(kind: Kind) -> int:
    op = kind.op
    assert isinstance(op, edge10.Exchange)
    return max(op.given_bytes(), op.taken_bytes())


@dataclass(frozen=True)
class _Table:
    """Sums over the commands of each group: what they add to the latest end, DRAM bytes, their number, and
    time on each of `_BOUNDS`.
    """

    delay: npt.NDArray[Any]
    nbytes: npt.NDArray[Any]
    commands: npt.NDArray[Any]
    busy: npt.NDArray[Any]

    def bound_by(self, group: int) -> str:
        return _BOUNDS[int(self.busy[group].argmax())]


@dataclass(frozen=True)
class _Columns:
    """One die's commands in program order."""

    kinds: Sequence[Kind]
    kind: npt.NDArray[Any]
    layer: npt.NDArray[Any]
    unit: npt.NDArray[Any]
    delay: npt.NDArray[Any]
    busy: npt.NDArray[Any]
    nbytes: npt.NDArray[Any]

    @classmethod
    def of(cls, die: DieTiming) -> _Columns:
        commands = die.commands
        kind = np.array(commands.kind, np.int64)
        units = [_BOUNDS.index("dram" if k.unit in edge10.DMA_UNITS else k.unit) for k in commands.kinds]
        latest = np.maximum.accumulate(np.concatenate([[die.start.min(initial=np.inf)], die.end]))
        return cls(
            commands.kinds,
            kind,
            np.array(commands.layer, np.int64),
            np.array(units, np.int64)[kind],
            np.diff(latest),
            die.end - die.data,
            die.command_bytes,
        )

    def by(self, group: npt.NDArray[Any], count: int) -> _Table:
        """`group[i]` is command i's, below `count`."""
        busy = np.bincount(group * len(_BOUNDS) + self.unit, self.busy, count * len(_BOUNDS)).reshape(
            count, len(_BOUNDS)
        )
        return _Table(
            np.bincount(group, self.delay, count),
            np.bincount(group, self.nbytes, count),
            np.bincount(group, minlength=count),
            busy,
        )
