"""Which division of SRAM suits a program: each candidate is lowered and its commands are priced with the simulator's formulas.

    time = sum over the ops of the model of the busiest unit's time for that op's commands        (units overlap within an op, ops follow each other)

Few tokens are bound by DRAM whatever the division, so they keep the default; many tokens want room for activations, at the price of smaller weight tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from tyir.backends.edge10.allocate import SramShares
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.ir import Op
from tyir.targets.command_times import Transfer, compute_ns, gather_transfer, transfer_of
from tyir.targets.machine import Machine

__all__ = ["CANDIDATES", "best_shares", "estimated_ns"]

CANDIDATES: Final = (
    SramShares(),
    SramShares(boundary=0.0),
    SramShares(16, (2, 4), (2, 4), (8, 4)),
    SramShares(16, (1, 4), (2, 4), (5, 4)),
    SramShares(16, (1, 4), (2, 4), (5, 4), 0.0),
    SramShares(16, (2, 4), (2, 4), (4, 4)),
    SramShares(16, (2, 4), (2, 4), (4, 4), 0.0),
)
_TRANSFERS: Final = ("ewdma", "eidma", "ebdma", "eodma")


def best_shares(lower: Callable[[SramShares], Module], key: Hashable, machine: Machine, cache: dict[Hashable, SramShares]) -> SramShares:
    """The candidate whose program `lower` makes cheapest; `key` says what the program depends on besides, and results are kept in `cache`.

    A candidate that does not fit the machine is passed over; when none fits, the error is that of the default.
    """
    if key not in cache:
        found: list[tuple[float, int]] = []
        for number, shares in enumerate(CANDIDATES):
            try:
                found.append((estimated_ns(lower(shares), machine), number))
            except TyirError:
                if number == 0:
                    raise
        cache[key] = CANDIDATES[min(found)[1]]
    return cache[key]


def estimated_ns(program: Module, machine: Machine) -> float:
    """The time of one step of a command program, by the rule above; loops count one turn, collectives nothing (they are the same in every candidate)."""
    functions = {str(f.sym_name): f for f in program.body if isinstance(f, Func)}
    calls: dict[str, int] = {}
    for function in functions.values():
        for call in function.walk_type(Call):
            calls[call.callee.leaf] = calls.get(call.callee.leaf, 0) + 1
    return sum(_function_ns(f, machine) * calls.get(name, 1) for name, f in functions.items())


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
