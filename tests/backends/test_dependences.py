"""The tracker against the definition: every two conflicting commands are ordered, by no token more than
needed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tyir.backends.edge10.lowering.dependences import SRAM, Access, Slot, Tracker
from tyir.dialects import edge10
from tyir.ir import Value


def token() -> Value:
    return edge10.Join(tokens=()).result


@dataclass
class Run:
    """Random commands and what each waits for."""

    tracker: Tracker
    before: dict[Value, set[Value]] = field(default_factory=dict)  # everything that is done when a token is
    last: dict[str, Value] = field(default_factory=dict)
    accesses: list[tuple[Value, list[Access]]] = field(default_factory=list)

    def command(self, unit: str, accesses: list[Access]) -> list[Value]:
        waits, done = self.tracker.waits(accesses, unit), token()
        self.tracker.record(accesses, done, unit)
        earlier = [*waits, *([self.last[unit]] if unit in self.last else [])]
        self.before[done] = {done}.union(*(self.before.get(t, {t}) for t in earlier))
        self.last[unit] = done
        self.accesses.append((done, accesses))
        return waits


def conflict(a: Access, b: Access) -> bool:
    return (a.write or b.write) and a.space == b.space and a.low < b.high and b.low < a.high


@pytest.mark.parametrize("seed", range(20))
def test_conflicts_are_ordered_and_tokens_are_needed(seed: int) -> None:
    rng = random.Random(seed)
    slots, slot_tokens, rest = (Slot(64, 96), Slot(96, 128)), (token(), token()), token()
    run = Run(Tracker(slots, slot_tokens, rest))
    for _ in range(150):
        unit = rng.choice(edge10.UNITS[:5])
        accesses = []
        for _ in range(rng.randint(1, 3)):
            low = rng.randrange(0, 120)
            accesses.append(
                Access(rng.choice((SRAM, "dram")), low, low + rng.randint(1, 30), rng.random() < 0.4)
            )
        known = run.before.get(run.last[unit], set()) if unit in run.last else set()
        waits = run.command(unit, accesses)
        assert not known & set(waits)
        for one in waits:  # no other token of the command implies it
            assert not any(one in run.before.get(other, {other}) for other in waits if other is not one)
    for number, (done, accesses) in enumerate(run.accesses):
        for earlier, others in run.accesses[:number]:
            if any(conflict(a, b) for a in accesses for b in others):
                assert earlier in run.before[done]
        for access in accesses:
            outside = [
                t
                for s, t in zip(slots, slot_tokens)
                if access.space == SRAM and access.low < s.high and s.low < access.high
            ]
            if access.space != SRAM or access.low < 64 or access.high > 128:
                outside.append(rest)
            assert set(outside) <= run.before[done]
    finished, others = run.tracker.finish()
    for slot, tokens in zip(slots, finished):
        everything = set().union(*(run.before.get(t, {t}) for t in tokens))
        assert {
            d
            for d, acc in run.accesses
            if any(conflict(a, Access(SRAM, slot.low, slot.high, True)) for a in acc)
        } <= everything
    everything = set().union(*(run.before.get(t, {t}) for t in others))
    assert {
        d for d, acc in run.accesses if any(a.space != SRAM or a.low < 64 or a.high > 128 for a in acc)
    } <= everything


def test_look_ups_do_not_grow_with_the_program() -> None:
    """A thousand tiles of one tensor leave as many segments, but a ring's slots only their own."""
    tracker = Tracker((), (), token())
    for number in range(1000):
        access = [Access(SRAM, number % 4 * 100, number % 4 * 100 + 100, True)]
        tracker.waits(access, "ewdma")
        tracker.record(access, token(), "ewdma")
    assert len(tracker._memories[SRAM].segments) == 6
