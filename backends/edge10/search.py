"""Which division of SRAM suits a program: with each candidate the layers are lowered and their commands priced with the simulator's formulas.

    time = sum over the ops of the model of the busiest unit's time for that op's commands        (units overlap within an op, ops follow each other)

Few tokens are bound by DRAM whatever the division, so they keep the default; many tokens want room for activations, at the price of smaller weight tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Final

from tyir.backends.edge10.allocate import SramPlan, SramShares
from tyir.backends.edge10.tiling import MatmulShape, choose_tiles, tiles_ns
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.ir import Op
from tyir.targets.command_times import Transfer, compute_ns, gather_transfer, transfer_of
from tyir.targets.machine import Machine
from tyir.types import bit_width

__all__ = ["CANDIDATES", "best_shares", "estimated_ns", "products_ns"]

CANDIDATES: Final = (
    SramShares(),
    SramShares(boundary=0.0),
    SramShares(25, (1, 2), (10, 2), (38, 2), waiting_sums=True),
    SramShares(25, (1, 2), (5, 4), (19, 2), waiting_sums=True),
    SramShares(13, (1, 2), (5, 3), (19, 2)),
    SramShares(32, (2, 4), (4, 4), (10, 4)),
    SramShares(32, (2, 4), (4, 4), (10, 4), 0.0),
    SramShares(32, (4, 4), (4, 4), (8, 4), 0.0),
)
_TRANSFERS: Final = ("ewdma", "eidma", "ebdma", "eodma")


def best_shares(cost: Callable[[SramShares], float], key: Hashable, cache: dict[Hashable, SramShares]) -> SramShares:
    """The candidate of the least `cost` (ns); `key` says what the costs depend on, and results are kept in `cache`.

    A candidate that does not fit the machine is passed over; when none fits, the error is that of the default.
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


def estimated_ns(program: Module, machine: Machine, calls: Mapping[str, int] | None = None) -> float:
    """The time of one step of a command program, by the rule above; loops count one turn, collectives nothing (they are the same in every candidate).

    `calls` says how often each function runs; without it, the calls in the program do.
    """
    functions = {str(f.sym_name): f for f in program.body if isinstance(f, Func)}
    if calls is None:
        leaves = [call.callee.leaf for f in functions.values() for call in f.walk_type(Call)]
        calls = {name: leaves.count(name) for name in set(leaves)}
    return sum(_function_ns(f, machine) * calls.get(name, 1) for name, f in functions.items())


def products_ns(function: Func, machine: Machine, plan: SramPlan) -> float:
    """The time of a function's products alone, by the cost of their tiles: the head of the model, without writing its thousands of tiles down."""
    total = 0.0
    for op in function.body:
        if isinstance(op, (Linear, QuantizedLinear)):
            *outer, k = tensor_type(op.x).static_shape
            group = op.group_size if isinstance(op, QuantizedLinear) else 0
            width = bit_width(tensor_type(op.out).element) // 8
            shape = MatmulShape(math.prod(outer), tensor_type(op.out).static_shape[-1], k, group, True, width, plan.temp_bytes // 2)
            total += tiles_ns(shape, choose_tiles(shape, machine, plan), machine)
    return total


def _function_ns(function: Func, machine: Machine) -> float:
    busy: dict[str, dict[str, float]] = {}
    known: dict[Hashable, tuple[str, float]] = {}
    for op in function.walk():
        if not edge10.is_command(op) or edge10.dynamic_sizes(op):
            continue
        unit = edge10.unit_of(op)
        if unit == "d2d":
            continue
        key = (type(op), _size(op))
        if key not in known:
            known[key] = _price(op, unit, machine)
        name, ns = known[key]
        units = busy.setdefault(str(op.loc), {})
        units[name] = units.get(name, 0.0) + ns
    return sum(max(units.values()) for units in busy.values())


def _size(op: Op) -> Hashable:
    """What the time of a command depends on."""
    if isinstance(op, (edge10.Load, edge10.Store)):
        return (op.shape, op.dram_strides)
    if isinstance(op, edge10.Matmul):
        return (op.m, op.n, op.k)
    if isinstance(op, edge10.Drain):
        return (op.m, op.n)
    if isinstance(op, edge10.Dequant):
        return (op.n, op.k)
    if isinstance(op, edge10.VectorOp):
        return (op.function, op.rows, op.cols)
    return id(op)


def _price(op: Op, unit: str, machine: Machine) -> tuple[str, float]:
    if unit not in _TRANSFERS:
        return unit, machine.sync.command_ns + compute_ns(op, (), machine)
    transfer: Transfer
    if isinstance(op, edge10.Gather):
        transfer = gather_transfer(op)
    else:
        assert isinstance(op, (edge10.Load, edge10.Store))
        transfer = transfer_of(op.shape, op.dram_strides)
    return "dram", transfer.cost_bytes(machine) / machine.dram_bytes_per_ns
