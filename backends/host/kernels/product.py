"""The frame shared by the matrix products: out[m, n] = sum_k x[m, k] w[n, k] + bias[n] in tiles that live
in registers.

    for each block of rows n (on all cores):
      for each tile of columns m:
        for each tile of rows n in the block:     tile_rows x tile_columns partial sums, `lanes` wide, in registers
          for k: each weight vector is read (and dequantised) once and multiplied with every x[m]
          add up the lanes, add the bias, round, store

The block's weights stay in the second-level cache while the tiles of m pass over them.  Ahead of the loops
x is converted to f32 and packed into panels, one per tile of m, in the order in which a tile reads it: [k
/ lanes][tile's m][lanes] (as in BLIS; rows of x read side by side would fall into the same cache sets).
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    add_to,
    get,
    hold,
    horizontal_sum,
    load,
    loop,
    register,
    span,
    store,
    vector,
)

__all__ = ["Accumulate", "Tile", "tiled_product"]

_BLOCK_TILES = 8  # tiles of n per block when x has more than one tile


@dataclass(frozen=True)
class Tile:
    """A register tile: rows n0.. of the weight by rows m0.. of x.

    `sums` holds its partial sums, [chains][rows][columns] registers of `lanes`.  Additions of one chain wait
    for each other, those of different chains do not: small tiles need several to keep the adders busy.
    """

    n0: Expr
    m0: Expr
    rows: int
    columns: int
    chains: int
    lanes: int
    sums: list[Buffer]
    panels: Buffer
    k: int

    def multiply(self, chain: int, step: Expr, row: int, weight: Expr) -> None:
        """Adds the products of one weight vector with vector `step` of every x row of the tile; `chain` is
        taken modulo their number.
        """
        for c in range(self.columns):
            x = self.panels[span(self.m0 * self.k + (step * self.columns + c) * self.lanes, self.lanes)]
            add_to(
                self.sums[((chain % self.chains) * self.rows + row) * self.columns + c],
                weight * x,
                self.lanes,
            )

    def join_chains(self) -> None:
        """Adds up the chains, into the first."""
        size = self.rows * self.columns
        for i in range(size, self.chains * size):
            add_to(self.sums[i % size], get(self.sums[i], self.lanes), self.lanes)


Accumulate = Callable[[Tile], None]
Order = Callable[[Expr], Expr]
Unpack = Callable[[Expr, Buffer, Expr], None]


def _packed(x: Buffer, columns: int, lanes: int, order: Order, cpu: Cpu) -> Buffer:
    """x [m, k] as f32 panels; vector `step` of a row holds its elements `order(step)`."""
    m, k = (int(d) for d in x.shape)
    panels = T.alloc_buffer((m * k,), "float32")

    def panel(m0: Expr, width: int) -> None:
        with T.serial(0, k // lanes) as step:
            for c in range(width):
                at = span(m0 * k + (step * width + c) * lanes, lanes)
                T.buffer_store(panels, T.cast(x[m0 + c, order(step)], vector("float32", lanes)), [at])

    with loop(m // columns, cpu, m * k * 4) as tile:
        panel(tile * columns, columns)
    if m % columns:
        panel(m - m % columns, m % columns)
    return panels


def _accumulate_known(tile: Tile, known: Buffer, row: Expr) -> None:
    """The k loop of a tile whose weights are rows `row`.. of an f32 buffer."""
    with T.serial(0, tile.k // tile.lanes) as step:
        for r in range(tile.rows):
            at = (row + r) * tile.k + step * tile.lanes
            tile.multiply(0, step, r, hold(known[span(at, tile.lanes)], tile.lanes))


_ROWS = 4


def tile_shape(m: int, one_stream: bool, cpu: Cpu) -> tuple[int, int, int]:
    """Rows of the weight, rows of x, and chains of a tile.

    With one token an unpacked weight is read at memory speed; that goes best with a single row at a time
    (`one_stream`), one linear stream that the processor's prefetcher follows.  Otherwise rows share the
    reading of x, and each tile prefetches the next tile's weights: measured at 8 tokens, 2.3 ms against 3.7
    ms without it, for 1536 -> 8960 in f16 on one Zen 4 core.
    """
    if m == 1 and one_stream:
        return 1, 1, 4
    most = cpu.accumulators // _ROWS
    return _ROWS, -(-m // -(-m // most)), 1


def tiled_product(
    x: Buffer,
    n: int,
    lanes: int,
    order: Order,
    bias: Buffer | None,
    out: Buffer,
    cpu: Cpu,
    accumulate: Accumulate,
    one_stream: bool = False,
    unpack: Unpack | None = None,
) -> None:
    """Emits the loops; `accumulate` emits the k loop of one tile.  `x` is [m, k], `out` [m, n], `bias` [n] or
    None.

    `unpack(n, to, row)` of a weight that is not stored as numbers puts row n of it into row `row` of an f32
    buffer, vectors in order: where several tiles of x meet a block of rows, it is unpacked once for all.

    `order(step)` gives the indices along k of vector `step`, which is what `Tile.multiply` multiplies with.
    """
    m, k = (int(d) for d in x.shape)
    rows, columns, chains = tile_shape(m, one_stream, cpu)
    panels = _packed(x, columns, lanes, order, cpu)

    def tile(n0: Expr, m0: Expr, tile_rows: int, tile_columns: int, known: Buffer | None, row: Expr) -> None:
        sums = [register(lanes, 0) for _ in range(chains * tile_rows * tile_columns)]
        whole = Tile(n0, m0, tile_rows, tile_columns, chains, lanes, sums, panels, k)
        if known is None:
            accumulate(whole)
        else:
            _accumulate_known(whole, known, row)
        whole.join_chains()
        for r in range(tile_rows):
            for c in range(tile_columns):
                total = horizontal_sum(sums[r * tile_columns + c], lanes)
                total = total if bias is None else total + load(bias, [n0 + r], 1)
                store(out, [m0 + c, n0 + r], total, 1)

    def row_tiles(n0: Expr, count: Expr, tile_rows: int) -> None:
        """All columns against `count` tiles of rows from n0."""
        known: Buffer | None = None
        if unpack is not None and m > columns:
            known = T.alloc_buffer((_BLOCK_TILES * rows * k,), "float32")
            with T.serial(0, count * tile_rows) as r:
                unpack(n0 + r, known, r)
        with T.serial(0, m // columns) as c, T.serial(0, count) as t:
            tile(n0 + t * tile_rows, c * columns, tile_rows, columns, known, t * tile_rows)
        if m % columns:
            with T.serial(0, count) as t:
                tile(n0 + t * tile_rows, m - m % columns, tile_rows, m % columns, known, t * tile_rows)

    tiles = n // rows
    per_block = 1 if m <= columns else min(_BLOCK_TILES, tiles)
    if tiles:
        with loop(-(-tiles // per_block), cpu, m * n * k) as block:
            row_tiles(
                block * per_block * rows,
                T.min(per_block, tiles - block * per_block) if tiles % per_block else per_block,
                rows,
            )
    if n % rows:
        row_tiles(n - n % rows, 1, n % rows)
