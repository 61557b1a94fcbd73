"""The proof that a function's places hold what they must hold.

No two values, or scratch of ops, share bytes while both are live.

The byte-level check (`tyir.runtime_sim.execution.check_accesses`) sees what commands touch, in an order that
makes them wait for each other; that a value was overwritten before its last reader came is seen here alone,
where values still have names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tyir.backends.edge10.lowering.context import Place
from tyir.backends.edge10.memory.places import Lifetimes, Places, Scratch
from tyir.diagnostics import Diagnostic
from tyir.dialects.func import Func
from tyir.dialects.ty import tensor_type
from tyir.ir import Op, Value
from tyir.types import TensorType

__all__ = ["live_problems"]


@dataclass(frozen=True)
class _Held:
    """Bytes `low`..`high` of SRAM or of a buffer, from op `first` to op `last`.

    `given` ones are placed from outside, where a result may take over from an operand.
    """

    what: str
    where: str
    memory: str
    low: int
    high: int
    first: int
    last: int
    given: bool

    def clashes(self, other: _Held) -> bool:
        if self.memory != other.memory or self.low >= other.high or other.low >= self.high:
            return False
        if self.given and other.given:
            return self.first < other.last and other.first < self.last
        return self.first <= other.last and other.first <= self.last


def live_problems(
    function: Func,
    places: Places,
    given: Mapping[Value, Place],
    scratch: Mapping[Op, Scratch],
    fused: Mapping[Op, Op],
    handed_on: Mapping[Value, Value],
) -> Iterator[Diagnostic]:
    """What shares bytes while live, and what lies in SRAM while a layer, which uses all of it, runs.

    `fused` ops run with a later one; a value that is `handed_on` gives up its place when the other is made
    (`residual`).
    """
    lifetimes = Lifetimes(function, fused)
    held = [
        h for v in lifetimes.first if (h := _of_value(v, places, given, lifetimes, handed_on)) is not None
    ]
    order = {op: index for index, op in enumerate(function.body)}
    for op, (offset, spilled) in places.scratch.items():
        size, at = scratch[op], order[op]
        name, where = f"the scratch of '{op.name}'", str(op.loc)
        held.append(_Held(name, where, "sram", offset, offset + size.sram_bytes, at, at, False))
        if size.dram_bytes and isinstance(spilled.base, str):
            held.append(
                _Held(
                    name,
                    where,
                    f"@{spilled.base}",
                    spilled.offset,
                    spilled.offset + size.dram_bytes,
                    at,
                    at,
                    False,
                )
            )
    held.sort(key=lambda h: (h.memory, h.low))
    for number, one in enumerate(held):
        for other in held[number + 1 :]:
            if other.memory != one.memory or other.low >= one.high:
                break
            if one.clashes(other):
                message = (
                    f"@{function.sym_name}: {one.what} ({one.memory} {one.low}..{one.high}, ops {one.first}"
                    f" to {one.last}) and {other.what} ({other.low}..{other.high}, ops {other.first} to"
                    f" {other.last}) share bytes while both are live"
                )
                yield Diagnostic(
                    message,
                    where=other.where,
                    help="give one of them a tyir.place of its own, or run plan-memory anew",
                )
    for value in lifetimes.first:
        place = places.values.get(value)
        if place is not None and place.in_sram and value not in given and lifetimes.spans_call(value):
            message = (
                f"@{function.sym_name}: {_name(value)} lies in SRAM while a layer runs, which uses all of it"
            )
            yield Diagnostic(
                message, where=_where(value), help=f'write tyir.place = "@spill.{function.sym_name} ..."'
            )


def _of_value(
    value: Value,
    places: Places,
    given: Mapping[Value, Place],
    lifetimes: Lifetimes,
    handed_on: Mapping[Value, Value],
) -> _Held | None:
    place = places.values.get(value)
    if (
        place is None
        or place.constant
        or not isinstance(value.type, TensorType)
        or not (place.in_sram or isinstance(place.base, str))
    ):
        return None
    heir = handed_on.get(value)
    last = lifetimes.last[value] if heir is None else lifetimes.first[heir]
    memory = "sram" if place.in_sram else f"@{place.base}"
    end = place.offset + tensor_type(value).nbytes
    return _Held(
        _name(value), _where(value), memory, place.offset, end, lifetimes.first[value], last, value in given
    )


def _name(value: Value) -> str:
    return (
        f"%{value.name}"
        if value.name
        else f"a result of '{value.op.name}'"
        if value.op is not None
        else f"argument {value.index}"
    )


def _where(value: Value) -> str:
    return str(value.op.loc) if value.op is not None else ""
