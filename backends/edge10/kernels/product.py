"""The frame shared by the matrix products: out[m, n] = sum_k x[m, k] w[n, k] + bias[n] in tiles that live in registers.

    for each block of rows n (on all cores):
      for each tile of columns m:
        for each tile of rows n in the block:     tile_rows x tile_columns partial sums, `lanes` wide, in registers
          for k: each weight vector is read (and dequantised) once and multiplied with every x[m]
          add up the lanes, add the bias, round, store

The block's weights stay in the second-level cache while the tiles of m pass over them; x is converted to f32 once per call, ahead of the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from tyir.backends.edge10.kernels.tir import Buffer, Cpu, Expr, fill, horizontal_sum, load, loop, registers, span, store

__all__ = ["Accumulate", "Tile", "tiled_product"]

_BLOCK_TILES = 8  # tiles of n per block when x has more than one tile


@dataclass(frozen=True)
class Tile:
    """A register tile: rows n0.. of the weight by rows m0.. of x; `sums` holds its partial sums, [rows][columns] vectors of `lanes`."""

    n0: Expr
    m0: Expr
    rows: int
    columns: int
    lanes: int
    sums: Buffer

    def add(self, row: int, column: int, product: Expr) -> None:
        """sums[row, column] += product."""
        at = span((row * self.columns + column) * self.lanes, self.lanes)
        T.buffer_store(self.sums, self.sums[at] + product, [at])


Accumulate = Callable[[Tile], None]


def tile_shape(m: int, cpu: Cpu) -> tuple[int, int]:
    """Rows of the weight and of x per tile."""
    most = cpu.accumulators
    if m <= 2:
        return (8 if most >= 16 else 4), m
    rows = 4 if most >= 16 else 2
    tiles = -(-m // (most // rows))
    return rows, -(-m // tiles)


def tiled_product(m: int, n: int, k: int, lanes: int, bias: Buffer | None, out: Buffer, cpu: Cpu, accumulate: Accumulate) -> None:
    """Emits the loops; `accumulate` emits the k loop of one tile.  `out` is [m, n], `bias` [n] or None."""
    rows, columns = tile_shape(m, cpu)

    def tile(n0: Expr, m0: Expr, tile_rows: int, tile_columns: int) -> None:
        sums = registers(tile_rows * tile_columns, lanes)
        fill(sums, 0, tile_rows * tile_columns, 0, lanes)
        accumulate(Tile(n0, m0, tile_rows, tile_columns, lanes, sums))
        for r in range(tile_rows):
            for c in range(tile_columns):
                total = horizontal_sum(sums, (r * tile_columns + c) * lanes, lanes)
                total = total if bias is None else total + load(bias, [n0 + r], 1)
                store(out, [m0 + c, n0 + r], total, 1)

    def row_tiles(n0: Expr, count: Expr, tile_rows: int) -> None:
        """All columns against `count` tiles of rows from n0."""
        with T.serial(0, m // columns) as c, T.serial(0, count) as t:
            tile(n0 + t * tile_rows, c * columns, tile_rows, columns)
        if m % columns:
            with T.serial(0, count) as t:
                tile(n0 + t * tile_rows, m - m % columns, tile_rows, m % columns)

    tiles = n // rows
    per_block = 1 if m <= columns else min(_BLOCK_TILES, tiles)
    if tiles:
        with loop(-(-tiles // per_block), cpu, m * n * k) as block:
            row_tiles(block * per_block * rows, T.min(per_block, tiles - block * per_block) if tiles % per_block else per_block, rows)
    if n % rows:
        row_tiles(n - n % rows, 1, n % rows)
