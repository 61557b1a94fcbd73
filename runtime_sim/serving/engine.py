"""One thread that runs steps: requests in from any thread, tokens out to their listeners.

    engine = Engine(BatchSession(folder))
    engine.start()
    engine.add(Generation(ids, listener, limit=16))
    ...
    engine.stop()

A session serves one thread at a time, and that is the engine's.  Requests and cancellations are looked at
between any two steps.  What goes wrong with one request ends that request; what goes wrong with the engine
ends all of them, and `failed` says why.  Without `start`, `step` runs one step in the calling thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import LongRope
from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.generation import Finish, Generation
from tyir.runtime_sim.serving.scheduler import Scheduler, Step, Task
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.finite_steps import NotFinite
from tyir.runtime_sim.vision.batch_session import VisionBatchSession
from tyir.runtime_sim.vision.request import VisionRequest

__all__ = ["Engine", "Observer"]

Array = npt.NDArray[Any]


class Observer:
    """What is counted; called by the engine's thread."""

    def stepped(self, step: Step, slots: int, seconds: float) -> None:
        """A step has been computed."""

    def admitted(self, generation: Generation) -> None:
        """A request got a slot."""

    def chosen(self, generation: Generation, gap: float | None) -> None:
        """A token was chosen, `gap` seconds after the one before (None: it is the first)."""

    def ended(self, generation: Generation) -> None:
        """A request is done with, for the reason in `generation.finish`."""


class Engine:
    """A session, a scheduler, and the requests that share them.  Every method may be called by any thread."""

    def __init__(
        self,
        session: BatchSession,
        *,
        most_waiting: int | None = None,
        most_waiting_tokens: int | None = None,
        long_share: float = 0.5,
        queue_timeout: float | None = None,
        request_timeout: float | None = None,
        observer: Observer | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`queue_timeout`: seconds that a request may wait for a slot; `request_timeout`: until its end."""
        options = session.manifest.options
        self.session = session
        self.capacity = options.max_kv
        self.vocabulary = int(session.manifest.model.get("vocab_size", 1 << 31))
        self.choices = session.manifest.choices
        self.has_logsumexp = session.manifest.has_logsumexp
        self.scheduler = Scheduler(
            options.batch,
            options.dense_seqlens,
            options.max_kv,
            most_waiting=most_waiting,
            most_waiting_tokens=most_waiting_tokens,
            long_share=long_share,
            copies=True,
            chunks=DualChunk.used(session.manifest.model, options.max_kv),
            ropes=LongRope.used(session.manifest.model, options.max_kv),
        )
        self.failed: str | None = None
        self.observer = observer or Observer()
        self._now = now
        self._queue_timeout = queue_timeout
        self._request_timeout = request_timeout
        self._changed = threading.Condition()
        self._generations: dict[Task, Generation] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -------------------------------------------------------------------------------------- for other threads

    def start(self) -> None:
        """Run steps in a thread of the engine's own, whenever there is something to do."""
        self._thread = threading.Thread(target=self._run, name="tyir-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End every request with `abort`, and the thread after its step."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.cancel_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def add(self, *generations: Generation) -> None:
        """Requests that belong together.

        `QueueFull` when too many wait, `TyirError` for one that cannot be answered; then none is taken.
        """
        for generation in generations:
            generation.check(self.session.manifest, self.vocabulary)
            if generation.pictures is None and isinstance(self.session, VisionBatchSession):
                generation.pictures = VisionRequest.text(generation.prompt)
        with self._changed:
            if self.failed is not None or self._stopping:
                raise TyirError(f"the engine has stopped: {self.failed or 'it was told to'}")
            self.scheduler.add(*(g.task for g in generations))
            for generation in generations:
                generation.times.arrived = self._now()
                self._generations[generation.task] = generation
            self._changed.notify_all()

    def cancel(self, generation: Generation, finish: Finish | None = None) -> None:
        """End a request; nothing when it has ended.  Its slot is free for the next step, and its cache stays
        for whoever begins alike.
        """
        with self._changed:
            self._end(generation, finish or Finish("abort"))

    def cancel_all(self) -> None:
        """End every request with `abort`."""
        with self._changed:
            for generation in list(self._generations.values()):
                self._end(generation, Finish("abort"))

    def fail(self, message: str) -> None:
        """Nothing can be computed any more: every request ends with an error, and no more are taken."""
        with self._changed:
            self.failed = self.failed or message
            for generation in list(self._generations.values()):
                self._end(generation, Finish("error", message=self.failed))
            self._changed.notify_all()

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests have a slot, and how many wait for one."""
        with self._changed:
            waiting = len(self.scheduler.waiting)
            return len(self._generations) - waiting, waiting

    @property
    def cache_usage(self) -> float:
        """What part of the caches' positions belongs to requests that are being answered."""
        with self._changed:
            used = sum(t.computed for t in self.scheduler.running if t is not None)
            return used / (len(self.scheduler.running) * self.capacity)

    # -------------------------------------------------------------------------------------- the engine's own

    def step(self) -> bool:
        """Run one step; whether there was something to do."""
        with self._changed:
            self._end_late()
            step = self.scheduler.plan()
            if step is None:
                return False
            self._note_admitted()
            asked = [None if t is None else self._generations.get(t) for t in self.scheduler.running]
        before = self._now()
        try:
            outputs = self._execute(step, asked)
        except NotFinite as error:
            self._blame(error)
            return True
        with self._changed:
            tasks = {slot: t for slot, t in enumerate(self.scheduler.running) if t is not None}
            ready = set(self.scheduler.ran(step))
        self.observer.stepped(step, len(step.feeds), self._now() - before)
        for slot, task in tasks.items():
            generation = self._generations.get(task)
            if generation is not None and step.feeds[slot]:
                self._hear(generation, step.starts[slot], outputs[slot], task in ready)
        return True

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._stopping and not self._generations:
                        self._changed.wait()
                    if self._stopping:
                        return
                self.step()
        except BaseException as error:  # whatever it is, who waits for an answer must hear of it
            self.fail(f"{type(error).__name__}: {error}")

    def _execute(self, step: Step, asked: Sequence[Generation | None]) -> list[dict[str, Array]]:
        session, feeds = self.session, step.feeds
        for copy in step.copies:
            session.copy(copy.source, copy.target, copy.count)
        for slot, start in enumerate(step.starts):
            session.rewind(slot, start)
        if isinstance(session, VisionBatchSession) and (one := asked[0]) is not None and one.pictures:
            session.begin(one.pictures)  # such artifacts run one sequence
            start, count = step.starts[0], len(feeds[0])
            feeds = (tuple([*one.prompt, *one.made][start : start + count]),)
        return session.step(feeds, step.seqlen, step.lengths, most=step.most)

    def _hear(self, generation: Generation, start: int, outputs: Mapping[str, Array], ready: bool) -> None:
        """What a step says to one request; an error of its own ends it and no other."""
        try:
            if generation.score_prompt and not generation.made:
                generation.score(np.asarray(outputs["logits"], np.float32), start)
            if not ready:
                return
            now, before = self._now(), generation.times.last
            finish = generation.next({name: a[-1] for name, a in outputs.items()}, self.capacity)
        except Exception as error:
            text = str(error) if isinstance(error, TyirError) else f"{type(error).__name__}: {error}"
            finish = Finish("error", message=text, refused=isinstance(error, TyirError))
        else:
            if generation.limit:
                first = len(generation.made) == 1
                generation.times.first = now if first else generation.times.first
                generation.times.last = now
                self.observer.chosen(generation, None if first else now - before)
                generation.task.ids.append(generation.made[-1])
        if finish is not None:
            self.cancel(generation, finish)

    def _note_admitted(self) -> None:
        for task in self.scheduler.running:
            generation = self._generations.get(task) if task is not None else None
            if generation is not None and math.isnan(generation.times.scheduled):
                generation.times.scheduled = self._now()
                self.observer.admitted(generation)

    def _end_late(self) -> None:
        """End what has taken longer than it may."""
        if self._queue_timeout is None and self._request_timeout is None:
            return
        now = self._now()
        for generation in list(self._generations.values()):
            waited = now - generation.times.arrived
            if self._request_timeout is not None and waited >= self._request_timeout:
                words = f"the answer took longer than the {self._request_timeout:g} s that one may take"
            elif (
                self._queue_timeout is not None
                and generation.task.slot is None
                and waited >= self._queue_timeout
            ):
                words = f"no place came free in the {self._queue_timeout:g} s that a request may wait"
            else:
                continue
            self._end(generation, Finish("timeout", message=words))

    def _blame(self, error: NotFinite) -> None:
        """End the request whose numbers are not finite; the step is run again without it."""
        with self._changed:
            task = self.scheduler.running[error.sequence]
            self.scheduler.forget(error.sequence)
            if task is not None and task in self._generations:
                self._end(self._generations[task], Finish("error", message=str(error)))

    def _end(self, generation: Generation, finish: Finish) -> None:
        if generation.finish is not None:
            return
        generation.finish = finish  # first: listeners may ask again
        generation.times.ended = self._now()
        self.scheduler.remove(generation.task)
        self._generations.pop(generation.task, None)
        self.observer.ended(generation)
        generation.listener.ended(finish)
