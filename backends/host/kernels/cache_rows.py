"""How attention reads rows of keys and values, whatever a cache stores of them (`kv.stored_rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Expr,
    bind,
    lanes_for,
    load,
    prefetch,
    splat,
    vector,
)

__all__ = ["CacheRow", "CacheRows"]

_CACHE_LINE: Final = 64  # bytes
_PACKED: Final = "uint8"  # the element of a 4-bit cache


@dataclass(frozen=True)
class CacheRows:
    """A cache, and what it has beside it: of 8-bit rows their scales, of 4-bit ones those of their groups."""

    stored: Buffer
    scales: Buffer | None = None

    @property
    def width(self) -> int:
        """Channels of a row."""
        return int(self.stored.shape[-1]) * (2 if self.packed else 1)

    @property
    def packed(self) -> bool:
        """Whether a byte holds two channels."""
        return bool(self.stored.dtype == _PACKED)

    @property
    def run(self) -> int:
        """Neighbouring channels that lie side by side and share a scale."""
        if not self.packed:
            return self.width
        assert self.scales is not None
        return int(self.stored.shape[-1]) // int(self.scales.shape[-1])

    def lanes(self, limit: int) -> int:
        """The widest vectors, up to `limit`, that a row is read in."""
        return lanes_for(limit, self.run)

    def row(self, place: Sequence[Expr]) -> CacheRow:
        """The row that lies there."""
        if self.scales is None or self.packed:
            return CacheRow(self, place)
        return CacheRow(self, place, bind(T.cast(self.scales[tuple(place)], "float32")))

    def ask_ahead(self, place: Sequence[Expr], column: Expr, width: int) -> None:
        """Asks for `width` channels from `column` on of a row that is visited soon."""
        if self.packed:
            half = int(self.stored.shape[-1])
            column, width = T.floormod(column, T.int32(half)), min(width, half)
        for line in range(0, width, _CACHE_LINE // np.dtype(self.stored.dtype).itemsize):
            prefetch(self.stored, [*place, column + line])


@dataclass(frozen=True)
class CacheRow:
    """One row of a cache; `scale` of 8-bit ones."""

    of: CacheRows
    place: Sequence[Expr]
    scale: Expr | None = None

    def read(self, column: Expr, lanes: int) -> Expr:
        """`lanes` channels from `column` on, as f32: the f16 that the cache stands for."""
        if self.of.packed:
            return self._decoded(column, lanes)
        value = load(self.of.stored, [*self.place, column], lanes)
        if self.scale is None:
            return value
        scaled = T.cast(value * splat(self.scale, lanes), vector("float16", lanes))
        return T.cast(scaled, vector("float32", lanes))

    def _decoded(self, column: Expr, lanes: int) -> Expr:
        """(code - zero) * scale, every step of which f32 and f16 hold exactly."""
        half, scales = int(self.of.stored.shape[-1]), self.of.scales
        assert scales is not None
        byte = bind(T.floormod(column, T.int32(half)))
        shift = T.Select(T.int32(column) >= half, T.int32(4), T.int32(0))
        word = bind(T.cast(scales[(*self.place, T.floordiv(byte, T.int32(self.of.run)))], "int32"))
        bits = T.cast(T.bitwise_and(word, T.int32(0xFFF0)), "uint16")
        scale = bind(T.cast(T.reinterpret("float16", bits), "float32"))
        zero = bind(T.cast(T.bitwise_and(word, T.int32(15)), "float32") * scale)
        codes = load(self.of.stored, [*self.place, byte], lanes, "int32")
        codes = T.bitwise_and(T.shift_right(codes, splat(bind(shift), lanes)), splat(T.int32(15), lanes))
        return T.cast(codes, vector("float32", lanes)) * splat(scale, lanes) - splat(zero, lanes)
