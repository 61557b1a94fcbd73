"""Which division of SRAM suits a program: with each candidate the layers' commands are priced with the
simulator's formulas, without being written down.

    time = sum over the ops of the model of the busiest unit's time for that op's commands        (units overlap within an op, ops follow each other)

Few tokens are bound by DRAM whatever the division, so they keep the default; many tokens want room for
activations, at the price of smaller weight tiles.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

from tyir.backends.edge10.lowering.dependences import Access, Tracker
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.tiling import MatmulShape, choose_tiles, tiles_ns
from tyir.backends.edge10.memory.allocate import SramPlan, SramShares
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.edge10.command_times import Transfer
from tyir.ir import Block, Value
from tyir.targets.machine import Machine
from tyir.types import bit_width, i64

__all__ = ["CANDIDATES", "TALL", "PricedEmitter", "Prices", "Search", "products_ns"]

CANDIDATES: Final = (
    SramShares(),
    SramShares(boundary=0.0),
    SramShares(16, (1, 2), (10, 3), (38, 2), waiting_sums=True),
    SramShares(16, (1, 2), (5, 5), (19, 2), waiting_sums=True),
    SramShares(13, (1, 2), (5, 3), (19, 2)),
    SramShares(32, (2, 4), (4, 4), (10, 4)),
    SramShares(32, (2, 4), (4, 4), (10, 4), 0.0),
    SramShares(32, (4, 4), (4, 4), (8, 4), 0.0),
)
# For many rows of f16 weights: an arena that holds them, nothing for 4-bit tiles.
TALL: Final = (
    SramShares(16, (1, 2), (5, 5), (19, 2)),
    SramShares(40, (2, 2), (1, 1), (8, 3), 0.0),
    SramShares(28, (1, 2), (1, 1), (10, 3), 0.0),
    SramShares(41, (2, 2), (1, 1), (6, 3), 0.0),
)


class Search:
    """The divisions of SRAM that were found, for whoever lowers several programs: those of equal shapes (the
    dies of a board) are searched once.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, SramShares] = {}

    def best_shares(
        self,
        cost: Callable[[SramShares], float],
        key: Hashable,
        candidates: Sequence[SramShares] = CANDIDATES,
    ) -> SramShares:
        """The candidate of the least `cost` (ns); `key` says what the costs depend on.

        A candidate that does not fit the machine is passed over; when none fits, the error is that of the
        default.
        """
        if key not in self._found:
            costs: list[tuple[float, int]] = []
            errors: list[TyirError] = []
            for number, shares in enumerate(candidates):
                try:
                    costs.append((cost(shares), number))
                except TyirError as error:
                    errors.append(error)
            if not costs:
                raise errors[0]
            self._found[key] = candidates[min(costs)[1]]
        return self._found[key]


class Prices:
    """The time of commands by op of the model; loops count the turns that whoever writes them expects, sizes
    that registers give count as the largest, collectives nothing (they are the same in every candidate).
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[Hashable, tuple[str, float]] = {}
        self._busy: dict[str, dict[str, float]] = {}
        self._repeated: dict[Hashable, list[tuple[str, str, float]]] = {}
        self._heard: list[tuple[str, str, float]] | None = None
        self._elsewhere = 0.0

    def add(
        self,
        source: str,
        command: type[edge10.Command],
        properties: Mapping[str, Any],
        scalars: tuple[int, ...],
        times: int = 1,
    ) -> None:
        """Count a command that implements the op `source`, `times` times."""
        sizes = (properties.get(name) for name in (*command.dynamic, *command.priced_by))
        key = (command, scalars, *sizes)
        if key not in self._known:
            self._known[key] = _price(command, properties, scalars, self.machine)
        unit, ns = self._known[key]
        self._count(source, unit, times * ns)

    def repeated(self, key: Hashable, price: Callable[[], None]) -> None:
        """What `price` adds; for a key that was there before, what it added then, in the same order (sums of
        floats are the same to the last bit).
        """
        if (known := self._repeated.get(key)) is not None:
            for source, unit, ns in known:
                self._count(source, unit, ns)
            return
        outer, self._heard = self._heard, []
        try:
            price()
            self._repeated[key] = self._heard
            if outer is not None:
                outer += self._heard
        finally:
            self._heard = outer

    def _count(self, source: str, unit: str, ns: float) -> None:
        units = self._busy.setdefault(source, {})
        units[unit] = units.get(unit, 0.0) + ns
        if self._heard is not None:
            self._heard.append((source, unit, ns))

    def add_ns(self, ns: float) -> None:
        """Count what has been priced elsewhere."""
        self._elsewhere += ns

    def total_ns(self) -> float:
        return self._elsewhere + sum(max(units.values()) for units in self._busy.values())


class PricedEmitter(Emitter):
    """Prices commands instead of writing them; tokens mean nothing."""

    def __init__(
        self, block: Block, tracker: Tracker, prices: Prices, outer: Emitter | None = None, turns: int = 1
    ) -> None:
        super().__init__(block, tracker, outer)
        self.prices, self.turns = prices, turns
        self._token = block.append(edge10.Join(tokens=())).result

    def nested(self, block: Block, tracker: Tracker, turns: int = 1) -> Emitter:
        return PricedEmitter(block, tracker, self.prices, self, self.turns * turns)

    def emit(
        self,
        command: type[edge10.Command],
        *operands: Value,
        reads: Sequence[Access] = (),
        writes: Sequence[Access] = (),
        **properties: Any,
    ) -> Value:
        if not issubclass(command, edge10.Exchange):
            scalars = tuple([_most(v) for v in operands if v.type is i64])
            self.prices.add(self.path, command, properties, scalars, self.turns)
        return self._token

    def repeated(self, key: Hashable, write: Callable[[], None]) -> None:
        self.prices.repeated((self.path, self.turns, key), write)

    def loop(self, low: Value, high: Value, body: Block, inner: Tracker) -> None:
        pass


def products_ns(function: Func, machine: Machine, plan: SramPlan) -> float:
    """The time of a function's products alone, by the cost of their tiles: the head of the model, without
    writing its thousands of tiles down.
    """
    total = 0.0
    for op in function.body:
        if isinstance(op, (Linear, QuantizedLinear)):
            *outer, k = tensor_type(op.x).static_shape
            group = op.group_size if isinstance(op, QuantizedLinear) else 0
            width = bit_width(tensor_type(op.out).element) // 8
            shape = MatmulShape(
                math.prod(outer),
                tensor_type(op.out).static_shape[-1],
                k,
                group,
                True,
                width,
                plan.temp_bytes // 2,
            )
            total += tiles_ns(shape, choose_tiles(shape, machine, plan), machine)
    return total


def _most(scalar: Value) -> int:
    """The largest value of a register that gives a size; what has no bound (the first key of a block) gives
    none.
    """
    high = scalar.op.high if isinstance(scalar.op, edge10.Affine) else None
    return 0 if high is None else high


def _price(
    command: type[edge10.Command], properties: Mapping[str, Any], scalars: Sequence[int], machine: Machine
) -> tuple[str, float]:
    make: Callable[..., edge10.Command] = command  # each command has properties of its own
    op = make(args=(), **properties)
    cost = op.cost(scalars)
    if isinstance(cost, Transfer):
        return "dram", cost.cost_bytes(machine) / machine.dram_bytes_per_ns
    return op.unit, machine.sync.dispatch_ns + cost.ns(machine)
