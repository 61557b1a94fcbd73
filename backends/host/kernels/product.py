"""The frame shared by the matrix products: out[m, n] = sum_k x[m, k] w[n, k] + bias[n] in tiles that live
in registers.

    for each block of rows n (on all cores):
      for each tile of columns m:
        for each tile of rows n in the block:     tile_rows x tile_columns partial sums, `lanes` wide, in registers
          for k: each weight vector is read (and dequantised) once and multiplied with every x[m]
          add up the lanes, add the bias, round, store

Where one tile holds all of x, a weight is read once, in several streams (`streams.py`): a tile's rows lie far apart.
Otherwise the block's weights stay in the second-level cache while the tiles of m pass over them.  Ahead of the loops
x is converted to f32 and packed into panels, one per tile of m, in the order in which a tile reads it: [k
/ lanes][tile's m][lanes] (as in BLIS; rows of x read side by side would fall into the same cache sets).
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.streams import in_streams, streams_of
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    add_to,
    bind,
    hold,
    horizontal_sum,
    load,
    loop,
    put,
    register,
    span,
    store,
    sums_of,
    vector,
)

__all__ = ["Tile", "Weight", "tiled_product"]

_BLOCK_TILES = 8  # tiles of n per block when x has more than one tile


@dataclass(frozen=True)
class Tile:
    """A register tile: rows of the weight by rows m0.. of x.

    `rows` of the weight count from `first`, which `Weight.ready` was told.
    `sums` holds its partial sums, [rows][columns] registers of `lanes`: one for each result, however small
    the tile, so that a row of x gives the same bits beside any others.
    """

    first: Expr
    rows: Sequence[Expr]
    m0: Expr
    columns: int
    lanes: int
    sums: list[Buffer]
    panels: Buffer
    k: int

    def multiply(self, step: Expr, row: int, weight: Expr) -> None:
        """Adds the products of one weight vector with vector `step` of every x row of the tile."""
        for c in range(self.columns):
            x = self.panels[span(self.m0 * self.k + (step * self.columns + c) * self.lanes, self.lanes)]
            add_to(self.sums[row * self.columns + c], weight * x, self.lanes)


class Weight(Protocol):
    """The weight operand [n, k] of a product, as it is stored.

    `unpacks`: it is not stored as numbers, and is unpacked once where tiles of x share a block of rows.
    """

    row_bytes: int

    @property
    def unpacks(self) -> bool: ...

    def ready(self, first: Expr, count: Expr, most: int) -> None:
        """Emits what a block of rows takes before its tiles: rows `first`.., at most `most`."""

    def accumulate(self, tile: Tile) -> None:
        """Emits the k loop of a tile."""

    def unpack(self, row: Expr, to: Buffer, place: Expr) -> None:
        """Emits that row `row` of the block goes into row `place` of an f32 buffer, vectors in order."""


Order = Callable[[Expr], Expr]


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


def _accumulate_known(tile: Tile, known: Buffer) -> None:
    """The k loop of a tile whose weights are rows of an f32 buffer."""
    with T.serial(0, tile.k // tile.lanes) as step:
        for r, row in enumerate(tile.rows):
            at = row * tile.k + step * tile.lanes
            tile.multiply(step, r, hold(known[span(at, tile.lanes)], tile.lanes))


def _store_together(
    sums: Sequence[Buffer], n0: Expr, m0: Expr, rows: int, lanes: int, bias: Buffer | None, out: Buffer
) -> None:
    """Adds up and stores the sums [rows][columns] of a tile whose rows are neighbours, `lanes` at once."""
    columns = len(sums) // rows
    added = None if bias is None else bind(load(bias, [n0], rows))
    together = register(lanes)
    for start in range(0, columns, lanes // rows):
        some = range(start, start + lanes // rows)
        put(together, sums_of([sums[r * columns + c] for c in some for r in range(rows)], lanes), lanes)
        for place, c in enumerate(some):
            total = together[span(place * rows, rows)]
            store(out, [m0 + c, n0], total if added is None else total + added, rows)


_ROWS = 4


def _most_columns(cpu: Cpu) -> int:
    return cpu.accumulators // _ROWS


def tiled_product(
    x: Buffer, n: int, lanes: int, order: Order, bias: Buffer | None, out: Buffer, cpu: Cpu, weight: Weight
) -> None:
    """Emits the loops.  `x` is [m, k], `out` [m, n], `bias` [n] or None.

    `order(step)` gives the indices along k of vector `step`, which is what `Tile.multiply` multiplies with.
    """
    m, k = (int(d) for d in x.shape)
    columns = -(-m // -(-m // _most_columns(cpu)))
    panels = _packed(x, columns, lanes, order, cpu)

    def tile(
        first: Expr,
        rows: Sequence[Expr],
        m0: Expr,
        width: int,
        known: Buffer | None = None,
        side_by_side: bool = False,
    ) -> None:
        sums = [register(lanes, 0) for _ in range(len(rows) * width)]
        whole = Tile(first, rows, m0, width, lanes, sums, panels, k)
        if known is None:
            weight.accumulate(whole)
        else:
            _accumulate_known(whole, known)
        if side_by_side and len(sums) % lanes == 0 and lanes % len(rows) == 0:
            _store_together(sums, first + rows[0], m0, len(rows), lanes, bias, out)
            return
        for r, row in enumerate(rows):
            for c in range(width):
                total = horizontal_sum(sums[r * width + c], lanes)
                total = total if bias is None else total + load(bias, [first + row], 1)
                store(out, [m0 + c, first + row], total, 1)

    if m <= columns:
        given: list[Expr] = []

        def ready(first: Expr, count: Expr, most: int) -> None:
            given[:] = [first]
            weight.ready(first, count, most)

        streams = streams_of(cpu) if m == 1 else _ROWS
        in_streams(
            range(n),
            streams,
            weight.row_bytes,
            cpu,
            m * n * k,
            ready,
            lambda rows: tile(given[0], rows, T.int32(0), m),
        )
        return

    def row_tiles(first: Expr, count: Expr, rows: int) -> None:
        """All columns against `count` tiles of rows from `first` on."""
        weight.ready(first, count * rows, _BLOCK_TILES * rows)
        known: Buffer | None = None
        if weight.unpacks:
            known = T.alloc_buffer((_BLOCK_TILES * rows * k,), "float32")
            with T.serial(0, count * rows) as r:
                weight.unpack(r, known, r)

        def columns_from(m0: Expr, width: int) -> None:
            with T.serial(0, count) as t:
                at = [t * rows + r for r in range(rows)]
                tile(first, at, m0, width, known=known, side_by_side=True)

        with T.serial(0, m // columns) as c:
            columns_from(c * columns, columns)
        if m % columns:
            columns_from(T.int32(m - m % columns), m % columns)

    tiles = n // _ROWS
    if tiles:
        most = min(_BLOCK_TILES, tiles)
        with loop(-(-tiles // most), cpu, m * n * k) as block:
            count = T.min(most, tiles - block * most) if tiles % most else most
            row_tiles(block * (most * _ROWS), count, _ROWS)
    if n % _ROWS:
        row_tiles(T.int32(n - n % _ROWS), T.int32(1), n % _ROWS)
