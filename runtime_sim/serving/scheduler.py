"""Which tokens of which request run in the next step: continuous batching over compiled lengths.

Artifacts run `slots` sequences at once, in steps of a few lengths.  Between any two steps requests come and
go (Yu et al., "Orca", OSDI 2022); a step carries the next token of every request that is being answered, and
as much as it holds of every prompt that is not computed yet (Agrawal et al., "Sarathi-Serve", OSDI 2024).

There is no clock here, no engine and no text: the server and `tyir-bench-serving` ask the same object, which
answers the same for the same calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import LongRope
from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.chunks import length_for

__all__ = ["Copy", "QueueFull", "Scheduler", "Step", "Task"]

_LEAST_COPY: Final = 8  # tokens; fewer are computed again sooner than copied


class QueueFull(TyirError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Task:
    """A sequence that is being continued: its prompt, then every token that was chosen for it.

    `after`: a task whose prompt is the same, and is worth waiting for.  `whole`: no row of the prompt may be
    taken from a cache, because all of them are read.  `salt`: caches are shared among tasks of one salt.
    `most`: tokens that prompt and answer may come to, 0 for those of the prompt.
    """

    prompt: Sequence[int]
    after: Task | None = None
    whole: bool = False
    salt: str = ""
    most: int = 0
    ids: list[int] = field(init=False)
    computed: int = field(default=0, init=False)  # of `ids`, in the slot's cache
    cached: int = field(default=0, init=False)  # of the prompt, that the cache held already
    slot: int | None = field(default=None, init=False)
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def answering(self) -> bool:
        """Whether the prompt is computed."""
        return self.computed >= len(self.prompt)


@dataclass(frozen=True)
class Copy:
    """The first `count` rows of a slot's cache are wanted in another's, before the step."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Step:
    """A step of `seqlen` rows for each slot: `feeds[i]` from position `starts[i]` on, the rest is padding.

    An idle slot is given no tokens, and a position behind those that it keeps.
    """

    seqlen: int
    starts: tuple[int, ...]
    feeds: tuple[tuple[int, ...], ...]
    copies: tuple[Copy, ...] = ()
    lengths: tuple[int, ...] = ()  # of the slots, what is still to come of their prompts included
    most: tuple[int, ...] = ()  # that the slots' answers may come to

    @property
    def tokens(self) -> int:
        return sum(map(len, self.feeds))

    @property
    def wanted(self) -> bool:
        """Whether a token is chosen after it: not where all that it computes are prompts that go on."""
        ends = [start + len(feed) for start, feed in zip(self.starts, self.feeds)]
        return any(feed and end >= length for feed, end, length in zip(self.feeds, ends, self.lengths))


class _Chunks:
    """The length of the first step of the cheapest way through a number of tokens.

    `costs`: of a step by its length.  Of two ways that cost the same, the one with less padding; of those the
    longer step first.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        self._costs = costs
        self._best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # cost, rows, first length

    def first(self, tokens: int) -> int:
        for count in range(len(self._best), tokens + 1):
            ways = []
            for length, cost in self._costs.items():
                rest = self._best[max(count - length, 0)]
                ways.append((cost + rest[0], length + rest[1], -length))
            cost, rows, length = min(ways)
            self._best.append((cost, rows, -length))
        return self._best[tokens][2]


class Scheduler:
    """Requests, the slots that some of them have, and what every slot's cache holds.

        scheduler.add(task)
        while (step := scheduler.plan()) is not None:
            for task in scheduler.ran(step): task.ids.append(...)      # or scheduler.remove(task)

    `most_waiting`: requests that may wait beside those that have a slot; `most_waiting_tokens`: of their
    prompts.  `long_share`: how many of the steps may be longer than the shortest while somebody is being
    answered.  `costs`: of a step by its length, equal without.  `copies`: whether rows can be copied from
    one slot to another.  `chunks`: borders that no slot's part of a step crosses.  `ropes`: by
    which of two tables a task's keys are turned; caches are shared among tasks of one.
    """

    def __init__(
        self,
        slots: int,
        seqlens: Sequence[int],
        capacity: int,
        *,
        most_waiting: int | None = None,
        most_waiting_tokens: int | None = None,
        long_share: float = 0.5,
        costs: Mapping[int, float] | None = None,
        copies: bool = False,
        chunks: DualChunk | None = None,
        ropes: LongRope | None = None,
    ) -> None:
        if not 0 < long_share <= 1:
            raise TyirError(
                f"a share of {long_share:g} long steps is out of range", help="give one of (0, 1]"
            )
        self.capacity = capacity
        self.seqlens = tuple(sorted(seqlens))
        self.waiting: deque[Task] = deque()
        self.running: list[Task | None] = [None] * slots
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._kinds = [("", False)] * slots
        self._used = [0] * slots  # when a slot was taken last, in admissions
        self._admissions = 0
        self._most_waiting = most_waiting
        self._most_waiting_tokens = most_waiting_tokens
        self._chunks = _Chunks(costs or dict.fromkeys(self.seqlens, 1.0))
        self._long_share = long_share
        self._long_due = 1.0  # long steps that may be taken now
        self._copies = copies
        self._borders = chunks
        self._ropes = ropes

    def weigh(self, costs: Mapping[int, float]) -> None:
        """What a step of each length costs from now on, in any unit."""
        self._chunks = _Chunks({length: costs[length] for length in self.seqlens})

    # --------------------------------------------------------------------------------------- coming and going

    def add(self, *tasks: Task) -> None:
        """Tasks that belong together: all are taken or none.

        `QueueFull`, or `TyirError` for a prompt that is empty or leaves no room for a token.
        """
        for task in tasks:
            if not task.prompt:
                raise TyirError("the prompt is empty", help="give at least one token")
            if len(task.prompt) > self.capacity:
                raise TyirError(
                    f"the prompt has {len(task.prompt)} tokens, and the cache {self.capacity} positions",
                    help=f"shorten it, or compile with --max-kv {len(task.prompt)} or more",
                )
        under_way = len(self.waiting) + sum(t is not None for t in self.running)
        if self._most_waiting is not None and under_way + len(tasks) > len(self.running) + self._most_waiting:
            raise QueueFull(
                f"{len(self.running)} requests are answered at once and {self._most_waiting} may wait",
                help="try again later",
            )
        tokens = sum(len(t.prompt) for t in (*self.waiting, *tasks))
        if self._most_waiting_tokens is not None and self.waiting and tokens > self._most_waiting_tokens:
            raise QueueFull(
                f"prompts of {self._most_waiting_tokens} tokens may wait, these would be {tokens}",
                help="try again later",
            )
        self.waiting.extend(tasks)

    def remove(self, task: Task) -> None:
        """A task that is answered, or no longer wanted.  What its slot holds stays until it is taken."""
        if task.done:
            return
        task.done = True
        if task.slot is None:
            self.waiting.remove(task)
        else:
            self.running[task.slot] = None

    def forget(self, slot: int) -> None:
        """What a slot's cache holds is not to be used again."""
        self.held[slot] = []

    # --------------------------------------------------------------------------------------------- the steps

    def plan(self) -> Step | None:
        """The next step; None when there is nothing to do.  To be followed by `ran` (or, when it failed, by
        `forget` of the slots that it concerns).
        """
        copies = self._admit()
        rests = [0 if t is None else self._next(t) for t in self.running]
        if not any(rests):
            return None
        seqlen = self._length(rests)
        return Step(
            seqlen,
            tuple(len(h) if t is None else t.computed for t, h in zip(self.running, self.held)),
            tuple(
                () if t is None else tuple(t.ids[t.computed : t.computed + min(rest, seqlen)])
                for t, rest in zip(self.running, rests)
            ),
            tuple(copies),
            tuple(len(h) if t is None else len(t.ids) for t, h in zip(self.running, self.held)),
            tuple(len(h) if t is None else self._most(t) for t, h in zip(self.running, self.held)),
        )

    def _most(self, task: Task) -> int:
        """Tokens that a task may come to."""
        return min(max(task.most, len(task.ids)), self.capacity)

    def _kind(self, task: Task) -> tuple[str, bool]:
        """What the caches of two tasks have in common where one may use the other's."""
        most = max(task.most, len(task.prompt))
        return task.salt, self._ropes is not None and self._ropes.is_long(min(most, self.capacity))

    def _next(self, task: Task) -> int:
        """Tokens of a task that may be computed before a border."""
        rest = len(task.ids) - task.computed
        return rest if self._borders is None else min(rest, self._borders.room(task.computed))

    def ran(self, step: Step) -> list[Task]:
        """Note that a step has been computed; the tasks to choose a token for, by slot."""
        ready = []
        for slot, (start, feed) in enumerate(zip(step.starts, step.feeds)):
            if not feed:
                continue
            self.held[slot][start:] = feed
            task = self.running[slot]
            if task is not None:  # else it was removed meanwhile
                task.computed = start + len(feed)
                if task.computed == len(task.ids):
                    ready.append(task)
        return ready

    def _length(self, rests: Sequence[int]) -> int:
        """Prompts want the cheapest way through; whoever is being answered wants short steps."""
        short = length_for(1, self.seqlens)
        prompts = [r for r, t in zip(rests, self.running) if t is not None and not t.answering]
        wanted = self._chunks.first(max(prompts)) if prompts else short
        if not any(t is not None and t.answering for t in self.running):
            self._long_due = 1.0
            return wanted
        self._long_due = min(self._long_due + self._long_share, 1.0)
        if wanted == short or self._long_due < 1.0 - 1e-9:
            return short
        self._long_due -= 1.0
        return wanted

    # ------------------------------------------------------------------------------------------------- slots

    def _admit(self) -> list[Copy]:
        """Give free slots to those that wait, first come first served."""
        copies: list[Copy] = []
        for task in list(self.waiting):
            free = [slot for slot, t in enumerate(self.running) if t is None]
            if not free:
                break
            leader = task.after
            if leader is not None and not leader.done and not leader.answering:
                continue
            self.waiting.remove(task)
            shared = [self._shared(slot, task) for slot in range(len(self.running))]
            slot = max(free, key=lambda s: (shared[s], -self._used[s]))
            source = max(range(len(shared)), key=shared.__getitem__)
            if self._copies and shared[source] >= shared[slot] + _LEAST_COPY:
                slot = min((s for s in free if s != source), key=self._used.__getitem__)
                copies.append(Copy(source, slot, shared[source]))
                shared[slot] = shared[source]
            self._admissions += 1
            self._used[slot] = self._admissions
            self._kinds[slot] = self._kind(task)
            self.held[slot] = list(task.prompt[: shared[slot]])
            task.slot, task.computed, task.cached = slot, shared[slot], shared[slot]
            self.running[slot] = task
        return copies

    def _shared(self, slot: int, task: Task) -> int:
        """How many of the first tokens of a prompt a slot's cache holds, the last one excepted: its logits
        must be computed.
        """
        if task.whole or self._kinds[slot] != self._kind(task):
            return 0
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.held[slot], task.prompt))
        return min(sum(1 for _ in same), len(task.prompt) - 1)
