"""A layer function, once for all its calls.

    func.func @layer_s1(%x, %w0, %w1, %k, %v, %pos) -> (%y, %k, %v)
    -->
    func.func @layer_s1(%weights, %k, %v : addresses, %slot0, %slot1, .., %ready : tokens) -> the tokens anew

A token says when a slot of the weight stream is free; the last one, when everything else is done.  A layer of very
many tokens takes them in blocks of rows (`fused/rows.py`).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tyir.backends.edge10.lowering.body_lowering import BodyLowering
from tyir.backends.edge10.lowering.columns import MOST_ROWS, collective_block
from tyir.backends.edge10.lowering.context import Lowering, Place, ResidualCopy
from tyir.backends.edge10.lowering.dependences import Tracker
from tyir.backends.edge10.lowering.dram_buffers import NoBuffers
from tyir.backends.edge10.lowering.fused.fusion import Room
from tyir.backends.edge10.lowering.fused.rows import gathered, in_two, row_blocks, rows_part
from tyir.backends.edge10.lowering.fused.waiting_sums import waiting_sums
from tyir.backends.edge10.lowering.layers import LayerLayout
from tyir.backends.edge10.lowering.ops.collective import lower_all_gather
from tyir.backends.edge10.lowering.search import Prices
from tyir.backends.edge10.memory.places import Boundary, BoundaryPlaces, boundary_of, in_place, root
from tyir.diagnostics import TyirError
from tyir.dialects import edge10, ty
from tyir.dialects.dist import AllGather
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import CachedAttention
from tyir.ir import Value
from tyir.types import TensorType, f16

__all__ = ["LayerLowering"]


@dataclass(frozen=True)
class _Part:
    """What rows pass through: a function with the layer's arguments (and more), where these lie that are not
    activations, its results that are caches, where the rows of its other results go, the arguments that are
    needed of all rows, and what is gathered over the dies when all rows are through.
    """

    function: Func
    given: Mapping[int, Place]
    aliased: Mapping[int, int]
    results: Mapping[int, Place]
    uncut: Collection[int]
    gathers: Sequence[AllGather] = ()


class LayerLowering:
    """Lowers layer functions of `seqlen` tokens, whose boundary takes the first bytes of the arena; sums may
    wait in DRAM (`fused/waiting_sums.py`) if the division of SRAM says so.
    """

    def __init__(
        self, bodies: BodyLowering, boundary: BoundaryPlaces, seqlen: int, *, sums_may_wait: bool
    ) -> None:
        self._bodies, self._boundary, self._seqlen = bodies, boundary, seqlen
        self._sums_may_wait = sums_may_wait

    def lower(self, layer: LayerLayout, prices: Prices | None = None) -> Func:
        """The command program of a layer; with `prices`, its commands are priced and not written."""
        source, slots = layer.function, self._bodies.plan.slots
        addresses = [
            f"weights{source.sym_name.removeprefix('layer')}",
            *(source.args[i].name or f"a{i}" for i in layer.addressed),
        ]
        function = Func.make(
            source.sym_name,
            [*[edge10.ADDRESS] * len(addresses), *[edge10.TOKEN] * (len(slots) + 1)],
            [*addresses, *[f"slot{i}" for i in range(len(slots))], "ready"],
        )
        function.sym_visibility = "private"
        tokens = function.args[len(addresses) :]
        lowering = self._bodies.begin(function, Tracker(slots, tokens[:-1], tokens[-1]), prices)
        given = _given(layer, function.args)
        if self._takes_rows(layer):
            for part in self._parts(layer, given, lowering):
                blocks = self._row_blocks(layer, part, function)
                if prices is None:
                    for first, count in blocks:
                        self._lower_rows(layer, part, lowering, first, count)
                    for gather in part.gathers:
                        lowering.emitter.begin(gather)
                        lower_all_gather(gather, lowering)
                else:
                    prices.add_ns(self._rows_ns(layer, part, function, blocks))
        else:
            self._lower_body(source, layer.boundary, lowering, given, self._boundary.sram_bytes)
        slot_tokens, rest = lowering.emitter.tracker.finish()
        function.body.append(Return(values=[lowering.emitter.join(t) for t in (*slot_tokens, rest)]))
        function.refresh_type()
        return function

    def _lower_body(
        self, source: Func, boundary: Boundary, lowering: Lowering, given: Mapping[int, Place], first: int
    ) -> None:
        """A layer's ops; its own activations lie in SRAM from offset `first` on."""
        fixed: dict[Value, Place] = {source.args[i]: p for i, p in boundary.arguments.items()}
        fixed.update(in_place(source, boundary))
        fixed.update({root(source.body.terminator.operands[i]): p for i, p in boundary.results.items()})
        if self._sums_may_wait:
            self._keep_sums_in_dram(source, lowering, fixed)
        fixed.update({source.args[i]: place for i, place in given.items()})
        self._bodies.lower(source, lowering, fixed, first)

    # -- blocks of rows
    # -------------------------------------------------------------------------------------------
    def _takes_rows(self, layer: LayerLayout) -> bool:
        """Whether a layer has more rows than are worked on at once, in all that it takes and gives."""
        types = [ty.tensor_type(layer.function.args[i]) for i in layer.activations]
        rows = _rows(layer)
        return rows > MOST_ROWS and all(t.rank >= 3 and t.static_shape[:2] == (1, rows) for t in types)

    def _row_blocks(self, layer: LayerLayout, part: _Part, function: Func) -> list[tuple[int, int]]:
        """The blocks of rows that a part of a layer is lowered in: the cheapest that fit.

        Few blocks read the weights seldom, many leave room for what lies between the products.  A layer of a
        language model keeps to the rows that its collectives work on in columns.
        """
        rows, machine = _rows(layer), self._bodies.machine
        usual = list(row_blocks(rows, machine))
        if any(True for _ in layer.function.walk_type(CachedAttention)):
            return usual
        best: tuple[float, list[tuple[int, int]]] | None = None
        tried: set[int] = set()
        for each in _EACH:
            blocks = list(row_blocks(rows, machine, each))
            if len(blocks) in tried:
                continue
            tried.add(len(blocks))
            try:
                cost = self._rows_ns(layer, part, function, blocks)
            except TyirError:
                continue  # they do not fit
            if best is None or cost < _CLEARLY * best[0]:
                best = cost, blocks
        return usual if best is None else best[1]

    def _rows_ns(
        self, layer: LayerLayout, part: _Part, function: Func, blocks: Sequence[tuple[int, int]]
    ) -> float:
        """About how long a part of a layer takes in these blocks: each size is priced once."""
        bodies = self._bodies
        trial = LayerLowering(
            BodyLowering(bodies.machine, bodies.plan, bodies.die, NoBuffers()),
            self._boundary,
            self._seqlen,
            sums_may_wait=self._sums_may_wait,
        )
        total = 0.0
        for count, (first, times) in _sizes(blocks).items():
            prices, tokens = Prices(bodies.machine), function.args[-len(bodies.plan.slots) - 1 :]
            tracker = Tracker(bodies.plan.slots, tokens[:-1], tokens[-1])
            emitter_of = Func.make("priced", [])
            trial._lower_rows(layer, part, bodies.begin(emitter_of, tracker, prices), first, count)
            total += times * prices.total_ns()
        return total

    def _parts(self, layer: LayerLayout, given: Mapping[int, Place], lowering: Lowering) -> list[_Part]:
        """What the rows pass through one after the other: the layer or, of one that attends to rows after its
        own, its two parts.
        """
        source = layer.function
        if not any(True for _ in source.walk_type(ty.Attention)):
            return [_Part(source, given, layer.aliased, layer.boundary.results, ())]
        halves = in_two(source)
        if halves is None:
            raise TyirError(
                f"@{source.sym_name} attends to rows after its own in more places than one",
                help="layers with one attention can be lowered for many rows",
            )
        (attention,) = source.walk_type(ty.Attention)
        handed: dict[int, Place] = {}
        taken, count = dict(given), len(source.args)
        gathers: list[AllGather] = []
        for number, (letter, value) in enumerate(zip("qkv", attention.operands)):
            handed[number] = taken[count + number] = self._in_dram(f"{letter}.{source.sym_name}", value)
            if (gather := gathered(value)) is not None:
                gathers.append(gather)
                handed[number] = self._in_dram(f"{letter}.own.{source.sym_name}", gather.operands[0])
                lowering.places[gather.operands[0]] = handed[number]
                lowering.places[gather.out] = taken[count + number]
        return [
            _Part(halves[0], given, {}, handed, (), gathers),
            _Part(halves[1], taken, layer.aliased, layer.boundary.results, (count + 1, count + 2)),
        ]

    def _in_dram(self, name: str, value: Value) -> Place:
        """A buffer for all rows of a value."""
        self._bodies.buffers.add_activations(name, ty.tensor_type(value))
        return Place("dram", 0, name)

    def _lower_rows(
        self, layer: LayerLayout, whole: _Part, lowering: Lowering, first: int, count: int
    ) -> None:
        """A part of a layer for `count` tokens: their rows are brought to where the layer works, and its
        results back.
        """
        part = rows_part(whole.function, _rows(layer), first, count, whole.uncut)
        start = self._boundary.sram_bytes
        room = max(self._bodies.plan.boundary - start, 0)
        places = BoundaryPlaces(room, f"rows.{part.sym_name}", start)
        boundary = boundary_of(part, layer.activations, whole.aliased, places)
        # What SRAM has no room for is worked on where it lies.
        there = {i: _of_rows(layer.boundary.arguments[i], part.args[i], first) for i in boundary.arguments}
        given_back = part.body.terminator.operands
        back = {i: _of_rows(whole.results[i], given_back[i], first) for i in boundary.results}
        boundary = replace(
            boundary,
            arguments={i: p if p.in_sram else there[i] for i, p in boundary.arguments.items()},
            results={i: p if p.in_sram else back[i] for i, p in boundary.results.items()},
        )
        lowering.first_token = first
        lowering.emitter.begin(next(iter(part.body)))
        for index, place in boundary.arguments.items():
            lowering.move(there[index], place, ty.tensor_type(part.args[index]).nbytes)
        given = {}
        for index, place in whole.given.items():
            mine, all_rows = part.args[index].type, whole.function.args[index].type
            offset = ty.tensor_type(part.args[index]).nbytes // count * first if mine is not all_rows else 0
            given[index] = place.at(offset)
        self._lower_body(part, boundary, lowering, given, start + places.sram_bytes)
        for index, place in boundary.results.items():
            lowering.move(place, back[index], ty.tensor_type(given_back[index]).nbytes)
        lowering.first_token = 0

    # -- sums that wait
    # -------------------------------------------------------------------------------------------
    def _keep_sums_in_dram(self, source: Func, lowering: Lowering, fixed: dict[Value, Place]) -> None:
        """Give the norms of waiting sums the sums' places, and the sums copies in DRAM."""
        machine = self._bodies.machine
        room = Room(source, machine, self._bodies.plan, arena=0)
        for number, (value, normed) in enumerate(waiting_sums(room).items()):
            place = fixed.get(value)
            if place is not None and place.in_sram:
                fixed[normed] = place
                *outer, columns = ty.tensor_type(value).static_shape
                rows, name = math.prod(outer), f"waiting{number}.{source.sym_name}"
                self._bodies.buffers.add_activations(name, TensorType((rows, columns), f16))
                block = collective_block(rows, 2, machine)
                lowering.waits[value] = normed
                lowering.copies[value] = ResidualCopy(Place("dram", 0, name), rows, columns, block)


# How many of the cube's rows each of its units takes of a block: even numbers deal every tile evenly.
_EACH: Final = (18, 14, 10, 8, 6, 4, 2)
# More blocks must be so much cheaper: prices leave out what the cubes wait for when a block begins.
_CLEARLY: Final = 0.98


def _rows(layer: LayerLayout) -> int:
    """Rows of what a layer takes; 0 for what is not in rows."""
    first = ty.tensor_type(layer.function.args[layer.activations[0]]) if layer.activations else None
    return first.static_shape[1] if first is not None and first.rank >= 3 else 0


def _of_rows(place: Place, value: Value, first: int) -> Place:
    """Where the rows of `value`, a part of a tensor that lies at `place`, begin: `first` rows after it."""
    type = ty.tensor_type(value)
    return place.at(type.nbytes // type.static_shape[1] * first)


def _sizes(blocks: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Of each size of blocks, the first one's first row and how many there are."""
    found: dict[int, tuple[int, int]] = {}
    for first, count in blocks:
        found[count] = (found[count][0], found[count][1] + 1) if count in found else (first, 1)
    return found


def _given(layer: LayerLayout, arguments: Sequence[Value]) -> dict[int, Place]:
    """Where a layer's weights and caches lie, by argument: its own arguments are addresses."""
    offsets = layer.offsets
    given = {i: Place("dram", offsets[i], arguments[0], constant=True) for i in layer.packed}
    given.update({i: Place("dram", 0, symbol, constant=True) for i, symbol in layer.shared.items()})
    for number, index in enumerate(layer.addressed):
        is_weight = isinstance(layer.calls[0].operands[index].op, ty.GetGlobal)
        given[index] = Place("dram", 0, arguments[1 + number], constant=is_weight)
    return given
