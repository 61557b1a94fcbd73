"""A layer function, once for all its calls.

    func.func @layer_s1(%x, %w0, %w1, %k, %v, %pos) -> (%y, %k, %v)
    -->
    func.func @layer_s1(%weights, %k, %v : addresses, %slot0, %slot1, .., %ready : tokens) -> the tokens anew

A token says when a slot of the weight stream is free; the last one, when everything else is done.  A layer of very
many tokens takes them in blocks of rows (`fused/rows.py`).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tyir.backends.edge10.lowering.body_lowering import BodyLowering
from tyir.backends.edge10.lowering.columns import MOST_ROWS, collective_block
from tyir.backends.edge10.lowering.context import Lowering, Place, ResidualCopy
from tyir.backends.edge10.lowering.dependences import Tracker
from tyir.backends.edge10.lowering.fused.fusion import Room
from tyir.backends.edge10.lowering.fused.rows import row_blocks, rows_part
from tyir.backends.edge10.lowering.fused.waiting_sums import waiting_sums
from tyir.backends.edge10.lowering.layers import LayerLayout
from tyir.backends.edge10.lowering.search import Prices
from tyir.backends.edge10.memory.places import Boundary, BoundaryPlaces, boundary_of, in_place, root
from tyir.dialects import edge10, ty
from tyir.dialects.func import Func, Return
from tyir.ir import Value
from tyir.types import TensorType, f16

__all__ = ["LayerLowering"]


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
            blocks = list(row_blocks(self._seqlen, self._bodies.machine))
            if prices is not None:  # one of each size
                blocks = list({count: (first, count) for first, count in blocks}.values())
            for first, count in blocks:
                self._lower_rows(layer, lowering, given, first, count)
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
        """Whether a layer has more tokens than are worked on at once, in all that it takes and gives, and
        what it makes of a row needs no row after it.
        """
        if any(True for _ in layer.function.walk_type(ty.Attention)):
            return False
        types = [ty.tensor_type(layer.function.args[i]) for i in layer.activations]
        return self._seqlen > MOST_ROWS and all(
            t.rank >= 3 and t.static_shape[:2] == (1, self._seqlen) for t in types
        )

    def _lower_rows(
        self, layer: LayerLayout, lowering: Lowering, given: Mapping[int, Place], first: int, count: int
    ) -> None:
        """A layer for `count` tokens: their rows are brought to where the layer works, and its results
        back.
        """
        part = rows_part(layer.function, self._seqlen, first, count)
        start = self._boundary.sram_bytes
        room = max(self._bodies.plan.boundary - start, 0)
        places = BoundaryPlaces(room, f"rows.{part.sym_name}", start)
        boundary = boundary_of(part, layer.activations, layer.aliased, places)
        self._bodies.buffers.add_bytes(places.symbol, places.dram_bytes)
        lowering.first_token = first
        lowering.emitter.begin(next(iter(part.body)))
        for index, place in boundary.arguments.items():
            nbytes = ty.tensor_type(part.args[index]).nbytes
            lowering.move(layer.boundary.arguments[index].at(nbytes // count * first), place, nbytes)
        self._lower_body(part, boundary, lowering, given, start + places.sram_bytes)
        for index, place in boundary.results.items():
            nbytes = ty.tensor_type(part.body.terminator.operands[index]).nbytes
            lowering.move(place, layer.boundary.results[index].at(nbytes // count * first), nbytes)

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


def _given(layer: LayerLayout, arguments: Sequence[Value]) -> dict[int, Place]:
    """Where a layer's weights and caches lie, by argument: its own arguments are addresses."""
    offsets = layer.offsets
    given = {i: Place("dram", offsets[i], arguments[0], constant=True) for i in layer.packed}
    given.update({i: Place("dram", 0, symbol, constant=True) for i, symbol in layer.shared.items()})
    for number, index in enumerate(layer.addressed):
        is_weight = isinstance(layer.calls[0].operands[index].op, ty.GetGlobal)
        given[index] = Place("dram", 0, arguments[1 + number], constant=is_weight)
    return given
