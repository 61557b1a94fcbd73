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
from tyir.edge10.command_times import compute_ns, gather_transfer, transfer_of
from tyir.ir import Block, Value
from tyir.opdef import DeclaredOp
from tyir.targets.machine import Machine
from tyir.types import bit_width, i64

__all__ = ["CANDIDATES", "PricedEmitter", "Prices", "best_shares", "products_ns"]

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


def best_shares(
    cost: Callable[[SramShares], float], key: Hashable, cache: dict[Hashable, SramShares]
) -> SramShares:
    """The candidate of the least `cost` (ns); `key` says what the costs depend on, and results are kept in
    `cache`.

    A candidate that does not fit the machine is passed over; when none fits, the error is that of the
    default.
    """
    if key not in cache:
        found: list[tuple[float, int]] = []
        for number, shares in enumerate(CANDIDATES):
            try:
                found.append((cost(shares), number))
            except TyirError:
                if number == 0:
                    raise
        cache[key] = CANDIDATES[min(found)[1]]
    return cache[key]


class Prices:
    """The time of commands by op of the model; loops count one turn, collectives nothing (they are the same
    in every candidate).
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[Hashable, tuple[str, float]] = {}
        self._busy: dict[str, dict[str, float]] = {}

    def add(self, source: str, command: type[DeclaredOp], properties: Mapping[str, Any]) -> None:
        """Count a command that implements the op `source`."""
        key = (command, *(properties.get(name) for name in _SIZES[command]))
        if key not in self._known:
            self._known[key] = _price(command, properties, self.machine)
        unit, ns = self._known[key]
        units = self._busy.setdefault(source, {})
        units[unit] = units.get(unit, 0.0) + ns

    def total_ns(self) -> float:
        return sum(max(units.values()) for units in self._busy.values())


class PricedEmitter(Emitter):
    """Prices commands instead of writing them; tokens mean nothing."""

    def __init__(self, block: Block, tracker: Tracker, prices: Prices, outer: Emitter | None = None) -> None:
        super().__init__(block, tracker, outer)
        self.prices = prices
        self._token = block.append(edge10.Join(tokens=())).result

    def nested(self, block: Block, tracker: Tracker) -> Emitter:
        return PricedEmitter(block, tracker, self.prices, self)

    def emit(
        self,
        command: type[DeclaredOp],
        *operands: Value,
        reads: Sequence[Access] = (),
        writes: Sequence[Access] = (),
        **properties: Any,
    ) -> Value:
        if command in _SIZES and not any(v.type is i64 for v in operands):
            self.prices.add(self.path, command, properties)
        return self._token

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


# What the time of a command depends on.  Collectives are not compared.
_SIZES: Final[dict[type[DeclaredOp], tuple[str, ...]]] = {
    edge10.Load: ("shape", "dram_strides"),
    edge10.Store: ("shape", "dram_strides"),
    edge10.Gather: ("index", "rows", "row_bytes"),
    edge10.Matmul: ("m", "n", "k"),
    edge10.Drain: ("m", "n"),
    edge10.Dequant: ("n", "k"),
    edge10.VectorOp: ("function", "rows", "cols"),
    edge10.TopK: ("rows", "cols", "k"),
}


def _price(command: type[DeclaredOp], properties: Mapping[str, Any], machine: Machine) -> tuple[str, float]:
    op = command(args=(), **properties)
    if isinstance(op, (edge10.Load, edge10.Store)):
        transfer = transfer_of(op.shape, op.dram_strides)
    elif isinstance(op, edge10.Gather):
        transfer = gather_transfer(op)
    else:
        return edge10.unit_of(op), machine.sync.dispatch_ns + compute_ns(op, (), machine)
    return "dram", transfer.cost_bytes(machine) / machine.dram_bytes_per_ns
