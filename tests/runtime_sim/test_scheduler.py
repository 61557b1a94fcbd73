"""What runs in which step: decisions without a clock, an engine or text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.scheduler import Copy, QueueFull, Scheduler, Step, Task


def steps(scheduler: Scheduler, tokens: int = 1) -> Iterator[Step]:
    """Run it: every task is given `tokens` tokens."""
    while (step := scheduler.plan()) is not None:
        yield step
        for task in scheduler.ran(step):
            made = len(task.ids) - len(task.prompt)
            if made + 1 < tokens:
                task.ids.append(1000 + made)
            else:
                scheduler.remove(task)


def test_a_prompt_takes_the_cheapest_steps() -> None:
    lengths = lambda count, **more: [  # noqa: E731
        s.seqlen for s in _added(Scheduler(1, (1, 8, 64), 512, **more), Task(range(count)))
    ]
    assert lengths(70) == [64, 8] and lengths(9) == [64] and lengths(8) == [8] and lengths(1) == [1]
    assert lengths(129) == [64, 64, 1]
    measured = {1: 14.0, 8: 20.0, 64: 94.0}
    assert lengths(9, costs=measured) == [8, 1] and lengths(70, costs=measured) == [64, 8]
    assert lengths(40, costs=measured) == [64]


def _added(scheduler: Scheduler, *tasks: Task) -> Iterator[Step]:
    scheduler.add(*tasks)
    return steps(scheduler)


def test_answers_go_on_beside_a_long_prompt() -> None:
    """Every step carries the stream's next token, and at most every second one is long."""
    scheduler = Scheduler(2, (1, 8), 512)
    stream = Task([1, 2])
    scheduler.add(stream)
    lengths = []
    for step in steps(scheduler, tokens=40):
        if len(stream.ids) == 3:
            scheduler.add(Task(range(60)))
        assert step.feeds[0] or stream.done
        lengths.append(step.seqlen)
    while_both = lengths[2:14]
    assert while_both == [8, 1] * 6
    assert all(s == 8 for s in [s.seqlen for s in _added(Scheduler(2, (1, 8), 512), Task(range(60)))])
    with pytest.raises(TyirError, match="share of 0 long steps"):
        Scheduler(2, (1, 8), 512, long_share=0)


def test_a_slot_that_begins_alike_is_taken_and_keeps_what_was_cancelled() -> None:
    scheduler = Scheduler(3, (1, 8), 512)
    a, b = Task(range(100, 120)), Task(range(200, 220))
    list(_added(scheduler, a, b))
    assert (a.slot, b.slot) == (0, 1)
    cut = Task([*range(200, 220), 7, 8, 9])
    scheduler.add(cut)
    step = scheduler.plan()
    assert step is not None and (cut.slot, cut.cached) == (1, 20) and step.starts[1] == 20
    scheduler.ran(step)
    scheduler.remove(cut)  # cancelled after its prompt
    again = Task([*range(200, 220), 7, 8, 5])
    scheduler.add(again)
    assert scheduler.plan() is not None and (again.slot, again.cached) == (1, 22)
    fresh = Task([1, 2, 3])
    scheduler.add(fresh)
    assert scheduler.plan() is not None and fresh.slot == 2, "the one that was never used"
    whole = Task(range(100, 120), whole=True)
    scheduler.add(whole)
    assert scheduler.plan() is not None and (whole.slot, whole.cached) == (0, 0)


def test_salts_keep_caches_apart() -> None:
    scheduler = Scheduler(1, (1, 8), 512)
    list(_added(scheduler, Task(range(20), salt="a")))
    other = Task(range(20), salt="b")
    list(_added(scheduler, other))
    same = Task(range(20), salt="b")
    list(_added(scheduler, same))
    assert (other.cached, same.cached) == (0, 19)


def test_one_prompt_for_several_answers() -> None:
    """The others wait for it and copy its rows."""
    scheduler = Scheduler(3, (1, 8), 512, copies=True)
    first = Task(range(40))
    rest = [Task(range(40), after=first) for _ in range(2)]
    scheduler.add(first, *rest)
    taken = list(steps(scheduler, tokens=3))
    assert [c for s in taken for c in s.copies] == [Copy(0, 1, 39), Copy(0, 2, 39)]
    assert [t.cached for t in rest] == [39, 39] and sum(s.tokens for s in taken) == 40 + 2 * 1 + 3 * 2
    gone = Task(range(300, 340))
    follower = Task(range(300, 340), after=gone)
    scheduler.add(gone, follower)
    scheduler.remove(gone)
    list(steps(scheduler))
    assert follower.done and follower.cached == 0


def test_what_may_wait() -> None:
    scheduler = Scheduler(2, (1, 8), 64, most_waiting=1)
    for _ in range(3):
        scheduler.add(Task([1, 2]))
    with pytest.raises(QueueFull, match="2 requests are answered at once and 1 may wait"):
        scheduler.add(Task([1]))
    with pytest.raises(QueueFull):
        Scheduler(2, (1,), 64, most_waiting=0).add(*(Task([1]) for _ in range(3)))
    by_tokens = Scheduler(1, (1,), 64, most_waiting_tokens=10)
    by_tokens.add(Task(range(60)))
    with pytest.raises(QueueFull, match="10 tokens may wait, these would be 61"):
        by_tokens.add(Task([1]))
    with pytest.raises(TyirError, match="65 tokens, and the cache 64"):
        scheduler.add(Task(range(65)))
    with pytest.raises(TyirError, match="prompt is empty"):
        scheduler.add(Task([]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_comes_and_goes(data: st.DataObject) -> None:
    """Every token is computed once at its place, behind a prefix that is its own; nobody starves."""
    slots = data.draw(st.integers(1, 4))
    seqlens = data.draw(st.sampled_from([(1,), (1, 4), (2, 8), (1, 8, 32)]))
    scheduler = Scheduler(slots, seqlens, 64, copies=data.draw(st.booleans()))
    rows: list[list[int]] = [[] for _ in range(slots)]  # what an engine's caches would hold
    want: dict[Task, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=40))
            leader = Task(prompt)
            followers = [Task(prompt, after=leader) for _ in range(data.draw(st.integers(0, 2)))]
            scheduler.add(leader, *followers)
            want.update(dict.fromkeys((leader, *followers), data.draw(st.integers(1, 10))))
        elif want and data.draw(st.booleans()):
            scheduler.remove(data.draw(st.sampled_from(sorted(want, key=lambda t: t.ids))))
        _run_one(scheduler, rows, want)
    for _ in range(5000):
        if not _run_one(scheduler, rows, want):
            break
    assert all(t.done for t in want)


def _run_one(scheduler: Scheduler, rows: list[list[int]], want: dict[Task, int]) -> bool:
    step = scheduler.plan()
    if step is None:
        assert not scheduler.waiting
        return False
    for copy in step.copies:
        rows[copy.target] = rows[copy.source][: copy.count]
    assert step.tokens
    for slot, (start, feed) in enumerate(zip(step.starts, step.feeds)):
        assert start <= len(rows[slot]) and len(feed) <= step.seqlen
        del rows[slot][start:]
        rows[slot] += feed
    for task in scheduler.ran(step):
        assert task.slot is not None and rows[task.slot] == task.ids
        if len(task.ids) - len(task.prompt) + 1 < min(want[task], 64 - len(task.prompt)):
            task.ids.append(len(task.ids) % 2)
        else:
            scheduler.remove(task)
    assert rows == scheduler.held
    return True
