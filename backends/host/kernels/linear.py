"""ty.linear: x [.., K] times a weight [N, K], both as they are stored; vectors along K."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.product import Tile, tiled_product
from tyir.backends.host.kernels.streams import ask_ahead
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    bind,
    flat,
    lanes_for,
    load,
    span,
)
from tyir.dialects import ty

__all__ = ["EMITTERS"]


class _Weight:
    """The weight operand of one kernel."""

    unpacks: Final = False

    def __init__(self, weight: Buffer, lanes: int) -> None:
        self.weight, self.lanes = weight, lanes
        self.row_bytes = int(weight.shape[1]) * weight.dtype.itemsize
        self.first: Expr = None

    def ready(self, first: Expr, count: Expr, most: int) -> None:
        self.first = first

    def accumulate(self, tile: Tile) -> None:
        with T.serial(0, tile.k // self.lanes) as step:
            for r, row in enumerate(tile.rows):
                ask_ahead(self.weight, self.first + row, step * self.lanes)
                value = load(self.weight, [self.first + row, step * self.lanes], self.lanes)
                tile.multiply(step, r, bind(value))

    def unpack(self, row: Expr, to: Buffer, place: Expr) -> None:
        raise AssertionError("a weight of numbers")

    def order(self, step: Expr) -> Expr:
        return span(step * self.lanes, self.lanes)


def linear(op: ty.Linear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, stored, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    m, n, lanes = math.prod(lead), int(stored.shape[0]), lanes_for(cpu.lanes, k)
    weight = _Weight(stored, lanes)
    given = bias[0] if bias else None
    tiled_product(flat(x, m, k), n, lanes, weight.order, given, flat(out, m, n), cpu, weight)


EMITTERS: Final[Emitters] = {
    ty.Linear: linear,
}
