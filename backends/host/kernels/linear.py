"""ty.linear: x [.., K] times a weight [N, K], both as they are stored; vectors along K."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.product import Tile, tiled_product
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    bind,
    flat,
    lanes_for,
    load,
    prefetch,
    span,
)
from tyir.dialects import ty

__all__ = ["EMITTERS"]


def linear(op: ty.Linear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, weight, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    m, n = math.prod(lead), int(weight.shape[0])
    lanes = lanes_for(cpu.lanes, k)

    def accumulate(tile: Tile) -> None:
        chains = lanes_for(tile.chains, k // lanes)
        with T.serial(0, k // (lanes * chains)) as i:
            for chain in range(chains):
                step = bind(i * chains + chain)
                for r in range(tile.rows):
                    if tile.rows > 1:
                        prefetch(weight, [tile.n0 + r + tile.rows, step * lanes])
                    tile.multiply(chain, step, r, bind(load(weight, [tile.n0 + r, step * lanes], lanes)))

    def order(step: Expr) -> Expr:
        return span(step * lanes, lanes)

    tiled_product(
        flat(x, m, k),
        n,
        lanes,
        order,
        bias[0] if bias else None,
        flat(out, m, n),
        cpu,
        accumulate,
        one_stream=True,
    )


EMITTERS: Final[Emitters] = {
    ty.Linear: linear,
}
