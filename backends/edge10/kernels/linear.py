"""ty.linear: x [.., K] times a weight [N, K], both as they are stored; vectors along K."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm.tirx.script.builder import ir as T

from tyir.backends.edge10.kernels.product import Tile, tiled_product
from tyir.backends.edge10.kernels.tir import Buffer, Cpu, bind, flat, lanes_for, load, loop, store
from tyir.dialects import ty

__all__ = ["linear"]


def linear(op: ty.Linear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, weight, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    m, n = math.prod(lead), int(weight.shape[0])
    lanes = lanes_for(cpu.lanes, k)
    x = flat(x, m, k)
    wide = T.alloc_buffer((m, k), "float32")
    with loop(m, cpu, m * k) as row, T.serial(0, k // lanes) as i:
        store(wide, [row, i * lanes], load(x, [row, i * lanes], lanes), lanes)

    def accumulate(tile: Tile) -> None:
        with T.serial(0, k // lanes) as i:
            at = bind(i * lanes)
            for r in range(tile.rows):
                w = bind(load(weight, [tile.n0 + r, at], lanes))
                for c in range(tile.columns):
                    tile.add(r, c, w * load(wide, [tile.m0 + c, at], lanes))

    tiled_product(m, n, k, lanes, bias[0] if bias else None, flat(out, m, n), cpu, accumulate)
