"""Python's cyclic collector around bulk work: parsing, cloning, printing.

Ops and values refer to each other, so every op is five objects the collector tracks.  While thousands of them
are made none is garbage, yet the collector would look at all of them, three times until they count as old: a
sixth of the time to parse 100,000 ops, half of the time to copy them.  So it pauses, and what was made
meanwhile is put among the old objects unlooked at (*pretenured*, as in other generational collectors).  Old
objects are looked at in full collections only, which CPython starts by counting the survivors of younger
ones; so the pretenured are counted here, and when `LIMIT` of them have come since the last full collection,
one is run: a program that makes and drops modules in a loop keeps a bounded amount of garbage.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

__all__ = ["collector_paused"]

LIMIT: Final = 2_000_000  # tracked objects, about 160 MB; a module of 100,000 ops is 600,000
_FEW: Final = 10_000  # so many young objects are looked at in a moment


@dataclass
class _Pretenured:
    """Objects put among the old ones since the last full collection."""

    objects: int = 0
    full_collections: int = 0

    def take_young(self) -> None:
        """Make all young objects old.

        Does nothing when somebody else keeps objects frozen, which this would undo.
        """
        young = gc.get_count()[0]
        if young < _FEW or gc.get_freeze_count():
            return
        full_collections = gc.get_stats()[2]["collections"]
        if full_collections != self.full_collections:
            self.objects, self.full_collections = 0, full_collections
        self.objects += young
        if self.objects > LIMIT:
            gc.collect()
        else:
            gc.freeze()
            gc.unfreeze()


_pretenured: Final = _Pretenured()


@contextmanager
def collector_paused() -> Iterator[None]:
    """The cyclic collector is off inside; what is made there is old afterwards.  May be nested."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _pretenured.take_young()
        gc.enable()
