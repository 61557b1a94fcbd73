"""Deciding where the tensors of one function live: in SRAM by lifetime, or in a spill buffer.

The spill buffer, in DRAM, takes what does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tyir.backends.edge10.lowering.context import Place
from tyir.backends.edge10.memory.allocate import ALIGNMENT, Interval, align, place_intervals
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Call, Func
from tyir.dialects.kv import Append, BlockScores, CachedAttention, Replace
from tyir.dialects.ty import Add, Attention, GetGlobal, Linear, QuantizedLinear, Reshape, Rope, tensor_type
from tyir.ir import Op, Value
from tyir.traits import Elementwise
from tyir.types import TensorType

__all__ = [
    "Boundary",
    "BoundaryPlaces",
    "Lifetimes",
    "Places",
    "Scratch",
    "assign_places",
    "boundary_of",
    "in_place",
    "root",
    "used_until",
]


def root(value: Value) -> Value:
    """The value whose storage this one shares.

    Through reshapes, appends in place, and ops that may write their result over their first operand.
    """
    while isinstance(op := value.op, (Reshape, Append, Replace)) or (
        isinstance(op, (Rope, CachedAttention)) and _fits(op) and _only_reader(op.operands[0])
    ):
        value = op.operands[0]
    return value


def _fits(op: Op) -> bool:
    """Whether the result has the type of the first operand: parts of attention do not."""
    return op.results[0].type is op.operands[0].type


def _only_reader(value: Value) -> bool:
    """Whether one op alone reads a value, under any shape, and an op of this function has made it."""
    while len(value.uses) == 1 and isinstance(value.op, Reshape):
        value = value.op.operands[0]
    return len(value.uses) == 1 and value.op is not None and not isinstance(value.op, (Call, GetGlobal))


class Lifetimes:
    """First and last op at which each storage is in use, and the ops that are calls."""

    def __init__(self, function: Func, fused: Mapping[Op, Op] | None = None) -> None:
        """`fused` ops are executed together with a later op: what they read lives until then."""
        order = {op: index for index, op in enumerate(function.body)}
        self.first: dict[Value, int] = {root(a): -1 for a in function.args}
        self.last: dict[Value, int] = {root(a): -1 for a in function.args}
        self.calls: list[int] = []
        self.heat: dict[Value, float] = {}
        for op in function.body:
            index = order[(fused or {}).get(op, op)]
            if isinstance(op, Call):
                self.calls.append(index)
            for value in op.operands:
                self.last[root(value)] = max(index, self.last.get(root(value), -1))
                self.heat[root(value)] = self.heat.get(root(value), 0.0) + _heat(op, value)
            for value in op.results:
                self.first.setdefault(root(value), index)
                self.last.setdefault(root(value), index)

    def spans_call(self, value: Value) -> bool:
        """Whether a function that uses SRAM as it likes runs while the value lives."""
        return any(self.first[value] < call < self.last[value] for call in self.calls)


def _heat(op: Op, value: Value) -> float:
    """How often a byte of an operand is read.

    A linear reads its input once for each tile of its output channels.
    """
    if isinstance(op, (Linear, QuantizedLinear)):
        return max(1.0, tensor_type(op.results[0]).static_shape[-1] / 256)
    return 1.0


@dataclass(frozen=True)
class Boundary:
    """Where the activations that a layer function takes and gives lie, the same for every call.

    Places by argument and by result index.
    """

    arguments: Mapping[int, Place]
    results: Mapping[int, Place]
    overwritten: frozenset[int]


class BoundaryPlaces:
    """Places that all layer functions of a program share.

    The n-th argument of a type has the same place in each.

    At most `sram_limit` bytes are given out in SRAM, from offset `start`; what exceeds them lies in the DRAM
    buffer `symbol`.
    """

    def __init__(self, sram_limit: int, symbol: str, start: int = 0) -> None:
        self.sram_limit = sram_limit
        self.symbol = symbol
        self.start = start
        self.sram_bytes = self.dram_bytes = 0
        self._places: dict[tuple[str, TensorType, int], Place] = {}

    def take(self, role: str, type: TensorType, number: int) -> Place:
        """The place of the `number`-th value of a type in a role."""
        key = (role, type, number)
        if key not in self._places:
            self._places[key] = self._new(align(type.nbytes))
        return self._places[key]

    def _new(self, size: int) -> Place:
        if self.sram_bytes + size <= self.sram_limit:
            self.sram_bytes += size
            return Place("sram", self.start + self.sram_bytes - size)
        self.dram_bytes += size
        return Place("dram", self.dram_bytes - size, self.symbol)


def boundary_of(
    function: Func, activations: Iterable[int], aliased: Iterable[int], shared: BoundaryPlaces
) -> Boundary:
    """Places for a layer's activations.

    `activations` are argument indices, `aliased` the indices of results that are caches.

    A result takes over the place of an argument of its type that is no longer read when it is written: the
    residual stream stays where it is.
    """
    lifetimes = Lifetimes(function)
    returned = function.body.terminator.operands
    arguments: dict[int, Place] = {}
    counts: Counter[tuple[str, TensorType]] = Counter()

    def take(role: str, value: Value) -> Place:
        type = tensor_type(value)
        counts[role, type] += 1
        return shared.take(role, type, counts[role, type])

    for index in activations:
        arguments[index] = take("argument", function.args[index])
    results: dict[int, Place] = {}
    overwritten: set[int] = set()
    for index, value in enumerate(returned):
        if index in aliased:
            continue
        defined = lifetimes.first[root(value)]
        heirs = [
            a
            for a in arguments
            if a not in overwritten
            and function.args[a].type is value.type
            and lifetimes.last[function.args[a]] <= defined
        ]
        if heirs and _may_overwrite(value, function.args[heirs[0]]):
            overwritten.add(heirs[0])
            results[index] = arguments[heirs[0]]
        else:
            results[index] = take("result", value)
    return Boundary(arguments, results, frozenset(overwritten))


def _may_overwrite(result: Value, argument: Value) -> bool:
    """An op that works element by element may write where it reads; others only where nothing is read any
    more.
    """
    op = root(result).op
    if op is None:
        return False
    reads_argument = any(root(v) is argument for v in op.operands)
    return not reads_argument or op.has_trait(Elementwise)


@dataclass(frozen=True)
class Scratch:
    """What one op needs while it runs, besides its operands and results."""

    sram_bytes: int
    dram_bytes: int


@dataclass(frozen=True)
class Places:
    """Where values and the scratch of ops lie, and how many bytes the spill buffer has.

    Scratch is an offset in SRAM and a place in the spill buffer.
    """

    values: dict[Value, Place]
    scratch: dict[Op, tuple[int, Place]]
    spill_bytes: int


def used_until(
    function: Func, places: Places, scratch: Mapping[Op, Scratch], fused: Mapping[Op, Op]
) -> dict[Op, int]:
    """For each op the first byte of the arena behind all that lies there while it runs."""
    lifetimes, order = Lifetimes(function, fused), {op: i for i, op in enumerate(function.body)}
    lives = [
        (lifetimes.first[v], lifetimes.last[v], place.offset + tensor_type(v).nbytes)
        for v, place in places.values.items()
        if place.in_sram and v in lifetimes.first
    ]
    lives += [(order[op], order[op], places.scratch[op][0] + s.sram_bytes) for op, s in scratch.items()]
    return {
        op: align(max((end for first, last, end in lives if first <= index <= last), default=0))
        for op, index in order.items()
    }


def _streamed(function: Func) -> set[Value]:
    """What lies in DRAM whatever room there is: the keys and values of a tower's attention, which pass
    through SRAM by blocks as a cache's do, rows of several tokens for a cache that is cut by tokens, and what
    sampled queries see in a block of the cache, whose addresses follow the position.
    """
    seen = {op.scores for op in function.body if isinstance(op, BlockScores)}
    found = seen | {root(v) for op in function.body if isinstance(op, Attention) for v in (op.k, op.v)}
    appends = (op for op in function.body if isinstance(op, Append) and op.blocks is not None)
    return found | {root(op.rows) for op in appends if tensor_type(op.rows).static_shape[1] > 1}


def in_place(function: Func, boundary: Boundary) -> dict[Value, Place]:
    """Sums that may be made in the place of an argument which nothing reads afterwards.

    The residual stream stays at the layers' boundary.
    """
    lifetimes = Lifetimes(function)
    returned = [root(v) for v in function.body.terminator.operands]
    found: dict[Value, Place] = {}
    for index, place in boundary.arguments.items():
        argument = function.args[index]
        heirs = [returned[i] for i, p in boundary.results.items() if p == place]
        for op in function.body:
            if (
                not isinstance(op, Add)
                or not any(root(v) is argument for v in op.operands)
                or op.out in returned
            ):
                continue
            order = lifetimes.first[op.out]
            free = lifetimes.last[argument] <= order and all(
                lifetimes.last[op.out] <= lifetimes.first[heir] for heir in heirs
            )
            if free and op.out.type is argument.type and root(op.out) is op.out:
                found[op.out] = place
    return found


def assign_places(
    function: Func,
    fixed: Mapping[Value, Place],
    low: int,
    high: int,
    spill: str,
    fused: Mapping[Op, Op],
    scratch: Mapping[Op, Scratch],
) -> Places:
    """A place for every value the function computes.

    `fixed` ones are given (by root), results of `fused` ops need none, `scratch` is what ops need besides.

    Values that live across a call are spilled: a layer uses the whole arena.
    """
    lifetimes = Lifetimes(function, fused)
    made = {root(v) for op in function.body if op not in fused for v in op.results}
    own = [
        v
        for v in lifetimes.first
        if v not in fixed
        and isinstance(v.type, TensorType)
        and v.op is not None
        and v in made
        and not isinstance(v.op, GetGlobal)
    ]
    intervals: dict[Value, Interval] = {}
    for number, value in enumerate(own):
        size = tensor_type(value).nbytes
        heat = 1.0 + lifetimes.heat.get(value, 0.0) + isinstance(value.op, (AllReduce, AllGather))
        intervals[value] = Interval(
            f"%{value.name or number}", align(size), lifetimes.first[value], lifetimes.last[value], heat
        )
    order = {op: index for index, op in enumerate(function.body)}
    held = {
        op: Interval("scratch", align(s.sram_bytes), order[op], order[op], float("inf"))
        for op, s in scratch.items()
    }
    kept = {
        op: Interval("scratch", align(s.dram_bytes), order[op], order[op], 0.0)
        for op, s in scratch.items()
        if s.dram_bytes
    }
    streamed = _streamed(function)
    place_intervals(
        [
            *held.values(),
            *(i for v, i in intervals.items() if v not in streamed and not lifetimes.spans_call(v)),
        ],
        low,
        high,
    )
    spilled = [*(i for i in intervals.values() if i.offset is None), *kept.values()]
    places = {v: Place("sram", i.offset) for v, i in intervals.items() if i.offset is not None}
    place_intervals(spilled, 0, 1 << 62)
    places.update({v: Place("dram", i.offset or 0, spill) for v, i in intervals.items() if i in spilled})
    scratches: dict[Op, tuple[int, Place]] = {}
    for op, interval in held.items():
        assert interval.offset is not None, "scratch is sized to fit the arena"
        scratches[op] = interval.offset, Place("dram", (kept[op].offset or 0) if op in kept else 0, spill)
    return Places(
        {**places, **fixed},
        scratches,
        align(max((i.nbytes + (i.offset or 0) for i in spilled), default=0), ALIGNMENT),
    )
