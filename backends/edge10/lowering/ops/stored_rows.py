"""Rows of caches of 8 and of 4 bits: what a row and its scales take, and what makes f16 of them."""

from __future__ import annotations

from collections.abc import Sequence

from tyir.backends.edge10.lowering.context import element_bytes, sram_range
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.dialects import edge10
from tyir.dialects.ty import tensor_type
from tyir.ir import Value

__all__ = ["emit_dequant_rows", "row_bytes", "stored_bytes"]


def row_bytes(cache: Value) -> int:
    """Bytes of a head's row of a cache, or of its scales."""
    *_, width = tensor_type(cache).static_shape[3:] or (1,)
    return width * element_bytes(cache)


def stored_bytes(caches: Sequence[Value], scales: Sequence[Value]) -> tuple[tuple[int, int], ...]:
    """Of each cache the bytes of a row and of its scales; nothing of caches of f16."""
    return tuple((row_bytes(cache), row_bytes(of)) for cache, of in zip(caches, scales))


def emit_dequant_rows(
    emitter: Emitter,
    rows: Value,
    places: tuple[int, int, int],
    stored: tuple[Value, Value],
    size: tuple[int, int],
    dim: int,
) -> None:
    """`rows` rows of `dim` channels of each plane as f16.

    `places`: where the stored rows, their scales and the result lie in SRAM; `stored`: the cache and its
    scales; `size`: planes, and rows that each has room for.
    """
    (q, scales, out), (planes, plane_rows) = places, size
    row, of_scales = stored_bytes(stored[:1], stored[1:])[0]
    emitter.emit(
        edge10.DequantRows,
        rows,
        q=q,
        scales=scales,
        out=out,
        planes=planes,
        plane_rows=plane_rows,
        rows=edge10.DYNAMIC,
        k=dim,
        groups=of_scales // 2 if row < dim else 0,
        reads=[
            sram_range(q, planes * plane_rows * row),
            sram_range(scales, planes * plane_rows * of_scales),
        ],
        writes=[sram_range(out, planes * plane_rows * dim * 2, write=True)],
    )
