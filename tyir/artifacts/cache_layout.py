"""The axes of a key/value cache.

Layout "HND" is [b, G, capacity, D], where a head's rows follow each other, "NHD" [b, capacity, G, D], where a
token's do (the names are FlashInfer's: heads, n tokens, dimension).

The scales of an 8-bit cache have no D.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LAYOUTS", "cache_shape", "head_axis", "position_axis"]

LAYOUTS: Final = ("HND", "NHD")


def head_axis(layout: str) -> int:
    """The axis of a cache's heads."""
    return 1 if layout == "HND" else 2


def position_axis(layout: str) -> int:
    """The axis of a cache's positions."""
    return 3 - head_axis(layout)


def cache_shape(
    layout: str, batch: int | None, heads: int | None, capacity: int, *width: int | None
) -> tuple[int | None, ...]:
    """The dimensions of a cache; `width` is D, nothing for scales."""
    return (batch, heads, capacity, *width) if layout == "HND" else (batch, capacity, heads, *width)
