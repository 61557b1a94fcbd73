"""What a fusion is: ops of one function that are lowered as one, at the turn of the last, the *anchor*.

    %g = linear(%x, %wg);  %u = linear(%x, %wu);  %y = silu_mul(%g, %u);  %d = linear(%y, %wd)
    `------------------------------- others ----------------------------'  `----- anchor -----'

`groups.find_groups` offers every op to every kind (lowering/fusions.py); what earlier kinds have matched
stands in the `Room` that later ones match in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

from tyir.backends.edge10.lowering.columns import Columns
from tyir.backends.edge10.lowering.context import Area, Lowering, Place
from tyir.backends.edge10.memory.allocate import SramPlan
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects.func import Func
from tyir.ir import Op, Value
from tyir.targets.machine import Machine

__all__ = ["ColumnSource", "Fusion", "Room", "ScratchPlace"]

ScratchPlace = tuple[int, Place]  # where a `Scratch` lies: an offset in SRAM, a place in the spill buffer


class Fusion(Protocol):
    """Some ops of a function and how they are lowered together."""

    @classmethod
    def match(cls, op: Op, room: Room) -> Self | None:
        """The fusion of this kind whose anchor `op` is, if there is one."""

    @property
    def anchor(self) -> Op:
        """The op at whose turn all are lowered; its results are what the fusion makes."""

    @property
    def others(self) -> Sequence[Op]:
        """The ops that are passed over, in the order in which the fusion computes them."""

    @property
    def scratch(self) -> Scratch | None:
        """What the fusion needs while it runs, besides what it reads and makes."""

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        """The commands; `scratch` is where that lies that was asked for."""


class ColumnSource(Protocol):
    """What computes the columns of a product block by block, for whoever takes them: a product alone, or a
    fusion that ends in one.
    """

    @property
    def ops(self) -> Sequence[Op]:
        """Everything that is computed, the product last."""

    @property
    def scratch(self) -> Scratch | None: ...

    def results_area(self, lowering: Lowering) -> Area:
        """The temporaries that the source leaves to the taker of the columns."""

    def lower_into(self, lowering: Lowering, scratch: ScratchPlace | None, results: Columns) -> None:
        """The commands; each block of columns is handed to `results`."""


@dataclass
class Room:
    """Where fusions are looked for: a function, the bytes of SRAM that it has for activations (`arena`)
    beside the values `held` there, and what has been matched so far.
    """

    function: Func
    machine: Machine
    plan: SramPlan
    arena: int
    held: Collection[Value] = ()
    fusions: dict[Op, Fusion] = field(default_factory=dict)  # by their anchors
    anchors: dict[Op, Op] = field(default_factory=dict)  # for every op that is passed over

    def add(self, fusion: Fusion) -> None:
        """Keep a match; it takes the place of fusions that it contains."""
        for op in fusion.others:
            self.fusions.pop(op, None)
            self.anchors[op] = fusion.anchor
        self.fusions[fusion.anchor] = fusion

    @cached_property
    def _order(self) -> dict[Op, int]:
        return {op: number for number, op in enumerate(self.function.body)}

    def turn(self, op: Op) -> tuple[int, int]:
        """When an op is lowered: with its anchor, after the ops of the fusion that come before it."""
        anchor = self.anchors.get(op, op)
        others = list(self.fusions[anchor].others) if anchor in self.fusions else []
        return self._order[anchor], others.index(op) if op in others else len(others)
