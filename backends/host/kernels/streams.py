"""Reading a weight's rows once: several streams a core, which memory serves faster than one.

A processor fetches ahead within a page and has few requests of one stream under way; eight rows read side by side, each
some pages from the next, have several times as many.  Measured on 2 cores of a Xeon (Ice Lake), 256 MB with 2 threads:
one stream 21 GB/s, two 23, four 24, eight 26; asking 512 bytes ahead matters less, 2 KiB ahead is worse than nothing.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import Buffer, Cpu, Expr, bind, flat, loop, prefetch

__all__ = ["ask_ahead", "in_streams", "streams_of"]

_AHEAD: Final = 512  # bytes
_BLOCK_BYTES: Final = 1 << 19  # of a weight, that a core takes at a time: eight times less takes 15 % longer


def streams_of(cpu: Cpu) -> int:
    """How many rows of a weight are read side by side: each needs a few registers."""
    return 8 if cpu.registers >= 32 else 4


def in_streams(
    rows: range,
    streams: int,
    row_bytes: int,
    cpu: Cpu,
    work: int,
    ready: Callable[[Expr, Expr, int], None],
    emit: Callable[[Sequence[Expr]], None],
) -> None:
    """Emits a loop over blocks of a weight's `rows`, as many for each core, and in each one over tiles.

    `ready(first, count, most)` begins a block: rows `first`.., at most `most` of them.  `emit` gets rows of
    a tile, counted from the block's first: one in each of `streams`, and the rows that are left one by one.
    """
    tiles = len(rows) // streams
    if tiles:
        rounds = max(1, -(-tiles * streams * row_bytes // (_BLOCK_BYTES * cpu.cores)))
        most = -(-tiles // (rounds * cpu.cores))
        with loop(-(-tiles // most), cpu, work) as block:
            count = bind(T.min(most, tiles - block * most)) if tiles % most else T.int32(most)
            ready(bind(rows.start + block * (most * streams)), count * streams, most * streams)
            with T.serial(0, count) as tile:
                emit([bind(stream * count + tile) for stream in range(streams)])
    if left := len(rows) % streams:
        ready(T.int32(rows.stop - left), T.int32(left), left)
        for row in range(left):
            emit([T.int32(row)])


def ask_ahead(weight: Buffer, row: Expr, column: Expr) -> None:
    """Asks for what a stream reads soon after this element of a weight [n, width]."""
    n, width = (int(d) for d in weight.shape)
    prefetch(flat(weight, n * width), [row * width + column + _AHEAD // weight.dtype.itemsize])
