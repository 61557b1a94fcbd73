"""Bulk work leaves its objects to full collections, and garbage does not pile up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tyir.process.collector import _FEW, _Pretenured, collector_paused


class _Cycle:
    """Garbage that only the cyclic collector finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_on() -> Iterator[None]:
    gc.collect()
    gc.enable()
    yield
    gc.enable()


def test_what_is_made_is_old_and_stays_collectable() -> None:
    with collector_paused():
        assert not gc.isenabled()
        made = [_Cycle() for _ in range(_FEW)]
    assert gc.isenabled()
    assert gc.get_count()[0] < _FEW, "the young generation was left full"
    last = weakref.ref(made[-1])
    del made
    gc.collect()
    assert last() is None


def test_nothing_changes_where_the_collector_is_off_or_objects_are_frozen() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
    gc.enable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector_paused():
        kept = [_Cycle() for _ in range(_FEW)]
    assert gc.get_freeze_count() >= frozen - len(kept)
    gc.unfreeze()


def test_garbage_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tyir.process.collector.LIMIT", 10 * _FEW)
    pretenured, dropped = _Pretenured(), []
    for _ in range(50):
        gc.disable()
        garbage = [_Cycle() for _ in range(_FEW)]
        dropped.append(weakref.ref(garbage[0]))
        del garbage
        pretenured.take_young()
        gc.enable()
    assert sum(ref() is not None for ref in dropped) <= 11
