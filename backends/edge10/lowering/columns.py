"""Who takes the columns of a product, block by block as they are computed.

    for each block of columns:   product -> results.target(...);   results.deliver(...)

`StoredColumns` brings them to a tensor of their own.  The kinds of fusion that take a product's columns bring
takers of theirs (`fused/summed.py`, `fused/gathered.py`, `fused/ranked.py`).
"""

from __future__ import annotations

import math
from typing import Protocol

from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, element_bytes
from tyir.backends.edge10.memory.allocate import sram_plan
from tyir.dialects.ty import tensor_type
from tyir.ir import Value
from tyir.targets.machine import Machine

__all__ = ["MOST_ROWS", "Columns", "StoredColumns", "block_of", "collective_block"]

MOST_ROWS = 128  # above, blocks would be so narrow that their latency counts
_WIDEST = 256


class Columns(Protocol):
    """Takes the blocks of a product.

    `piece_bytes`, `piece_limit` and `block` are as in `tiling.MatmulShape`; where nothing fixes their number,
    columns are handed on in multiples of `unit`.
    """

    piece_bytes: int
    piece_limit: int
    block: int
    unit: int

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        """Where out[m0 : m0 + m, n0 : n0 + n] shall be drained to: the offset in SRAM, bytes from row to
        row.
        """

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        """Bring the block, now at `offset`, to where it belongs."""


def collective_block(rows: int, width: int, machine: Machine) -> int:
    """Columns of `width` bytes that one collective brings at a time; 0 when it shall bring the whole
    tensor.
    """
    cube, plan = machine.cube, sram_plan(machine)
    if not cube.rows < rows <= MOST_ROWS:
        return 0
    sums = machine.accumulator_bytes // 2 // 4 // (-(-rows // cube.rows) * cube.rows)
    return min(sums, plan.temp_bytes // 2 // (2 * rows * width), _WIDEST) // cube.columns * cube.columns


def block_of(value: Value, machine: Machine) -> int:
    """`collective_block` for a tensor whose columns are the last dimension."""
    *outer, _ = tensor_type(value).static_shape
    return collective_block(math.prod(outer), element_bytes(value), machine)


class StoredColumns:
    """A tensor of its own: drained in place when it lies in SRAM, else by way of a buffer."""

    def __init__(self, out: Value, lowering: Lowering, area: Area) -> None:
        self.lowering, self.place, self.width = lowering, lowering.place(out), element_bytes(out)
        self.row = tensor_type(out).static_shape[-1] * self.width
        self.piece_bytes, self.piece_limit, self.block = (
            0 if self.place.in_sram else self.width,
            area.nbytes // 2,
            0,
        )
        self.unit = 1
        self._buffers = Buffers(area, self.piece_limit)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        if self.place.in_sram:
            return self.place.offset + m0 * self.row + n0 * self.width, self.row
        return self._buffers.take(), n * self.width

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        if not self.place.in_sram:
            self.lowering.store(
                self.place.at(m0 * self.row + n0 * self.width),
                offset,
                (1, m, n * self.width),
                dram_strides=(0, self.row),
            )
